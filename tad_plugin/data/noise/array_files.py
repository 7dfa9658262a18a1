"""Files of arrays, from outside: npz without pickle, and ``.pt`` without running any code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad_plugin.data.noise.pickled_arrays import read_pickled_arrays
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.utils.seals import check_archive

__all__ = ["load_pt", "read_npz", "regular_file"]

_LARGEST = 2**30


def regular_file(path: str | Path, what: str) -> Path:
    """The path, if a regular file of at most 1 GiB is there.

    Args:
        path: "~" is the home folder.
        what: the kind of file, for messages.

    Raises:
        FileFormatError: it is not.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():  # a pipe or a device would be read for ever
        raise FileFormatError(explain(what, f"no file at {path.absolute()}", "Pass the path of an existing file"))
    _check_size(path.stat().st_size, path)
    return path


def read_npz(path: Path) -> dict[str, Any]:
    """All arrays of an npz by name.

    Raises:
        FileFormatError: not an npz, one with pickles, or more than 1 GiB unpacked.
    """
    try:
        _check_entries(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileFormatError:
        raise
    except Exception as error:  # the parsers raise whatever the bytes provoke
        do = "Write it with numpy.savez from plain arrays, or download it again"
        raise FileFormatError(explain("an npz file of plain arrays", f"{path}: {error}", do)) from error


def load_pt(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, integer arrays, and plain containers of them.

    Raises:
        FileFormatError: it holds anything else, is damaged, or has more than 1 GiB unpacked.
    """
    do = "Check the download; or convert it once, where you trust it, with numpy.savez(path, clean=..., worse=...)"
    try:
        if zipfile.is_zipfile(path):
            _check_entries(path)
        check_archive(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # broken bytes, or arrays as in the published file: the next reader tells
            return read_pickled_arrays(path)
    except FileFormatError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        reason = str(error).split("\n", 1)[0][:200]
        raise FileFormatError(explain("a .pt file of plain arrays", f"{path}: {reason}", do)) from error


def _check_size(size: int, path: Path) -> None:
    if size > _LARGEST:
        got = f"{size / 2**20:.0f} MiB in {path}"
        raise FileFormatError(explain(f"at most {_LARGEST >> 20} MiB", got, "Use the file as published"))


def _check_entries(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    _check_size(sum(entry.file_size for entry in entries), path)
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("an entry twice in the archive")
