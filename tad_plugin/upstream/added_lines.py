"""Reads diffs of added lines, inserts the lines into a file and removes them again.

Our patches only add lines. A diff that removes nothing and shows no context contains no line of the changed code::

    --- a/train.py
    +++ b/train.py
    @@ -9,0 +10 @@
    +import tad_plugin

This means: after line 9 of train.py, insert one line, which becomes line 10. Without context a diff cannot tell whether
it fits a file. So :mod:`tad_plugin.upstream.file_state` compares the digest of the file, and the anchors of each place
if the file is another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tad_plugin.errors import FileFormatError, PatchError, explain
from tad_plugin.upstream.source_text import SourceText

__all__ = [
    "Insertion",
    "added_lines",
    "format_diff",
    "insert_lines",
    "inserted_numbers",
    "parse_diff",
    "remove_lines",
]

_HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@")
_ONLY_ADDED = "Write it with `diff -U0` or `git diff -U0` of changes that only add lines"


@dataclass(frozen=True)
class Insertion:
    """Lines to insert after one line of a file.

    Attributes:
        after: 1-based number of the line before them in the unchanged file; 0 inserts at the start.
        lines: the new lines without their line endings, at least one.
    """

    after: int
    lines: tuple[str, ...]


def added_lines(insertions: Sequence[Insertion]) -> int:
    """Counts the added lines."""
    return sum(len(i.lines) for i in insertions)


def parse_diff(text: str, source: str = "the diff") -> dict[str, tuple[Insertion, ...]]:
    """Reads the insertions of each file from a unified diff with zero context.

    Args:
        text: the diff; its line endings may be of either kind.
        source: name of the diff in messages.

    Returns:
        Path inside the checkout, with forward slashes -> its insertions, in the order of the file.

    Raises:
        FileFormatError: the diff has a removed line, a context line, or anything but headers, hunks and added lines.
    """
    found: dict[str, list[Insertion]] = {}
    hunks: list[Insertion] = []
    old, missing, shift = "", 0, 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.removesuffix("\r")
        where = f"line {number} of {source}"
        if missing:
            if not line.startswith("+"):
                raise _format_error(f"{missing} more added lines at {where}", repr(line))
            last = hunks[-1]
            hunks[-1] = Insertion(last.after, (*last.lines, line[1:]))
            missing -= 1
        elif line.startswith("--- a/") and not old:
            old = line.removeprefix("--- a/")
        elif line.startswith("+++ b/") and old:
            name = line.removeprefix("+++ b/")
            if name != old or name in found:
                raise _format_error(f"each file once, under one name, at {where}", f"{old!r} and {name!r}")
            hunks, old, shift = found.setdefault(name, []), "", 0
        elif (match := _HUNK.fullmatch(line)) and found and not old:
            after, start, missing = int(match[1]), int(match[2]), int(match[3] or 1)
            ordered = not hunks or after > hunks[-1].after
            if not ordered or start != after + shift + 1 or not missing:
                raise _format_error(f"hunks in order, numbered without a gap, at {where}", line)
            hunks.append(Insertion(after, ()))
            shift += missing
        elif line:
            raise _format_error(f"a file's header, a hunk `@@ -n,0 +m,k @@` or an added line at {where}", repr(line))
    if missing or old or not found or not all(found.values()):
        raise _format_error(f"added lines for every file in {source}", "a diff that ends too early, or none")
    return {name: tuple(insertions) for name, insertions in found.items()}


def format_diff(files: dict[str, Sequence[Insertion]]) -> str:
    """Writes the diff that :func:`parse_diff` reads, with plain line feeds."""
    out = []
    for name, insertions in files.items():
        out += [f"--- a/{name}", f"+++ b/{name}"]
        shift = 0
        for i in insertions:
            size = "" if len(i.lines) == 1 else f",{len(i.lines)}"
            out.append(f"@@ -{i.after},0 +{i.after + shift + 1}{size} @@")
            out += [f"+{line}" for line in i.lines]
            shift += len(i.lines)
    return "\n".join(out) + "\n"


def insert_lines(content: bytes, insertions: Sequence[Insertion]) -> bytes:
    r"""Inserts lines into a file; each takes the ending ("\n" or "\r\n") of the line before it.

    A file without a newline at its end still has none.

    Args:
        content: the unchanged file.
        insertions: in the order of the file, with line numbers of the unchanged file.

    Raises:
        PatchError: the file is too short.
    """
    text = SourceText.of(content)
    for i in insertions:
        if i.after > len(text.lines):
            got = f"one of {len(text.lines)}"
            raise PatchError(explain(f"a file of at least {i.after} lines", got, "Check the file"))
    return text.inserted({i.after: [line.encode() for line in i.lines] for i in insertions}).content


def inserted_numbers(insertions: Sequence[Insertion]) -> list[int]:
    """0-based positions of the added lines in the file that has them."""
    numbers: list[int] = []
    for i in insertions:
        start = i.after + len(numbers)
        numbers += range(start, start + len(i.lines))
    return numbers


def remove_lines(content: bytes, insertions: Sequence[Insertion]) -> bytes:
    """Removes the inserted lines: the inverse of :func:`insert_lines`, bit for bit.

    Args:
        content: the file with the inserted lines.
        insertions: the insertions that were made.

    Raises:
        PatchError: a line is not the one that was inserted.
    """
    text, numbers = SourceText.of(content), inserted_numbers(insertions)
    expected = [line for i in insertions for line in i.lines]
    for place, line in zip(numbers, expected, strict=True):
        if place >= len(text.lines) or text.lines[place] != line.encode():
            do = "Restore the file from its source"
            raise PatchError(explain(f"the added line {line.strip()!r} at line {place + 1}", "another", do))
    return text.removed(set(numbers)).content


def _format_error(expected: str, got: str) -> FileFormatError:
    return FileFormatError(explain(expected, got, _ONLY_ADDED))
