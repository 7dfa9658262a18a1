"""What a patch finds in one file: its own lines, and where the others belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tad_plugin.errors import FileFormatError, explain
from tad_plugin.upstream.added_lines import Insertion, inserted_numbers
from tad_plugin.upstream.anchors import Anchor, Place, find_places, indent_width, leading, verified
from tad_plugin.upstream.fitting import defined_by, import_line, is_import, misfit
from tad_plugin.upstream.own_lines import find_own_lines
from tad_plugin.upstream.patch import FilePatch
from tad_plugin.upstream.source_text import SourceText

__all__ = ["FileState", "Point", "examine", "patched", "reversed_text"]


@dataclass(frozen=True)
class Point:
    """One insertion of a patch in one file.

    Attributes:
        insertion: the lines, as the patch has them.
        found: 0-based position of each line in the file as it is; None for one that is not there.
        line: number of lines before its place, in the file without the patch's lines; None without a verified place.
        rows: the lines, indented for the file.
        suggestions: places where a side matches, the best first; for a verified place that one.
        problem: why there is no verified place; "" if there is one.
    """

    insertion: Insertion
    found: tuple[int | None, ...]
    line: int | None
    rows: tuple[bytes, ...]
    suggestions: tuple[Place, ...] = ()
    problem: str = ""

    @property
    def in_place(self) -> bool:
        """True if all its lines are in the file."""
        return None not in self.found


@dataclass(frozen=True)
class FileState:
    """A file of a checkout, as a patch sees it.

    Attributes:
        file: what the patch does to it.
        condition: "unpatched" or "patched" (as the patch expects it); "patched and edited" (all lines of the patch are
            there), "partly patched" (some are), "edited" (none is, and the file is recognised); "another file", or
            "missing".
        text: the file as it is; None if it is missing.
        bare: the file without the lines of the patch.
        points: one for each insertion.
    """

    file: FilePatch
    condition: str
    text: SourceText | None
    bare: SourceText | None
    points: tuple[Point, ...]

    @property
    def recognised(self) -> bool:
        """True if it is a file of the codebase."""
        return self.condition not in ("another file", "missing")

    @property
    def own(self) -> list[int]:
        """0-based positions of the patch's lines in it, ascending."""
        return sorted(n for point in self.points for n in point.found if n is not None)


def examine(file: FilePatch, content: bytes | None) -> FileState:
    """Finds the lines of a patch in a file, and the places of those that are not there.

    Args:
        file: what the patch does to it.
        content: the file; None if it is missing.
    """
    if content is None:
        return FileState(file, "missing", None, None, ())
    text = SourceText.of(content)
    if text.digest == file.after:
        numbers = iter(inserted_numbers(file.insertions))
        found = [[next(numbers) for _ in i.lines] for i in file.insertions]
        return _state(file, "patched", text, found, exact=True)
    if text.digest == file.before:
        return _state(file, "unpatched", text, [[None] * len(i.lines) for i in file.insertions], exact=True)
    own = find_own_lines(text.lines, file.insertions, file.anchors)
    bare = text.removed({n for rows in own for n in rows if n is not None})
    complete = all(n is not None for rows in own for n in rows)
    some = any(n is not None for rows in own for n in rows)
    condition = "patched and edited" if complete else "partly patched" if some else "edited"
    state = _state(file, condition, text, own, exact=bare.digest == file.before)
    if condition == "edited":
        # Every file with imports has a place for an import.
        telling = [point for point in state.points if not is_import(point.insertion.lines)]
        near = sum(point.line is not None or bool(point.suggestions) for point in telling)
        sure = sum(point.line is not None or any(p.two_sided for p in point.suggestions) for point in telling)
        if sure == 0 or 2 * near < len(telling):
            return FileState(file, "another file", text, bare, state.points)
    return state


def _state(
    file: FilePatch, condition: str, text: SourceText, own: Sequence[Sequence[int | None]], *, exact: bool
) -> FileState:
    gone = {n for rows in own for n in rows if n is not None}
    bare = text.removed(gone)
    points = []
    for insertion, anchor, rows in zip(file.insertions, file.anchors, own, strict=True):
        first = next((n for n in rows if n is not None), None)
        plain = tuple(line.encode() for line in insertion.lines)
        if first is not None:
            line = first - sum(n < first for n in gone)
            lines = _indented(insertion, indent_width(text.lines[first]), line, bare)
            points.append(Point(insertion, tuple(rows), line, lines))
        elif exact and insertion.after <= len(bare.lines):
            points.append(Point(insertion, tuple(rows), insertion.after, plain))
        else:
            points.append(_placed(insertion, anchor, tuple(rows), bare))
    checked = points if exact else _fitting(_apart(points), bare)
    return FileState(file, condition, text, bare, tuple(checked))


def _placed(insertion: Insertion, anchor: Anchor, rows: tuple[int | None, ...], bare: SourceText) -> Point:
    places = find_places(bare.lines, anchor)
    place = verified(places)
    if place is not None:
        return Point(insertion, rows, place.line, _indented(insertion, place.indent, place.line, bare), (place,))
    plain = tuple(line.encode() for line in insertion.lines)
    top = import_line(bare.content) if is_import(insertion.lines) else None
    if top is not None:
        return Point(insertion, rows, top, plain)
    two_sided = [p for p in places if p.two_sided]
    problem = "no place matches"
    if places:
        problem = f"{len(two_sided)} places match" if two_sided else "no place matches on both sides"
    best = sorted(places, key=lambda p: (-p.two_sided, -p.matching, p.line))
    likely = [p for p in best if p.two_sided or p.matching == best[0].matching][:3]
    return Point(insertion, rows, None, plain, tuple(likely), problem)


def _refused(point: Point, problem: str) -> Point:
    return replace(point, line=None, problem=problem)


def _apart(points: Sequence[Point]) -> list[Point]:
    """Takes back places that two insertions share."""
    out = []
    for point in points:
        shared = any(p is not point and p.line == point.line for p in points)
        if point.line is not None and not point.in_place and shared:
            point = _refused(point, f"another line of the patch has its place after line {point.line} too")
        out.append(point)
    return out


def _fitting(points: Sequence[Point], bare: SourceText) -> list[Point]:
    """Takes back places at which the lines are no statements, or read names that are not defined."""
    out = list(points)
    made, numbers = _with_all(out, bare)
    known = defined_by(line for point in points for line in point.insertion.lines)
    everything = [n + 1 for rows in numbers.values() for n in rows]
    if all(point.in_place for point in out) or misfit(made.content, everything, bare.content, known) is None:
        return out
    for number, rows in numbers.items():
        if not out[number].in_place:
            problem = misfit(made.content, [n + 1 for n in rows], made.removed(set(rows)).content, known)
            if problem is not None:
                out[number] = _refused(out[number], problem)
    return out


def _with_all(points: Sequence[Point], bare: SourceText) -> tuple[SourceText, dict[int, list[int]]]:
    """The file with the lines of all points that have a place, and the 0-based positions of each point's lines."""
    with_place = sorted((p.line, number) for number, p in enumerate(points) if p.line is not None)
    new: dict[int, list[bytes]] = {}
    numbers: dict[int, list[int]] = {}
    total = 0
    for line, number in with_place:
        rows = points[number].rows
        new.setdefault(line, []).extend(rows)
        numbers[number] = [line + total + k for k in range(len(rows))]
        total += len(rows)
    return bare.inserted(new), numbers


def _indented(insertion: Insertion, indent: int, near: int, bare: SourceText) -> tuple[bytes, ...]:
    """The lines of an insertion, the first with ``indent`` columns before it."""
    lines = [line.encode() for line in insertion.lines]
    shift = indent - indent_width(lines[0])
    return tuple(_white(indent_width(line) + shift, near, bare) + line.lstrip() for line in lines)


def _white(columns: int, near: int, bare: SourceText) -> bytes:
    """White space of that many columns, as in the nearest line of the file that has it."""
    for n in sorted(range(len(bare.lines)), key=lambda n: abs(n - near)):
        if bare.lines[n].strip() and indent_width(bare.lines[n]) == columns:
            return leading(bare.lines[n])
    return b" " * columns


def patched(state: FileState) -> tuple[bytes, list[int]]:
    """The file with all lines of the patch: those that are there stay as they are, the others go to their places.

    Args:
        state: of a file in which every point has a place.

    Returns:
        The content, and the 0-based positions of the lines that are new in it.

    Raises:
        FileFormatError: the result for an unpatched file is not the manifest's: the patch is damaged.
    """
    text = state.text
    assert text is not None
    missing: dict[int, list[bytes]] = {}
    for point in sorted(state.points, key=lambda p: p.line or 0):
        if point.in_place:
            continue
        for k, row in enumerate(point.rows):
            if point.found[k] is None:
                missing.setdefault(_position(point, k, state), []).append(row)
    made = text.inserted(missing)
    if state.condition == "unpatched" and made.digest != state.file.after:
        do = "Restore the folder of the patch"
        raise FileFormatError(explain(f"a result for {state.file.path} with the manifest's digest", "another", do))
    new, total = [], 0
    for position in sorted(missing):
        new += [position + total + k for k in range(len(missing[position]))]
        total += len(missing[position])
    return made.content, new


def _position(point: Point, k: int, state: FileState) -> int:
    """Number of lines of the file, as it is, before the k-th line of a point, which is missing."""
    before = [n for n in point.found[:k] if n is not None]
    if before:
        return before[-1] + 1
    after = [n for n in point.found[k:] if n is not None]
    if after:
        return after[0]
    line = point.line or 0
    # Back from the file without the patch's lines: each of them before the place moves it down.
    for n in state.own:
        line += n < line
    return line


def reversed_text(state: FileState) -> bytes:
    """The file without the lines of the patch; all else stays as it is.

    Raises:
        FileFormatError: the result for a patched file is not the manifest's: the patch is damaged.
    """
    assert state.bare is not None
    if state.condition == "patched" and state.bare.digest != state.file.before:
        do = "Restore the folder of the patch"
        raise FileFormatError(explain(f"a result for {state.file.path} with the manifest's digest", "another", do))
    return state.bare.content
