"""Decoded images in a mapped file: the pixels of decoding, once; checked, repaired, resumed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.data import pixel_cache
from tad_plugin.data.image_folder import decode
from tad_plugin.data.image_tree import open_tree
from tad_plugin.data.pixel_cache import cache_places, cached_pixels
from tad_plugin.errors import DiskSpaceError, FileFormatError, FileWriteError, InvalidInputError, TadPluginWarning
from tad_plugin.utils.image_store import MappedPixels
from tests.data.files import png, write

COLOUR = {f"train/a/{i}.png": png(i, mode="RGB") for i in range(11)}
GREY = {f"train/a/{i}.png": png(i, mode="L") for i in range(11)}
NAMES = tuple(COLOUR)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "_BLOCK_BYTES", 4 * 3 * 6 * 6)  # 4 images


class Count:
    """How many images were decoded; a decoder that dies at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded, self.dies_at = 0, 1000
        real = pixel_cache.decode_into

        def counted(out: Any, tree: Any, paths: Any, *more: Any) -> bool:
            if self.decoded + len(paths) > self.dies_at:
                raise KeyboardInterrupt
            self.decoded += len(paths)
            return real(out, tree, paths, *more)

        monkeypatch.setattr(pixel_cache, "decode_into", counted)


def pixels_of(source: Path, image_size: int | None = None, names: tuple[str, ...] = NAMES) -> MappedPixels:
    with open_tree(source) as tree:
        return cached_pixels(tree, names, image_size, cache_places(source, source.parent / "root"))


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
@pytest.mark.parametrize("files", [COLOUR, GREY, {**GREY, "train/a/10.png": png(3, mode="RGB")}])
@pytest.mark.parametrize("image_size", [None, 5])
def test_pixels_are_decoded_once_and_are_those_of_decoding(
    tmp_path: Path, place: str, files: dict[str, bytes], image_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, source = Count(monkeypatch), write(tmp_path / place, files)
    with open_tree(source) as tree:
        expected = decode(tree, NAMES, image_size)
    for _ in range(2):
        found = pixels_of(source, image_size)
        assert torch.equal(found[:], expected) and found.shape == expected.shape and count.decoded == 11
    names = {p.suffix for p in (tmp_path / f".{source.stem}.pixels").iterdir()}
    assert names == {".pixels", ".json", ""} and not (tmp_path / "root").exists()


def test_changed_images_and_other_sizes_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, source = Count(monkeypatch), write(tmp_path / "folder", COLOUR)
    first = pixels_of(source)[:]
    pixels_of(source, 5)
    pixels_of(source, None, NAMES[:6])
    assert count.decoded == 28
    (source / NAMES[7]).write_bytes(png(77, mode="RGB"))
    found = pixels_of(source)[:]
    assert count.decoded == 39 and found[7].unique().tolist() == [77]
    assert torch.equal(found[:7], first[:7])


@pytest.mark.parametrize("files", [COLOUR, GREY])
def test_a_damaged_block_is_decoded_again_with_a_warning(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "folder", files)
    expected = pixels_of(source)[:].clone()
    (path,) = (tmp_path / ".folder.pixels").glob("*.pixels")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    count = Count(monkeypatch)
    with pytest.warns(TadPluginWarning, match="1 of"):
        found = pixels_of(source)
    assert torch.equal(found[:], expected) and 0 < count.decoded <= (4 if files is COLOUR else 11)
    path.write_bytes(content[:-3])
    with pytest.warns(TadPluginWarning):
        assert torch.equal(pixels_of(source)[:], expected)
    for suffix in (".json", ".pixels"):
        path.with_suffix(suffix).unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(pixels_of(source)[:], expected)


@pytest.mark.parametrize("dies_at", [0, 4, 8])
def test_a_process_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "_SAVE_SECONDS", -1.0)
    count, source = Count(monkeypatch), write(tmp_path / "folder", COLOUR)
    count.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        pixels_of(source)
    if dies_at == 8:  # of what was written, a block was lost
        (part,) = (tmp_path / ".folder.pixels").glob("*.pixels.part")
        with open(part, "rb+") as file:
            file.write(b"\xff")
    count.dies_at = 1000
    with open_tree(source) as tree:
        assert torch.equal(pixels_of(source)[:], decode(tree, NAMES))
    assert count.decoded == (15 if dies_at == 8 else 11)
    assert not list((tmp_path / ".folder.pixels").glob("*.part"))


def test_where_the_place_beside_cannot_be_written_the_root_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "folder", COLOUR)
    beside = tmp_path / ".folder.pixels"
    beside.write_bytes(b"")  # no folder can be made there
    assert pixels_of(source).path.parent == tmp_path / "root" / ".folder.pixels"
    with open_tree(source) as tree, pytest.raises(FileWriteError, match="--root"):
        cached_pixels(tree, NAMES[:3], None, [beside])


def test_a_full_disk_is_named_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "folder", COLOUR)
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr(pixel_cache.os, "statvfs", lambda path: Full())
    with pytest.raises(DiskSpaceError, match="0 MiB free"):
        pixels_of(source)
    monkeypatch.setattr(pixel_cache.os, "statvfs", real)
    assert len(pixels_of(source)[:]) == 11


def test_images_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "folder", {**COLOUR, "train/a/5.png": b"no image"})
    with pytest.raises(FileFormatError, match=r"a/5\.png"):
        pixels_of(source)
    source = write(tmp_path / "sizes", {**COLOUR, "train/a/5.png": png(1, size=(9, 8))})
    with pytest.raises(InvalidInputError, match="image_size"):
        pixels_of(source)
