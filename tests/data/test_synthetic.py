"""The synthetic set and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.data.whitening import fit_zca
from tad_plugin.errors import FileFormatError, InvalidInputError, InvalidLabelsError

IMAGES = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
PLAIN = Preprocessing((0.3,), (0.4,))


def make() -> SyntheticSet:
    return SyntheticSet(IMAGES, LABELS, 3, PLAIN, "digits", ("a", "b", "c"), 0.02, "partition:2")


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_a_set_comes_back_bit_for_bit_with_what_undoes_its_pixels(tmp_path: Path, whitened: bool, soft: bool) -> None:
    real = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    preprocessing = Preprocessing((0.0,), (1.0,), fit_zca(real)) if whitened else PLAIN
    labels = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), 1) if soft else LABELS
    given = replace(make(), labels=labels, preprocessing=preprocessing)
    given.save(tmp_path / "s.safetensors")
    found = SyntheticSet.load(tmp_path / "s.safetensors")
    assert (
        torch.equal(found.images, IMAGES) and torch.equal(found.labels, labels) and found.labels.dtype == labels.dtype
    )
    for name in ("num_classes", "dataset", "class_names", "learning_rate", "decode"):
        assert getattr(found, name) == getattr(given, name)
    found.preprocessing.check_same(preprocessing)
    pixels = found.preprocessing.inverse(preprocessing(real))
    torch.testing.assert_close(pixels, real, atol=1e-3, rtol=1e-3)


def test_copies_share_nothing_and_soft_labels_have_a_hard_form() -> None:
    given = make()
    copy = given.detached()
    given.images.zero_()
    try:
        assert bool(copy.images.any()) and len(copy) == 6 and torch.equal(copy.hard_labels, LABELS)
        soft = replace(copy, labels=torch.eye(3)[LABELS] * 0.6 + 0.1)
        assert torch.equal(soft.hard_labels, LABELS)
    finally:
        IMAGES.copy_(copy.images)


def test_bad_sets_are_named() -> None:
    for images, labels, error, message in (
        (IMAGES, LABELS[:3], InvalidInputError, "one label each"),
        (IMAGES[0], LABELS, InvalidInputError, r"images \[M,C,H,W\]"),
        (IMAGES, torch.ones(6, 4) / 4, InvalidInputError, r"soft labels \[M,3\], but got \[6, 4\]"),
        (IMAGES, torch.ones(6, 3, 1), InvalidInputError, r"soft labels \[M,3\]"),
        (IMAGES, LABELS + 1, InvalidLabelsError, r"in \[0, 3\)"),
        (IMAGES, LABELS.float(), InvalidLabelsError, "integer `labels`"),
    ):
        with pytest.raises(error, match=message):
            SyntheticSet(images, labels, 3, PLAIN)


@pytest.mark.parametrize(
    "how", ["missing", "truncated", "garbage", "version", "no images", "no names", "statistics", "labels"]
)
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.safetensors"
    make().save(path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as f:
        header = json.loads(f.metadata()["tad_plugin"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(whole[:-9])
    elif how == "garbage":
        path.write_bytes(b"\x93NUMPY" * 50)
    else:
        if how == "version":
            header["version"] = 3
        elif how == "no images":
            del tensors["images"]
        elif how == "no names":
            del header["class_names"]
        elif how == "statistics":
            header["preprocessing"]["mean"] = [0.5]
        elif how == "labels":
            tensors["labels"] = tensors["labels"] + 9
        save_file(tensors, path, metadata={"tad_plugin": json.dumps(header)})
    with pytest.raises(FileFormatError, match="Expected .*, but got"):
        SyntheticSet.load(path)
