"""Trees of files: links, pipes, loops, sizes, damaged archives."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from tad_plugin.data import image_tree
from tad_plugin.data.image_tree import open_tree
from tad_plugin.errors import FileFormatError
from tests.data.files import png, write


def link(target: Path, place: Path) -> None:
    try:
        os.symlink(target, place)
    except OSError:
        pytest.skip("this system makes no symbolic links")


def test_loops_of_links_end(tmp_path: Path) -> None:
    place = write(tmp_path / "f", {"train/a/0.png": png(0), "train/b/0.png": png(0)})
    link(place, place / "train" / "a" / "top")
    link(place / "train", place / "train" / "again")
    link(place / "train" / "b", place / "train" / "a" / "x")
    link(place / "train" / "a", place / "train" / "b" / "y")
    link(place / "train" / "self", place / "train" / "self")
    with open_tree(place) as tree:
        assert set(tree.files) == {"train/a/0.png", "train/b/0.png", "train/a/x/0.png", "train/b/y/0.png"}
        assert tree.skipped == {"link to a folder above it": 5, "not a regular file": 1}
        assert tree.read("train/a/x/0.png") == png(0)


def test_only_regular_files_are_listed(tmp_path: Path) -> None:
    place = write(tmp_path / "f", {"train/a/0.png": png(0)})
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes")
    os.mkfifo(place / "train" / "a" / "1.png")
    link(Path("/dev/zero"), place / "train" / "a" / "2.png")
    link(Path("nowhere"), place / "train" / "a" / "3.png")
    with open_tree(place) as tree:
        assert list(tree.files) == ["train/a/0.png"] and tree.skipped == {"not a regular file": 3}
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(FileFormatError, match="pipe.zip"), open_tree(tmp_path / "pipe.zip"):
        pass


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("wrapped/train/a/0.png", b"old")
        archive.writestr("wrapped/train/a/0.png", b"new")
        archive.writestr("wrapped/train/b/", b"")
        archive.writestr("README.md", b"-")
        entry = zipfile.ZipInfo("wrapped/train/a/1.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "0.png")
    with open_tree(tmp_path / "f.zip") as tree:
        assert list(tree.files) == ["train/a/0.png"] and tree.folders == ("train/b",)
        assert tree.read("train/a/0.png") == b"new"
        assert tree.skipped == {"twice in the archive": 1, "not a regular file": 1, ".md": 1}


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_large_files_are_not_read(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / place, {"train/a/0.png": b"x" * 100, "train/a/1.png": b"x" * 101})
    monkeypatch.setattr(image_tree, "_LARGEST", 100)
    with open_tree(path) as tree:
        assert len(tree.read("train/a/0.png")) == 100
        with pytest.raises(FileFormatError, match=r"1\.png"):
            tree.read("train/a/1.png")


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_damaged_zip_is_named_whatever_it_provokes(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "a.zip", {"train/a/0.png": png(3, (20, 20))})
    data = bytearray(path.read_bytes())
    for i in range(at, min(at + 3, len(data))):
        data[i] ^= 0xFF
    path.write_bytes(data)
    try:
        with open_tree(path) as tree:
            for name in tree.files:
                tree.read(name)
    except FileFormatError as error:
        assert "a.zip" in str(error)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write(tmp_path / "f", {"train/a/0.png": png(0)})

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(image_tree.os, "scandir", refused)
    with pytest.raises(FileFormatError, match="Permission denied"), open_tree(place):
        pass


@pytest.mark.parametrize("archive", [False, True])
def test_class_folders_at_the_top_are_the_training_images(archive: bool, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    path = Path(shutil.make_archive(str(folder), "zip", folder)) if archive else folder
    with open_tree(path) as tree:
        assert sorted(tree.files) == ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png"] and tree.flat
        assert tree.read("train/dog/1.png") == b"dog/1.png" and tree.place("train/dog/1.png") == "dog/1.png"
        assert tree.skipped == {".txt": 1}


@pytest.mark.parametrize("names", [("cat/1.png",), ("cat/1.png", "test/1.png"), ("cat/a/1.png", "dog/a/1.png")])
def test_other_folders_at_the_top_are_not_taken_for_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileFormatError, match="train"), open_tree(tmp_path):
        pass
