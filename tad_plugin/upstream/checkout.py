"""Applies a patch to a checkout and takes it back. The content of the files decides; git is not needed.

Added lines go where lines on both sides match; other edits of the files stay. All files are changed, or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tad_plugin.errors import PatchError, explain
from tad_plugin.upstream.file_state import FileState, examine, patched, reversed_text
from tad_plugin.upstream.git_folder import head_commit
from tad_plugin.upstream.patch import Patch

__all__ = ["Change", "Status", "apply", "plan_apply", "plan_reverse", "reverse", "status", "write_changes"]


@dataclass(frozen=True)
class Change:
    """A new content for one file.

    Attributes:
        path: inside the checkout.
        place: the file itself.
        old: its content.
        new: its content after the change.
    """

    path: str
    place: Path
    old: bytes
    new: bytes


@dataclass(frozen=True)
class Status:
    """Condition of a checkout.

    Attributes:
        files: in the order of the patch.
        commit: the checkout's commit; None without a readable .git. It decides nothing.
    """

    files: tuple[FileState, ...]
    commit: str | None

    @property
    def condition(self) -> str:
        """The condition of all files together.

        "patched" or "unpatched": as the patch was made. "patched and edited": all its lines are there. "partly
        patched": some are. "edited": none is. "not this repository": no file is recognised.
        """
        found = {state.condition for state in self.files}
        if not any(state.recognised for state in self.files):
            return "not this repository"
        if len(found) == 1:
            return found.pop()
        if found == {"patched", "patched and edited"}:
            return "patched and edited"
        return "partly patched" if any(state.own for state in self.files) else "edited"


def status(patch: Patch, checkout: str | Path) -> Status:
    """Finds the condition of a checkout; changes nothing.

    Raises:
        PatchError: ``checkout`` is not a folder.
    """
    root = Path(checkout).expanduser()
    if not root.is_dir():
        raise PatchError(explain("the folder of a checkout", str(checkout), "Pass the folder that git clone made"))
    contents = [(root / f.path).read_bytes() if (root / f.path).is_file() else None for f in patch.files]
    files = tuple(examine(f, content) for f, content in zip(patch.files, contents, strict=True))
    return Status(files, head_commit(root))


def plan_apply(patch: Patch, checkout: str | Path) -> list[Change]:
    """Finds what applying the patch changes; changes nothing.

    Lines of the patch that are there already, from an earlier attempt or put there by hand, stay as they are.

    Returns:
        One change for each file that lacks lines of the patch.

    Raises:
        PatchError: there is nothing to do; or a file is missing, is another one, or has a point without a verified
            place. The message names them all.
    """
    found = status(patch, checkout)
    if found.condition in ("patched", "patched and edited"):
        expected = f"a checkout without the patch {patch.name!r}"
        do = "There is nothing to do; `patch reverse` removes the lines"
        raise PatchError(explain(expected, "one to which it is already applied", do))
    problems = [problem for state in found.files for problem in _problems(state)]
    if problems:
        raise PatchError(explain(f"files of {patch.repository}", f"{'; '.join(problems)}", _advice(patch, found)))
    out = []
    for state in found.files:
        if any(not point.in_place for point in state.points):
            out.append(_change(state, checkout, patched(state)[0]))
    return out


def _problems(state: FileState) -> list[str]:
    path = state.file.path
    if not state.recognised:
        return [f"no {path}" if state.condition == "missing" else f"another {path}"]
    lost = [p for p in state.points if not p.in_place and p.line is None]
    return [f"{path}: {p.problem} for {p.insertion.lines[0].strip()!r}" for p in lost]


def _advice(patch: Patch, found: Status) -> str:
    absent = [state.file.path for state in found.files if not state.recognised]
    if len(absent) == len(found.files):
        return f"Pass the folder of a checkout of {patch.repository}"
    if absent:
        present = ",".join(state.file.path for state in found.files if state.recognised)
        return f"Patch the others only, with --files {present}"
    return "`patch guide` shows where these lines may belong; put them in by hand, then apply the rest"


def plan_reverse(patch: Patch, checkout: str | Path) -> list[Change]:
    """Finds what reversing the patch changes; changes nothing.

    The lines of the patch are found by their content. All other lines stay.

    Returns:
        One change for each file that has lines of the patch.

    Raises:
        PatchError: no file has a line of the patch.
    """
    found = status(patch, checkout)
    out = [_change(state, checkout, reversed_text(state)) for state in found.files if state.own]
    if not out:
        expected = f"a checkout with the patch {patch.name!r}"
        raise PatchError(explain(expected, f"one without any line of it ({found.condition})", "There is nothing to do"))
    return out


def _change(state: FileState, checkout: str | Path, new: bytes) -> Change:
    root = Path(checkout).expanduser()
    place = (root / state.file.path).resolve()
    if not place.is_relative_to(root.resolve()):
        do = "Put the file itself there, as git clone does"
        raise PatchError(explain(f"{state.file.path} inside the checkout {root}", f"a link to {place}", do))
    assert state.text is not None
    return Change(state.file.path, place, state.text.content, new)


def apply(patch: Patch, checkout: str | Path) -> list[Path]:
    """Adds the lines of the patch to every file, or changes nothing; see :func:`plan_apply`, :func:`write_changes`."""
    return write_changes(plan_apply(patch, checkout))


def reverse(patch: Patch, checkout: str | Path) -> list[Path]:
    """Removes the lines of the patch, or changes nothing; see :func:`plan_reverse`, :func:`write_changes`."""
    return write_changes(plan_reverse(patch, checkout))


# -- writing ---------------------------------------------------------------------------------------
def write_changes(changes: list[Change]) -> list[Path]:
    """Writes all new contents beside the files, then renames them; after a failure it restores the renamed files.

    Returns:
        The files that were changed.

    Raises:
        PatchError: a file was changed by someone else meanwhile, or a write failed.
    """
    contents = {change.place: (change.old, change.new) for change in changes}
    return _replace_all(contents)


def _replace_all(contents: Mapping[Path, tuple[bytes, bytes]]) -> list[Path]:
    temporaries = {place: place.with_name(f".tmp-{os.getpid()}-{place.name}") for place in contents}
    done: list[Path] = []
    try:
        for place, (_, made) in contents.items():
            _write_beside(place, temporaries[place], made)
        for place, (old, _) in contents.items():
            if place.read_bytes() != old:
                raise OSError(f"{place} was changed meanwhile")
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
