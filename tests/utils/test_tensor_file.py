"""Tensor files: the round trip, and damage that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tad_plugin.errors import FileFormatError
from tad_plugin.utils.tensor_file import TensorFile, content_digest

KIND = TensorFile("tad_plugin.test", "a test file", "Write it again", tensors=("x",), fields=("name",))


def tensors() -> dict[str, Tensor]:
    return {"x": torch.tensor([1.0, -2.5]), "mask": torch.tensor([True, False, True])}


def written(path: Path, **more: Any) -> Path:
    KIND.write(path, tensors(), {"name": "né", "rate": 1e-05, **more})
    return path


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "x.safetensors", folder=Path("a"), nested={"b": [1, None]}, bad=float("inf"))
    header, found = KIND.read(path)
    assert {k: header[k] for k in ("format", "version", "name", "rate", "folder", "nested", "bad")} == {
        "format": "tad_plugin.test", "version": 2, "name": "né", "rate": 1e-05, "folder": "a",
        "nested": {"b": [1, None]}, "bad": float("inf"),
    }  # fmt: skip
    assert sorted(found) == ["mask", "x"]
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors().items())
    again = written(tmp_path / "y.safetensors", folder=Path("a"), nested={"b": [1, None]}, bad=float("inf"))
    assert again.read_bytes() == path.read_bytes()


def test_views_and_empty_tensors_are_written(tmp_path: Path) -> None:
    values = {"x": torch.arange(6.0).view(2, 3).t(), "none": torch.zeros(0, 4), "one": torch.tensor(3)}
    KIND.write(tmp_path / "x", values, {"name": ""})
    found = KIND.read(tmp_path / "x")[1]
    assert all(torch.equal(found[k], v) and found[k].shape == v.shape for k, v in values.items())


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    KIND.write(path, {"x": torch.tensor([1.0])}, {"name": "é", "rate": 1e-05})  # small: it is read 3,000 times
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="Write it again"):
            KIND.read(path)
    path.write_bytes(whole)
    KIND.read(path)


@pytest.mark.parametrize("keep", [lambda n: 0, lambda n: 4, lambda n: n // 2, lambda n: n - 1])
def test_a_truncated_and_a_missing_file_are_refused(tmp_path: Path, keep: Callable[[int], int]) -> None:
    path = written(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep(len(whole))])
    with pytest.raises(FileFormatError):
        KIND.read(path)
    with pytest.raises(FileFormatError, match="nothing"):
        KIND.read(tmp_path / "nothing")


def by_hand(path: Path, values: dict[str, Tensor], header: Any) -> Path:
    save_file(values, str(path), metadata={"tad_plugin": header if isinstance(header, str) else json.dumps(header)})
    return path


def test_version_1_is_read_with_and_without_its_content_hash(tmp_path: Path) -> None:
    old = {"format": KIND.format, "version": 1, "name": "old"}
    header, found = KIND.read(by_hand(tmp_path / "a", tensors(), old))
    assert header["name"] == "old" and torch.equal(found["x"], tensors()["x"])
    KIND.read(by_hand(tmp_path / "b", tensors(), {**old, "content": content_digest(tensors())}))
    with pytest.raises(FileFormatError):
        KIND.read(by_hand(tmp_path / "c", tensors(), {**old, "content": "0" * 64}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: {**h, "format": "other"}, "'other'"),
        (lambda h: {**h, "version": 3}, "version 3"),
        (lambda h: {**h, "version": None}, "None"),
        (lambda h: {k: v for k, v in h.items() if k != "name"}, "without name"),
        (lambda h: {k: v for k, v in h.items() if k != "content"}, "without content"),
        (lambda h: {k: v for k, v in h.items() if k != "header"}, "without header"),
        (lambda h: {**h, "name": "another"}, "hashes"),
        (lambda h: {**h, "more": 1}, "hashes"),
        (lambda h: json.dumps(h).replace("1e-05", "1E-05"), "hashes"),
        (lambda h: [], "None"),
        (lambda h: "{", "read"),
    ],
)
def test_other_headers_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    header, values = KIND.read(written(tmp_path / "x"))
    assert KIND.read(by_hand(tmp_path / "same", values, header))[0] == header
    with pytest.raises(FileFormatError, match=says):
        KIND.read(by_hand(tmp_path / "other", values, change(header)))


def test_a_file_without_a_required_tensor_or_without_our_header_is_refused(tmp_path: Path) -> None:
    KIND.write(tmp_path / "x", {"mask": tensors()["mask"]}, {"name": ""})
    with pytest.raises(FileFormatError, match="without x"):
        KIND.read(tmp_path / "x")
    save_file(tensors(), str(tmp_path / "foreign"))
    with pytest.raises(FileFormatError, match="None"):
        KIND.read(tmp_path / "foreign")


def test_the_digest_covers_names_types_shapes_and_values() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    others = [{"y": x}, {"x": x.view(2, 2)}, {"x": x.view(torch.int32)}, {"x": x.flip(0)}, {"x": x, "y": x}]
    digests = {content_digest(values) for values in ({"x": x}, *others)}
    assert len(digests) == 6 and all(len(d) == 64 for d in digests)
    assert content_digest({"a": x, "b": x}) == content_digest({"b": x, "a": x})
