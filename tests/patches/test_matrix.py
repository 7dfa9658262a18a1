"""Checkouts of the public codebases as people have them: edited, converted, forked.

Needs checkouts named by TAD_UPSTREAM_DM, _MTT, _DATM, _IDM and _IDC. TAD_UPSTREAM_FORKS names forks of
them: ``dm=PATH:mtt=PATH:mtt=PATH``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tad_plugin.errors import PatchError
from tad_plugin.upstream.checkout import apply, reverse, status
from tad_plugin.upstream.patch import Patch, available_patches, load_patch
from tests.checkouts import upstream
from tests.upstream.edits import MATRIX, own_comment

FORKS = [fork.split("=", 1) for fork in os.environ.get("TAD_UPSTREAM_FORKS", "").split(":") if fork]


def files(patch: Patch, root: Path) -> dict[str, bytes]:
    return {file.path: (root / file.path).read_bytes() for file in patch.files if (root / file.path).is_file()}


def copy(patch: Patch, source: Path, target: Path) -> Path:
    """Only what a patch looks at, so that this is fast."""
    for name, content in files(patch, source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    (target / ".git").mkdir(exist_ok=True)
    (target / ".git" / "HEAD").write_text(patch.commit + "\n")
    return target


@pytest.mark.parametrize("name", available_patches())
def test_the_matrix(name: str, tmp_path: Path) -> None:
    patch, source = load_patch(name), upstream(name)
    plain = copy(patch, source, tmp_path / "plain")
    original = files(patch, plain)
    apply(patch, plain)
    for case, (change, of_root, _, _) in MATRIX.items():
        root = copy(patch, source, tmp_path / "edited")
        for file, content in original.items():
            (root / file).write_bytes(change(content))
        if of_root is not None:
            of_root(root)
        before = files(patch, root)
        apply(patch, root)
        found = status(patch, root)
        assert found.condition in ("patched", "patched and edited"), case
        assert [len(state.own) for state in found.files] == [file.added for file in patch.files], case
        if case != "trailing spaces":  # those are not on our lines
            assert files(patch, root) == {file: change(text) for file, text in files(patch, plain).items()}, case
        for file, content in files(patch, root).items():
            (root / file).write_bytes(own_comment(content))
        reverse(patch, root)
        assert files(patch, root) == {file: own_comment(content) for file, content in before.items()}, case
        shutil.rmtree(root)


@pytest.mark.skipif(not FORKS, reason="TAD_UPSTREAM_FORKS names no fork")
@pytest.mark.parametrize(("name", "fork"), FORKS)
def test_forks_get_lines_with_code_of_the_original_on_both_sides(name: str, fork: str, tmp_path: Path) -> None:
    patch = load_patch(name)
    root = copy(patch, Path(fork), tmp_path / "fork")
    plain = copy(patch, upstream(name), tmp_path / "plain")
    before = files(patch, root)
    for state, file in zip(status(patch, root).files, patch.files, strict=True):
        if not state.recognised:
            continue
        old = _code((plain / file.path).read_bytes().splitlines())
        assert state.bare is not None
        for point, insertion in zip(state.points, file.insertions, strict=True):
            if point.line is None or "import tad_plugin" in insertion.lines:
                continue
            near = []
            for lines, place in ((old, insertion.after), (_code(state.bare.lines), point.line)):
                ahead = [line for n, line in lines if n < place][-3:]
                behind = [line for n, line in lines if n >= place][:3]
                near.append((ahead, behind))
            assert set(near[0][0]) & set(near[1][0]) and set(near[0][1]) & set(near[1][1]), insertion.lines
    try:
        apply(patch, root)
    except PatchError:
        assert files(patch, root) == before
    else:
        reverse(patch, root)
        assert files(patch, root) == before


def _code(lines: list[bytes] | tuple[bytes, ...]) -> list[tuple[int, bytes]]:
    found = [(n, line.strip()) for n, line in enumerate(lines)]
    return [(n, line) for n, line in found if line and not line.startswith(b"#")]
