"""Shared by the tests of the patches: a small CIFAR-10 in its own format, and runs of a checkout's scripts."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tad_plugin.upstream import stand_ins
from tad_plugin.upstream.checkout import apply, reverse, status
from tad_plugin.upstream.patch import load_patch
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import needed_switches
from tests.checkouts import upstream


def copied(name: str, folder: Path) -> Path:
    """Copies the checkout ``name``, so that the given one never changes; skips the test if there is none."""
    place = folder / name
    shutil.copytree(upstream(name), place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "result"))
    return place


def tiny_cifar10(folder: Path, *, per_class: int = 40, seed: int = 0) -> Path:
    """Writes class-coloured noise as CIFAR-10 files: ``per_class`` training and 2 test images in each class."""
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
def any_checksum() -> Iterator[None]:
    """torchvision accepts files that are not the published ones."""
    with stand_ins.any_checksum():
        yield


#: what every test that runs a public script needs
MARKS = [
    pytest.mark.usefixtures("any_checksum"),
    pytest.mark.filterwarnings("ignore::Warning"),  # old code on a current stack
]


def run(root: Path, script: str, arguments: Sequence[str], *, seed: int = 0) -> None:
    """Runs a script of a checkout repeatably, with the switches that it needs."""
    found = Script.find(root, script)
    assert run_script(found, arguments, switches=needed_switches(found), seed=seed) == 0


Experts = list[list[list[Tensor]]]
"""The parameters of each expert after each epoch (0 is the start)."""


def same(a: Experts, b: Experts) -> bool:
    """True if all parameters of all epochs and experts have the same bits."""
    flat = [[p for expert in found for epoch in expert for p in epoch] for found in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(torch.equal(p, q) for p, q in zip(*flat, strict=True))


def flags(folder: Path, method: str, settings: Mapping[str, Mapping[str, object]], **iwd: object) -> list[str]:
    """Flags for a method on 40% wrong labels with a state file in ``folder``; ``iwd``: more settings of IWD."""
    used = {name: dict(given) for name, given in settings.items() if name in ("scorer", *method.split("+"))}
    if "iwd" in used:
        used["iwd"].update(iwd)
    config = folder / "config.json"
    config.write_text(json.dumps(used))
    state = ["--tad_state", str(folder / "state.safetensors")]
    return ["--tad_method", method, "--tad_config", str(config), *state, "--tad_noise", "symmetric:0.4"]


def check_bytes(name: str, folder: Path, changed: dict[str, bool]) -> None:
    """Applies and reverses a patch; ``changed``: its files, and True if their lines end in CRLF."""
    root, patch = copied(name, folder), load_patch(name)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert status(patch, root).condition == "unpatched"
    assert sorted(p.name for p in apply(patch, root)) == sorted(Path(file).name for file in changed)
    found = {p.relative_to(root).as_posix() for p, content in before.items() if p.read_bytes() != content}
    assert found == set(changed) and status(patch, root).condition == "patched"
    for file, crlf in changed.items():
        content = (root / file).read_bytes()
        assert content.count(b"\r\n") == (content.count(b"\n") if crlf else 0)
    reverse(patch, root)
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def nearest(images: Tensor, data: Path) -> list[int]:
    """Finds the position of each normalised image among the training images of ``data``; each must be one of them."""
    from torchvision import datasets, transforms

    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    real = datasets.CIFAR10(str(data), train=True, transform=steps)
    rows = torch.stack([real[i][0] for i in range(len(real))])
    distance = torch.cdist(images.flatten(1), rows.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.amin(1).max()) < 1e-4
    found: list[int] = distance.argmin(1).tolist()
    return found
