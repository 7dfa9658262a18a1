"""Anchors: where added lines belong in a file that is not the one the patch was written for.

An anchor keeps hashes of the code lines around a place and their indentation relative to the added lines. It holds no
text of the codebase. Empty lines and comments are skipped, so they can be added and removed freely.

A place is *verified* if lines on both sides match next to it and no other place in the file is like it. One line next
to the place may have been edited, if the two lines beyond it and the two on the other side match. An import needs no
place of its own: it goes after the first imports of a file.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tad_plugin.errors import FileFormatError, explain

__all__ = ["Anchor", "Place", "Side", "find_places", "indent_width", "is_code", "leading", "verified"]

_DEPTH = 4
_LEAST = 3
_START, _END = "^", "$"
_TOKEN = re.compile(r"(\^|\$|[0-9a-f]{10})(?:([+-]\d+))?")


def is_code(line: bytes) -> bool:
    """True for a line that is neither empty nor a comment."""
    text = line.strip()
    return bool(text) and not text.startswith(b"#")


def leading(line: bytes) -> bytes:
    """The white space before a line."""
    return line[: len(line) - len(line.lstrip())]


def indent_width(line: bytes) -> int:
    """Columns of the white space before a line; a tab goes to the next multiple of four."""
    return len(leading(line).expandtabs(4))


@dataclass(frozen=True)
class Anchor:
    """The surroundings of a place.

    Attributes:
        before: hash and relative indentation of the code lines before it, the nearest first, at most four; at the start
            of the file "^" ends them.
        after: the same after it, ended by "$" at the end of the file.
        lead: number of empty lines and comments between the line before and the place.
        least: number of matching lines that tell the place from all others in the file the patch was written for.
    """

    before: tuple[tuple[str, int], ...]
    after: tuple[tuple[str, int], ...]
    lead: int
    least: int

    @classmethod
    def of(cls, lines: Sequence[bytes], after: int, indent: int) -> Anchor:
        """Makes the anchor of the place after the first ``after`` lines.

        Args:
            lines: of the file without the added lines, without endings.
            after: number of lines before the place.
            indent: columns before the first added line.
        """
        code = [n for n, line in enumerate(lines) if is_code(line)]
        gap = sum(n < after for n in code)
        file = _file(tuple(lines))
        before = tuple(file.token(gap - 1 - i, indent) for i in range(_DEPTH) if gap - i >= 0)
        behind = tuple(file.token(gap + i, indent) for i in range(_DEPTH) if gap + i <= len(code))
        lead = after - (code[gap - 1] + 1 if gap else 0)
        anchor = cls(before, behind, lead, _LEAST)
        rivals = [p.matching for p in find_places(lines, anchor) if p.gap != gap and p.before.run and p.after.run]
        return cls(before, behind, lead, max(_LEAST, 1 + max(rivals, default=0)))

    def __str__(self) -> str:
        before, after = (" ".join(f"{h}{r:+d}" if r else h for h, r in side) for side in (self.before, self.after))
        return f"{self.lead} {self.least} {before} | {after}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """Reads what ``str`` wrote. Raises FileFormatError."""
        try:
            head, after = text.split(" | ")
            lead, least, *before = head.split(" ")
            sides = [tuple(_parse_token(word) for word in words) for words in (before, after.split(" "))]
            anchor = cls(sides[0], sides[1], int(lead), int(least))
        except ValueError as error:
            do = "Restore the folder of the patch"
            raise FileFormatError(explain("an anchor", f"{text!r} ({error})", do)) from error
        return anchor


def _parse_token(word: str) -> tuple[str, int]:
    match = _TOKEN.fullmatch(word)
    if match is None:
        raise ValueError(f"no hash with an indentation: {word!r}")
    return match[1], int(match[2] or 0)


@dataclass(frozen=True)
class Side:
    """How well one side of a place matches.

    Attributes:
        run: number of matching lines in a row.
        edited: True if they start one line away from the place.
    """

    run: int
    edited: bool


@dataclass(frozen=True)
class Place:
    """A place in a file.

    Attributes:
        line: number of lines of the file before it.
        gap: number of code lines of the file before it.
        indent: columns before the first added line.
        before: the match before it.
        after: the match after it.
        least: number of matching lines that the anchor asks for.
    """

    line: int
    gap: int
    indent: int
    before: Side
    after: Side
    least: int

    @property
    def matching(self) -> int:
        """Number of matching lines on both sides."""
        return self.before.run + self.after.run

    @property
    def two_sided(self) -> bool:
        """True if both sides match well enough."""
        if (self.before.edited and self.after.edited) or self.matching < self.least:
            return False
        if self.before.edited or self.after.edited:
            return min(self.before.run, self.after.run) >= 2
        return min(self.before.run, self.after.run) >= 1


class _File:
    """Hashes and indentations of the code lines of a file, with a mark at both ends."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self.lines = lines
        self.code = [n for n, line in enumerate(lines) if is_code(line)]
        self.hashes = [hashlib.sha256(lines[n].strip()).hexdigest()[:10] for n in self.code]
        self.indents = [indent_width(lines[n]) for n in self.code]

    def token(self, position: int, indent: int) -> tuple[str, int]:
        """Hash of the code line at ``position`` and its indentation less ``indent``."""
        if position < 0:
            return _START, 0
        if position >= len(self.code):
            return _END, 0
        return self.hashes[position], self.indents[position] - indent

    def hash(self, position: int) -> str | None:
        """Hash of the code line at ``position``, the mark of an end next to it, or None farther out."""
        return self.token(position, 0)[0] if -1 <= position <= len(self.code) else None

    def indent(self, position: int) -> int | None:
        """Columns before the code line at ``position``; None at the ends, where no line is."""
        return self.indents[position] if 0 <= position < len(self.code) else None


_file = functools.lru_cache(maxsize=4)(_File)  # all anchors of a file ask for the same lines


def find_places(lines: Sequence[bytes], anchor: Anchor) -> list[Place]:
    """Finds all places of a file at which a line on one side matches, in the order of the file.

    Args:
        lines: of the file without the added lines, without endings.
        anchor: the anchor of the place.
    """
    file = _file(tuple(lines))
    found = []
    for gap in range(len(file.code) + 1):
        for indent in sorted(_indents(file, anchor, gap)):
            before = _side(file, anchor.before, gap - 1, -1, indent)
            after = _side(file, anchor.after, gap, 1, indent)
            if before.run or after.run:
                start = file.code[gap - 1] + 1 if gap else 0
                end = file.code[gap] if gap < len(file.code) else len(lines)
                line = start + min(anchor.lead, end - start)
                found.append(Place(line, gap, indent, before, after, anchor.least))
    return found


def verified(places: Sequence[Place]) -> Place | None:
    """The one place that matches on both sides, or None if there is none or more than one."""
    two_sided = [place for place in places if place.two_sided]
    return two_sided[0] if len(two_sided) == 1 else None


def _indents(file: _File, anchor: Anchor, gap: int) -> set[int]:
    """The indentations of the added lines that fit a matching line next to the place, or one line away."""
    found = set()
    for side, start, step in ((anchor.before, gap - 1, -1), (anchor.after, gap, 1)):
        for away in range(min(2, len(side))):
            position = start + step * away
            indent = file.indent(position)
            if indent is not None and file.hash(position) == side[away][0]:
                found.add(indent - side[away][1])
                break
    return {indent for indent in found if indent >= 0}


def _side(file: _File, wanted: tuple[tuple[str, int], ...], start: int, step: int, indent: int) -> Side:
    """Counts the matching lines of one side, from the place or from the line after the next."""
    for away in (0, 1):
        run = 0
        for i in range(away, len(wanted)):
            position = start + step * i
            expected = file.indent(position)
            same = expected is None or expected - wanted[i][1] == indent
            if file.hash(position) != wanted[i][0] or not same:
                break
            run += 1
        if run >= 1 + away:
            return Side(run, bool(away))
    return Side(0, False)
