from __future__ import annotations

import base64
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.errors import InvalidInputError, MissingExtraError
from tad_plugin.experiments.report.page import html_page
from tad_plugin.experiments.report.tables import (
    Row,
    build_tables,
    markdown_table,
    noise_label,
    notes,
    summarise,
    text_table,
)


def result(arm: str, last: list[float], *, seed: int = 0, ipc: int = 10, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "baseline": "dm",
        "dataset": "digits",
        "ipc": ipc,
        "noise": {"kind": "symmetric", "rate": 0.4, "seed": seed, "realised_rate": 0.39},
        "seed": seed,
        "accuracy": {"last": last, "best": [value + 1 for value in last]},
        "seconds_per_iteration": 0.0123,
        "scoring_seconds": 2.0 + seed,
        "peak_memory_bytes": (300 + seed) * 2**20,
        "split": None,
        "versions": {"python": "3.11", "torch": "2.2"},
        "command": "tad-plugin compare --ipc 10",
        **more,
    }


RESULTS = [
    result("clean", [90.0, 92.0], seed=0),
    result("clean", [93.0, 95.0], seed=1),
    result("noisy", [70.0, 74.0], seed=0),
    result("noisy", [71.0, 73.0], seed=1),
    result("tad", [86.0, 90.0], seed=0, split={"precision": 0.9, "recall": 0.8, "auc": float("nan")}),
    result("tad", [90.0, 92.0], seed=1, split={"precision": 0.8, "recall": 0.6, "auc": 0.9}),
]


def row_of(rows: list[Row], arm: str, ipc: int = 10) -> Row:
    (found,) = [row for row in rows if row.arm == arm and row.ipc == ipc]
    return found


def test_networks_are_averaged_first_and_the_spread_is_over_seeds() -> None:
    row = row_of(summarise(RESULTS), "tad")
    assert row.last is not None and row.best is not None
    assert row.last.per_seed == (88.0, 91.0)
    assert row.last.mean == pytest.approx(89.5) and row.best.mean == pytest.approx(90.5)
    assert row.last.std == pytest.approx(statistics.stdev([88.0, 91.0]))
    assert (row.baseline, row.dataset, row.noise, row.ipc, row.seeds) == ("dm", "digits", "symmetric 40%", 10, 2)
    assert row.seconds_per_iteration == pytest.approx(0.0123) and row.scoring_seconds == pytest.approx(2.5)
    assert row.peak_memory_bytes == 301 * 2**20
    # NaN: this seed had nothing to measure
    assert (row.precision, row.recall, row.auc) == (pytest.approx(0.85), pytest.approx(0.7), pytest.approx(0.9))


def test_recovered_is_the_share_of_the_gap() -> None:
    rows = summarise(RESULTS)
    shares = {row.arm: row.last.recovered for row in rows if row.last}
    assert shares["clean"] == pytest.approx(100) and shares["noisy"] == pytest.approx(0)
    assert shares["tad"] == pytest.approx(100 * (89.5 - 72) / (92.5 - 72))


def test_cost_is_a_multiple_of_the_noisy_arms_time() -> None:
    spent = {"clean": [10.0, 10.0], "noisy": [8.0, 12.0], "tad": [20.0, 25.0]}
    results = [{**r, "total_seconds": spent[r["arm"]][r["seed"]]} for r in RESULTS]
    rows = summarise(results)
    assert {row.arm: row.cost for row in rows} == {"clean": 1.0, "noisy": 1.0, "tad": 2.25}
    assert "2.25x" in text_table(rows) and "cost" in markdown_table(rows)
    # no such column without the noisy arm or in older results
    assert "2.25x" not in text_table(summarise([r for r in results if r["arm"] != "noisy"]))
    assert {row.cost for row in summarise(RESULTS)} == {None}


@pytest.mark.parametrize(
    "results",
    [
        [r for r in RESULTS if r["arm"] != "clean"],
        [r for r in RESULTS if r["arm"] != "noisy"],
        [result("clean", [72.2]), result("noisy", [72.0]), result("tad", [90.0])],  # the gap is too small
        [result("clean", [70.0]), result("noisy", [72.0]), result("tad", [90.0])],
    ],
)
def test_without_a_gap_nothing_is_recovered(results: list[dict[str, Any]]) -> None:
    last = row_of(summarise(results), "tad").last
    assert last is not None and last.recovered is None


def test_one_seed_has_no_spread() -> None:
    row = row_of(summarise([RESULTS[0]]), "clean")
    assert row.last is not None and row.last.std is None and row.seeds == 1


def test_settings_are_kept_apart_and_arms_keep_their_order() -> None:
    other = [result("tad", [50.0], ipc=1), result("noisy", [40.0], ipc=1), result("tad", [60.0], noise=None)]
    rows = summarise([*RESULTS, *other])
    assert [(row.noise, row.ipc, row.arm) for row in rows] == [
        ("symmetric 40%", 10, "clean"),
        ("symmetric 40%", 10, "noisy"),
        ("symmetric 40%", 10, "tad"),
        ("symmetric 40%", 1, "tad"),
        ("symmetric 40%", 1, "noisy"),
        ("none", 10, "tad"),
    ]


def test_a_clean_arm_without_noise_is_the_reference_of_every_noise_setting() -> None:
    asymmetric = {"kind": "asymmetric", "rate": 0.4, "seed": 0}
    results = [
        result("clean", [90.0], noise={"kind": "none", "rate": 0.0, "seed": 0}),
        result("noisy", [70.0]),
        result("noisy", [80.0], noise=asymmetric),
        result("clean", [50.0], ipc=1, noise=None),
    ]
    rows = summarise(results)
    table = {(row.noise, row.ipc, row.arm): row.last.recovered for row in rows if row.last}
    assert table == {
        ("symmetric 40%", 10, "clean"): 100.0,
        ("symmetric 40%", 10, "noisy"): 0.0,
        ("asymmetric 40%", 10, "clean"): 100.0,
        ("asymmetric 40%", 10, "noisy"): 0.0,
        ("none", 1, "clean"): None,
    }
    # where other arms ran on clean labels too, it stays there as well
    rows = summarise([*results, result("tad", [91.0], noise=None)])
    assert {(row.noise, row.arm) for row in rows if row.ipc == 10} >= {("none", "clean"), ("none", "tad")}


@pytest.mark.parametrize(
    ("noise", "label"),
    [
        (None, "none"),
        ({"kind": "none", "rate": 0.0}, "none"),
        ({"kind": "symmetric", "rate": 0.4}, "symmetric 40%"),
        ({"kind": "pair", "rate": 0.125}, "pair 12.5%"),
        ({"kind": "human", "rate": 0.0, "key": "worse"}, "human worse"),
    ],
)
def test_noise_in_words(noise: dict[str, Any] | None, label: str) -> None:
    assert noise_label(noise) == label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": {"last": [], "best": []}}, "result 1"),
        ({"accuracy": None}, "result 1"),
        ({"ipc": "many"}, "result 1"),
        ({"accuracy": {"last": ["x"]}}, "result 1"),
    ],
)
def test_unusable_results_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        summarise([RESULTS[0], {**RESULTS[1], **change}])


def test_a_missing_key_is_named() -> None:
    broken = {key: value for key, value in RESULTS[0].items() if key != "arm"}
    with pytest.raises(InvalidInputError, match="'arm' .*result 0"):
        summarise([broken])


def test_the_same_seed_twice_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="'tad'.* 0, 0"):
        summarise([result("tad", [1.0]), result("tad", [2.0])])


def test_arms_that_were_only_evaluated_last_or_best_have_a_row() -> None:
    only_last = summarise([result("random", [60.0], accuracy={"last": [60.0], "best": []})])
    assert only_last[0].best is None and "60.0" in text_table(only_last)
    only_best = summarise([result("random", [60.0], accuracy={"best": [61.0]})])
    assert only_best[0].last is None and "61.0" in text_table(only_best)


# tables


def test_text_table_is_aligned_and_complete() -> None:
    text = text_table(summarise([*RESULTS, result("tad", [50.0], ipc=1)]))
    lines = text.splitlines()
    assert lines[0] == "DM, digits, label noise symmetric 40%"
    assert re.fullmatch("-+", lines[1])
    header = lines[2]
    assert header.split() == ["IPC", "arm", "last", "best", "recovered", "seeds", "s/iter", "scoring", "s", "memory",
                              "precision", "recall", "AUC"]  # fmt: skip
    body = [line for line in lines[4:] if line.startswith((" ", "1"))]
    assert body[0].split()[0] == "1" and len(body) == 4  # ascending IPC
    assert "89.5 ± 2.1" in text and "85%" in text and "clean *" in text and "knows the true labels" in text
    end = header.index("last") + len("last")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in body)


def test_columns_without_any_figure_are_left_out() -> None:
    results = [{**r, "split": None, "scoring_seconds": None, "peak_memory_bytes": None} for r in RESULTS]
    header = text_table(summarise(results)).splitlines()[2]
    assert header.split() == ["IPC", "arm", "last", "best", "recovered", "seeds", "s/iter"]


def test_markdown_table_has_one_cell_per_column() -> None:
    text = markdown_table(summarise([*RESULTS, result("a|b", [1.0])]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "a\\|b" in text and "clean \\*" in text
    assert sum("**" in line for line in lines) == 1 and "**89.5 ± 2.1**" in text


def test_markdown_shows_names_as_they_are() -> None:
    evil = "<img src=x onerror=alert(1)>|[a](javascript:b)\n`c`&amp;"
    text = markdown_table(summarise([result(evil, [1.0], dataset=evil)]))
    assert "<" not in text and text.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert text.count(r"\[a\](javascript:b) \`c\`&amp;amp;") == 2
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3


def test_no_results_say_so() -> None:
    assert text_table([]) == markdown_table([]) == "No results."
    assert "No results." in html_page([], {})


# the page


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_the_page_is_self_contained_well_formed_and_escaped(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(PIXEL)
    (tmp_path / "q.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    results = [*RESULTS, {**result("<script>alert(1)</script>", [10.0]), "doubts": ["out of <range>"]}]
    html = html_page(results, {"A picture & more": tmp_path / "p.png", "Q": tmp_path / "q.svg"}, title="T <x>")
    page = Page()
    page.feed(html)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["src"] == "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    assert str(images[1]["src"]).startswith("data:image/svg+xml;base64,")
    assert images[0]["alt"] == "A picture & more"
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    assert "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "seed 0: out of &lt;range&gt;</li>" in html and "Doubtful" not in html_page(RESULTS, {})
    assert "T &lt;x&gt;" in html and "tad-plugin compare --ipc 10" in html and "torch 2.2" in html


def test_the_best_arm_that_does_not_know_the_truth_is_marked() -> None:
    html = html_page([*RESULTS, result("loss-prune", [80.0])], {})
    marked = re.findall(r'<tr class="[^"]*best[^"]*">(.*?)</tr>', html)
    assert len(marked) == 1 and "<td>tad</td>" in marked[0]


def test_pictures_must_exist_and_be_pictures(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="absent.png"):
        html_page(RESULTS, {"x": tmp_path / "absent.png"})
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InvalidInputError, match="x.txt"):
        html_page(RESULTS, {"x": tmp_path / "x.txt"})


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"tad_plugin\[reproduce\]"):
        html_page(RESULTS, {})


def test_bold_marks_the_best_and_all_within_its_standard_error() -> None:
    """tad: mean 80, standard deviation 2 over 4 seeds, so the error is 1."""
    arms = {"clean": [99.0] * 4, "noisy": [78.9] * 4, "el2n": [79.1] * 4, "tad": [78.0, 82.0, 78.0, 82.0]}
    error = statistics.stdev(arms["tad"]) / 2
    arms["noisy"], arms["el2n"] = [80.0 - error - 0.05] * 4, [80.0 - error + 0.05] * 4
    rows = summarise(result(arm, [v], seed=seed) for arm, values in arms.items() for seed, v in enumerate(values))
    best = [line.cells[1] for line in build_tables(rows)[0].lines if line.best]
    assert best == ["el2n †", "tad"]


def test_a_footnote_stands_only_where_its_mark_stands() -> None:
    assert notes(summarise([result("noisy", [1.0])])).startswith("bold")
    assert "told the rate" in notes(summarise([result("loss-prune", [1.0])]))
    known = notes(summarise([result("clean", [1.0])]))
    assert "knows the true labels" in known and "rate" not in known
    assert "bold" not in text_table(summarise([result("noisy", [1.0])]))


def test_the_page_explains_its_columns_and_links_its_runs() -> None:
    html = html_page(RESULTS, {}, runs={"tad, IPC 10, seed 0": "tad/ipc10/seed0/"})
    assert '<a href="tad/ipc10/seed0/">tad, IPC 10, seed 0</a>' in html
    assert "<dt>recovered</dt>" in html and "<dt>gain</dt>" not in html
