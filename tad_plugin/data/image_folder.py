"""Image folders and zip archives of them: the images of each class, and their pixels.

Layout: ``train/<class>/...`` and ``test/<class>/...`` (or ``val/``), at the top or below one single folder.
"""

from __future__ import annotations

import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.image_tree import Tree, suffix_of
from tad_plugin.data.labels import whole_number
from tad_plugin.errors import EmptyClassError, FileFormatError, InvalidInputError, NotEnoughSamplesError, explain

__all__ = ["ClassFiles", "class_files", "decode", "decode_into", "decoders", "decoding_bar", "first_size"]

# Formats that hold pixels and that Pillow recognises by their first bytes. Others (EPS, PDF) may run programs.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF", "AVIF", "JPEG2000")
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112
_BAR_FROM = 2000
_CHUNK = 512


@dataclass(frozen=True)
class ClassFiles:
    """Image files of one split in class order.

    Attributes:
        paths: N names in the tree.
        labels: int64 [N].
        ranks: int64 [N], number of each image in its class, where the file names are such numbers; else None.
        skipped: how many files of the split were passed over, by suffix or reason.
    """

    paths: tuple[str, ...]
    labels: Tensor
    ranks: Tensor | None
    skipped: Mapping[str, int]


def class_files(
    tree: Tree, split: str, class_names: Sequence[str] | None = None, per_class: int | None = None
) -> tuple[tuple[str, ...], ClassFiles]:
    """The image files below ``split/<class>/``, class by class, each class in the order of its file names.

    File names that are whole numbers are sorted as numbers. They are ranks if every class has a number 0 and no number
    twice; otherwise ``ranks`` is None. A file is an image if its suffix says so; without a suffix, if its first bytes
    do. Each file counts once per class, however many links lead to it.

    Args:
        tree: where to look.
        split: "train", "test", "val".
        class_names: the classes that must be there, in label order; None takes all folders, sorted.
        per_class: keep the first so many of each class, or None for all.

    Returns:
        (class names in label order, their files).

    Raises:
        FileFormatError: no image at all, or a class that ``class_names`` lacks.
        EmptyClassError: a class folder without images.
        NotEnoughSamplesError: ``per_class`` is more than a class has.
    """
    groups, skipped = _grouped(tree, split)
    if not any(groups.values()):
        kinds = " ".join(sorted(_suffixes()))
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
    ranked = True
    for label, name in enumerate(classes):
        ordered, numbers = _ordered(groups[name])
        ranked &= numbers is not None and numbers[0] == 0
        kept = len(ordered) if per_class is None else per_class
        if kept > len(ordered):
            got = f"{len(ordered)} of class {name!r}"
            raise NotEnoughSamplesError(
                explain(f"at least per_class = {per_class} images of each class", got, "Lower per_class")
            )
        paths += ordered[:kept]
        labels += [label] * kept
        ranks += (numbers or [0] * kept)[:kept]
    return classes, ClassFiles(
        tuple(paths), torch.tensor(labels), torch.tensor(ranks) if ranked else None, +Counter(skipped)
    )


def _grouped(tree: Tree, split: str) -> tuple[dict[str, list[str]], Counter[str]]:
    """The images of each class folder, and what else lies in the split."""
    groups: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    seen: set[tuple[str, tuple[int, int]]] = set()
    for folder in tree.folders:
        top, _, rest = folder.partition("/")
        if top == split and rest:
            groups.setdefault(rest.split("/")[0], [])
    for name, file in tree.files.items():
        parts = name.split("/")
        if parts[0] != split:
            continue
        if len(parts) < 3:
            skipped[f"directly in {split}/"] += 1
            continue
        group = groups.setdefault(parts[1], [])
        if not _is_image(tree, name):
            skipped[suffix_of(name)] += 1
        elif file.identity is not None and (parts[1], file.identity) in seen:
            skipped["second link to an image"] += 1
        else:
            group.append(name)
            if file.identity is not None:
                seen.add((parts[1], file.identity))
    return groups, skipped


def _ordered(paths: list[str]) -> tuple[list[str], list[int] | None]:
    """The paths in order, and their numbers if all names are different whole numbers."""
    numbers = [whole_number(PurePosixPath(path).stem) for path in paths]
    if None in numbers or len(set(numbers)) < len(numbers):
        return sorted(paths), None
    pairs = sorted((n, path) for n, path in zip(numbers, paths, strict=True) if n is not None)
    return [path for _, path in pairs], [n for n, _ in pairs]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that the installed Pillow decodes."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def _is_image(tree: Tree, name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix:
        return suffix in _suffixes()
    from PIL import Image

    try:
        with tree.open(name) as file, Image.open(file, formats=_formats()):
            return True
    except Image.UnidentifiedImageError:
        return False
    except Exception:  # an image that is broken: decoding it names what is wrong
        return True


def decode(tree: Tree, paths: Sequence[str], image_size: int | None = None, label: str = "images") -> Tensor:
    """The pixels of image files, uint8 [N, C, H, W]; C is 1 if every image is grey, else 3.

    Images are turned upright as their EXIF orientation says. Of an animation the first frame is taken.

    Args:
        tree: where the files are.
        paths: N names in the tree, at least one.
        image_size: height and width in pixels; the shorter side is resized to it (bilinear, antialiased) and the
            middle is cut out. None keeps the size, which must then be the same for all.
        label: the progress bar's name for them; there is one from 2,000 images on, if tqdm is installed.

    Raises:
        FileFormatError: an image that cannot be decoded, has more than 8 bits per channel, or is a file of more than
            256 MiB.
        InvalidInputError: sizes differ and ``image_size`` is None.
    """
    height, width = first_size(tree, paths, image_size)
    out = np.empty((len(paths), 3, height, width), dtype=np.uint8)
    grey = True
    with decoders() as pool, decoding_bar(len(paths), label) as advance:
        for start in range(0, len(paths), _CHUNK):
            part = slice(start, start + _CHUNK)
            grey &= decode_into(out[part], tree, paths[part], image_size, pool)
            advance(len(paths[part]))
    return torch.from_numpy(out[:, :1].copy() if grey else out)


def first_size(tree: Tree, paths: Sequence[str], image_size: int | None) -> tuple[int, int]:
    """Height and width of the decoded images, as the first one gives them. Errors: see :func:`decode`."""
    if not paths:
        raise FileFormatError(explain(f"images in {tree.source}", "none", "Check the folder"))
    if image_size is not None:
        return image_size, image_size
    from PIL import Image

    blob = tree.read(paths[0])
    try:
        with Image.open(io.BytesIO(blob), formats=_formats()) as image:
            width, height = image.size
            lying = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # decoding names what is wrong
        width, height, lying = *_decode_one(blob, f"{tree.source}:{paths[0]}", None)[0].shape[1::-1], False
    return (width, height) if lying else (height, width)


def decoders() -> ThreadPoolExecutor:
    """Threads that decode. The decoders release Python's lock."""
    return ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)))


def decode_into(
    out: np.ndarray, tree: Tree, paths: Sequence[str], image_size: int | None, pool: ThreadPoolExecutor
) -> bool:
    """Writes the pixels of some image files to ``out``, uint8 [B, 3, H, W]. Returns whether all are grey.

    Errors: see :func:`decode`.
    """
    # One thread reads, because a zip handle is not made for several.
    blobs = [tree.read(name) for name in paths]
    names = [f"{tree.source}:{name}" for name in paths]
    grey = True
    for i, (pixels, is_grey) in enumerate(pool.map(_decode_one, blobs, names, [image_size] * len(paths))):
        if pixels.shape[:2] != out.shape[2:]:
            a, b = ("x".join(map(str, reversed(s))) for s in (out.shape[2:], pixels.shape[:2]))
            do = "Bring all images to one size with image_size (--image_size on the command line)"
            got = f"{b} in {names[i]}"
            raise InvalidInputError(explain(f"images of one size ({a}, as the first)", got, do))
        out[i] = pixels.transpose(2, 0, 1)
        grey &= is_grey
    return grey


def _decode_one(blob: bytes, name: str, image_size: int | None) -> tuple[np.ndarray, bool]:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(blob), formats=_formats()) as image:
            if image.mode not in _EIGHT_BIT:
                got = f"mode {image.mode} in {name}"
                raise FileFormatError(explain("an image of 8 bits per channel", got, "Convert it to 8 bits"))
            grey = image.mode in {"1", "L", "LA"}
            image.load()
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            rgb = (ImageOps.exif_transpose(image) if turned else image).convert("RGB")
    except FileFormatError:
        raise
    except Exception as error:  # decoders raise whatever the bytes provoke
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise FileFormatError(explain("a readable image", f"{name}: {reason}", "Replace or remove the file")) from error
    if image_size is not None and rgb.size != (image_size, image_size):
        scale = image_size / min(rgb.size)
        width, height = (max(image_size, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        rgb = rgb.crop((left, top, left + image_size, top + image_size))
    return np.asarray(rgb), grey


@contextmanager
def decoding_bar(total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A progress bar from 2,000 images on, if tqdm is installed. Yields the function that moves it on."""
    if total <= _BAR_FROM:
        yield lambda n: None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # the bar is optional
        yield lambda n: None
        return
    with tqdm(total=total, desc=f"decoding {label}", unit="image", leave=False) as bar:
        yield bar.update
