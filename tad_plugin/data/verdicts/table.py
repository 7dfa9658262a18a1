"""Files of verdicts as columns: CSV, JSON, npz and pt, read without running any code."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tad_plugin.data.noise.array_files import load_pt, read_npz, regular_file
from tad_plugin.data.noise.named_labels import plain_path
from tad_plugin.errors import FileFormatError, explain

__all__ = ["ACCEPTED", "BARE", "Table", "plain_name", "read_table"]

ACCEPTED = (
    "Accepted are: a CSV or JSON with one record per image (a path or an index, and columns such as is_label_issue,"
    " label_quality, corrected_label, weight, keep, or verdict as in suspects.csv); an npz or pt of such arrays; and a"
    " bare list, array or tensor, of which --verdict_means and --order tell what it is"
)
"""The accepted forms, for messages."""

BARE = ""
"""Name of the one column of a file without names."""

_SUFFIXES = (".csv", ".json", ".npz", ".pt", ".pth")
_PATHS = ("path", "file", "filename", "image", "image_path")
_INDEX = ("index", "idx", "id", "sample", "unnamed:_0", "")
_HASHES = ("label_sha256", "labels_sha256", "label_digest")


@dataclass(frozen=True)
class Table:
    """A file of verdicts.

    Attributes:
        source: the file, for messages.
        columns: values by name, all of one length R; ``BARE`` names those of a file without names.
        paths: R paths as :func:`plain_path` gives them, or None.
        index: R positions, or None.
        label_hash: sha256 of the labels that were judged, or "".
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    paths: tuple[str, ...] | None = None
    index: tuple[int, ...] | None = None
    label_hash: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def plain_name(name: Any) -> str:
    """A column's name as it is compared: lower case, words joined by "_"."""
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def read_table(path: str | Path) -> Table:
    """Reads a file of verdicts.

    Args:
        path: a regular file of at most 1 GiB, ending in .csv, .json, .npz, .pt or .pth.

    Raises:
        FileFormatError: missing, corrupt, too large, of another format, needing unrestricted pickle, with columns of
            several lengths, without records, or with a path or index twice.
    """
    file = regular_file(path, "a file of verdicts (.csv, .json, .npz or .pt)")
    suffix = file.suffix.lower()
    if suffix not in _SUFFIXES:
        raise FileFormatError(explain(f"a file of verdicts ending in {', '.join(_SUFFIXES)}", str(file), ACCEPTED))
    if suffix == ".npz":
        content: Any = read_npz(file)
        content = content["arr_0"] if set(content) == {"arr_0"} else content
    elif suffix in (".pt", ".pth"):
        content = load_pt(file)
    else:
        try:
            text = file.read_text(encoding="utf-8-sig")
            content = _csv(text) if suffix == ".csv" else json.loads(text, object_pairs_hook=_once)
        except Exception as error:  # the parsers raise whatever the bytes provoke
            raise FileFormatError(explain("a CSV or JSON file of verdicts", f"{file}: {error}", ACCEPTED)) from error
    columns, found_hash = _columns(content, file)
    return _table(columns, found_hash, file)


def _columns(content: Any, file: Path) -> tuple[dict[str, list[Any]], str]:
    """The content as columns, and the hash of the labels."""
    if isinstance(content, Mapping):
        named = {plain_name(name): value for name, value in content.items()}
        if len(named) < len(content):
            raise _bad("column names that differ by more than case", "one twice", file)
        hashes = [named.pop(name) for name in _HASHES if name in named]
        hash_text = str(np.asarray(hashes[0]).item()) if hashes else ""
        if named and all(isinstance(value, Mapping) for value in named.values()):
            return _of_mappings(named, file), hash_text
        if named and all(_is_row(value) for value in named.values()):
            return {name: _list(value, file) for name, value in named.items()}, hash_text
        if content and all(np.ndim(value) == 0 for value in content.values()) and not hashes:
            return {"path": [str(name) for name in content], BARE + "value": list(content.values())}, ""
        raise _bad("columns of one value per image, or one value for each path", "a mapping of other things", file)
    if isinstance(content, list) and content and all(isinstance(record, Mapping) for record in content):
        names = [plain_name(name) for name in content[0]]
        if any([plain_name(name) for name in record] != names for record in content):
            raise _bad("the same fields in every record", "others", file)
        return {n: [list(record.values())[i] for record in content] for i, n in enumerate(names)}, ""
    if _is_row(content):
        return {BARE: _list(content, file)}, ""
    raise _bad("a list, an array or named columns", _kind(content), file)


def _of_mappings(named: Mapping[str, Mapping[Any, Any]], file: Path) -> dict[str, list[Any]]:
    """Columns of a table that pandas wrote: {column: {index: value}}."""
    keys = [str(key) for key in next(iter(named.values()))]
    if any([str(key) for key in column] != keys for column in named.values()):
        raise _bad("the same index in every column", "others", file)
    own = {"index": list(keys)} if not set(named) & {*_PATHS, *_INDEX} else {}
    return {**own, **{name: list(column.values()) for name, column in named.items()}}


def _table(columns: dict[str, list[Any]], found_hash: str, file: Path) -> Table:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        got = ", ".join(f"{name or 'values'}: {n}" for name, n in lengths.items())
        raise _bad("columns of one length, not empty", got, file)
    rest = dict(columns)
    bare = list(rest) == [BARE]
    paths = index = None
    for name in [] if bare else _PATHS:
        if name in rest:
            found = rest.pop(name)
            if any(str(value) for value in found):  # a table of a dataset without files has empty ones
                paths = tuple(plain_path(str(value)) for value in found)
            break
    for name in [] if bare else _INDEX:
        if name in rest:
            index = tuple(_position(value, name, file) for value in rest.pop(name))
            break
    for what, names in (("path", paths), ("index", index)):
        if names is not None and len(set(names)) < len(names):
            raise _bad(f"each {what} once", "one twice", file)
    if not rest:
        raise _bad("a column beside the names of the images", "none", file)
    return Table(str(file), rest, paths, index, found_hash)


def _position(value: Any, name: str, file: Path) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = -1
    if found < 0 or float(value) != found:
        raise _bad(f"whole numbers from 0 under {name or 'the first column'!r}", repr(value), file)
    return found


def _is_row(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(np.ndim(item) == 0 for item in value)
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 1


def _list(value: Any, file: Path) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    found = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if any(isinstance(item, complex) for item in found):
        raise _bad("real numbers or text", "complex numbers", file)
    return found


def _csv(text: str) -> dict[str, list[Any]]:
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if not rows:
        raise ValueError("no header")
    names, records = rows[0], [row for row in rows[1:] if row]
    if len(set(map(plain_name, names))) < len(names):
        raise ValueError("a name twice in the header")
    if any(len(row) != len(names) for row in records):
        raise ValueError("a line with more or fewer fields than the header")
    return {name: [row[i] for row in records] for i, name in enumerate(names)}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # json itself would keep the last one
        raise ValueError("a key twice")
    return found


def _kind(value: Any) -> str:
    shape = f" {list(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"{type(value).__name__}{shape}"


def _bad(expected: str, got: str, file: Path) -> FileFormatError:
    return FileFormatError(explain(f"{expected} in {os.fspath(file)}", got, ACCEPTED))
