from __future__ import annotations

import builtins
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.errors import FileFormatError, MissingExtraError
from tad_plugin.utils.files import (
    atomic_save,
    atomic_write,
    file_digest,
    plain,
    read_json,
    read_yaml,
    remove_temporaries,
    yaml_text,
)
from tad_plugin.utils.tensor_file import TensorFile


def test_write_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    assert atomic_write(path, "ä") == path
    assert path.read_bytes() == "ä".encode()
    atomic_write(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_save(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_lies_beside_the_target_and_ends_like_it(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_bytes(b"")

    atomic_save(tmp_path / "picture.png", write)
    assert seen[0].parent == tmp_path and seen[0].suffix == ".png" and not seen[0].exists()


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    assert atomic_write(tmp_path / "ours", "").stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_follow_the_umask_whatever_the_writer_sets(umask: int, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.touch(mode=0o600)

    before = os.umask(umask)
    try:
        TensorFile("test", "a test file", "").write(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
        atomic_save(tmp_path / "b", write)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "b")}
    assert modes == {0o666 & ~umask}


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    kept = atomic_write(tmp_path / "kept.txt", "x")
    with pytest.raises(KeyboardInterrupt):
        atomic_save(tmp_path / "y.txt", lambda temporary: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / ".tmp-0123456789ab.pt").write_bytes(b"half")
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_digest_is_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192  # over one piece of 1 MiB
    assert file_digest(atomic_write(tmp_path / "d", data)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_unreadable_json_is_a_named_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"r\.json"):
        read_json(path)


@pytest.mark.parametrize("content", [None, b"a: [1", b"\xff\xfe", b"a: !!python/object/apply:os.getcwd []"])
def test_unreadable_yaml_is_a_named_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"r\.yaml"):
        read_yaml(path)


def test_yaml_comes_back_with_its_keys_in_order(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ä": "text", "empty": {}}, "c": float("inf")}
    text = yaml_text(value)
    assert read_yaml(atomic_write(tmp_path / "x.yaml", text)) == value
    assert [line[0] for line in text.splitlines() if line[0] in "abc"] == ["b", "a", "c"] and "ä" in text
    assert read_yaml(atomic_write(tmp_path / "x.json", '{"a": [1, null]}')) == {"a": [1, None]}
    assert read_yaml(atomic_write(tmp_path / "empty.yaml", "")) is None


def test_values_become_plain_ones() -> None:
    values = {1: (1, np.float32(0.5)), "t": torch.arange(2), "s": {"b", "a"}, "p": Path("x"), "d": torch.float32}
    assert plain(values) == {"1": [1, 0.5], "t": [0, 1], "s": ["a", "b"], "p": "x", "d": "torch.float32"}
    assert yaml_text({"p": Path("x")}) == "p: x\n"


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *more: Any, **options: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return original(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for use in (lambda: read_yaml(tmp_path / "x"), lambda: yaml_text({})):
        with pytest.raises(MissingExtraError, match="reproduce"):
            use()
