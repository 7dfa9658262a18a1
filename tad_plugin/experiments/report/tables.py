"""Comparisons for people: rows of means, tables in text and Markdown, and one HTML page.

The input everywhere is a list of results as a run's results.json holds them. Accuracies are in percent. What is
averaged: the networks of one seed first, then the seeds; the spread is the sample standard deviation over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tad_plugin.errors import InvalidInputError, explain

__all__ = [
    "NOTE",
    "Accuracy",
    "Row",
    "best_rivals",
    "cells",
    "groups",
    "heading",
    "markdown_table",
    "noise_label",
    "summarise",
    "text_table",
]

#: arms that are given the true labels: references, not rivals
KNOWS_TRUTH = ("clean", "oracle")
#: below this gap between clean and noisy, in points, there is nothing to win back
MINIMUM_GAP = 0.5
NOTE = (
    "* knows the true labels. recovered: share of the gap between the clean and the noisy arm that is won back. "
    "cost: time of scoring, experts and distillation, as a multiple of the noisy arm's."
)


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy of one arm, in percent.

    Attributes:
        mean: over seeds, of the mean over networks.
        std: sample standard deviation over seeds; None for one seed.
        per_seed: the mean over networks of each seed, in the order of the results.
        recovered: 100 * (mean - noisy) / (clean - noisy); None where one of these arms is missing or the gap is under
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
        last: accuracy of the last synthetic set; None where it was not evaluated.
        best: accuracy of the one that the held-out split chose; None likewise.
        seconds_per_iteration: mean over seeds, or None.
        scoring_seconds: mean time spent in scoring samples, or None.
        cost: mean time of scoring, experts and distillation, as a multiple of that of the arm "noisy", or None.
        peak_memory_bytes: the largest over seeds, or None.
        precision: mean share of correct labels among trusted samples, in [0, 1], or None.
        recall: mean share of correctly labelled samples that are trusted, or None.
        auc: mean area under the ROC curve of the trust, or None.
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

    @property
    def group(self) -> tuple[str, str, str]:
        """(baseline, dataset, noise): what shares a table."""
        return self.baseline, self.dataset, self.noise


def noise_label(noise: Mapping[str, Any] | None) -> str:
    """A result's noise in words: "symmetric 40%", "human worse", "none"."""
    if not noise or noise.get("kind", "none") == "none":
        return "none"
    parts = [str(noise["kind"])]
    if noise.get("key"):
        parts.append(str(noise["key"]))
    if noise.get("rate"):
        parts.append(f"{100 * float(noise['rate']):.4g}%")
    return " ".join(parts)


def summarise(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per (baseline, dataset, noise, IPC) and arm, in the order of first appearance.

    Results of the arm "clean" that record no noise belong to every noise setting of their baseline, dataset and IPC.

    Args:
        results: dicts as in results.json; the same arm and setting once per seed.

    Raises:
        InvalidInputError: a key is missing or has a wrong type, both accuracy lists are empty, or a seed occurs twice.
    """
    results = list(results)
    cells: dict[tuple[str, str, str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for index, result in enumerate(results):
        cells.setdefault(_setting(result, index), {}).setdefault(str(result["arm"]), []).append(result)
    for key in [key for key, arms in cells.items() if key[2] == "none" and "clean" in arms]:
        homes = [other for other in cells if other != key and (*other[:2], other[3]) == (*key[:2], key[3])]
        for home in homes:
            found = cells[home].get("clean", [])
            cells[home] = {"clean": [], **cells[home]}
            cells[home]["clean"] = [*found, *cells[key]["clean"]]
        if homes and len(cells[key]) == 1:
            del cells[key]
    rows: list[Row] = []
    for key, arms in cells.items():
        rows += _summarise_setting(key, arms)
    return rows


def text_table(rows: Sequence[Row]) -> str:
    """Aligned plain text for a terminal, one block per baseline, dataset and noise; a trailing newline is left out."""
    blocks = []
    for group, members in groups(rows).items():
        table = cells(members)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            padded = (
                cell.ljust(width) if column == 1 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            lines.append("  ".join(padded).rstrip())
        rule = "-" * max(len(line) for line in lines)
        ipcs = [row.ipc for row in members]
        body = []
        for position, text in enumerate(lines[1:]):
            if position and ipcs[position] != ipcs[position - 1]:
                body.append("")
            body.append(text)
        blocks.append("\n".join([heading(group), rule, lines[0], rule, *body, rule]))
    return "\n\n".join([*blocks, NOTE]) if blocks else "No results."


def markdown_table(rows: Sequence[Row]) -> str:
    """The same tables in Markdown."""
    blocks = []
    for group, members in groups(rows).items():
        header, *table = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in cells(members)]
        align = [":--" if name == "arm" else "--:" for name in header]
        lines = ["| " + " | ".join(line) + " |" for line in [header, align, *table]]
        blocks.append("\n".join([f"**{heading(group)}**", "", *lines]))
    return "\n\n".join([*blocks, NOTE.replace("*", "\\*")]) if blocks else "No results."


_HEADER = (
    "IPC", "arm", "last", "best", "recovered", "seeds", "s/iter", "scoring s", "cost", "memory", "precision", "recall",
    "AUC",
)  # fmt: skip


def _setting(result: Mapping[str, Any], index: int) -> tuple[str, str, str, int]:
    try:
        accuracy = result["accuracy"]
        if not (_numbers(accuracy.get("last")) or _numbers(accuracy.get("best"))):
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
    per_seed: dict[str, dict[str, list[float]]] = {"last": {}, "best": {}}
    for arm, found in arms.items():
        seeds = [(result["seed"], (result.get("noise") or {}).get("seed")) for result in found]
        if len(set(seeds)) < len(seeds):
            raise InvalidInputError(
                explain(
                    f"each seed once for arm {arm!r} of {heading(key[:3])}, IPC {key[3]}",
                    f"seeds {', '.join(str(seed) for seed, _ in seeds)}",
                    "Remove the double results",
                )
            )
        for which, store in per_seed.items():
            lists = [_numbers(result["accuracy"].get(which)) for result in found]
            if all(lists):
                store[arm] = [statistics.fmean(values) for values in lists]

    def accuracy(which: str, arm: str) -> Accuracy | None:
        store = per_seed[which]
        if arm not in store:
            return None
        mean = statistics.fmean(store[arm])
        recovered = None
        if "clean" in store and "noisy" in store:
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
            )
        )
    return rows


def _mean(values: Iterable[Any]) -> float | None:
    """The mean of the numbers among ``values``: a None or NaN says that a seed had nothing to measure."""
    numbers = [float(value) for value in values if value is not None and not math.isnan(float(value))]
    return statistics.fmean(numbers) if numbers else None


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by table, and inside a table by ascending IPC."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return {group: sorted(members, key=lambda row: row.ipc) for group, members in groups.items()}


def heading(group: tuple[str, ...]) -> str:
    """The title of a table: loop, dataset, noise."""
    baseline, dataset, noise = group
    return f"{baseline.upper()}, {dataset}, {'no label noise' if noise == 'none' else f'label noise {noise}'}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header and one line per row, without the columns for which no row has a figure."""

    def show(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    def accuracy(value: Accuracy | None) -> str:
        if value is None:
            return "-"
        return f"{value.mean:.1f}" if value.std is None else f"{value.mean:.1f} ± {value.std:.1f}"

    lines = []
    for row in rows:
        main = row.last or row.best
        recovered = main.recovered if main else None
        lines.append(
            [
                str(row.ipc),
                row.arm + (" *" if row.arm in KNOWS_TRUTH else ""),
                accuracy(row.last),
                accuracy(row.best),
                "-" if recovered is None else f"{recovered:.0f}%",
                str(row.seeds),
                show(row.seconds_per_iteration, ".3g"),
                show(row.scoring_seconds, ".1f"),
                "-" if row.cost is None else f"{row.cost:.2f}x",
                "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f} MiB",
                show(row.precision),
                show(row.recall),
                show(row.auc),
            ]
        )
    kept = [column for column in range(len(_HEADER)) if any(line[column] != "-" for line in lines)]
    return [[line[column] for column in kept] for line in [list(_HEADER), *lines]]


def best_rivals(rows: Sequence[Row]) -> list[Row]:
    """Of each IPC the row with the highest last accuracy among those that do not know the true labels."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.arm in KNOWS_TRUTH or row.last is None:
            continue
        rival = best.get(row.ipc)
        if rival is None or rival.last is None or row.last.mean > rival.last.mean:
            best[row.ipc] = row
    return list(best.values())
