"""Exports of a synthetic set: what stands in the files, and that load.py trains on them."""

from __future__ import annotations

import ast
import csv
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import read_image

from tad_plugin.data.export import FORMATS, class_folders, export_set
from tad_plugin.data.mosaic import expand
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.data.whitening import fit_zca
from tad_plugin.errors import InvalidInputError, UnknownNameError

PLAIN = Preprocessing((0.3, 0.4, 0.5), (0.4, 0.3, 0.2))
LABELS = torch.tensor([2, 0, 1, 0, 2, 1])
HOW = {"width": 8, "depth": 2, "epochs": 20, "batch_size": 3, "lr": 0.05}


def pixels() -> Tensor:
    """Each class has its own colour; one pixel is too dark and one too bright for a file of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(6, 3, 8, 8, generator=generator) * 0.2 + torch.eye(3)[LABELS][:, :, None, None] * 0.7
    found[0, 0, 0, 0], found[0, 1, 0, 0] = -0.5, 1.5
    return found


def make(*, soft: bool = False, whitened: bool = False, **more: Any) -> SyntheticSet:
    real = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    how = Preprocessing((0.0,) * 3, (1.0,) * 3, fit_zca(real)) if whitened else PLAIN
    labels = torch.eye(3)[LABELS] * 0.9 + 0.1 / 3 if soft else LABELS
    return SyntheticSet(how(pixels()), labels, 3, how, "blobs", ("cat", "a/b", "dog"), **more)


def contents(folder: Path, kind: str) -> dict[str, Tensor]:
    if kind == "npz":
        return {name: torch.from_numpy(value) for name, value in np.load(folder / "set.npz").items()}
    if kind == "pt":
        return dict(torch.load(folder / "set.pt", weights_only=True))
    return load_file(folder / "set.safetensors")


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["npz", "pt", "safetensors"])
def test_tensors_are_pixels_by_class_with_their_labels(kind: str, soft: bool, whitened: bool, tmp_path: Path) -> None:
    given = make(soft=soft, whitened=whitened, learning_rate=0.02)
    export_set(given, tmp_path / "e", kind, HOW)
    found, order = contents(tmp_path / "e", kind), LABELS.argsort(stable=True)
    torch.testing.assert_close(found["images"], pixels()[order], atol=2e-3, rtol=0)  # not clamped
    assert torch.equal(found["labels"], given.labels[order])
    assert ("whitening_matrix" in found) == whitened
    about = json.loads((tmp_path / "e" / "set.json").read_text())
    assert about["learning_rate"] == about["training"]["lr"] == 0.02
    assert (about["soft_labels"], about["whitened"]) == (soft, whitened)
    assert about["class_names"] == ["cat", "a/b", "dog"]


@pytest.mark.parametrize("soft", [False, True])
def test_png_are_class_folders_of_clamped_pixels(soft: bool, tmp_path: Path) -> None:
    export_set(make(soft=soft), tmp_path / "e", "png")
    with open(tmp_path / "e" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{c}/{n:04d}.png" for c in ("cat", "a_b", "dog") for n in (0, 1)]
    assert [row["class"] for row in rows] == ["cat", "cat", "a/b", "a/b", "dog", "dog"]
    order = LABELS.argsort(stable=True)
    for row, expected in zip(rows, pixels()[order].clamp(0, 1), strict=True):
        torch.testing.assert_close(
            read_image(str(tmp_path / "e" / row["path"])) / 255, expected, atol=0.5 / 255, rtol=0
        )
    if soft:
        shown = torch.tensor([[float(row[f"p{k}"]) for k in range(3)] for row in rows])
        assert torch.equal(shown, make(soft=True).labels[order])
    else:
        assert [int(row["label"]) for row in rows] == [0, 0, 1, 1, 2, 2] and "p0" not in rows[0]


@pytest.mark.parametrize("soft", [False, True])
def test_dd_ranking_gets_network_input_and_logits(soft: bool, tmp_path: Path) -> None:
    given, order = make(soft=soft, learning_rate=0.02), LABELS.argsort(stable=True)
    export_set(given, tmp_path / "e", "dd-ranking")
    images, labels, rate = (
        torch.load(tmp_path / "e" / f"{name}.pt", weights_only=True) for name in ("images", "labels", "lr")
    )
    assert torch.equal(images, given.images[order]) and rate.item() == pytest.approx(0.02)
    if soft:  # its loss takes the softmax of what it gets
        torch.testing.assert_close(labels.softmax(1), given.labels[order])
    else:
        assert torch.equal(labels, LABELS[order])
    export_set(make(), tmp_path / "fixed", "dd-ranking")
    assert not (tmp_path / "fixed" / "lr.pt").exists()  # DD-Ranking then searches for one


@pytest.mark.parametrize(
    ("kind", "soft", "whitened"),
    [
        *((kind, soft, False) for kind, soft in zip(FORMATS, (True, False, True, False, True), strict=True)),
        ("png", False, True),
        ("npz", True, True),
        ("dd-ranking", False, True),
    ],
)
def test_load_py_trains_a_network_that_knows_the_classes(kind: str, soft: bool, whitened: bool, tmp_path: Path) -> None:
    folder = export_set(make(soft=soft, whitened=whitened), tmp_path / "e", kind, HOW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = runpy.run_path(str(folder / "load.py"))
    shown = found["network"](found["prepare"](pixels().clamp(0, 1)))
    assert shown.shape == (6, 3) and torch.equal(shown.argmax(1), LABELS)
    torch.testing.assert_close(found["prepare"](pixels()), make(whitened=whitened).images, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_load_py_is_short_and_needs_nothing_of_ours(kind: str, tmp_path: Path) -> None:
    text = (export_set(make(), tmp_path / "e", kind) / "load.py").read_text()
    assert "tad_plugin" not in text
    _, *body = ast.parse(text).body
    statements = [node for part in body for node in ast.walk(part) if isinstance(node, ast.stmt)]
    own = [node for node in statements if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(own) <= (14 if kind == "png" else 12)


def test_mosaics_are_exported_as_their_training_images(tmp_path: Path) -> None:
    given = replace(make(), decode="partition:2")
    found = contents(export_set(given, tmp_path / "e", "pt"), "pt")
    labels = LABELS.repeat(4)
    order = labels.argsort(stable=True)
    assert torch.equal(found["labels"], labels[order])
    torch.testing.assert_close(found["images"], PLAIN.inverse(expand(given.images, 2))[order])
    assert json.loads((tmp_path / "e" / "set.json").read_text())["mosaic"] == "partition:2"


def test_a_set_is_a_torch_dataset() -> None:
    given = replace(make(soft=True), decode="partition:2")
    given.images.requires_grad_()
    batches = list(DataLoader(given.as_dataset(), batch_size=10))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(images) == 24 and not images.requires_grad
    expected = given.training_pairs()
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    torch.testing.assert_close(make().as_dataset(pixels=True)[:][0], pixels())


def test_nothing_is_overwritten_that_is_not_an_export(tmp_path: Path) -> None:
    folder = export_set(make(), tmp_path / "e", "png")
    with pytest.raises(InvalidInputError, match="--overwrite"):
        export_set(make(), folder, "pt")
    export_set(make(), folder, "pt", overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["load.py", "set.json", "set.pt"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "set.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="other files"):
        export_set(make(), tmp_path / "mine", "pt", overwrite=True)
    with pytest.raises(UnknownNameError, match="safetensors"):
        export_set(make(), tmp_path / "n", "safetensor")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "mine"]


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ((), ["0", "1", "2"]),
        (("a", "B", "c d"), ["a", "B", "c_d"]),
        (("a", "A", "b"), ["0_a", "1_A", "2_b"]),
        (("..", "x", "y"), ["0", "1_x", "2_y"]),
    ],
)
def test_class_folders_are_distinct_names_of_files(names: tuple[str, ...], folders: list[str]) -> None:
    assert class_folders(names, 3) == folders
