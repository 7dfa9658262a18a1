"""The picture of a synthetic set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.style import picture

__all__ = ["plot_synthetic"]


def plot_synthetic(
    images: Tensor,
    labels: Tensor,
    path: str | Path,
    *,
    inverse: Callable[[Tensor], Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    max_classes: int = 20,
    max_per_class: int = 20,
) -> Path:
    """Draws the synthetic images, one row per class.

    Args:
        images: float [M, C, H, W] with C = 1 or 3, normalised; any device.
        labels: int64 [M], or soft labels [M, K]; the largest entry decides the row.
        path: picture to write.
        inverse: undoes the normalisation (``Preprocessing.inverse``); its result is clamped to [0, 1]. Without it, all
            images are scaled together: the smallest value is black, the largest is white.
        class_names: names of the classes, at least as many as the largest label; None writes numbers.
        title: heading; a note is added if classes or images are left out.
        max_classes: maximum number of rows.
        max_per_class: maximum number of columns.

    Raises:
        InvalidInputError: wrong shape, different lengths, non-finite images, or too few names.
        MissingExtraError: matplotlib is not installed.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InvalidInputError(
            explain("`images` of shape [M, 1 or 3, H, W]", f"shape {list(images.shape)}", "Pass at least one image")
        )
    if len(labels) != len(images):
        raise InvalidInputError(
            explain(f"{len(images)} `labels`, one per image", f"{len(labels)}", "Pass the labels of these images")
        )
    hard = (labels.argmax(dim=1) if labels.ndim == 2 else labels).detach().cpu().long()
    present = hard.unique().tolist()
    if class_names is not None and len(class_names) <= present[-1]:
        raise InvalidInputError(
            explain(f"at least {present[-1] + 1} `class_names`", f"{len(class_names)}", "Pass all the dataset's names")
        )
    pixels = images.detach()
    pixels = (inverse(pixels) if inverse is not None else pixels).float().cpu()
    if not bool(torch.isfinite(pixels).all()):
        raise InvalidInputError(explain("finite `images`", "NaN or infinite pixels", "Check the loss of that run"))
    if inverse is None:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) / max(high - low, 1e-12)
    pixels = pixels.clamp(0, 1).permute(0, 2, 3, 1)

    rows = present[:max_classes]
    members = [(hard == label).nonzero().flatten()[:max_per_class] for label in rows]
    columns = max(len(indices) for indices in members)
    largest = int(hard.bincount().max())
    notes = [f"first {len(rows)} of {len(present)} classes"] if len(rows) < len(present) else []
    notes += [f"first {columns} of {largest} per class"] if columns < largest else []
    height, width, channels = pixels.shape[1:]
    gap = max(1, height // 16)
    canvas = torch.ones(len(rows) * (height + gap) - gap, columns * (width + gap) - gap, channels)
    for row, indices in enumerate(members):
        for column, index in enumerate(indices.tolist()):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = pixels[index]
    cell = 0.55 if columns > 4 else 0.7
    names = [class_names[label] if class_names is not None else str(label) for label in rows]
    with picture(path, tight=True) as figure:
        figure.set_size_inches(cell * columns, cell * len(rows) * height / width)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(canvas.expand(-1, -1, 3).numpy(), interpolation="nearest")
        axis.set_yticks([row * (height + gap) + (height - 1) / 2 for row in range(len(rows))], names)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        heading = " ".join([title or "", f"({', '.join(notes)})" if notes else ""]).strip()
        if heading:
            axis.set_title(heading, pad=8)
    return Path(path)
