"""Tables of a comparison: rows of means over seeds, in text and in Markdown.

The input is a list of results as in a run's results.json. Accuracies are in percent. The networks of one seed are
averaged first, then the seeds. The spread is the sample standard deviation over seeds.
"""

from __future__ import annotations

import html
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.marks import COLUMNS, MARKED, leaders, marked, marks_note

__all__ = [
    "Accuracy",
    "Line",
    "Row",
    "Table",
    "build_tables",
    "markdown_table",
    "markdown_text",
    "noise_label",
    "notes",
    "summarise",
    "text_table",
]

#: smallest gap between clean and noisy, in points, of which a recovered share is computed
MINIMUM_GAP = 0.5
HELD_OUT = (
    "held out: no test images; accuracy of the last set on training images that were held out, counted against "
    "{labels} labels{doubt}."
)
"""The note below tables of runs without test images."""
_HEADER = (
    "IPC", "arm", "last", "best", "held out", "recovered", "seeds", "s/iter", "scoring s", "cost", "memory",
    "precision", "recall", "AUC",
)  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy of one arm, in percent.

    Attributes:
        mean: over seeds, of the mean over networks.
        std: sample standard deviation over seeds; None for one seed.
        per_seed: the mean over networks of each seed, in the order of the results.
        recovered: 100 * (mean - noisy) / (clean - noisy); None if one of these arms is missing or the gap is under
            half a point.
    """

    mean: float
    std: float | None
    per_seed: tuple[float, ...]
    recovered: float | None


@dataclass(frozen=True)
class Row:
    """One arm in one setting.

    Attributes:
        baseline: "dm", ...
        dataset: "digits", ...
        noise: as :func:`noise_label` gives it.
        ipc: synthetic images per class.
        arm: the arm's name.
        seeds: number of seeds.
        last: accuracy of the last synthetic set; None if it was not evaluated.
        best: accuracy of the synthetic set that the held-out split chose; None if it was not evaluated.
        seconds_per_iteration: mean over seeds, or None.
        scoring_seconds: mean time spent on scoring samples, or None.
        cost: mean time of scoring, experts and distillation, as a multiple of the arm "noisy", or None.
        peak_memory_bytes: the largest over seeds, or None.
        precision: mean share of correct labels among trusted samples, in [0, 1], or None.
        recall: mean share of correctly labelled samples that are trusted, in [0, 1], or None.
        held_out: accuracy of the last synthetic set on held-out training images, where there are no test images.
        held_out_labels: which labels that is counted against: "observed" or "true".
        auc: mean area under the ROC curve of the trust for correct labels, in [0, 1], or None.
    """

    baseline: str
    dataset: str
    noise: str
    ipc: int
    arm: str
    seeds: int
    last: Accuracy | None
    best: Accuracy | None
    seconds_per_iteration: float | None
    scoring_seconds: float | None
    cost: float | None
    peak_memory_bytes: int | None
    precision: float | None
    recall: float | None
    auc: float | None
    held_out: Accuracy | None = None
    held_out_labels: str = ""

    @property
    def group(self) -> tuple[str, str, str]:
        """(baseline, dataset, noise): rows with the same group share a table."""
        return self.baseline, self.dataset, self.noise


def noise_label(noise: Mapping[str, Any] | None) -> str:
    """Describes the noise of a result: "symmetric 40%", "human worse", "none"."""
    if not noise or noise.get("kind", "none") == "none":
        return "none"
    parts = [str(noise["kind"])]
    if noise.get("key"):
        parts.append(str(noise["key"]))
    if noise.get("rate"):
        parts.append(f"{100 * float(noise['rate']):.4g}%")
    return " ".join(parts)


def summarise(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Computes one row per (baseline, dataset, noise, IPC) and arm, in the order of first appearance.

    Results of the arm "clean" without noise count for every noise setting of their baseline, dataset and IPC.

    Args:
        results: dicts as in results.json; each arm and setting once per seed.

    Raises:
        InvalidInputError: a key is missing or has a wrong type, both accuracy lists are empty, or a seed occurs twice.
    """
    results = list(results)
    settings: dict[tuple[str, str, str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for index, result in enumerate(results):
        settings.setdefault(_setting(result, index), {}).setdefault(str(result["arm"]), []).append(result)
    for key in [key for key, arms in settings.items() if key[2] == "none" and "clean" in arms]:
        homes = [other for other in settings if other != key and (*other[:2], other[3]) == (*key[:2], key[3])]
        for home in homes:
            found = settings[home].get("clean", [])
            settings[home] = {"clean": [], **settings[home]}
            settings[home]["clean"] = [*found, *settings[key]["clean"]]
        if homes and len(settings[key]) == 1:
            del settings[key]
    rows: list[Row] = []
    for key, arms in settings.items():
        rows += _summarise_setting(key, arms)
    return rows


def _setting(result: Mapping[str, Any], index: int) -> tuple[str, str, str, int]:
    try:
        accuracy = result["accuracy"]
        told = "heldout" in result  # without test images
        if not (told or _numbers(accuracy.get("last")) or _numbers(accuracy.get("best"))):
            raise ValueError("empty accuracy lists")
        _ = result["arm"], result["seed"]
        return str(result["baseline"]), str(result["dataset"]), noise_label(result.get("noise")), int(result["ipc"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInputError(
            explain(
                "results with arm, baseline, dataset, ipc, seed and at least one accuracy",
                f"{what} in result {index}",
                "Pass dicts as a run's results.json holds them",
            )
        ) from error


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values] if values is not None else []


def _summarise_setting(key: tuple[str, str, str, int], arms: Mapping[str, list[Mapping[str, Any]]]) -> list[Row]:
    per_seed: dict[str, dict[str, list[float]]] = {"last": {}, "best": {}, "held out": {}}
    for arm, found in arms.items():
        seeds = [(result["seed"], (result.get("noise") or {}).get("seed")) for result in found]
        if len(set(seeds)) < len(seeds):
            raise InvalidInputError(
                explain(
                    f"each seed once for arm {arm!r} of {_title(key[:3])}, IPC {key[3]}",
                    f"seeds {', '.join(str(seed) for seed, _ in seeds)}",
                    "Remove the double results",
                )
            )
        for which, store in per_seed.items():
            held = which == "held out"
            tables = [(result.get("heldout") or {}) if held else result["accuracy"] for result in found]
            lists = [_numbers(table.get("last" if held else which)) for table in tables]
            if all(lists):
                store[arm] = [statistics.fmean(values) for values in lists]

    def accuracy(which: str, arm: str) -> Accuracy | None:
        store = per_seed[which]
        if arm not in store:
            return None
        mean = statistics.fmean(store[arm])
        recovered = None
        if which != "held out" and "clean" in store and "noisy" in store:  # held-out labels may differ between arms
            clean, noisy = statistics.fmean(store["clean"]), statistics.fmean(store["noisy"])
            if clean - noisy >= MINIMUM_GAP:
                recovered = 100 * (mean - noisy) / (clean - noisy)
        spread = statistics.stdev(store[arm]) if len(store[arm]) > 1 else None
        return Accuracy(mean, spread, tuple(store[arm]), recovered)

    totals = {arm: _mean(result.get("total_seconds") for result in found) for arm, found in arms.items()}
    base = totals.get("noisy")
    rows = []
    for arm, found in arms.items():
        total = totals[arm]
        memory = [int(result["peak_memory_bytes"]) for result in found if result.get("peak_memory_bytes")]
        splits = [result.get("split") or {} for result in found]
        rows.append(
            Row(
                *key,
                arm=arm,
                seeds=len(found),
                last=accuracy("last", arm),
                best=accuracy("best", arm),
                seconds_per_iteration=_mean(result.get("seconds_per_iteration") for result in found),
                scoring_seconds=_mean(result.get("scoring_seconds") for result in found),
                cost=total / base if total is not None and base else None,
                peak_memory_bytes=max(memory, default=None),
                precision=_mean(split.get("precision") for split in splits),
                recall=_mean(split.get("recall") for split in splits),
                auc=_mean(split.get("auc") for split in splits),
                held_out=accuracy("held out", arm),
                held_out_labels=str((found[0].get("heldout") or {}).get("labels", "")),
            )
        )
    return rows


def _mean(values: Iterable[Any]) -> float | None:
    """Computes the mean without None and NaN, which mean that a seed had nothing to measure."""
    numbers = [float(value) for value in values if value is not None and not math.isnan(float(value))]
    return statistics.fmean(numbers) if numbers else None


# -- tables ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        cells: texts, one per column.
        first: True for the first line of its IPC.
        best: True for the highest last accuracy of its IPC among arms that do not know the true labels, and for all
            within its standard error.
    """

    cells: tuple[str, ...]
    first: bool
    best: bool


@dataclass(frozen=True)
class Table:
    """All rows of one (baseline, dataset, noise), by ascending IPC.

    Attributes:
        title: baseline, dataset and noise in words.
        header: names of the columns; columns without any figure are left out.
        lines: one per row.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]


def build_tables(rows: Sequence[Row]) -> list[Table]:
    """Formats rows (from :func:`summarise`) as tables, one for each baseline, dataset and noise."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    tables = []
    for group, members in groups.items():
        members = sorted(members, key=lambda row: row.ipc)
        texts = [_cells(row) for row in members]
        kept = [column for column in range(len(_HEADER)) if any(text[column] != "-" for text in texts)]
        best = _best(members)
        lines = [
            Line(
                cells=tuple(text[column] for column in kept),
                first=position == 0 or row.ipc != members[position - 1].ipc,
                best=any(row is leader for leader in best),
            )
            for position, (row, text) in enumerate(zip(members, texts, strict=True))
        ]
        tables.append(Table(_title(group), tuple(_HEADER[column] for column in kept), tuple(lines)))
    return tables


def _title(group: tuple[str, ...]) -> str:
    baseline, dataset, noise = group
    return f"{baseline.upper()}, {dataset}, {'no label noise' if noise == 'none' else f'label noise {noise}'}"


def _cells(row: Row) -> list[str]:
    """All columns of a row; "-" without a figure."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    def accuracy(value: Accuracy | None) -> str:
        if value is None:
            return "-"
        return f"{value.mean:.1f}" if value.std is None else f"{value.mean:.1f} ± {value.std:.1f}"

    main = row.last or row.best
    return [
        str(row.ipc),
        marked(row.arm),
        accuracy(row.last),
        accuracy(row.best),
        accuracy(row.held_out),
        show(main.recovered if main else None, "{:.0f}%"),
        str(row.seeds),
        show(row.seconds_per_iteration, "{:.3g}"),
        show(row.scoring_seconds, "{:.1f}"),
        show(row.cost, "{:.2f}x"),
        show(row.peak_memory_bytes / 2**20 if row.peak_memory_bytes is not None else None, "{:.0f} MiB"),
        show(row.precision, "{:.2f}"),
        show(row.recall, "{:.2f}"),
        show(row.auc, "{:.2f}"),
    ]


def _best(rows: Sequence[Row]) -> list[Row]:
    """The rows that are bold: the highest last accuracy of each IPC, and all within its standard error."""
    found: list[Row] = []
    for ipc in dict.fromkeys(row.ipc for row in rows):
        of_ipc = [row for row in rows if row.ipc == ipc]
        found += leaders([(r, r.arm, r.last.mean, r.last.std, r.seeds) for r in of_ipc if r.last is not None])
    return found


def text_table(rows: Sequence[Row]) -> str:
    """Formats rows as aligned plain text for a terminal, one block per table, without a trailing newline."""
    blocks = []
    for table in build_tables(rows):
        grid = [table.header, *(line.cells for line in table.lines)]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        texts = []
        for cells in grid:
            padded = (
                cell.ljust(width) if column == 1 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            texts.append("  ".join(padded).rstrip())
        rule = "-" * max(len(text) for text in texts)
        body: list[str] = []
        for line, text in zip(table.lines, texts[1:], strict=True):
            body += ["", text] if line.first and body else [text]
        blocks.append("\n".join([table.title, rule, texts[0], rule, *body, rule]))
    return "\n\n".join([*blocks, notes(rows, bold=False)]) if blocks else "No results."


def notes(rows: Sequence[Row], *, bold: bool = True) -> str:
    """The note below tables of these rows; ``bold`` if they show the best arms."""
    header = {name for table in build_tables(rows) for name in table.header}
    found = [marks_note(row.arm for row in rows), MARKED if bold and "last" in header else ""]
    found += [f"{name}: {COLUMNS[name]}." for name in ("recovered", "cost") if name in header]
    if labels := sorted({row.held_out_labels for row in rows if row.held_out is not None}):
        doubt = ", which may be wrong themselves" if "observed" in labels else ""
        found.append(HELD_OUT.format(labels=" or ".join(labels), doubt=doubt))
    return " ".join(part for part in found if part)


def markdown_table(rows: Sequence[Row]) -> str:
    """Formats rows as Markdown, one table for each baseline, dataset and noise."""
    blocks = []
    for table in build_tables(rows):
        align = [":--" if name == "arm" else "--:" for name in table.header]
        body = [_markdown_cells(line, table.header) for line in table.lines]
        lines = ["| " + " | ".join(cells) + " |" for cells in [table.header, align, *body]]
        blocks.append("\n".join([f"**{markdown_text(table.title)}**", "", *lines]))
    note = textwrap.fill(markdown_text(notes(rows)), 118)
    return "\n\n".join([*blocks, note]) if blocks else "No results."


def _markdown_cells(line: Line, header: Sequence[str]) -> list[str]:
    cells = [markdown_text(cell) for cell in line.cells]
    if line.best and "last" in header:
        place = header.index("last")
        cells[place] = f"**{cells[place]}**"
    return cells


def markdown_text(text: str) -> str:
    """``text`` as Markdown shows it: no markup, no HTML, no end of a cell or line."""
    escaped = re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())
