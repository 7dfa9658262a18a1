"""Real data for public scripts: any dataset of this package in torchvision's CIFAR-10 format."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad_plugin.data.sources import RawSplits, read_source
from tad_plugin.errors import ConfigError, explain
from tad_plugin.experiments.config import RunConfig
from tad_plugin.utils.files import atomic_write, read_json

__all__ = ["torchvision_folder", "write_torchvision"]


def write_torchvision(config: RunConfig, place: Path) -> str:
    """Writes the dataset of ``config`` as torchvision's CIFAR-10 files, class after class, if it is not there yet.

    Args:
        config: its dataset, root, per_class and image_size are used.
        place: folder for ``cifar-10-batches-py``.

    Returns:
        The name of the dataset.

    Raises:
        ConfigError: not ten classes of 32x32 colour images, or the folder holds another dataset.
    """
    wanted = {"dataset": config.dataset, "per_class": config.per_class, "image_size": config.image_size}
    note = place / "made_from.json"
    if note.is_file():
        held = read_json(note)
        if held["made_from"] != wanted:
            do = "Give the cell a grid of its own, or pass another --out"
            raise ConfigError(explain(f"data of {wanted} in {place}", f"those of {held['made_from']}", do))
        return str(held["name"])
    raw = read_source(
        config.dataset,
        Path(config.root),
        per_class=config.per_class or None,
        image_size=config.image_size,
        download=True,
    )
    shape, classes = tuple(raw.train.shape[1:]), len(raw.class_names)
    if shape != (3, 32, 32) or classes != 10:
        do = "Use a dataset like CIFAR-10 for cells that run public scripts"
        raise ConfigError(explain("10 classes of images [3, 32, 32]", f"{classes} of {list(shape)}", do))
    torchvision_folder(raw, place)
    atomic_write(note, json.dumps({"made_from": wanted, "name": raw.name}))
    return raw.name


def torchvision_folder(raw: RawSplits, place: Path) -> None:
    """Writes ``raw`` as torchvision's CIFAR-10 files below ``place``, in the order given (class after class)."""
    folder = place / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: Any, labels: list[int]) -> None:
        atomic_write(folder / name, pickle.dumps({"data": rows.reshape(len(labels), -1), "labels": labels}))

    for number, part in enumerate(np.array_split(np.arange(len(raw.train)), 5), 1):
        chosen = torch.as_tensor(part)
        write(f"data_batch_{number}", raw.train[chosen].numpy(), raw.train_labels[chosen].tolist())
    write("test_batch", raw.test.numpy(), raw.test_labels.tolist())
    atomic_write(folder / "batches.meta", pickle.dumps({"label_names": list(raw.class_names)}))
