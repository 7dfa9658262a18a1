"""The most helpful and most harmful real samples of a run, as a table and a picture.

It reads the tensors ``influence``, ``influence_count`` and ``influence_weight`` [N] of a saved state. A method that
scores the influence of samples keeps them under these names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.data.splits import class_members
from tad_plugin.errors import FileFormatError, InvalidInputError, explain
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.report.style import VERMILLION, picture
from tad_plugin.utils.csv_file import write_csv
from tad_plugin.utils.files import atomic_save
from tad_plugin.utils.image_store import Images

__all__ = ["extremes", "influence_table", "plot_influence", "report_influence", "write_table"]


def extremes(state: SampleState, top: int) -> list[tuple[Tensor, Tensor]]:
    """Finds for each class the most helpful and the most harmful scored samples, most extreme first.

    Args:
        state: a state with the tensors ``influence`` and ``influence_count``.
        top: samples of each kind; if a class has fewer than twice as many, each kind gets half of them.

    Returns:
        For each class, positions (int64) of the helpful and of the harmful samples.

    Raises:
        InvalidInputError: the state holds no influences, or ``top`` is not at least 1.
    """
    if "influence" not in state or not bool((state["influence_count"] > 0).any()):
        do = "Pass a run whose method scores the influence of samples"
        raise InvalidInputError(explain("a state with influences", "one without", do))
    if top < 1:
        raise InvalidInputError(explain("top of at least 1", str(top), "Ask for at least one sample"))
    found = []
    for rows in class_members(state.target, state.num_classes, state["influence_count"] > 0):
        order = rows[state["influence"][rows].argsort(stable=True)]
        count = min(top, len(order) // 2)
        found.append((order[:count], order.flip(0)[:count]))
    return found


def influence_table(
    state: SampleState, *, top: int = 10, class_names: Sequence[str] = (), true_labels: Tensor | None = None
) -> list[dict[str, Any]]:
    """Makes one row for each of the most helpful and most harmful samples of each class.

    Args:
        state: as in :func:`extremes`.
        top: samples of each kind and class.
        class_names: K names; empty writes numbers.
        true_labels: int64 [N] if they are known; adds the column ``true``.

    Returns:
        Rows with class, name, kind ("helpful" or "harmful"), rank (1 = most extreme), index (position in the training
        data), influence (mean z-score in the class, shrunk, negative = helpful), scored (how often), weight (the
        method's factor, mean 1 in the class), observed, trusted and, if known, true.
    """
    rows = []
    for c, pair in enumerate(extremes(state, top)):
        for kind, indices in zip(("helpful", "harmful"), pair, strict=True):
            for rank, i in enumerate(indices.tolist(), 1):
                row = {
                    "class": c,
                    "name": class_names[c] if class_names else str(c),
                    "kind": kind,
                    "rank": rank,
                    "index": i,
                    "influence": float(state["influence"][i]),
                    "scored": int(state["influence_count"][i]),
                    "weight": float(state["influence_weight"][i]),
                    "observed": int(state.observed[i]),
                    "trusted": bool(state.trusted[i]),
                }
                rows.append(row if true_labels is None else {**row, "true": int(true_labels[i])})
    return rows


def write_table(rows: list[dict[str, Any]], path: str | Path) -> list[Path]:
    """Writes rows as CSV and, if pyarrow is installed (the extra ``parquet``), also as Parquet. Returns the files.

    In the CSV a text that a spreadsheet would run as a formula (it starts with = + - @, tab or carriage return) gets an
    apostrophe before it. Numbers stay as they are.

    Raises:
        InvalidInputError: there are no rows.
    """
    if not rows:
        raise InvalidInputError(explain("at least one row", "none", "Lower --top, or score more samples"))
    path = Path(path).with_suffix(".csv")

    write_csv(rows, list(rows[0]), path)
    written = [path]
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        return written
    table = pyarrow.Table.from_pylist(rows)
    atomic_save(path.with_suffix(".parquet"), lambda temporary: parquet.write_table(table, str(temporary)))
    return [*written, path.with_suffix(".parquet")]


def plot_influence(
    images: Images,
    state: SampleState,
    path: str | Path,
    *,
    top: int = 8,
    class_names: Sequence[str] = (),
    true_labels: Tensor | None = None,
    max_classes: int = 20,
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> Path:
    """Draws one row per class: its most helpful samples on the left, its most harmful ones on the right.

    Args:
        images: float [N,C,H,W] with 1 or 3 channels in [0, 1].
        state: as in :func:`extremes`.
        path: picture to write (.png, .svg or .pdf).
        top: samples of each kind and class.
        class_names: K names; empty writes numbers.
        true_labels: int64 [N] if they are known; mislabelled samples get a frame and the name of the true class.
        max_classes: maximum number of rows; a note says if classes are left out.
        inverse: brings images [B,C,H,W] to [0, 1], if they are normalised. Only those that are drawn are read.

    Returns:
        ``path``.
    """
    if images.ndim != 4 or len(images) != len(state) or images.shape[1] not in (1, 3):
        raise InvalidInputError(
            explain(f"images [{len(state)}, 1 or 3, H, W]", f"{list(images.shape)}", "Pass the real training images")
        )
    names = list(class_names) or [str(c) for c in range(state.num_classes)]
    rows = extremes(state, top)[:max_classes]
    drawn = torch.cat([kind for row in rows for kind in row]).unique() if rows else torch.zeros(0, dtype=torch.int64)
    read = images[drawn.to(images.device)].detach()
    read = (read if inverse is None else inverse(read)).float().cpu().clamp(0, 1)
    pixels = dict(zip(drawn.tolist(), read.permute(0, 2, 3, 1).expand(-1, -1, -1, 3), strict=True))
    wide = max((len(kind) for row in rows for kind in row), default=0)
    captions = true_labels is not None
    with picture(path, tight=True) as figure:
        cell, gap, head = 0.62, 0.5, 0.32
        tall = cell * (1.35 if captions else 1.08)
        figure.set_size_inches(cell * 2 * wide + gap + 1.2, tall * len(rows) + head)
        width, height = figure.get_size_inches()
        for r, (name, row) in enumerate(zip(names, rows, strict=False)):
            bottom = height - head - tall * (r + 1)
            figure.text(1.05 / width, (bottom + tall - cell / 2) / height, name, ha="right", va="center")
            for side, indices in enumerate(row):
                for k, i in enumerate(indices.tolist()):
                    left = 1.2 + side * (cell * wide + gap) + cell * k
                    axis = figure.add_axes(
                        (left / width, (bottom + tall - cell) / height, cell * 0.94 / width, cell * 0.94 / height)
                    )
                    axis.imshow(pixels[i].numpy(), interpolation="nearest")
                    axis.set_xticks([])
                    axis.set_yticks([])
                    wrong = true_labels is not None and int(true_labels[i]) != int(state.observed[i])
                    axis.spines[:].set_visible(wrong)
                    if wrong and true_labels is not None:
                        axis.spines[:].set_color(VERMILLION)
                        axis.spines[:].set_linewidth(1.8)
                        axis.set_xlabel(names[int(true_labels[i])], fontsize=5.5, color=VERMILLION, labelpad=1.5)
        for side, text in enumerate(("most helpful", "most harmful")):
            note = " (framed: mislabelled, with the true class)" if captions and side == 1 else ""
            left = 1.2 + side * (cell * wide + gap)
            figure.text(left / width, 1 - 0.4 * head / height, text + note, va="center", weight="bold")
        if state.num_classes > len(rows):
            figure.text(0, 1, f"first {len(rows)} of {state.num_classes} classes", va="bottom", fontsize=7)
    return Path(path)


def report_influence(folder: str | Path, out: str | Path = "", *, top: int = 10) -> list[Path]:
    """Writes the table and the picture of a run folder. The data are loaded again from the run's configuration.

    Args:
        folder: folder of a finished run whose method scores influence.
        out: folder for influence.csv, influence.parquet (with pyarrow) and influence.png; by default ``folder``.
        top: samples of each kind and class.

    Returns:
        The files written.

    Raises:
        FileFormatError: the folder has no finished run.
        InvalidInputError: the run has no influences.
        StateMismatchError: the data have changed since the run.
    """
    folder = Path(folder)
    target = Path(out) if str(out) else folder
    for name in ("config.yaml", "state.safetensors"):
        if not (folder / name).is_file():
            do = "Pass the folder of a finished run, as --out of tad-plugin distill"
            raise FileFormatError(explain(f"{name} in {folder}", "no such file", do))
    known = {f.name for f in dataclasses.fields(RunConfig)}
    stored = RunFolder(folder).config()
    plan = resolve(RunConfig(**{k: v for k, v in stored.items() if k in known}), stored["arm"])
    splits, noisy, _ = load_noisy(plan)
    state = SampleState.load(folder / "state.safetensors", noisy.labels.cpu())
    true = splits.train_labels.cpu() if truth_known(plan) else None
    shown = true if true is not None and bool((true != state.observed).any()) else None
    names = tuple(splits.class_names)
    rows = influence_table(state, top=top, class_names=names, true_labels=true)
    written = write_table(rows, target / "influence.csv")
    picture_file = plot_influence(
        splits.train_images,
        state,
        target / "influence.png",
        top=min(top, 8),
        class_names=names,
        true_labels=shown,
        inverse=splits.preprocessing.inverse,
    )
    return [*written, picture_file]
