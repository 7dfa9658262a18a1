"""Pictures of a division of the data: the trusted space over rounds, and the losses with the fitted mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.core.callback import ClassMixtureLike
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.style import BLUE, GREEN, GREY, LIGHT, ORANGE, VERMILLION, legend_above, picture

__all__ = ["plot_loss_histogram", "plot_trusted_space"]

MAX_PANELS = 10
_GRID = 512


def plot_trusted_space(log_records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws the division over rounds: samples trusted as labelled, relabelled and untrusted, and its quality.

    Args:
        log_records: records of a run's log, in their order. A record with a number under "trusted" is a round. It may
            also have "untrusted", "relabelled" (a part of the trusted ones), "recalled", "returned", "round", and
            "precision" and "recall" (shares in [0, 1]). Precision and recall are also read from the records with
            "event": "split" that follow the round. Other records are ignored. A panel without any figure is left out.
        path: picture to write.

    Raises:
        InvalidInputError: there is no round.
        MissingExtraError: matplotlib is not installed.
    """
    rounds = _rounds(log_records)
    number = _series(rounds, "round")
    x = number if bool(np.all(np.diff(number) > 0)) and not np.isnan(number).any() else np.arange(1.0, len(rounds) + 1)
    trusted, untrusted = _series(rounds, "trusted"), _series(rounds, "untrusted")
    relabelled = np.nan_to_num(_series(rounds, "relabelled"))
    plain = trusted - relabelled  # "trusted" counts relabelled samples
    moved = _present(rounds, (("recalled", GREEN, "-"), ("returned", VERMILLION, "--")))
    shares = _present(rounds, (("precision", BLUE, "-"), ("recall", ORANGE, "--")))
    heights = [1.7, *([1.0] if moved else []), *([1.2] if shares else [])]
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(rounds) <= 30 else {}
    with picture(path) as figure:
        figure.set_size_inches(6.4, 0.5 + 1.3 * sum(heights))
        axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        axis = axes.pop(0)
        axis.fill_between(x, 0, plain, color=BLUE, alpha=0.3, linewidth=0)
        axis.plot(x, plain, color=BLUE, label="trusted as labelled", **style)
        if relabelled.any():
            axis.fill_between(x, plain, trusted, color=GREEN, alpha=0.3, linewidth=0)
            axis.plot(x, trusted, color=GREEN, label="and relabelled", **style)
        if not np.isnan(untrusted).all():
            axis.fill_between(x, trusted, trusted + untrusted, color=LIGHT, alpha=0.5, linewidth=0)
            axis.plot(x, trusted + untrusted, color=GREY, linewidth=1.2, label="and untrusted")
        axis.set_title("Samples")
        axis.set_ylabel("samples")
        axis.set_ylim(bottom=0)
        lower = ((moved, "Moved in the round", "samples", 1), (shares, "Against the true labels", "%", 100))
        for series, title, unit, scale in lower:
            if not series:
                continue
            axis = axes.pop(0)
            for name, values, colour, line in series:
                axis.plot(x, scale * values, color=colour, linestyle=line, label=name, clip_on=False, **style)
            axis.set_title(title)
            axis.set_ylabel(unit)
            if unit == "samples":
                axis.set_ylim(bottom=0)
        for axis in figure.axes:
            axis.grid(axis="y")
            axis.margins(x=0.02)
            legend_above(axis)
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()
    return Path(path)


def plot_loss_histogram(
    losses: Tensor,
    labels: Tensor,
    mixture: ClassMixtureLike,
    path: str | Path,
    *,
    true_wrong: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Draws the losses and the two fitted components, for all classes together and for each of the first ten.

    The curves have the scale of the histogram: expected samples per bin.

    Args:
        losses: float [N], the losses that the mixture was fitted to.
        labels: int64 [N], the observed labels that the mixture was fitted with.
        mixture: the fitted mixture.
        path: picture to write.
        true_wrong: bool [N], True if the observed label is wrong; None if that is not known.
        class_names: names of the classes; None writes numbers.

    Raises:
        InvalidInputError: lengths differ, there is no loss, or a loss is not finite.
        MissingExtraError: matplotlib is not installed.
    """
    loss, label = losses.detach().cpu().double().flatten(), labels.detach().cpu().flatten()
    wrong = None if true_wrong is None else true_wrong.detach().cpu().bool().flatten()
    if len(label) != len(loss) or (wrong is not None and len(wrong) != len(loss)) or len(loss) == 0:
        got = f"{len(loss)} losses, {len(label)} labels" + ("" if wrong is None else f", {len(wrong)} in `true_wrong`")
        raise InvalidInputError(
            explain("as many labels as losses, at least one", got, "Pass values of the same samples")
        )
    if not bool(torch.isfinite(loss).all()):
        raise InvalidInputError(explain("finite `losses`", "NaN or infinite ones", "Check the scorer's training"))
    classes, sizes = (part.tolist() for part in label.unique(return_counts=True))
    panels = classes[:MAX_PANELS] if len(classes) > 1 else []
    columns = (len(panels) + 1) // 2
    limits = float(loss.min()), float(loss.max())
    if limits[1] - limits[0] < 1e-12:  # all losses are equal
        limits = limits[0] - 0.5, limits[1] + 0.5
    if 0 < limits[0] < 0.1 * limits[1]:
        limits = 0.0, limits[1]
    with picture(path) as figure:
        figure.set_size_inches(4.6 + 1.5 * columns, 3.8)
        counts: dict[int, int] = dict(zip(classes, sizes, strict=True))
        grid = figure.add_gridspec(2, 1 + columns, width_ratios=[2.4, *[1.0] * columns])
        axis = figure.add_subplot(grid[:, 0])
        _loss_panel(axis, loss, wrong, mixture, counts, limits, bins=48)
        axis.set_title("All classes")
        axis.set_xlabel("loss")
        axis.set_ylabel("samples per bin")
        for position, index in enumerate(panels):
            small = figure.add_subplot(grid[position // columns, 1 + position % columns])
            mask = label == index
            part = None if wrong is None else wrong[mask]
            _loss_panel(small, loss[mask], part, mixture, {index: counts[index]}, limits, bins=24)
            small.set_title(class_names[index] if class_names is not None else f"class {index}", fontsize=9)
            small.tick_params(labelsize=7.5)
            small.locator_params(nbins=3)
        title = "Losses and the fitted mixture"
        if len(classes) > MAX_PANELS:
            title += f" (first {MAX_PANELS} of {len(classes)} classes on the right)"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=len(names))
    return Path(path)


def _rounds(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rounds: list[dict[str, Any]] = []
    for record in records:
        trusted = record.get("trusted")
        if isinstance(trusted, (int, float)) and not isinstance(trusted, bool):
            rounds.append(dict(record))
        elif rounds and record.get("event") == "split":
            rounds[-1].update({name: record[name] for name in ("precision", "recall") if name in record})
    if not rounds:
        raise InvalidInputError(
            explain(
                "log records with the size of the trusted space",
                "none",
                "Pass the log of a run whose method divides the data",
            )
        )
    return rounds


def _series(rounds: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One value per round; NaN if the round does not have it."""
    return np.array([np.nan if r.get(name) is None else float(r[name]) for r in rounds])


def _present(
    rounds: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str, str]]
) -> list[tuple[str, np.ndarray, str, str]]:
    found = [(name, _series(rounds, name), colour, line) for name, colour, line in wanted]
    return [series for series in found if not np.isnan(series[1]).all()]


def _loss_panel(
    axis: Any,
    loss: Tensor,
    wrong: Tensor | None,
    mixture: ClassMixtureLike,
    members: Mapping[int, int],
    limits: tuple[float, float],
    *,
    bins: int,
) -> None:
    edges = np.linspace(*limits, bins + 1)
    parts = [(loss, LIGHT, "samples")] if wrong is None else [
        (loss[~wrong], "#8FC1DF", "label correct"), (loss[wrong], "#F2C27F", "label wrong"),
    ]  # fmt: skip
    total = np.zeros(bins)
    for values, colour, name in parts:
        counts = np.histogram(values.numpy(), edges)[0]
        axis.bar(edges[:-1], counts, width=np.diff(edges), bottom=total, align="edge", color=colour, label=name)
        total += counts
    grid = torch.linspace(*limits, _GRID, dtype=torch.float64)
    expected = torch.zeros(_GRID, 2, dtype=torch.float64)
    for index, size in members.items():
        expected += size * mixture.density(index, grid).detach().cpu().double()
    expected *= edges[1] - edges[0]
    axis.plot(grid, expected[:, 0], color=BLUE, linewidth=1.6, label="low-loss component")
    axis.plot(grid, expected[:, 1], color=VERMILLION, linewidth=1.6, linestyle="--", label="high-loss component")
    axis.set_xlim(*limits)
    # the bars set the scale, because a narrow component can rise far above them
    axis.set_ylim(0, 1.25 * total.max())
