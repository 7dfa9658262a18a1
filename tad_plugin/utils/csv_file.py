"""Tables as CSV files that a spreadsheet can open."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tad_plugin.utils.files import atomic_save

__all__ = ["write_csv"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], path: str | Path) -> None:
    """Writes rows as CSV with a header; an existing file is replaced atomically.

    A text that a spreadsheet would run as a formula (it starts with = + - @, tab or carriage return) gets an
    apostrophe before it. Numbers stay as they are.

    Args:
        rows: a value for each column.
        columns: names of the columns, in order.
        path: the file.
    """

    def save(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)

    atomic_save(path, save)


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
