"""Image folders and zip archives of them: what lies inside, and its pixels.

Layout: ``train/<class>/...`` and ``test/<class>/...`` (or ``val/``), at the top or below one single folder. A zip is
read in place, nothing is unpacked.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from tad_plugin.errors import EmptyClassError, FileFormatError, InvalidInputError, NotEnoughSamplesError, explain

__all__ = ["ClassFiles", "Tree", "class_files", "decode", "open_tree"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_BAR_FROM = 2000
_CHUNK = 512


@dataclass(frozen=True)
class Tree:
    """The files of a folder or zip: ``source`` for messages, relative ``names`` (with "/"), and a reader."""

    source: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]

    def has(self, top: str) -> bool:
        """Whether some file lies below the folder ``top``."""
        return any(name.startswith(top + "/") for name in self.names)


@dataclass(frozen=True)
class ClassFiles:
    """Image files of one split in class order: paths, labels (int64 [N]) and ranks inside the class (int64 [N])."""

    paths: tuple[str, ...]
    labels: Tensor
    ranks: Tensor


@contextmanager
def open_tree(path: str | Path, marker: str = "train") -> Iterator[Tree]:
    """The tree whose top holds the folder ``marker``: ``path`` itself, or the single folder in it.

    Raises:
        FileFormatError: missing, neither folder nor zip, a corrupt zip, or without ``marker``.
    """
    path = Path(path)
    if path.is_dir():
        folder = path
        # followlinks: large datasets often lie elsewhere, behind a link.
        files = [Path(top, f) for top, _, found in os.walk(folder, followlinks=True) for f in found]
        names = [f.relative_to(folder).as_posix() for f in files]
        yield _rooted(str(folder), names, lambda name: (folder / name).read_bytes(), marker)
        return
    if not path.is_file():
        do = "Check the path; it is relative to the working directory"
        raise FileFormatError(explain("an image folder or a zip of one", f"nothing at {path}", do))
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        do = "Pass a folder or a zip; download the zip again if it is cut off"
        raise FileFormatError(explain("an image folder or a zip of one", f"{path}: {error}", do)) from error
    with archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        yield _rooted(str(path), names, archive.read, marker)


def _rooted(source: str, names: Sequence[str], read: Callable[[str], bytes], marker: str) -> Tree:
    # Finder and Explorer leave files of their own in folders and archives.
    names = [n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]
    tops = {n.split("/", 1)[0] for n in names if "/" in n}
    if marker in tops:
        prefix = ""
    else:
        below = {n.split("/", 2)[0] for n in names if n.count("/") >= 2 and n.split("/", 2)[1] == marker}
        if len(below) != 1:
            found = ", ".join(sorted(tops)[:8]) or "no folder"
            do = "Arrange the images as train/<class>/* and test/<class>/*"
            raise FileFormatError(explain(f"a folder '{marker}' in {source}", found, do))
        prefix = below.pop() + "/"
    inside = tuple(sorted(n[len(prefix) :] for n in names if n.startswith(prefix)))
    return Tree(source, inside, lambda name: read(prefix + name))


def class_files(
    tree: Tree, split: str, class_names: Sequence[str] | None = None, per_class: int | None = None
) -> tuple[tuple[str, ...], ClassFiles]:
    """The image files below ``split/<class>/``, class by class, each class in the order of its file names.

    File names that are whole numbers are sorted as such, and the number is the image's rank in its class; otherwise
    the rank is the place in the order. Files that are no images are passed over.

    Args:
        tree: where to look.
        split: "train", "test", "val".
        class_names: the classes that must be there, in label order; None takes all folders, sorted.
        per_class: keep the first so many of each class, or None for all.

    Returns:
        (class names in label order, their files).

    Raises:
        FileFormatError: no image at all, or a class that ``class_names`` lacks.
        EmptyClassError: a class without images.
        NotEnoughSamplesError: ``per_class`` is more than a class has.
    """
    groups: dict[str, list[str]] = {}
    for name in tree.names:
        parts = name.split("/")
        if parts[0] == split and len(parts) >= 3:
            group = groups.setdefault(parts[1], [])
            if PurePosixPath(name).suffix.lower() in SUFFIXES:
                group.append(name)
    if not any(groups.values()):
        kinds = " ".join(sorted(SUFFIXES))
        raise FileFormatError(
            explain(f"images below {split}/<class>/ in {tree.source}", "none", f"Put images there ({kinds})")
        )
    classes = tuple(sorted(groups)) if class_names is None else tuple(class_names)
    strange = sorted(set(groups) - set(classes))
    if strange:
        do = "Remove the folder, or add the class to train/"
        raise FileFormatError(
            explain(f"the classes of train/ in {split}/ of {tree.source}", ", ".join(strange[:8]), do)
        )
    empty = [c for c in classes if not groups.get(c)]
    if empty:
        got = f"none in {', '.join(empty[:8])}"
        do = "Add images, or remove the class from every split"
        raise EmptyClassError(explain(f"images of every class below {split}/ of {tree.source}", got, do))
    paths: list[str] = []
    labels: list[int] = []
    ranks: list[int] = []
    for label, name in enumerate(classes):
        ordered = _ordered(groups[name])
        if per_class is not None and per_class > len(ordered):
            got = f"{len(ordered)} of class {name!r}"
            raise NotEnoughSamplesError(
                explain(f"at least per_class = {per_class} images of each class", got, "Lower per_class")
            )
        for rank, path in ordered[:per_class]:
            paths.append(path)
            labels.append(label)
            ranks.append(rank)
    return classes, ClassFiles(tuple(paths), torch.tensor(labels), torch.tensor(ranks))


def _ordered(paths: list[str]) -> list[tuple[int, str]]:
    stems = [PurePosixPath(p).stem for p in paths]
    if all(s.isdecimal() and s.isascii() for s in stems) and len({int(s) for s in stems}) == len(stems):
        return sorted((int(s), p) for s, p in zip(stems, paths, strict=True))
    return list(enumerate(sorted(paths)))


def decode(tree: Tree, paths: Sequence[str], image_size: int | None = None, label: str = "images") -> Tensor:
    """The pixels of image files, uint8 [N, C, H, W]; C is 1 if every image is grey, else 3.

    Args:
        tree: where the files are.
        paths: N names in the tree.
        image_size: height and width in pixels; the shorter side is resized to it (bilinear, antialiased) and the
            middle is cut out. None keeps the size, which must then be the same for all.
        label: what the progress bar calls them; there is one from 2,000 images on, if tqdm is installed.

    Raises:
        FileFormatError: an image that cannot be decoded, or has more than 8 bits per channel.
        InvalidInputError: sizes differ and ``image_size`` is None.
    """
    out: np.ndarray | None = None
    grey = True
    workers = max(1, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool, _bar(len(paths), label) as advance:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            # One thread reads (a zip handle is not made for several), all decode: the decoder releases the lock.
            blobs = [_read(tree, name) for name in chunk]
            names = [f"{tree.source}:{name}" for name in chunk]
            decoded = pool.map(_decode_one, blobs, names, [image_size] * len(chunk))
            for i, (pixels, is_grey) in enumerate(decoded, start):
                if out is None:
                    out = np.empty((len(paths), *pixels.shape), dtype=np.uint8)
                if pixels.shape != out.shape[1:]:
                    a, b = ("x".join(map(str, reversed(s[:2]))) for s in (out.shape[1:], pixels.shape))
                    raise InvalidInputError(
                        explain(
                            f"images of one size ({a}, as the first)",
                            f"{b} in {names[i - start]}",
                            "Pass image_size to bring all images to one size",
                        )
                    )
                out[i] = pixels
                grey &= is_grey
            advance(len(chunk))
    if out is None:
        raise FileFormatError(explain(f"images in {tree.source}", "none", "Check the folder"))
    kept = out[..., :1] if grey else out
    return torch.from_numpy(np.ascontiguousarray(kept.transpose(0, 3, 1, 2)))


def _read(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except (OSError, KeyError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        do = "Restore the file; an encrypted archive must be unpacked first"
        raise FileFormatError(explain("a readable image", f"{tree.source}:{name}: {error}", do)) from error


def _decode_one(blob: bytes, name: str, image_size: int | None) -> tuple[np.ndarray, bool]:
    from PIL import Image

    do = "Replace or remove the file"
    try:
        with Image.open(io.BytesIO(blob)) as image:
            if image.mode not in _EIGHT_BIT:
                got = f"mode {image.mode} in {name}"
                raise FileFormatError(explain("an image of 8 bits per channel", got, "Convert it to 8 bits"))
            grey = image.mode in {"1", "L", "LA"}
            rgb = image.convert("RGB")
    except FileFormatError:
        raise
    except Exception as error:  # decoders raise whatever the bytes provoke
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise FileFormatError(explain("a readable image", f"{name}: {reason}", do)) from error
    if image_size is not None and rgb.size != (image_size, image_size):
        scale = image_size / min(rgb.size)
        width, height = (max(image_size, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        rgb = rgb.crop((left, top, left + image_size, top + image_size))
    return np.asarray(rgb), grey


@contextmanager
def _bar(total: int, label: str) -> Iterator[Callable[[int], object]]:
    if total <= _BAR_FROM:
        yield lambda n: None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a comfort, not a need
        yield lambda n: None
        return
    with tqdm(total=total, desc=f"decoding {label}", unit="image", leave=False) as bar:
        yield bar.update
