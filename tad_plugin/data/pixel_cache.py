"""The decoded pixels of an image folder in a file, made once: 8-bit, mapped into memory, checked, resumable.

The file ``KEY.pixels`` holds the images [N,C,H,W] one after the other, and ``KEY.json`` their shape and the sha256 of
each block. The key is the sha256 of names, sizes and times of the image files and of the size that they are brought
to, so that changed images are decoded again. While pixels are made, both names end in ``.part``; a process that was
killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from filelock import FileLock

from tad_plugin.data.image_folder import decode_into, decoders, decoding_bar, first_size
from tad_plugin.data.image_tree import Tree
from tad_plugin.errors import DiskSpaceError, FileFormatError, FileWriteError, TadPluginWarning, explain
from tad_plugin.utils.files import atomic_write, read_json, remove_temporaries
from tad_plugin.utils.image_store import MappedPixels
from tad_plugin.utils.seals import sealed_json
from tad_plugin.utils.write_errors import writing_to

__all__ = ["cache_places", "cached_pixels"]

_FORMAT = "tad_plugin pixels 1"
_BLOCK_BYTES = 2**23
_SAVE_SECONDS = 5.0


@dataclass
class _Pixels:
    """What the description of a file of pixels says.

    Attributes:
        shape: [N,C,H,W].
        per_block: images per block; the last block may have fewer.
        blocks: sha256 of each block, "" for one that is not made yet.
        grey: whether each block is grey.
    """

    shape: tuple[int, ...]
    per_block: int
    blocks: list[str]
    grey: list[bool]

    def rows(self, block: int) -> slice:
        return slice(block * self.per_block, min((block + 1) * self.per_block, self.shape[0]))

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape[1:]))

    def text(self) -> str:
        return sealed_json({"format": _FORMAT, **vars(self), "shape": list(self.shape)})

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> _Pixels:
        per_block = max(1, _BLOCK_BYTES // int(np.prod(shape[1:])))
        count = -(-shape[0] // per_block)
        return cls(shape, per_block, [""] * count, [False] * count)

    @classmethod
    def read(cls, path: Path) -> _Pixels | None:
        """The description in a file; None if there is none that can be used."""
        try:
            found = read_json(path)
            pixels = cls(tuple(found["shape"]), found["per_block"], found["blocks"], found["grey"])
        except (FileFormatError, KeyError, TypeError):
            return None
        count = -(-pixels.shape[0] // pixels.per_block)
        fits = found.get("format") == _FORMAT and len(pixels.blocks) == len(pixels.grey) == count
        return pixels if fits else None


def cache_places(source: Path, root: str | Path | None) -> list[Path]:
    """Folders where the pixels of ``source`` (a folder or a zip) may be kept: beside it, then below ``root``."""
    source = source.resolve()
    name = source.stem if source.suffix.lower() == ".zip" else source.name
    # A name that begins with a dot is not taken for images.
    return [source.parent / f".{name}.pixels", Path(os.path.expanduser(root or "data")) / f".{name}.pixels"]


def cached_pixels(
    tree: Tree, paths: Sequence[str], image_size: int | None, places: Sequence[Path], label: str = "images"
) -> MappedPixels:
    """The pixels of image files as a mapped file, decoded at the first call; see :func:`decode` for the images.

    Every block is checked at each call. A damaged one is decoded again, with a warning.

    Args:
        tree: where the image files are.
        paths: N names in the tree, at least one.
        image_size: as in :func:`decode`.
        places: folders where the file is looked for; it is made in the first of them that can be written.
        label: name of the progress bar.

    Raises:
        FileWriteError: no place can be written.
        DiskSpaceError: the disk has no room. What was made stays, and the same call goes on.
        FileFormatError, InvalidInputError: see :func:`decode`.
    """
    key = _key(tree, paths, image_size)
    for place in places:
        found = _Pixels.read(place / f"{key}.json")
        if found is not None and not _damaged(place / f"{key}.pixels", found):
            return MappedPixels(place / f"{key}.pixels", found.shape)
    place = _writable(places)
    # Two runs that begin together decode once.
    with FileLock(place / "lock"):
        remove_temporaries(place)
        return _made(place / key, tree, paths, image_size, label)


def _key(tree: Tree, paths: Sequence[str], image_size: int | None) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, image_size]).encode())
    for name in paths:
        file = tree.files[name]
        digest.update(json.dumps([name, file.size, file.stamp]).encode())
    return digest.hexdigest()[:16]


def _writable(places: Sequence[Path]) -> Path:
    reasons = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe = place / f".tmp-{os.getpid()}"
            probe.touch()
            probe.unlink()
            return place
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
    do = "Make one of them writable, or name a folder that is with --root (load_dataset(root=...))"
    raise FileWriteError(explain("a folder for the decoded images", "; ".join(reasons), do))


def _made(base: Path, tree: Tree, paths: Sequence[str], image_size: int | None, label: str) -> MappedPixels:
    """The pixels at ``base``, made, resumed or repaired where needed. The lock is held."""
    whole, part = base.with_suffix(".pixels"), base.with_suffix(".pixels.part")
    about, about_part = base.with_suffix(".json"), base.with_suffix(".json.part")
    pixels = _Pixels.read(about)
    if pixels is not None and whole.exists():
        damaged = _damaged(whole, pixels)
        if not damaged:
            return MappedPixels(whole, pixels.shape)
        got = f"{len(damaged)} of {len(pixels.blocks)} blocks with other contents"
        do = "Nothing to do: they are decoded again. Look after the disk if this happens often"
        warnings.warn(explain(f"the pixels in {whole} as they were written", got, do), TadPluginWarning, stacklevel=2)
        if pixels.shape[1] == 3:
            os.replace(whole, part)
            for block in damaged:
                pixels.blocks[block] = ""
        else:  # of grey images one channel was kept
            pixels = None
        about.unlink()
    else:
        pixels = _Pixels.read(about_part) if part.exists() else None
        if pixels is not None:
            for block in _damaged(part, pixels):
                pixels.blocks[block] = ""
    whole.unlink(missing_ok=True)
    if pixels is None:
        part.unlink(missing_ok=True)
        pixels = _Pixels.of((len(paths), 3, *first_size(tree, paths, image_size)))
    with writing_to(part):
        _fill(part, about_part, pixels, tree, paths, image_size, label)
        if all(pixels.grey):
            pixels = _one_channel(part, pixels)
        os.replace(part, whole)
    atomic_write(about, pixels.text())
    about_part.unlink(missing_ok=True)
    return MappedPixels(whole, pixels.shape)


def _fill(
    part: Path, about: Path, pixels: _Pixels, tree: Tree, paths: Sequence[str], image_size: int | None, label: str
) -> None:
    """Decodes the blocks that are missing, and says now and then which are done."""
    missing = [block for block, digest in enumerate(pixels.blocks) if not digest]
    if not missing:
        return
    part.touch()
    saved_at = perf_counter()
    count = sum(len(range(pixels.shape[0])[pixels.rows(block)]) for block in missing)
    with open(part, "rb+") as file, decoders() as pool, decoding_bar(count, label) as advance:
        _reserve(file, pixels.shape[0] * pixels.image_bytes, part)
        for block in missing:
            rows = pixels.rows(block)
            out = np.empty((rows.stop - rows.start, *pixels.shape[1:]), dtype=np.uint8)
            pixels.grey[block] = decode_into(out, tree, paths[rows], image_size, pool)
            content = out.reshape(-1).data
            file.seek(rows.start * pixels.image_bytes)
            file.write(content)
            pixels.blocks[block] = hashlib.sha256(content).hexdigest()
            if perf_counter() - saved_at > _SAVE_SECONDS or block == missing[-1]:
                file.flush()
                os.fsync(file.fileno())  # before the description says that they are there
                atomic_write(about, pixels.text())
                saved_at = perf_counter()
            advance(rows.stop - rows.start)


def _reserve(file: Any, size: int, path: Path) -> None:
    """Makes the file as long as it will be, and takes the room on the disk where the system can."""
    room = os.fstat(file.fileno()).st_size
    stat = os.statvfs(path.parent) if hasattr(os, "statvfs") else None
    if stat is not None and size - room > stat.f_bavail * stat.f_frsize:
        got = f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free"
        do = "Free space, bring the images to a smaller size (--image_size), or name another disk with --root"
        raise DiskSpaceError(explain(f"{(size - room) / 2**20:.0f} MiB for the decoded images in {path}", got, do))
    file.truncate(size)


def _one_channel(part: Path, pixels: _Pixels) -> _Pixels:
    """Rewrites pixels whose three channels are the same to one."""
    grey = _Pixels.of((pixels.shape[0], 1, *pixels.shape[2:]))
    narrow = part.with_suffix(".grey")
    source = np.memmap(part, np.uint8, "r", 0, pixels.shape)
    with open(narrow, "wb") as file:
        for block in range(len(grey.blocks)):
            content = np.ascontiguousarray(source[grey.rows(block), :1]).tobytes()
            file.write(content)
            grey.blocks[block], grey.grey[block] = hashlib.sha256(content).hexdigest(), True
        file.flush()
        os.fsync(file.fileno())
    del source
    os.replace(narrow, part)
    return grey


def _damaged(path: Path, pixels: _Pixels) -> list[int]:
    """Numbers of the blocks that were made and whose bytes are not those that were written."""

    def differs(block: int) -> bool:
        rows = pixels.rows(block)
        with open(path, "rb") as file:
            file.seek(rows.start * pixels.image_bytes)
            content = file.read((rows.stop - rows.start) * pixels.image_bytes)
        return hashlib.sha256(content).hexdigest() != pixels.blocks[block]

    made = [block for block, digest in enumerate(pixels.blocks) if digest]
    try:
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
            return [block for block, wrong in zip(made, pool.map(differs, made), strict=True) if wrong]
    except OSError:
        return made
