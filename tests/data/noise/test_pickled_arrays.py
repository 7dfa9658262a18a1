"""Arrays in a ``.pt`` file: both formats of torch.save, and everything that is no integer array."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.data.noise.pickled_arrays import read_pickled_arrays
from tests import ROOT

LABELS = np.arange(300) % 7


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def saved(path: Path, content: Any, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_arrays_come_back_as_they_were(tmp_path: Path, dtype: str, zipped: bool) -> None:
    content = OrderedDict(
        clean=LABELS.astype(dtype), square=LABELS.astype(dtype).reshape(20, 15).T, names=["a", 1, None]
    )
    found = read_pickled_arrays(saved(tmp_path / "a.pt", content, zipped))
    assert list(found) == list(content) and found["names"] == content["names"]
    for name in ("clean", "square"):
        assert found[name].dtype == np.dtype(dtype).newbyteorder("=")
        assert np.array_equal(found[name], content[name])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        LABELS.astype(float),
        LABELS.astype("M8[s]"),
        np.array(["a", "b"]),
        np.array([1, "b"], dtype=object),
        np.zeros(3, dtype=[("a", "i8")]),
        torch.zeros(3, dtype=torch.int64),
        Path("a"),
        Call(eval, "1"),
        Call(np.fromfile, str(ROOT / "setup.cfg")),
        Call(np.dtype, "O"),
        len,
        LABELS[0],
    ],
    ids=[
        "floats",
        "dates",
        "text",
        "objects",
        "records",
        "tensor",
        "path",
        "eval",
        "file",
        "dtype",
        "builtin",
        "scalar",
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: Any, zipped: bool) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_pickled_arrays(saved(tmp_path / "a.pt", {"clean": content}, zipped))


def older(data: bytes) -> bytes:
    """A file in the older format with ``data`` as its content."""
    parts = io.BytesIO()
    for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}):
        pickle.dump(part, parts, protocol=2)
    return parts.getvalue() + data


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"clean": LABELS}, protocol=2),  # without the head
        older(b"\x80\x02]r\xff\xff\xff\x7f."),  # part number 2^31 - 1: room for it is 16 GiB
        older(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."),
        older(b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."),  # a name inside an allowed one
        older(pickle.dumps({"clean": LABELS}, protocol=5)),
    ],
    ids=["bare", "part number", "codec", "nested name", "protocol 5"],
)
def test_a_pickle_of_another_make_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(pickle.UnpicklingError):
        read_pickled_arrays(tmp_path / "a.pt")


def test_any_cut_file_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pt", {"clean": LABELS[:20]}, zipped=False).read_bytes()
    content = len(whole) - len(pickle.dumps([], protocol=2))  # the list of tensors, which is not read
    for length in range(0, content, 7):
        (tmp_path / "b.pt").write_bytes(whole[:length])
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError)):
            read_pickled_arrays(tmp_path / "b.pt")
