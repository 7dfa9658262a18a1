"""Pictures of a grid: accuracy against the rate of wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tad_plugin.experiments.grid.statistics import GridRow
from tad_plugin.experiments.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, picture

__all__ = ["plot_noise_rates"]

_COLOURS = (BLUE, ORANGE, PURPLE, GREY)
_MARKS = ("o", "s", "^", "D")


def plot_noise_rates(rows: Sequence[GridRow], path: str | Path) -> bool:
    """Draws accuracy against the noise rate, one panel per kind of noise and IPC.

    Args:
        rows: of one cell. Noise without a rate (human labels) is left out; "none" is the rate 0 of every kind.
        path: picture to write.

    Returns:
        False, without a picture, if no kind of noise has two rates.
    """
    points: dict[tuple[str, int], dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        kind, _, rate = row.key.noise.partition(":")
        if row.key.way == "bundled" and row.last and (kind == "none" or rate.replace(".", "", 1).isdigit()):
            panel = points.setdefault((kind, row.key.ipc), {})
            panel.setdefault(row.arm, []).append((float(rate or 0), row.mean, row.std or 0.0))
    clean = {ipc: arms for (kind, ipc), arms in points.items() if kind == "none"}
    panels = {key: arms for key, arms in points.items() if key[0] != "none"}
    for (_, ipc), arms in panels.items():
        for arm, values in clean.get(ipc, {}).items():
            arms.setdefault(arm, []).extend(values)
    panels = {key: arms for key, arms in panels.items() if any(len(values) > 1 for values in arms.values())}
    if not panels:
        return False
    with picture(path) as figure:
        figure.set_size_inches(1.0 + 3.6 * len(panels), 3.2)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, ((kind, ipc), arms) in zip(axes, panels.items(), strict=True):
            axis.set_title(f"{kind} noise, IPC {ipc}")
            for place, (arm, values) in enumerate(arms.items()):
                rates, means, spreads = zip(*sorted(values), strict=True)
                colour = {"clean": GREEN, "noisy": VERMILLION}.get(arm, _COLOURS[place % 4])
                axis.errorbar(
                    [100 * r for r in rates], means, yerr=spreads, label=arm, color=colour, capsize=2,
                    marker=_MARKS[place % 4], markersize=4, linewidth=1.4,
                )  # fmt: skip
            axis.set_xlabel("wrong labels, %")
        axes[0].set_ylabel("test accuracy, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return True
