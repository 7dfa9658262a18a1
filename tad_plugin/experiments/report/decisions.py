"""Pictures of what was decided on the real samples: noise matrix, distrusted samples, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.data.splits import class_members
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.progress import shaded
from tad_plugin.experiments.report.style import BLUE, GREY, ORANGE, VERMILLION, picture
from tad_plugin.utils.image_store import Images

__all__ = ["most_doubted", "plot_distrusted", "plot_noise_matrix", "plot_weights"]


def plot_noise_matrix(matrix: Tensor, path: str | Path, *, class_names: Sequence[str] = ()) -> Path:
    """Draws which observed labels the samples of each true class have, in percent of the true class.

    Args:
        matrix: [K, K], ``matrix[true, observed]`` as shares.
        path: picture to write.
        class_names: K names; empty writes numbers.
    """
    shares = matrix.detach().cpu().double().numpy()
    count = len(shares)
    names = list(class_names) or [str(c) for c in range(count)]
    texts = [[f"{100 * v:.0f}" if v >= 0.005 else "" for v in row] for row in shares] if count <= 20 else None
    with picture(path) as figure:
        side = max(3.2, min(0.36 * count, 7.0))
        figure.set_size_inches(side + 1.0, side + 0.7)
        axis = figure.subplots()
        shaded(axis, shares, texts)
        if count <= 20:
            turned = 0 if max(map(len, names)) < 4 else 60
            axis.set_xticks(range(count), names, rotation=turned)
            axis.set_yticks(range(count), names)
        axis.set_xlabel("observed label")
        axis.set_ylabel("true class")
    return Path(path)


def most_doubted(state: SampleState, count: int) -> list[Tensor]:
    """For each observed class up to ``count`` samples (int64) that are untrusted or relabelled, lowest trust first."""
    doubted = ~state.trusted | (state.target != state.observed)
    members = class_members(state.observed, state.num_classes, doubted)
    return [rows[state.trust[rows].argsort(stable=True)][:count] for rows in members]


def plot_distrusted(
    images: Images,
    state: SampleState,
    path: str | Path,
    *,
    count: int = 8,
    class_names: Sequence[str] = (),
    true_labels: Tensor | None = None,
    inverse: Callable[[Tensor], Tensor] | None = None,
    max_classes: int = 10,
) -> Path | None:
    """Draws the most doubted samples, one row per observed class, with their new label if they were relabelled.

    Args:
        images: float [N,C,H,W] with 1 or 3 channels.
        state: the decisions on these samples.
        path: picture to write.
        count: samples per class.
        class_names: K names; empty writes numbers.
        true_labels: int64 [N] if they are known: samples whose observed label is right get a frame, as they are errors.
        inverse: brings images [B,C,H,W] to [0, 1]. Only those that are drawn are read.
        max_classes: maximum number of rows; a note says if classes are left out.

    Returns:
        The picture; None if no sample is doubted.

    Raises:
        InvalidInputError: other images than the state has samples, or not 1 or 3 channels.
    """
    if len(images) != len(state) or images.shape[1] not in (1, 3):
        raise InvalidInputError(
            explain(f"images [{len(state)}, 1 or 3, H, W]", f"{list(images.shape)}", "Pass the real training images")
        )
    names = list(class_names) or [str(c) for c in range(state.num_classes)]
    found = [(c, rows) for c, rows in enumerate(most_doubted(state, count)) if len(rows)]
    shown = found[:max_classes]
    if not shown:
        return None
    wide = max(len(rows) for _, rows in shown)
    cell, left, tall = 0.56, 1.0, 0.74
    with picture(path, tight=True) as figure:
        figure.set_size_inches(left + cell * wide, tall * len(shown))
        width, height = figure.get_size_inches()
        for r, (c, rows) in enumerate(shown):
            top = height - tall * r
            figure.text((left - 0.1) / width, (top - cell / 2) / height, names[c], ha="right", va="center")
            pixels = images[rows.to(images.device)].detach()
            pixels = (pixels if inverse is None else inverse(pixels)).float().cpu().clamp(0, 1)
            for k, i in enumerate(rows.tolist()):
                box = ((left + cell * k) / width, (top - cell) / height, cell * 0.92 / width, cell * 0.92 / height)
                axis = figure.add_axes(box)
                axis.imshow(pixels[k].permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                mistaken = true_labels is not None and int(true_labels[i]) == int(state.observed[i])
                axis.spines[:].set_visible(mistaken)
                axis.spines[:].set_color(VERMILLION)
                axis.spines[:].set_linewidth(2)
                new = int(state.target[i])
                said = names[new] if bool(state.trusted[i]) and new != int(state.observed[i]) else "dropped"
                axis.set_xlabel(said, fontsize=6, color=BLUE if said != "dropped" else GREY, labelpad=1.5)
        if len(found) > len(shown):
            figure.text(0, 1, f"first {len(shown)} of {len(found)} classes", va="bottom", fontsize=7)
    return Path(path)


def plot_weights(state: SampleState, path: str | Path, *, true_labels: Tensor | None = None) -> Path | None:
    """Draws how the weights of the samples spread, correct labels against wrong ones where they are known.

    Args:
        state: the decisions. Untrusted samples count with weight 0.
        path: picture to write.
        true_labels: int64 [N] if they are known.

    Returns:
        The picture; None if all weights are equal.
    """
    weight = torch.where(state.trusted, state.weight, torch.zeros_like(state.weight)).cpu().double().numpy()
    if weight.max() - weight.min() < 1e-9:
        return None
    edges = np.linspace(0.0, weight.max(), 31)
    if true_labels is None:
        parts = [("samples", np.ones(len(weight), dtype=bool), BLUE)]
    else:
        wrong = (true_labels.cpu() != state.observed.cpu()).numpy()
        parts = [("label correct", ~wrong, BLUE), ("label wrong", wrong, ORANGE)]
    with picture(path) as figure:
        figure.set_size_inches(4.8, 0.7 + 1.3 * len(parts))
        axes = figure.subplots(len(parts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, (name, mask, colour) in zip(axes, parts, strict=True):
            axis.bar(edges[:-1], np.histogram(weight[mask], edges)[0], width=np.diff(edges), align="edge", color=colour)
            axis.set_title(f"{name}: {int(mask.sum())} samples, {int((weight[mask] == 0).sum())} of them with weight 0")
            axis.set_ylabel("samples")
            axis.grid(axis="y")
        axes[-1].set_xlabel("weight")
    return Path(path)
