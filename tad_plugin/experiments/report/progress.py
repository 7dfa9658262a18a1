"""Pictures of accuracies: over the iterations of the distillation, and of each class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tad_plugin.experiments.report.comparison import _colour
from tad_plugin.experiments.report.style import BLUE, TEXT, picture

__all__ = ["plot_class_accuracy", "plot_curves", "shaded"]

_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v")


def plot_curves(results: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draws accuracy over the iterations, one line per arm: the mean over seeds, of one network for each iterate.

    Args:
        results: dicts as in results.json, of one IPC. "curve" holds "iterations", "test" and "heldout".
        path: picture to write.

    Returns:
        The picture; None if no arm has two iterates.
    """
    curves = {}
    tested = any(value is not None for r in results for value in (r.get("curve") or {}).get("test", ()))
    kind = "test" if tested else "heldout"
    for arm in dict.fromkeys(str(r["arm"]) for r in results):
        points: dict[int, list[float]] = {}
        for r in results:
            found = (r.get("curve") or {}) if str(r["arm"]) == arm else {}
            for iteration, value in zip(found.get("iterations", ()), found.get(kind, ()), strict=True):
                if value is not None:
                    points.setdefault(iteration, []).append(value)
        if len(points) > 1:
            curves[arm] = {i: statistics.fmean(values) for i, values in sorted(points.items())}
    if not curves:
        return None
    with picture(path) as figure:
        figure.set_size_inches(4.8, 3.4)
        axis = figure.subplots()
        for place, (arm, values) in enumerate(curves.items()):
            axis.plot(
                list(values), list(values.values()), label=arm, color=_colour(arm), linewidth=1.6, markersize=4.5,
                linestyle=_LINES[place % len(_LINES)], marker=_MARKS[place % len(_MARKS)],
            )  # fmt: skip
        axis.set_xlabel("iteration")
        axis.set_ylabel("test accuracy, %" if tested else "held-out accuracy, %")
        axis.grid(axis="y")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return Path(path)


def plot_class_accuracy(
    results: Sequence[Mapping[str, Any]], path: str | Path, *, class_names: Sequence[str] = (), max_classes: int = 20
) -> Path | None:
    """Draws the accuracy on each class, one row per arm, the mean over seeds.

    Args:
        results: dicts as in results.json, of one IPC. "class_accuracy" holds K percentages, None for an empty class.
        path: picture to write.
        class_names: K names; empty writes numbers.
        max_classes: maximum number of columns: those in which the arms differ most.

    Returns:
        The picture; None if no result has accuracies of classes.
    """
    rows: dict[str, np.ndarray] = {}
    for arm in dict.fromkeys(str(r["arm"]) for r in results):
        found = [r["class_accuracy"] for r in results if str(r["arm"]) == arm and r.get("class_accuracy")]
        if found:
            table = np.array([[math.nan if v is None else v for v in line] for line in found], dtype=float)
            rows[arm] = table.mean(axis=0)
    if not rows:
        return None
    table = np.stack(list(rows.values()))
    spread = np.nan_to_num(table.max(axis=0) - table.min(axis=0))
    chosen = np.sort(np.argsort(-spread, kind="stable")[:max_classes])
    names = [class_names[c] if class_names else str(c) for c in chosen]
    with picture(path) as figure:
        figure.set_size_inches(1.7 + 0.42 * len(chosen), 0.9 + 0.3 * len(rows))
        axis = figure.subplots()
        shaded(axis, table[:, chosen] / 100, [[_percent(v) for v in line] for line in table[:, chosen]])
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_xticks(range(len(chosen)), names, rotation=0 if max(map(len, names)) < 4 else 60, ha="center")
        if len(chosen) < table.shape[1]:
            axis.set_title(f"the {len(chosen)} of {table.shape[1]} classes that differ most")
    return Path(path)


def shaded(axis: Any, shares: np.ndarray, texts: Sequence[Sequence[str]] | None) -> None:
    """Fills a table of shares in [0, 1]: a colour over the paper, so that it suits both modes, and a text in each."""
    red, green, blue = (int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5))
    cells = np.empty((*shares.shape, 4))
    cells[..., :3] = red, green, blue
    cells[..., 3] = 0.6 * np.nan_to_num(shares)
    axis.imshow(cells, aspect="auto", interpolation="nearest")
    for y, line in enumerate(texts or ()):
        for x, text in enumerate(line):
            axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=TEXT)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"
