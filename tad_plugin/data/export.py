"""Exports a synthetic set for use without this package: images, labels, a description, and a script that trains on it.

Every format holds the images that a network is trained on: mosaics (IDM) as their F x F training images, each enlarged
to full size as in training. Normalisation and whitening are undone, except for DD-Ranking, whose programs take network
input. Images are ordered by class.

    png           <class>/0000.png, 8 bits, clamped to [0, 1]; labels.csv (path, label, class, and p0, p1, ... if soft)
    npz           set.npz with arrays ``images`` (float32, in [0, 1] but not clamped) and ``labels``
    pt            set.pt with the same tensors; ``torch.load(weights_only=True)`` reads it
    safetensors   set.safetensors with the same tensors
    dd-ranking    images.pt, labels.pt, and lr.pt if the rate was learned, as DD-Ranking's metrics take them

``labels`` are int64 [N], or probabilities float32 [N,K]. DD-Ranking's loss applies a softmax to soft labels, so there
they are log-probabilities; a temperature of 1 gives the probabilities again. A whitened set comes with the whitening
(``whitening_mean`` [D] and ``whitening_matrix`` [D,D]; for png in whitening.pt). Beside the data lie ``set.json``, the
description, and ``load.py``, which trains a ConvNet with plain PyTorch.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import InvalidInputError, explain, unknown_name
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.write_errors import check_path, names_write_errors

__all__ = ["FORMATS", "class_folders", "export_set"]

_FORMAT = "tad_plugin.export"
_ABOUT = "set.json"
_LEAST = 1e-12
"""Probabilities below it are exported as it where they are given as logarithms."""


@named_errors
@names_write_errors
def export_set(
    synthetic: SyntheticSet,
    folder: str | Path,
    kind: str = "png",
    protocol: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a set to a new folder in one of the formats above.

    Args:
        synthetic: the set.
        folder: where to write; it must not exist, or be empty.
        kind: a name of :data:`FORMATS`.
        protocol: how load.py trains: ``width`` and ``depth`` of the ConvNet, ``epochs``, ``batch_size``, ``lr`` (which
            a learned rate replaces), ``momentum``, ``weight_decay``. The field's protocol by default.
        overwrite: replace an earlier export in the folder.

    Returns:
        The folder.

    Raises:
        UnknownNameError: no such format.
        InvalidInputError: the folder holds something else, or an export and ``overwrite`` is False.
        ConfigError: the set names an unknown decoder.
        DiskSpaceError, FileWriteError: it cannot be written.
    """
    if kind not in FORMATS:
        raise unknown_name("export format", kind, list(FORMATS))
    folder = check_path(folder, "--to")
    _check_free(folder, overwrite)
    synthetic = synthetic.to("cpu").detached()
    inputs, labels = synthetic.as_dataset().tensors
    order = (labels if labels.ndim == 1 else labels.argmax(1)).argsort(stable=True)
    shown = replace(synthetic, images=inputs[order], labels=labels[order], decode="")
    how = {**_PROTOCOL, "depth": 3 if min(inputs.shape[-2:]) >= 16 else 2, **(protocol or {})}
    how["lr"] = how["lr"] if synthetic.learning_rate is None else synthetic.learning_rate
    # A folder appears whole or not at all.
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
    partial.mkdir()
    try:
        FORMATS[kind](shown, partial)
        about = _about(shown, synthetic.decode, kind, how)
        (partial / _ABOUT).write_text(json.dumps(about, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (partial / "load.py").write_text(_script(shown, kind, how), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def class_folders(names: tuple[str, ...], num_classes: int) -> list[str]:
    """A folder name for each class: its name as far as file systems take it; all different.

    Args:
        names: K class names, or none.
        num_classes: K.
    """
    width = len(str(num_classes - 1))
    plain = [re.sub(r"[^\w.-]+", "_", name).strip("._") for name in names or map(str, range(num_classes))]
    distinct = len({name.lower() for name in plain}) == num_classes and all(plain)
    return plain if distinct else [f"{k:0{width}d}_{name}".strip("_") for k, name in enumerate(plain)]


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = False
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # something else is there
        ours = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["format"] == _FORMAT
    if not (ours and overwrite):
        do = "Choose another folder, or replace it with --overwrite" if ours else "Choose another folder"
        got = f"{'an export' if ours else 'other files'} in {folder}"
        raise InvalidInputError(explain("a new or empty folder", got, do))


def _about(shown: SyntheticSet, decode: str, kind: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an export, as set.json holds it."""
    return {
        "format": _FORMAT,
        "version": 1,
        "kind": kind,
        "dataset": shown.dataset,
        "num_classes": shown.num_classes,
        "class_names": list(shown.class_names),
        "images": len(shown),
        "shape": list(shown.images.shape[1:]),
        "soft_labels": shown.labels.ndim == 2,
        "mean": list(shown.preprocessing.mean),
        "std": list(shown.preprocessing.std),
        "whitened": shown.preprocessing.zca is not None,
        "mosaic": decode,
        "learning_rate": shown.learning_rate,
        "training": how,
    }


# formats


def _pixels(shown: SyntheticSet) -> Tensor:
    return shown.preprocessing.inverse(shown.images)


def _whitening(shown: SyntheticSet) -> dict[str, Tensor]:
    zca = shown.preprocessing.zca
    if zca is None:
        return {}
    return {"whitening_mean": zca.mean.cpu(), "whitening_matrix": zca.matrix.cpu().contiguous()}


def _tensors(shown: SyntheticSet) -> dict[str, Tensor]:
    return {"images": _pixels(shown).contiguous(), "labels": shown.labels.contiguous(), **_whitening(shown)}


def _png(shown: SyntheticSet, folder: Path) -> None:
    from torchvision.io import write_png

    channels = shown.images.shape[1]
    if channels not in (1, 3):
        do = "Use --format npz, pt or safetensors"
        raise InvalidInputError(explain("grey or colour images for png", f"{channels} channels", do))
    eight = (_pixels(shown).clamp(0, 1) * 255).round().to(torch.uint8)
    names = class_folders(shown.class_names, shown.num_classes)
    table = io.StringIO()
    soft = [f"p{k}" for k in range(shown.num_classes)] if shown.labels.ndim == 2 else []
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "label", "class", *soft])
    counts = [0] * shown.num_classes
    for image, label, given in zip(eight, shown.hard_labels.tolist(), shown.labels, strict=True):
        path = f"{names[label]}/{counts[label]:04d}.png"
        counts[label] += 1
        (folder / names[label]).mkdir(exist_ok=True)
        write_png(image, str(folder / path))
        called = shown.class_names[label] if shown.class_names else str(label)
        rows.writerow([path, label, called, *(given.tolist() if soft else [])])
    (folder / "labels.csv").write_text(table.getvalue(), encoding="utf-8")
    if extra := _whitening(shown):
        torch.save(extra, folder / "whitening.pt")


def _npz(shown: SyntheticSet, folder: Path) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in _tensors(shown).items()}
    np.savez(folder / "set.npz", **arrays)


def _pt(shown: SyntheticSet, folder: Path) -> None:
    torch.save(_tensors(shown), folder / "set.pt")


def _safetensors(shown: SyntheticSet, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_tensors(shown), str(folder / "set.safetensors"))


def _dd_ranking(shown: SyntheticSet, folder: Path) -> None:
    labels = shown.labels
    torch.save(shown.images, folder / "images.pt")
    torch.save(labels if labels.ndim == 1 else labels.clamp_min(_LEAST).log(), folder / "labels.pt")
    if shown.learning_rate is not None:
        torch.save(torch.tensor(shown.learning_rate), folder / "lr.pt")
    if extra := _whitening(shown):
        torch.save(extra, folder / "whitening.pt")


FORMATS: dict[str, Callable[[SyntheticSet, Path], None]] = {
    "png": _png,
    "npz": _npz,
    "pt": _pt,
    "safetensors": _safetensors,
    "dd-ranking": _dd_ranking,
}
"""Writers by the format's name: (set of training images ordered by class, folder)."""


# load.py

_PROTOCOL = {"width": 128, "epochs": 1000, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
_HERE = "Path(__file__).with_name"
_IMPORTS = {
    "png": ("import csv", "from torchvision.io import read_image"),
    "npz": ("import numpy", ""),
    "safetensors": ("", "from safetensors.torch import load_file"),
}
"""What load.py imports before and after what every one does."""
_READING = {
    "png": (
        f'rows = list(csv.DictReader(open({_HERE}("labels.csv"), encoding="utf-8")))',
        "images = torch.stack([read_image(str(Path(__file__).parent / row['path'])) for row in rows]) / 255",
    ),
    "npz": (f'data = {{name: torch.from_numpy(array) for name, array in numpy.load({_HERE}("set.npz")).items()}}',),
    "pt": (f'data = torch.load({_HERE}("set.pt"), weights_only=True)',),
    "safetensors": (f'data = load_file({_HERE}("set.safetensors"))',),
    "dd-ranking": (
        f'inputs = torch.load({_HERE}("images.pt"), weights_only=True)',
        f'labels = torch.load({_HERE}("labels.pt"), weights_only=True)',
    ),
}
_TRAINING = """optimizer = torch.optim.SGD(network.parameters(), {lr}, {momentum}, weight_decay={weight_decay})
for epoch in range({epochs}):
    optimizer.param_groups[0]["lr"] = {lr} if epoch <= {epochs} // 2 else {lr} * 0.1
    for index in torch.randperm(len(inputs)).split({batch_size}):
        loss = nn.functional.cross_entropy(network(inputs[index]), {labels}[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


def _script(shown: SyntheticSet, kind: str, how: Mapping[str, Any]) -> str:
    """load.py: reads the set, trains a ConvNet on it, and leaves ``network`` and ``prepare`` for the user."""
    c, h, w = shown.images.shape[1:]
    reading = list(_READING[kind])
    holder = 'data["{}"]' if kind in ("npz", "pt", "safetensors") else "{}"
    if kind == "png":
        soft = shown.labels.ndim == 2
        value = f'[float(row[f"p{{k}}"]) for k in range({shown.num_classes})]' if soft else 'int(row["label"])'
        reading.append(f"labels = torch.tensor([{value} for row in rows])")
    elif kind == "dd-ranking" and shown.labels.ndim == 2:
        reading[1] += ".softmax(1)"
    preparing = _preparing(shown, kind, holder)
    if kind != "dd-ranking":
        preparing.append(f"inputs = prepare({holder.format('images')})")
    layers, channels = [], c
    for _ in range(how["depth"]):
        width = how["width"]
        layers.append(f"    nn.Conv2d({channels}, {width}, 3, padding=1), nn.GroupNorm({width}, {width}), nn.ReLU(),")
        layers[-1] += " nn.AvgPool2d(2),\n"
        channels = width
    features = channels * (h >> how["depth"]) * (w >> how["depth"])
    network = (
        f"network = nn.Sequential(\n{''.join(layers)}    nn.Flatten(), nn.Linear({features}, {shown.num_classes}))"
    )
    title = '"""Trains a ConvNet on this distilled set with plain PyTorch.\n\n'
    title += f'Afterwards network(prepare(pixels)) are the logits of pixels in [0, 1], float [N,{c},{h},{w}].\n"""\n\n'
    training = _TRAINING.format(labels=holder.format("labels"), **how)
    before, after = _IMPORTS.get(kind, ("", ""))
    imports = [before, "from pathlib import Path", "import torch", "from torch import nn", after]
    title += "\n".join(filter(None, imports))
    return title + "\n\n" + "\n".join([*reading, *preparing, network]) + "\n" + training


def _preparing(shown: SyntheticSet, kind: str, holder: str) -> list[str]:
    """Lines that define ``prepare``: normalisation, then whitening."""
    mean, std = (f"torch.tensor({list(v)}).view(1, -1, 1, 1)" for v in _statistics(shown))
    normal = f"(pixels - {mean}) / {std}"
    if shown.preprocessing.zca is None:
        return [f"prepare = lambda pixels: {normal}"]
    lines = []
    if holder == "{}":
        lines.append(f'data = torch.load({_HERE}("whitening.pt"), weights_only=True)')
    flat = f'(({normal}).flatten(1) - data["whitening_mean"])'
    return [*lines, f'prepare = lambda pixels: ({flat} @ data["whitening_matrix"]).view_as(pixels)']


def _statistics(shown: SyntheticSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return shown.preprocessing.mean, shown.preprocessing.std
