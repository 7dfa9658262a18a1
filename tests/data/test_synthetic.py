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
        (IMAGES, LABELS[:3], InvalidInputError, r"\[3\]"),
        (IMAGES[0], LABELS, InvalidInputError, r"\[1, 4, 4\]"),
        (IMAGES, torch.ones(6, 4) / 4, InvalidInputError, r"\[6, 4\]"),
        (IMAGES, torch.ones(6, 3, 1), InvalidInputError, r"\[6, 3, 1\]"),
        (IMAGES, LABELS + 1, InvalidLabelsError, "3"),
        (IMAGES, LABELS.float(), InvalidLabelsError, "float32"),
        (IMAGES.long(), LABELS, InvalidInputError, "int64"),
        (IMAGES, torch.ones(6, 3, dtype=torch.int64), InvalidInputError, "int64"),
    ):
        with pytest.raises(error, match=message):
            SyntheticSet(images, labels, 3, PLAIN)
    with pytest.raises(InvalidInputError, match="2"):
        SyntheticSet(IMAGES, LABELS, 3, PLAIN, class_names=("a", "b"))
    for rate in (float("nan"), float("inf"), "0.1", True):
        with pytest.raises(InvalidInputError, match="learning_rate"):
            SyntheticSet(IMAGES, LABELS, 3, PLAIN, learning_rate=rate)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="preprocessing"):
        SyntheticSet(IMAGES, LABELS, 3, float("nan"))  # type: ignore[arg-type]


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
    with pytest.raises(FileFormatError, match=r"s\.safetensors"):
        SyntheticSet.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", "3"), ("num_classes", 3.0), ("num_classes", True), ("dataset", None), ("dataset", 5),
        ("class_names", "abc"), ("class_names", ["a", "b", 3]), ("class_names", ["a", "b"]),
        ("class_names", {"a": 0, "b": 1, "c": 2}), ("learning_rate", "0.1"), ("learning_rate", True),
        ("learning_rate", float("nan")), ("learning_rate", [0.1]), ("decode", None), ("decode", 2),
        ("preprocessing", None), ("preprocessing", []), ("preprocessing", "plain"),
        ("preprocessing", Preprocessing((0.3,) * 3, (0.4,) * 3).to_header()),
        ("preprocessing", {**PLAIN.to_header(), "mean": ["0.3"]}), ("preprocessing", {**PLAIN.to_header(), "zca": 0}),
    ],
)  # fmt: skip
def test_header_values_of_another_type_are_refused(tmp_path: Path, name: str, value: object) -> None:
    """As in a file of version 1, whose header has no hash."""
    make().save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as f:
        header = json.loads(f.metadata()["tad_plugin"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    del header["header"]
    for changed, fits in ((header, True), ({**header, name: value}, False)):
        whole = {**changed, "version": 1}
        save_file(tensors, tmp_path / "s.safetensors", metadata={"tad_plugin": json.dumps(whole)})
        if fits:
            assert SyntheticSet.load(tmp_path / "s.safetensors").class_names == ("a", "b", "c")
        else:
            with pytest.raises(FileFormatError, match=r"s\.safetensors|preprocessing"):
                SyntheticSet.load(tmp_path / "s.safetensors")
