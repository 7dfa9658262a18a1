"""Makes a patch from two copies of a codebase: as it is, and with the lines of the hook put in by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tad_plugin.errors import FileFormatError, PatchError, explain
from tad_plugin.upstream.added_lines import Insertion, added_lines, format_diff, insert_lines, parse_diff
from tad_plugin.upstream.anchors import Anchor, indent_width
from tad_plugin.upstream.patch import FORMAT
from tad_plugin.upstream.source_text import SourceText
from tad_plugin.utils.files import atomic_write

__all__ = ["added_between", "make_manifest", "manifest_text", "write_patch"]


def added_between(plain: bytes, edited: bytes, path: str = "the file") -> list[Insertion]:
    """Finds the lines that one file has more than another.

    Args:
        plain: the file as it is.
        edited: the file with added lines.
        path: name of the file in messages.

    Raises:
        PatchError: a line was changed or removed.
    """
    old, new = SourceText.of(plain).lines, SourceText.of(edited).lines
    found: list[Insertion] = []
    position = 0
    lines: list[str] = []
    for line in new:
        # The added lines speak of the hook, so the first line that is the next old one is that one.
        if position < len(old) and line == old[position]:
            if lines:
                found.append(Insertion(position, tuple(lines)))
                lines = []
            position += 1
        else:
            lines.append(line.decode())
    if lines:
        found.append(Insertion(position, tuple(lines)))
    if position < len(old):
        expected = f"every line of {path} in the edited copy, unchanged and in order"
        got = f"line {position + 1} changed or removed"
        raise PatchError(explain(expected, got, "Put the line back, and add lines only"))
    return found


def make_manifest(diff: str, checkout: str | Path, *, repository: str, commit: str) -> dict[str, Any]:
    """Makes the manifest of a patch, for ``manifest.json``.

    Args:
        diff: the text of NAME.patch.
        checkout: an unchanged checkout of that commit.
        repository: address of the codebase.
        commit: 40 hexadecimal digits.

    Raises:
        FileFormatError: the diff has more than added lines.
        PatchError: a file is missing or too short.
    """
    files: dict[str, Any] = {}
    for path, insertions in parse_diff(diff).items():
        place = Path(checkout) / path
        if not place.is_file():
            raise PatchError(explain(f"the file {path}", f"none in {checkout}", "Check the diff and the checkout"))
        content = place.read_bytes()
        text = SourceText.of(content)
        files[path] = {
            "before": text.digest,
            "after": SourceText.of(insert_lines(content, insertions)).digest,
            "added": added_lines(insertions),
            "anchors": [str(Anchor.of(text.lines, i.after, indent_width(i.lines[0].encode()))) for i in insertions],
        }
    return {"format": FORMAT, "repository": repository, "commit": commit, "files": files}


def manifest_text(manifest: dict[str, Any]) -> str:
    """The text of ``manifest.json``."""
    return json.dumps(manifest, indent=1) + "\n"


def write_patch(
    name: str, checkout: str | Path, edited: str | Path, folder: str | Path, *, repository: str, commit: str
) -> list[Path]:
    """Writes ``NAME.patch`` and ``manifest.json`` of a new patch, or of one that is made anew.

    Args:
        name: name of the patch, letters, digits, "_" and "-".
        checkout: the codebase as it is.
        edited: a copy of it with added lines. Only its Python files are compared.
        folder: folder of all patches.
        repository: address of the codebase.
        commit: the commit of ``checkout``, 40 hexadecimal digits.

    Returns:
        The two files.

    Raises:
        PatchError: bad name or commit, a folder is missing, a line was changed or removed, or none was added.
    """
    plain, other = Path(checkout).expanduser(), Path(edited).expanduser()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise PatchError(explain("a name of letters, digits, _ and -", repr(name), "Name it after the codebase"))
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise PatchError(explain("a commit of 40 hexadecimal digits", repr(commit), "Pass --commit"))
    for place in (plain, other):
        if not place.is_dir():
            raise PatchError(explain("the folder of a checkout", str(place), "Pass the folder that git clone made"))
    files: dict[str, list[Insertion]] = {}
    for place in sorted(plain.rglob("*.py")):
        path = place.relative_to(plain)
        if (other / path).is_file() and ".git" not in path.parts:
            found = added_between(place.read_bytes(), (other / path).read_bytes(), path.as_posix())
            if found:
                files[path.as_posix()] = found
    if not files:
        raise PatchError(explain(f"added lines in {other}", "none", "Put the lines of the hook into this copy"))
    diff = format_diff(dict(files))
    if any(parse_diff(diff)[path] != tuple(found) for path, found in files.items()):
        raise FileFormatError(explain("lines that a diff can hold", "others", "Remove control characters"))
    manifest = make_manifest(diff, plain, repository=repository, commit=commit)
    target = Path(folder).expanduser() / name
    target.mkdir(parents=True, exist_ok=True)
    out = [target / f"{name}.patch", target / "manifest.json"]
    atomic_write(out[0], diff)
    atomic_write(out[1], manifest_text(manifest))
    return out
