"""What the tests of every patch share: a small CIFAR-10 in its own format, and runs of a checkout's scripts."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tad_plugin.compatibility import Script, needed_switches, run_script
from tests.upstream import upstream


def copied(name: str, folder: Path) -> Path:
    """A copy of the checkout ``name`` (the given one is never changed); skips the test where none is given."""
    place = folder / name
    shutil.copytree(upstream(name), place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "result"))
    return place


def tiny_cifar10(folder: Path, *, per_class: int = 40, seed: int = 0) -> Path:
    """Class-coloured noise as torchvision's CIFAR-10 files; ``per_class`` training and 2 test images in each class."""
    generator = np.random.default_rng(seed)
    shades = generator.integers(60, 196, size=(10, 3, 1, 1))
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)

    def write(name: str, labels: np.ndarray) -> None:
        images = shades[labels] + generator.normal(0, 25, size=(len(labels), 3, 32, 32))
        rows = {b"data": images.clip(0, 255).astype(np.uint8).reshape(len(labels), -1), b"labels": labels.tolist()}
        (place / name).write_bytes(pickle.dumps({k.decode(): v for k, v in rows.items()}))

    order = generator.permutation(np.repeat(np.arange(10), per_class))
    for number, part in enumerate(np.array_split(order, 5), 1):
        write(f"data_batch_{number}", part)
    write("test_batch", np.repeat(np.arange(10), 2))
    names = [f"class{c}" for c in range(10)]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return folder


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes files that are not the published ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_args, **_more: True)


def run(root: Path, script: str, arguments: Sequence[str], *, seed: int = 0) -> None:
    """Runs a script of a checkout repeatably, with the switches that it needs."""
    found = Script.find(root, script)
    assert run_script(found, arguments, switches=needed_switches(found), seed=seed) == 0
