"""The picture of a synthetic set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.experiments.report.style import picture

__all__ = ["plot_arms", "plot_synthetic"]


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


def plot_arms(
    sets: Mapping[str, tuple[Tensor, Tensor]],
    path: str | Path,
    *,
    class_names: Sequence[str],
    max_classes: int = 10,
    max_per_class: int = 5,
    across: int = 3,
) -> Path:
    """Draws the synthetic images of several arms in one grid.

    With one image per class each arm is a row, and each class is a column. With more, each arm is a block with a row
    per class, and blocks stand side by side.

    Args:
        sets: arm -> (pixels float [M, 1 or 3, H, W], where 0 is black and 1 is white; int64 labels [M]).
        path: picture to write.
        class_names: names of all classes.
        max_classes: maximum number of classes; a note says if some are left out.
        max_per_class: maximum number of images of a class.
        across: blocks side by side.

    Raises:
        InvalidInputError: no set, or images that are not finite.
    """
    if not sets or not all(bool(torch.isfinite(pixels).all()) for pixels, _ in sets.values()):
        raise InvalidInputError(explain("finite images of at least one arm", "none", "Check the losses of the runs"))
    classes = list(range(min(len(class_names), max_classes)))
    tables = {arm: _blocks(pixels, labels, classes, max_per_class) for arm, (pixels, labels) in sets.items()}
    wide = max(len(row) for table in tables.values() for row in table)
    single, arms = wide == 1, list(tables)
    rows, columns = (len(arms), len(classes)) if single else (len(classes), wide)
    across = 1 if single else min(across, len(arms))
    down = 1 if single else -(-len(arms) // across)
    cell, left, head = 0.5 if single else 0.38, 1.35 if single else 0.95, 0.3
    gap = 0.14
    block = columns * cell
    with picture(path, tight=True) as figure:
        figure.set_size_inches(left + across * (block + gap), down * (rows * cell + head + gap))
        width, height = figure.get_size_inches()
        sheets: list[tuple[str, list[list[Tensor]]]] = list(tables.items())
        if single:
            sheets = [("", [[image for row in tables[arm] for image in row] for arm in arms])]
        for place, (title, table) in enumerate(sheets):
            x = left + (place % across) * (block + gap)
            top = height - (place // across) * (rows * cell + head + gap) - head
            bounds = (x / width, (top - rows * cell) / height, block / width, rows * cell / height)
            axis = figure.add_axes(bounds)
            axis.imshow(_sheet(table, columns), interpolation="nearest", aspect="auto")
            axis.patch.set_visible(False)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            size = axis.get_images()[0].get_array().shape
            ys = [(row + 0.5) * size[0] / rows for row in range(rows)]
            if single:
                axis.xaxis.tick_top()
                names = [class_names[c] for c in classes]
                turned = 0 if max(map(len, names)) < 6 else 45
                axis.set_xticks(
                    [(c + 0.5) * size[1] / columns for c in range(columns)], names, rotation=turned,
                    ha="center" if not turned else "left",
                )  # fmt: skip
                axis.set_yticks(ys, arms)
            else:
                axis.set_xticks([])
                axis.set_yticks(ys if place % across == 0 else [], [class_names[c] for c in classes][: len(ys)]
                                if place % across == 0 else [])  # fmt: skip
                axis.set_title(title)
        notes = [f"first {len(classes)} of {len(class_names)} classes"] if len(classes) < len(class_names) else []
        largest = max(int(labels.bincount().max()) for _, labels in sets.values())
        notes += [f"first {wide} of {largest} images per class"] if wide < largest else []
        if notes:
            figure.text(0, -0.02, ", ".join(notes), va="top", fontsize=7.5)
    return Path(path)


def _blocks(pixels: Tensor, labels: Tensor, classes: Sequence[int], most: int) -> list[list[Tensor]]:
    """For each class its first images, as [H, W, 3] in [0, 1]."""
    shown = pixels.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return [list(shown[(labels.cpu() == c).nonzero().flatten()[:most]]) for c in classes]


def _sheet(table: Sequence[Sequence[Tensor]], columns: int) -> np.ndarray:
    """The images of a table beside and below one another, [rows * H', columns * W', 4]; gaps are transparent."""
    height, width, _ = next(image for row in table for image in row).shape
    gap = max(1, height // 16)
    sheet = np.zeros((len(table) * (height + gap), columns * (width + gap), 4))
    for r, row in enumerate(table):
        for c, image in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            sheet[top : top + height, left : left + width] = np.dstack([image.numpy(), np.ones((height, width))])
    return sheet
