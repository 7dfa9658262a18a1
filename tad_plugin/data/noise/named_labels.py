"""Label files that name the images: CSV or JSON with a path and one or more labels in each record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import FileFormatError, InvalidLabelsError, explain

__all__ = ["NamedLabels", "plain_path", "read_named_labels"]

_PATH = "path"


@dataclass(frozen=True)
class NamedLabels:
    """The records of a label file.

    Attributes:
        source: the file, for messages.
        rows: row of each image, by :func:`plain_path` of its path.
        sets: values of each label set, one per row: whole numbers, or text.
    """

    source: str
    rows: Mapping[str, int]
    sets: Mapping[str, Sequence[Any]]

    def labels(self, key: str, num_classes: int, class_names: Sequence[str] | None) -> Tensor:
        """A label set as int64 [rows]: class names where all values are, else whole numbers in [0, K).

        Raises:
            InvalidLabelsError: other values.
        """
        values = self.sets[key]
        if class_names is not None and all(value in class_names for value in values):
            number = {name: i for i, name in enumerate(class_names)}
            return torch.tensor([number[value] for value in values])
        found = [_class_number(value, num_classes) for value in values]
        bad = next((repr(v) for v, n in zip(values, found, strict=True) if n is None), None)
        if bad is not None:
            do = "Write class names or class numbers, not both"
            raise InvalidLabelsError(
                explain(f"class names, or numbers in [0, {num_classes}), under {key!r} in {self.source}", bad, do)
            )
        return torch.tensor(found)


def read_named_labels(path: Path) -> NamedLabels:
    """Reads a CSV with a header line, a JSON list of records, or a JSON mapping from path to label.

    Every record has a "path" and the same label sets. The mapping's label set is called "label".

    Args:
        path: a regular file ending in ``.csv`` or ``.json``.

    Raises:
        FileFormatError: corrupt, without records, without paths or labels, or with a path twice.
    """
    do = "Write one record per image: its path and its label, under the same names in each"
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = _csv_records(text) if path.suffix.lower() == ".csv" else _json_records(text)
    except Exception as error:  # the parsers raise whatever the bytes provoke
        raise FileFormatError(explain("a CSV or JSON label file", f"{path}: {error}", do)) from error
    names = list(records[0]) if records else []
    uniform = all(list(record) == names and isinstance(record[_PATH], str) for record in records if _PATH in names)
    if _PATH not in names or len(names) < 2 or not uniform:
        got = f"{', '.join(map(str, names)) or 'nothing'} in {path}" + ("" if uniform else ", and other fields")
        raise FileFormatError(explain("records of a 'path' and at least one label set", got, do))
    rows = {plain_path(record[_PATH]): i for i, record in enumerate(records)}
    if len(rows) < len(records):
        twice = next(r[_PATH] for i, r in enumerate(records) if rows[plain_path(r[_PATH])] != i)
        raise FileFormatError(explain("each path once", f"{twice!r} twice in {path}", "Remove one of the records"))
    return NamedLabels(str(path), rows, {name: [r[name] for r in records] for name in names if name != _PATH})


def plain_path(path: str) -> str:
    """The path below train/, with "/" between its parts: both "train/cat/1.png" and "cat/1.png" name one image."""
    return path.replace("\\", "/").removeprefix("./").removeprefix("train/")


def _csv_records(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = list(reader)
    if any(None in record or None in record.values() for record in records):
        raise ValueError("a line with more or fewer fields than the header")
    names = reader.fieldnames or ()
    if len(set(names)) < len(names):
        raise ValueError("a name twice in the header")
    return records


def _json_records(text: str) -> list[dict[str, Any]]:
    content = json.loads(text, object_pairs_hook=_without_repetition)
    if isinstance(content, Mapping):
        return [{_PATH: path, "label": label} for path, label in content.items()]
    if isinstance(content, list) and all(isinstance(record, Mapping) for record in content):
        return content
    raise TypeError("neither a list of records nor a mapping from path to label")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # json itself would keep the last one
        raise ValueError("a key twice")
    return found


def _class_number(value: Any, num_classes: int) -> int | None:
    if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 10:
        value = int(value)
    return value if type(value) is int and 0 <= value < num_classes else None
