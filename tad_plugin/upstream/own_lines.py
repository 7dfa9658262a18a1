"""Finds the lines that a patch added, by their content, in a file that was edited since."""

from __future__ import annotations

from collections.abc import Sequence

from tad_plugin.upstream.added_lines import Insertion
from tad_plugin.upstream.anchors import Anchor, find_places, is_code

__all__ = ["find_own_lines"]

_MATCH = 1000  # one more line found counts more than any surroundings


def find_own_lines(
    lines: Sequence[bytes], insertions: Sequence[Insertion], anchors: Sequence[Anchor]
) -> list[list[int | None]]:
    """Finds the added lines of a patch in a file.

    Lines are compared without the white space around them. As many as possible are found in the order of the patch;
    where one occurs more often than it was added, its surroundings decide. A line that was moved out of order is found
    if it occurs once more.

    Args:
        lines: of the file, without endings.
        insertions: of the patch, in the order of the file.
        anchors: one for each insertion.

    Returns:
        For each insertion the 0-based position of each of its lines, or None.
    """
    wanted = [(h, k, line.strip().encode()) for h, i in enumerate(insertions) for k, line in enumerate(i.lines)]
    texts = {text for *_, text in wanted}
    places = [n for n, line in enumerate(lines) if line.strip() in texts]
    scores = _surroundings(lines, places, anchors)
    chosen = _align([(h, text) for h, _, text in wanted], [(n, lines[n].strip()) for n in places], scores)
    free = [n for n in places if n not in chosen.values()]
    out: list[list[int | None]] = [[None] * len(i.lines) for i in insertions]
    for number, (h, k, text) in enumerate(wanted):
        position = chosen.get(number)
        if position is None:
            moved = [n for n in free if lines[n].strip() == text]
            if len(moved) == 1:
                position = moved[0]
                free.remove(position)
        out[h][k] = position
    return out


def _surroundings(lines: Sequence[bytes], places: Sequence[int], anchors: Sequence[Anchor]) -> list[dict[int, int]]:
    """For each anchor: position of a line -> number of matching lines around it, without the lines at ``places``."""
    own = set(places)
    bare = [line for n, line in enumerate(lines) if n not in own]
    gaps, code = {}, 0
    for n, line in enumerate(lines):
        if n in own:
            gaps[n] = code
        elif is_code(line):
            code += 1
    found = []
    for anchor in anchors:
        best: dict[int, int] = {}
        for place in find_places(bare, anchor):
            best[place.gap] = max(best.get(place.gap, 0), place.matching)
        found.append({n: best.get(gap, 0) for n, gap in gaps.items()})
    return found


def _align(
    wanted: Sequence[tuple[int, bytes]], given: Sequence[tuple[int, bytes]], scores: Sequence[dict[int, int]]
) -> dict[int, int]:
    """The best alignment in order: number of a wanted line -> position of a given one."""
    n, m = len(wanted), len(given)
    best = [[0] * (m + 1) for _ in range(n + 1)]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            best[i][j] = max(best[i + 1][j], best[i][j + 1])
            if wanted[i][1] == given[j][1]:
                best[i][j] = max(best[i][j], _MATCH + scores[wanted[i][0]][given[j][0]] + best[i + 1][j + 1])
    chosen, i, j = {}, 0, 0
    while i < n and j < m:
        gain = _MATCH + scores[wanted[i][0]][given[j][0]] + best[i + 1][j + 1]
        if wanted[i][1] == given[j][1] and best[i][j] == gain:
            chosen[i] = given[j][0]
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return chosen
