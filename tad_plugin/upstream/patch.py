"""Patches for checkouts of public codebases: verified by hash, applied all or nothing, reversed bit for bit.

A patch is a folder ``patches/NAME`` with two files. ``NAME.patch`` holds the added lines (see
:mod:`tad_plugin.upstream.added_lines`). ``manifest.json`` names the repository and the commit, and gives for each
changed file its sha256 before and after and the number of added lines. Nothing here needs git.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tad_plugin.errors import FileFormatError, PatchError, explain, unknown_name
from tad_plugin.upstream.added_lines import Insertion, added_lines, insert_lines, parse_diff, remove_lines
from tad_plugin.utils.files import read_json

__all__ = [
    "FilePatch",
    "Patch",
    "Status",
    "apply",
    "available_patches",
    "check",
    "head_commit",
    "load_patch",
    "make_manifest",
    "patches_folder",
    "reverse",
    "status",
]

_FORMAT = 1


@dataclass(frozen=True)
class FilePatch:
    """The change of one file.

    Attributes:
        path: inside the checkout, with forward slashes.
        before: sha256 of the unchanged file, 64 hexadecimal digits.
        after: sha256 of the patched file.
        insertions: the added lines.
    """

    path: str
    before: str
    after: str
    insertions: tuple[Insertion, ...]

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


@dataclass(frozen=True)
class Status:
    """Condition of a checkout.

    Attributes:
        files: path -> "clean" (as the patch expects it), "patched", "changed" or "missing".
        commit: the checkout's commit; None without a readable .git.
        condition: "clean", "patched", "partly patched" (only clean and patched files), or "changed".
    """

    files: Mapping[str, str]
    commit: str | None

    @property
    def condition(self) -> str:
        """See the class."""
        found = set(self.files.values())
        if len(found) == 1 and found <= {"clean", "patched"}:
            return found.pop()
        return "partly patched" if found == {"clean", "patched"} else "changed"


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
        if manifest["format"] != _FORMAT:
            raise FileFormatError(explain(f"format {_FORMAT} in {source}", repr(manifest["format"]), do))
        pinned = {str(k): (str(v["before"]), str(v["after"]), int(v["added"])) for k, v in manifest["files"].items()}
        repository, commit = str(manifest["repository"]), str(manifest["commit"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FileFormatError):
            raise
        expected = f"format, repository, commit and files (before, after, added) in {source}"
        raise FileFormatError(explain(expected, f"{type(error).__name__}: {error}", do)) from error
    counts = {path: added_lines(insertions) for path, insertions in diff.items()}
    if {path: added for path, (_, _, added) in pinned.items()} != counts:
        raise FileFormatError(explain(f"the files and line counts of the diff, {counts}", f"others in {source}", do))
    for path in pinned:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or ":" in path:
            raise FileFormatError(explain(f"paths inside the checkout in {source}", repr(path), do))
    files = tuple(FilePatch(path, pinned[path][0], pinned[path][1], lines) for path, lines in diff.items())
    return Patch(name, repository, commit, files)


def make_manifest(diff: str, checkout: str | Path, *, repository: str, commit: str) -> dict[str, Any]:
    """Makes the manifest of a new patch, for ``manifest.json``.

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
        content = _read(_root(checkout) / path)
        if content is None:
            raise PatchError(explain(f"the file {path}", f"none in {checkout}", "Check the diff and the checkout"))
        files[path] = {
            "before": _sha256(content),
            "after": _sha256(insert_lines(content, insertions)),
            "added": added_lines(insertions),
        }
    return {"format": _FORMAT, "repository": repository, "commit": commit, "files": files}


# -- looking ---------------------------------------------------------------------------------------
def status(patch: Patch, checkout: str | Path) -> Status:
    """Finds the condition of a checkout; changes nothing.

    Raises:
        PatchError: ``checkout`` is not a folder.
    """
    root = _root(checkout)
    files = {f.path: _condition(f, _read(root / f.path)) for f in patch.files}
    return Status(files, head_commit(root))


def check(patch: Patch, checkout: str | Path) -> None:
    """Checks that :func:`apply` would succeed; changes nothing.

    Raises:
        PatchError: it would fail; the message says why and names the files.
    """
    _prepare(patch, checkout, "clean")


def _prepare(patch: Patch, checkout: str | Path, wanted: str) -> dict[Path, tuple[bytes, bytes]]:
    """Maps each file to its old and new content; raises PatchError if a file is not as expected."""
    root, found = _root(checkout), status(patch, checkout)
    applying = wanted == "clean"
    if found.condition == ("patched" if applying else "clean"):
        got = "one to which it is already applied" if applying else "one to which it is not applied"
        do = "There is nothing to do" + ("; `patch reverse` removes the lines" if applying else "")
        raise PatchError(explain(f"a checkout {'without' if applying else 'with'} the patch {patch.name!r}", got, do))
    _refuse_others(patch, root, found)
    if applying:
        if found.commit is not None and found.commit != patch.commit:
            do = f"Check out that commit of {patch.repository}"
            got = f"commit {found.commit}"
            raise PatchError(explain(f"a checkout of commit {patch.commit}, which {patch.name!r} is for", got, do))
        if found.condition == "partly patched":
            done = ", ".join(path for path, condition in found.files.items() if condition == "patched")
            do = "Remove the lines with `patch reverse`, then apply again"
            raise PatchError(explain("files that are all unchanged", f"the patch in {done} already", do))
    out: dict[Path, tuple[bytes, bytes]] = {}
    for file in patch.files:
        if not applying and found.files[file.path] == "clean":
            continue  # an earlier attempt was killed here
        place = (root / file.path).resolve()
        if not place.is_relative_to(root.resolve()):
            do = "Put the file itself there, as git clone does"
            raise PatchError(explain(f"{file.path} inside the checkout {root}", f"a link to {place}", do))
        content = place.read_bytes()
        made = (insert_lines if applying else remove_lines)(content, file.insertions)
        if _sha256(made) != (file.after if applying else file.before):
            do = "Restore the folder of the patch"
            raise FileFormatError(explain(f"a result for {file.path} with the manifest's hash", "another", do))
        out[place] = (content, made)
    return out


def _refuse_others(patch: Patch, root: Path, found: Status) -> None:
    bad = []
    for file in patch.files:
        condition = found.files[file.path]
        if condition == "missing":
            bad.append(f"no {file.path}")
        elif condition == "changed":
            endings = _differs_in_endings(file, _read(root / file.path) or b"")
            bad.append(f"another {file.path}" + (" (its line endings were converted)" if endings else ""))
    if bad:
        at = f" at commit {found.commit}" if found.commit not in (None, patch.commit) else ""
        expected = f"the files of commit {patch.commit} of {patch.repository}"
        do = "Check out that commit afresh, with core.autocrlf=false if git converts line endings"
        raise PatchError(explain(expected, f"{', '.join(bad)} in {root}{at}", do))


def _differs_in_endings(file: FilePatch, content: bytes) -> bool:
    plain = content.replace(b"\r\n", b"\n")
    return bool({_sha256(plain), _sha256(plain.replace(b"\n", b"\r\n"))} & {file.before, file.after})


# -- changing --------------------------------------------------------------------------------------
def apply(patch: Patch, checkout: str | Path) -> list[Path]:
    """Adds the lines to every file, or changes nothing.

    Args:
        patch: the patch.
        checkout: folder of the codebase, at the patch's commit (checked if it has a .git).

    Returns:
        The files that were changed.

    Raises:
        PatchError: the patch is applied already or in part, a file is missing or changed or a link that leaves
            the checkout, the commit is another one, or a write failed.
    """
    return _replace_all(_prepare(patch, checkout, "clean"))


def reverse(patch: Patch, checkout: str | Path) -> list[Path]:
    """Removes the lines: every file gets its old bytes. Also repairs a checkout that is partly patched.

    Raises:
        PatchError: the patch is not applied, a file is missing, was changed since or is a link that leaves the
            checkout, or a write failed.
    """
    return _replace_all(_prepare(patch, checkout, "patched"))


def _replace_all(contents: Mapping[Path, tuple[bytes, bytes]]) -> list[Path]:
    """Writes all new contents beside the files, then renames them; after a failure it restores the renamed files."""
    temporaries = {place: place.with_name(f".tmp-{os.getpid()}-{place.name}") for place in contents}
    done: list[Path] = []
    try:
        for place, (_, made) in contents.items():
            _write_beside(place, temporaries[place], made)
        for place in contents:
            os.replace(temporaries[place], place)
            done.append(place)
    except OSError as error:
        stuck = [str(place) for place in done if not _restore(place, temporaries[place], contents[place][0])]
        state = f"; {', '.join(stuck)} could not be put back" if stuck else "; every file is as it was"
        do = "Check the permissions and the free space"
        raise PatchError(explain("to write the checkout", f"{error}{state}", do)) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    return done


def _write_beside(place: Path, temporary: Path, content: bytes) -> None:
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(place, temporary)


def _restore(place: Path, temporary: Path, content: bytes) -> bool:
    try:
        _write_beside(place, temporary, content)
        os.replace(temporary, place)
    except OSError:
        return False
    return True


# -- helpers ---------------------------------------------------------------------------------------
def _root(checkout: str | Path) -> Path:
    root = Path(checkout).expanduser()
    if not root.is_dir():
        raise PatchError(explain("the folder of a checkout", str(checkout), "Pass the folder that git clone made"))
    return root


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _condition(file: FilePatch, content: bytes | None) -> str:
    if content is None:
        return "missing"
    return {file.before: "clean", file.after: "patched"}.get(_sha256(content), "changed")


def head_commit(checkout: str | Path) -> str | None:
    """Reads the checked-out commit from .git without git; None if there is none or it cannot be read."""
    git = Path(checkout) / ".git"
    try:
        if git.is_file():  # a worktree or submodule
            git = Path(checkout) / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        common = git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        name = head.removeprefix("ref:").strip()
        for place in (git / name, shared / name):
            if place.is_file():
                return _commit(place.read_text(encoding="utf-8").strip())
        for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return _commit(line.split(" ", 1)[0])
    except (OSError, UnicodeDecodeError):
        return None
    return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None
