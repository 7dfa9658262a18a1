"""Texts about a checkout and a patch: its condition, a preview, and a guide for pasting lines by hand."""

from __future__ import annotations

import difflib
import re

from tad_plugin.upstream.checkout import Change, Status
from tad_plugin.upstream.file_state import FileState, Point
from tad_plugin.upstream.patch import Patch
from tad_plugin.upstream.source_text import SourceText

__all__ = ["guide_text", "left_lines", "preview", "status_text"]


def status_text(patch: Patch, found: Status) -> str:
    """The condition of a checkout and of each file."""
    lines = [f"{patch.name}: {found.condition} (commit {found.commit or 'unknown'}, made for {patch.commit})"]
    for state in found.files:
        there = f"{len(state.own)} of {state.file.added} lines there"
        lost = [p for p in state.points if not p.in_place and p.line is None]
        more = f", {len(lost)} of {len(state.points)} places not verified" if lost and state.recognised else ""
        lines.append(f"  {state.file.path}: {state.condition}, {there}{more}")
    return "\n".join(lines)


def preview(changes: list[Change]) -> str:
    """The changes as a unified diff."""
    out: list[str] = []
    for change in changes:
        old, new = (
            [line.decode(errors="replace") for line in SourceText.of(content).lines]
            for content in (change.old, change.new)
        )
        out += difflib.unified_diff(old, new, f"a/{change.path}", f"b/{change.path}", n=2, lineterm="")
    return "\n".join(out)


def guide_text(patch: Patch, found: Status) -> str:
    """For each line of the patch: the file, the line of the file it goes after, and what to paste.

    Places where one side matches only are suggestions, and are said to be that.
    """
    out = []
    for state in found.files:
        if not state.recognised:
            out.append(f"{state.file.path}: {state.condition}")
            continue
        out.append(f"{state.file.path}: {state.condition}")
        for point in state.points:
            out += [f"  {line}" for line in _point(state, point)]
    return "\n".join(out)


def _point(state: FileState, point: Point) -> list[str]:
    rows = [f"    {row.decode()}" for row in point.rows]
    if point.in_place:
        where = ", ".join(str(n + 1) for n in point.found if n is not None)
        return [f"in place, line {where}:", *rows]
    if point.line is not None:
        return [f"after line {_number(state, point.line)} (verified):", *rows]
    tips = []
    for place in point.suggestions:
        sides = [
            f"{side.run} {'lines' if side.run > 1 else 'line'} {word}{' (not the next one)' if side.edited else ''}"
            for side, word in ((place.before, "before"), (place.after, "after"))
            if side.run
        ]
        tips.append(f"  suggestion: after line {_number(state, place.line)}, where {' and '.join(sides)} it match")
    return [f"not verified: {point.problem}", *rows, *tips]


def _number(state: FileState, line: int) -> int:
    """Line number in the file as it is, from one in the file without the patch's lines."""
    for n in state.own:
        line += n < line
    return line


def left_lines(changes: list[Change]) -> list[str]:
    """Lines that still speak of the hook after a reversal: the user's own, or lines of the patch that were edited."""
    out = []
    for change in changes:
        for number, line in enumerate(SourceText.of(change.new).lines, 1):
            text = line.decode(errors="replace").strip()
            if re.search(r"\b(tad_plugin|hook\.)", text) and not text.startswith("#"):
                out.append(f"{change.path}, line {number}: {text}")
    return out
