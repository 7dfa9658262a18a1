"""Patches on checkouts that the tests make: all or nothing, reversed bit for bit, refused with the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.cli import main
from tad_plugin.errors import FileFormatError, PatchError, UnknownNameError
from tad_plugin.upstream import checkout as writing
from tad_plugin.upstream import patch as patching
from tad_plugin.upstream.added_lines import Insertion, format_diff
from tad_plugin.upstream.checkout import apply, plan_apply, reverse, status
from tad_plugin.upstream.git_folder import head_commit, origin
from tad_plugin.upstream.make_patch import make_manifest
from tad_plugin.upstream.patch import Patch, available_patches, load_patch, patches_folder

COMMIT, OTHER = "a1" * 20, "b2" * 20
FILES = {
    "train.py": b"import os\r\n\r\nprint(os.name)\r\n",
    "sub/tools.py": b"x = 1\ny = 2\nx = y\ny = x",
    "readme.md": b"text\n",
}
DIFF = format_diff(
    {
        "train.py": [Insertion(1, ("import tad_plugin",)), Insertion(3, ("print(1)", "print(2)"))],
        "sub/tools.py": [Insertion(0, ("import sys",)), Insertion(1, ("z = 3",))],
    }
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    git(root, COMMIT)
    return root


@pytest.fixture
def folder(checkout: Path, tmp_path: Path) -> Path:
    place = tmp_path / "patches" / "demo"
    place.mkdir(parents=True)
    (place / "demo.patch").write_text(DIFF)
    manifest = make_manifest(DIFF, checkout, repository="https://example.org/demo", commit=COMMIT)
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place.parent


@pytest.fixture
def patch(folder: Path) -> Patch:
    return load_patch("demo", folder)


def git(root: Path, commit: str) -> None:
    (root / ".git").mkdir(exist_ok=True)
    (root / ".git" / "HEAD").write_text(commit + "\n")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_apply_status_reverse(checkout: Path, patch: Patch) -> None:
    before = contents(checkout)
    (checkout / "train.py").chmod(0o750)
    assert status(patch, checkout).condition == "unpatched" and status(patch, checkout).commit == COMMIT
    plan_apply(patch, checkout)
    assert contents(checkout) == before
    assert [p.name for p in apply(patch, checkout)] == ["train.py", "tools.py"]
    assert (checkout / "train.py").read_bytes() == (
        b"import os\r\nimport tad_plugin\r\n\r\nprint(os.name)\r\nprint(1)\r\nprint(2)\r\n"
    )
    assert (checkout / "sub" / "tools.py").read_bytes() == b"import sys\nx = 1\nz = 3\ny = 2\nx = y\ny = x"
    assert stat.S_IMODE((checkout / "train.py").stat().st_mode) == 0o750
    found = status(patch, checkout)
    assert found.condition == "patched" and [f.condition for f in found.files] == ["patched", "patched"]
    assert [f.added for f in patch.files] == [3, 2]
    reverse(patch, checkout)
    assert contents(checkout) == before and status(patch, checkout).condition == "unpatched"


def test_twice_is_refused(checkout: Path, patch: Patch) -> None:
    with pytest.raises(PatchError, match="'demo'"):
        reverse(patch, checkout)
    apply(patch, checkout)
    patched = contents(checkout)
    for again in (apply, plan_apply):
        with pytest.raises(PatchError, match="'demo'"):
            again(patch, checkout)
    assert contents(checkout) == patched


def test_another_or_missing_file_is_named_and_nothing_is_written(checkout: Path, patch: Patch) -> None:
    tools = checkout / "sub" / "tools.py"
    tools.write_bytes(b"other = 1\n")
    before = contents(checkout)
    with pytest.raises(PatchError, match="https://example.org/demo.*another sub/tools.py.*--files train.py"):
        apply(patch, checkout)
    tools.unlink()
    with pytest.raises(PatchError, match="no sub/tools.py"):
        apply(patch, checkout)
    assert contents(checkout) == {k: v for k, v in before.items() if k != "sub/tools.py"}
    assert [f.condition for f in status(patch, checkout).files] == ["unpatched", "missing"]
    (checkout / "train.py").unlink()
    assert status(patch, checkout).condition == "not this repository"
    with pytest.raises(PatchError, match="https://example.org/demo"):
        apply(patch, checkout)


def test_the_commit_is_read_without_git(checkout: Path, tmp_path: Path) -> None:
    place = checkout / ".git"
    (place / "HEAD").write_text("ref: refs/heads/main\n")
    assert head_commit(checkout) is None
    (place / "packed-refs").write_text(f"# pack-refs\n{OTHER} refs/heads/main\n{COMMIT} refs/heads/mainly\n")
    assert head_commit(checkout) == OTHER
    (place / "refs" / "heads").mkdir(parents=True)
    (place / "refs" / "heads" / "main").write_text(COMMIT + "\n")
    assert head_commit(checkout) == COMMIT
    linked, own = tmp_path / "linked", place / "worktrees" / "linked"
    linked.mkdir()
    own.mkdir(parents=True)
    (linked / ".git").write_text(f"gitdir: {own}\n")
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "commondir").write_text("../..\n")
    assert head_commit(linked) == COMMIT
    (place / "HEAD").write_text("nonsense\n")
    assert head_commit(checkout) is None and head_commit(tmp_path) is None


def test_the_origin_is_read_without_git(checkout: Path) -> None:
    assert origin(checkout) is None
    config = '[core]\n\turl = x\n[remote "up"]\n\turl = y\n[remote "origin"]\n\turl = https://a.org/b.git\n[z]\n'
    (checkout / ".git" / "config").write_text(config)
    assert origin(checkout) == "https://a.org/b"


def test_without_git_the_hashes_decide(checkout: Path, patch: Patch) -> None:
    (checkout / ".git" / "HEAD").unlink()
    (checkout / ".git").rmdir()
    assert status(patch, checkout).commit is None
    apply(patch, checkout)
    reverse(patch, checkout)
    assert contents(checkout) == FILES


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_write_leaves_every_file_as_it_was(
    at: int, undo: bool, checkout: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if undo:
        apply(patch, checkout)
    before, original, calls = contents(checkout), os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == at + 1:
            raise PermissionError(13, "Permission denied", str(target))
        original(source, target)

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(PatchError, match="Permission denied"):
        (reverse if undo else apply)(patch, checkout)
    assert contents(checkout) == before


def test_a_full_disk_leaves_every_file_as_it_was(checkout: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original, calls = contents(checkout), os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(number)

    monkeypatch.setattr(writing.os, "fsync", fsync)
    with pytest.raises(PatchError, match="No space left on device"):
        apply(patch, checkout)
    assert contents(checkout) == before


def test_what_cannot_be_put_back_is_named(checkout: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied", str(target))
        original(source, target)

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(PatchError, match="train.py"):
        apply(patch, checkout)
    monkeypatch.undo()
    assert status(patch, checkout).condition == "partly patched"
    kept = contents(checkout)
    apply(patch, checkout)  # the rest
    assert status(patch, checkout).condition == "patched"
    (checkout / "sub" / "tools.py").write_bytes(kept["sub/tools.py"])
    reverse(patch, checkout)
    assert {k: v for k, v in contents(checkout).items() if k in FILES} == FILES


# the patch itself


def test_an_unknown_patch_and_a_wrong_folder_are_named(folder: Path, patch: Patch, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="demo"):
        load_patch("dem", folder)
    for wrong in (tmp_path / "nowhere", folder / "demo" / "demo.patch"):
        with pytest.raises(PatchError, match=wrong.name):
            apply(patch, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "2 .* 1"),
        ({"commit": None, "files": None}, "TypeError|AttributeError"),
        ({"files": {"train.py": {"before": "0", "after": "1", "added": 3, "anchors": []}}}, "sub/tools.py"),
        ({"files": {"train.py": {"before": "0", "after": "1", "added": 3, "anchors": ["0 1 xyz | ^"]}}}, "anchor"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "demo" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message):
        load_patch("demo", folder)


def test_a_patch_that_makes_something_else_than_its_manifest_says_writes_nothing(folder: Path, checkout: Path) -> None:
    file = folder / "demo" / "demo.patch"
    file.write_text(DIFF.replace("+z = 3", "+z = 4"))
    with pytest.raises(FileFormatError, match="sub/tools.py"):
        apply(load_patch("demo", folder), checkout)
    assert {k: v for k, v in contents(checkout).items() if k in FILES} == FILES
    file.write_bytes(b"\xff")
    with pytest.raises(FileFormatError, match="demo.patch"):
        load_patch("demo", folder)


@pytest.mark.parametrize("path", ["../train.py", "/train.py", "C:/train.py", "sub\\tools.py"])
def test_a_path_out_of_the_checkout_is_refused(path: str, folder: Path) -> None:
    (folder / "demo" / "demo.patch").write_text(format_diff({path: [Insertion(1, ("x",))]}))
    file = folder / "demo" / "manifest.json"
    known = {path: {"before": "0", "after": "1", "added": 1, "anchors": ["0 3 ^ | $"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "files": known}))
    with pytest.raises(FileFormatError, match=re.escape(repr(path))):
        load_patch("demo", folder)


@pytest.mark.parametrize("undo", [False, True])
def test_a_link_that_leaves_the_checkout_is_refused(undo: bool, checkout: Path, patch: Patch, tmp_path: Path) -> None:
    if undo:
        apply(patch, checkout)
    outside = tmp_path / "elsewhere.py"
    (checkout / "train.py").rename(outside)
    (checkout / "train.py").symlink_to(outside)
    before = contents(checkout) | {"outside": outside.read_bytes()}
    with pytest.raises(PatchError, match=re.escape(str(outside))):
        (reverse if undo else apply)(patch, checkout)
    if not undo:
        with pytest.raises(PatchError, match=re.escape(str(outside))):
            plan_apply(patch, checkout)
    assert contents(checkout) | {"outside": outside.read_bytes()} == before


def test_a_link_inside_the_checkout_is_followed(checkout: Path, patch: Patch) -> None:
    (checkout / "train.py").rename(checkout / "real.py")
    (checkout / "train.py").symlink_to("real.py")
    apply(patch, checkout)
    assert (checkout / "train.py").is_symlink() and b"tad_plugin" in (checkout / "real.py").read_bytes()


def test_a_manifest_needs_the_files(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="train.py"):
        make_manifest(DIFF, tmp_path, repository="", commit=COMMIT)


def test_an_installation_keeps_its_patches_in_one_of_the_usual_places(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"mine": tmp_path / "env", "of the user": tmp_path / "user"}
    monkeypatch.setattr(patching, "__file__", str(tmp_path / "lib" / "tad_plugin" / "upstream" / "patch.py"))
    monkeypatch.setattr(patching.sysconfig, "get_default_scheme", lambda: "mine")
    monkeypatch.setattr(patching.sysconfig, "get_preferred_scheme", lambda _: "of the user")
    monkeypatch.setattr(patching.sysconfig, "get_path", lambda _, scheme: str(data[scheme]))
    with pytest.raises(PatchError, match="patches"):
        available_patches()
    for place in (data["of the user"], data["mine"], tmp_path / "lib"):  # the latter is pip's --target
        shared = place / "share" / "tad_plugin" / "patches"
        shutil.copytree(folder, shared)
        assert patches_folder() == shared and available_patches() == available_patches(folder)


# the command


def test_the_verb(checkout: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(checkout)

    def patch_verb(action: str) -> tuple[int, str, str]:
        code = main(["patch", action, "demo", str(checkout), "--patches", str(folder)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    assert patch_verb("check")[:2] == (0, "demo: can be applied: 3 lines to train.py, 2 lines to sub/tools.py\n")
    code, out, _ = patch_verb("apply")
    assert code == 0 and out.count("patched ") == 2
    code, out, _ = patch_verb("status")
    assert code == 0 and "demo: patched" in out and "train.py: patched, 3 of 3 lines there" in out
    code, out, err = patch_verb("apply")
    assert (code, out) == (2, "") and "'demo'" in err
    assert patch_verb("reverse")[0] == 0 and contents(checkout) == before
    with pytest.raises(SystemExit) as stop:
        main(["patch", "aply", "demo", str(checkout)])
    assert stop.value.code == 2
