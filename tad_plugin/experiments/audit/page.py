"""The page of an audit: the most doubtful images of each class, the transition matrix and histograms."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.experiments.audit.verdicts import WORDS, Verdicts
from tad_plugin.experiments.report.page import data_uri, render
from tad_plugin.experiments.report.style import BLUE, GREY, VERMILLION, picture

__all__ = ["audit_page"]

SHOWN = 12
"""Most images of a class on the page."""
_CLASSES = 60


def audit_page(
    found: dict[str, Any],
    verdicts: Verdicts,
    observed: Tensor,
    images: Tensor,
    class_names: Sequence[str],
    rows: Sequence[dict[str, Any]],
    folder: Path,
) -> str:
    """Renders one self-contained page.

    Args:
        found: from :func:`tad_plugin.experiments.audit.table.summary`.
        verdicts: the verdicts.
        observed: int64 [N].
        images: float [M, C, H, W] in [0, 1], the images of the first M rows' samples, see :func:`shown_samples`.
        class_names: K names.
        rows: one for each sample, the most doubtful first.
        folder: where the pictures are drawn.
    """
    chosen = shown_samples(verdicts, observed, len(class_names))
    place = {int(i): n for n, i in enumerate(verdicts.order.tolist())}
    groups: dict[str, list[dict[str, Any]]] = {}
    for number, i in enumerate(chosen):
        row = rows[place[i]]
        groups.setdefault(row["class"], []).append({**row, "image": thumbnail(images[number])})
    matrix = folder / "matrix.png"
    histogram = folder / "trust.png"
    _matrix(torch.tensor(found["transition_matrix"]), class_names, matrix)
    _histogram(verdicts, histogram)
    return render(
        "audit.html.j2",
        summary=found,
        groups=groups,
        hidden=max(0, len(class_names) - _CLASSES),
        matrix=data_uri(matrix),
        histogram=data_uri(histogram),
    )


def shown_samples(verdicts: Verdicts, observed: Tensor, num_classes: int) -> list[int]:
    """The samples on the page: of each class the most doubtful ones that are not kept, class by class."""
    order = verdicts.order
    suspect = verdicts.verdict[order] != WORDS.index("keep")
    chosen: list[int] = []
    for c in range(min(num_classes, _CLASSES)):
        chosen += order[suspect & (observed[order] == c)][:SHOWN].tolist()
    return chosen


def thumbnail(image: Tensor) -> str:
    """A PNG of float [C, H, W] in [0, 1] as text that a page can hold; at most 96 pixels wide."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().cpu()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    shown = Image.fromarray(array)
    shown.thumbnail((96, 96))
    stream = io.BytesIO()
    shown.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _matrix(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    k = len(names)
    with picture(path) as figure:
        size = min(9.0, 2.2 + 0.35 * k)
        figure.set_size_inches(size + 0.8, size)
        axis = figure.subplots()
        shown = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
        if k <= 30:
            axis.set_xticks(range(k), names, rotation=90)
            axis.set_yticks(range(k), names)
        if k <= 12:
            for i in range(k):
                for j in range(k):
                    value = float(matrix[i, j])
                    if value >= 0.005:
                        colour = "white" if value > 0.5 else "black"
                        axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xlabel("label in the dataset")
        axis.set_ylabel("estimated right label")
        axis.set_title("Estimated transition matrix, %")
        figure.colorbar(shown, ax=axis, shrink=0.8)


def _histogram(verdicts: Verdicts, path: Path) -> None:
    kept = verdicts.verdict == 0
    with picture(path) as figure:
        figure.set_size_inches(6.4, 2.8)
        axes = figure.subplots(1, 2)
        for axis, values, title in ((axes[0], verdicts.trust, "trust"), (axes[1], verdicts.loss, "loss")):
            parts = [values[kept].cpu().numpy(), values[~kept].cpu().numpy()]
            axis.hist(parts, bins=40, stacked=True, color=[BLUE, VERMILLION], label=["kept", "doubted"])
            axis.set_title(title)
            axis.tick_params(colors=GREY)
        axes[0].set_ylabel("samples")
        axes[0].legend()
