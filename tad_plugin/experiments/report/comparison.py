"""The picture of a comparison: accuracy per arm and IPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.roles import has_own_method, knows_truth
from tad_plugin.experiments.report.style import BLUE, GREEN, GREY, ORANGE, PAPER, PURPLE, VERMILLION, picture
from tad_plugin.experiments.report.tables import Row

__all__ = ["plot_comparison"]

_BASELINES = {"clean": GREEN, "noisy": VERMILLION}


def plot_comparison(rows: Sequence[Row], path: str | Path, *, which: Literal["last", "best"] = "last") -> Path:
    """Draws accuracy per arm, one panel per IPC and one row of panels per (baseline, dataset, noise).

    Each arm has its mean and standard deviation over seeds, a dot per seed, and the figures at the right. The arms
    "clean" and "noisy" are also drawn as reference lines.

    Args:
        rows: from :func:`tad_plugin.experiments.report.tables.summarise`.
        path: picture to write (.png, .svg or .pdf).
        which: accuracy to show, of the last or of the best synthetic set.

    Raises:
        InvalidInputError: no row has that accuracy.
        MissingExtraError: matplotlib is not installed.
    """
    shown = [row for row in rows if getattr(row, which) is not None]
    if not shown:
        raise InvalidInputError(explain(f"rows with a {which!r} accuracy", "none", "Pass the rows of an evaluated run"))
    groups = list(dict.fromkeys(row.group for row in shown))
    ipcs = sorted({row.ipc for row in shown})
    arms = {group: list(dict.fromkeys(row.arm for row in shown if row.group == group)) for group in groups}
    with picture(path) as figure:
        figure.set_size_inches(1.6 + 3.5 * len(ipcs), 0.75 + sum(1.0 + 0.36 * len(arms[group]) for group in groups))
        axes = figure.subplots(
            len(groups), len(ipcs), squeeze=False, height_ratios=[1.0 + 0.36 * len(arms[group]) for group in groups]
        )
        for line, group in zip(axes, groups, strict=True):
            baseline, dataset, noise = group
            for column, (axis, ipc) in enumerate(zip(line, ipcs, strict=True)):
                members = {row.arm: row for row in shown if row.group == group and row.ipc == ipc}
                setting = f"{baseline.upper()}, {dataset}, {'clean labels' if noise == 'none' else noise}"
                axis.set_title(f"{setting}, IPC {ipc}" if column == 0 else f"IPC {ipc}")
                _panel(axis, members, arms[group], which, labelled=column == 0)
        for axis in axes[-1]:
            axis.set_xlabel(f"test accuracy of the {which} synthetic set, %")
        spread = any(len(getattr(row, which).per_seed) > 1 for row in shown)
        _legend(figure, {row.arm for row in shown}, spread)
    return Path(path)


def _colour(arm: str) -> str:
    """References: green, vermillion or (true labels known) purple. Methods: blue. Rivals and unknown arms: orange."""
    if arm in _BASELINES:
        return _BASELINES[arm]
    if knows_truth(arm):
        return PURPLE
    return BLUE if has_own_method(arm) else ORANGE


def _panel(axis: Any, members: Mapping[str, Row], arms: Sequence[str], which: str, *, labelled: bool) -> None:
    for reference in ("clean", "noisy"):
        if reference in members:
            mean, line = getattr(members[reference], which).mean, "--" if reference == "clean" else ":"
            axis.axvline(mean, color=_colour(reference), linewidth=1.2, linestyle=line, zorder=1)
    for y, arm in enumerate(arms):
        if arm not in members:
            continue
        accuracy, colour = getattr(members[arm], which), _colour(arm)
        if len(accuracy.per_seed) > 1:
            # below the mean, so that the error bar does not hide them
            axis.scatter(accuracy.per_seed, [y + 0.24] * len(accuracy.per_seed), s=12, color=colour, alpha=0.6, lw=0)
        axis.errorbar(
            accuracy.mean,
            y,
            xerr=accuracy.std,
            fmt="D" if colour == BLUE else "o",
            markersize=6.5,
            color=colour,
            elinewidth=1.6,
            capsize=3,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
        )
        figures = f"{accuracy.mean:.1f}" if accuracy.std is None else f"{accuracy.mean:.1f} ± {accuracy.std:.1f}"
        axis.text(1.02, y, figures, transform=axis.get_yaxis_transform(), va="center", fontsize=8.5, color=GREY)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_yticks(range(len(arms)), arms if labelled else [""] * len(arms))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y")
    axis.margins(x=0.08)


def _legend(figure: Any, arms: set[str], spread: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if "clean" in arms:
        handles.append(Line2D([], [], color=GREEN, linestyle="--", label="mean of clean labels"))
    if "noisy" in arms:
        handles.append(Line2D([], [], color=VERMILLION, linestyle=":", label="mean of noisy labels"))
    if spread:
        handles.append(Line2D([], [], color=GREY, marker="o", alpha=0.5, markersize=4, linestyle="", label="one seed"))
        handles.append(Line2D([], [], color=GREY, marker="o", markersize=6, label="mean ± std over seeds"))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles) if len(handles) < 4 else 2)
