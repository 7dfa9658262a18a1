"""Patches for checkouts of public codebases, as their folders hold them.

A patch is a folder ``patches/NAME`` with two files. ``NAME.patch`` holds the added lines (see
:mod:`tad_plugin.upstream.added_lines`). ``manifest.json`` names the repository and the commit, and gives for each
changed file its digest before and after (see :class:`tad_plugin.upstream.source_text.SourceText`), the number of added
lines, and the anchor of each place (see :mod:`tad_plugin.upstream.anchors`).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tad_plugin.errors import FileFormatError, PatchError, explain, unknown_name
from tad_plugin.upstream.added_lines import Insertion, added_lines, parse_diff
from tad_plugin.upstream.anchors import Anchor
from tad_plugin.utils.files import read_json

__all__ = ["FORMAT", "FilePatch", "Patch", "available_patches", "load_patch", "only_files", "patches_folder"]

FORMAT = 2
"""Format of ``manifest.json``."""


@dataclass(frozen=True)
class FilePatch:
    """The change of one file.

    Attributes:
        path: inside the checkout, with forward slashes.
        before: digest of the unchanged file, 64 hexadecimal digits.
        after: digest of the patched file.
        insertions: the added lines.
        anchors: one for each insertion.
    """

    path: str
    before: str
    after: str
    insertions: tuple[Insertion, ...]
    anchors: tuple[Anchor, ...]

    @property
    def added(self) -> int:
        """Number of added lines."""
        return added_lines(self.insertions)


@dataclass(frozen=True)
class Patch:
    """A patch with its manifest.

    Attributes:
        name: "dm", "mtt", ...
        repository: address of the codebase.
        commit: the commit that the patch was written for, 40 hexadecimal digits.
        files: in the order of the diff.
    """

    name: str
    repository: str
    commit: str
    files: tuple[FilePatch, ...]


# -- finding and reading ---------------------------------------------------------------------------
def patches_folder() -> Path:
    """Finds the folder ``patches``: beside the package, or ``share/tad_plugin/patches`` of an installation.

    Raises:
        PatchError: neither exists.
    """
    root, shared = Path(__file__).resolve().parents[2], Path("share", "tad_plugin", "patches")
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme)) for scheme in schemes]
    # `pip install --target` puts it beside the package
    for place in (root / "patches", *(folder / shared for folder in (root, *installed))):
        if any(place.glob("*/manifest.json")):
            return place
    do = "Install tad_plugin again, or pass the folder with --patches"
    raise PatchError(explain("the folder `patches` of tad_plugin", "none beside the installed package", do))


def available_patches(folder: str | Path | None = None) -> list[str]:
    """Names of the patches in ``folder`` (by default the project's own), sorted."""
    folder = Path(folder) if folder is not None else patches_folder()
    return sorted(p.parent.name for p in folder.glob("*/manifest.json"))


def load_patch(name: str, folder: str | Path | None = None) -> Patch:
    """Reads a patch and checks that its diff and its manifest list the same files and line counts.

    Args:
        name: name of the patch.
        folder: folder of all patches; by default the project's own.

    Raises:
        UnknownNameError: no patch of that name.
        FileFormatError: the diff has more than added lines, or the manifest is damaged or does not fit the diff.
    """
    folder = Path(folder) if folder is not None else patches_folder()
    if name not in available_patches(folder):
        raise unknown_name("patch", name, available_patches(folder))
    manifest_file, diff_file = folder / name / "manifest.json", folder / name / f"{name}.patch"
    manifest = read_json(manifest_file)
    try:
        diff = parse_diff(diff_file.read_text(encoding="utf-8"), diff_file.name)
    except (OSError, UnicodeDecodeError) as error:
        do = "Restore the folder of the patch"
        raise FileFormatError(explain(f"a readable {diff_file}", str(error), do)) from error
    return _assemble(name, manifest, diff, manifest_file)


def _assemble(name: str, manifest: Any, diff: dict[str, tuple[Insertion, ...]], source: Path) -> Patch:
    do = "Restore the folder of the patch"
    try:
        if manifest["format"] != FORMAT:
            raise FileFormatError(explain(f"format {FORMAT} in {source}", repr(manifest["format"]), do))
        pinned = {str(path): _pinned(entry) for path, entry in manifest["files"].items()}
        repository, commit = str(manifest["repository"]), str(manifest["commit"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FileFormatError):
            raise
        expected = f"format, repository, commit and files (before, after, added, anchors) in {source}"
        raise FileFormatError(explain(expected, f"{type(error).__name__}: {error}", do)) from error
    counts = {path: (added_lines(insertions), len(insertions)) for path, insertions in diff.items()}
    if {path: (added, len(anchors)) for path, (_, _, added, anchors) in pinned.items()} != counts:
        expected = f"the files, line counts and numbers of places of the diff, {counts}"
        raise FileFormatError(explain(expected, f"others in {source}", do))
    for path in pinned:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or ":" in path:
            raise FileFormatError(explain(f"paths inside the checkout in {source}", repr(path), do))
    files = tuple(
        FilePatch(path, pinned[path][0], pinned[path][1], insertions, pinned[path][3])
        for path, insertions in diff.items()
    )
    return Patch(name, repository, commit, files)


def _pinned(entry: Any) -> tuple[str, str, int, tuple[Anchor, ...]]:
    anchors = tuple(Anchor.parse(text) for text in entry["anchors"])
    return str(entry["before"]), str(entry["after"]), int(entry["added"]), anchors


def only_files(patch: Patch, files: Sequence[str]) -> Patch:
    """The patch for some of its files. An empty sequence means all.

    Raises:
        UnknownNameError: the patch does not change a file of that name.
    """
    known = [file.path for file in patch.files]
    for name in files:
        if name not in known:
            raise unknown_name("file", name, known)
    return replace(patch, files=tuple(file for file in patch.files if not files or file.path in files))
