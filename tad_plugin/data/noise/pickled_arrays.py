"""Integer arrays in a ``.pt`` file, read without running any code.

``torch.load(weights_only=True)`` reads tensors and plain containers, but NumPy arrays only from torch 2.6 on, and only
where the whole process allows them. This reader knows plain containers and integer arrays, and nothing else. As
Python's manual advises, it looks every name up in a table of its own, so a file cannot name anything that runs code.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["read_pickled_arrays"]


def read_pickled_arrays(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``: plain containers, numbers, text and integer arrays.

    Args:
        path: a zip archive, or the older format of four pickles in a row.

    Raises:
        pickle.UnpicklingError: the file holds anything else, a tensor included.
        Exception: whatever broken bytes provoke.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (entry,) = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            return _unpickle(io.BytesIO(archive.read(entry)))
    file = io.BytesIO(path.read_bytes())
    if _unpickle(file) != torch.serialization.MAGIC_NUMBER:
        raise pickle.UnpicklingError("not a file of torch.save")
    _unpickle(file)  # the version of the format
    _unpickle(file)  # the byte order of tensors, of which there are none here
    return _unpickle(file)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The meaning of a name in the file.

        Raises:
            pickle.UnpicklingError: the name is none of an integer array's.
        """
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"the file names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, _: Any) -> Any:
        """Refuses tensors.

        Raises:
            pickle.UnpicklingError: always.
        """
        raise pickle.UnpicklingError("a broken tensor, or tensors beside arrays")


def _unpickle(file: io.BytesIO) -> Any:
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        # An honest pickle numbers its parts in turn. Python would make room for all numbers up to the largest.
        if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"} and int(argument or 0) > file.getbuffer().nbytes:
            raise pickle.UnpicklingError(f"a part with the number {argument}")
    file.seek(start)
    return _ArrayUnpickler(file).load()


def _integers(*arguments: Any) -> np.dtype[Any]:
    dtype = np.dtype(*arguments)
    if dtype.kind not in "iu":
        raise pickle.UnpicklingError(f"an array of {dtype}")
    return dtype


def _bytes(text: str, encoding: str) -> bytes:
    # Pickles up to protocol 2 write bytes as text.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}")
    return text.encode("latin1")


_reconstruct = np.zeros(1).__reduce__()[0]
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _integers,
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): OrderedDict,
}
