"""The datasets as published: 8-bit images, true labels, class names, and the position of each sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.image_folder import ClassFiles, class_files, decode, first_size
from tad_plugin.data.image_tree import Tree, open_tree, suffix_of
from tad_plugin.data.noise.class_maps import DIGITS_CLASSES
from tad_plugin.data.pixel_cache import cache_places, cached_pixels
from tad_plugin.data.splits import class_members
from tad_plugin.errors import (
    EmptyClassError,
    FileFormatError,
    NotEnoughSamplesError,
    explain,
    missing_extra,
    unknown_name,
)
from tad_plugin.utils.image_store import FLOAT_BYTES, MappedPixels

__all__ = ["DATASETS", "RawSplits", "dataset_name", "read_source"]

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "tinyimagenet")
_FOLDER = "folder:"
_NO_FILES = ClassFiles((), torch.zeros(0, dtype=torch.int64), None, {})


@dataclass(frozen=True)
class RawSplits:
    """A dataset before splitting and normalising.

    Attributes:
        name: the dataset's name; for a folder "folder:" and its last path component.
        class_names: K names in label order.
        train: uint8 [N, C, H, W], the real training data. It may lie in a mapped file.
        train_labels: int64 [N], true labels.
        index: int64 [N], position of each sample in the published order.
        rank: int64 [N], number of each sample in its class, if the file names are such numbers; else None.
        test: uint8 [M, C, H, W]; M may be 0 for folders.
        test_labels: int64 [M].
        scale: the pixel value that stands for 1.
        paths: N file names of the training samples below the dataset's top, for folders; else None.
        skipped: how many files were passed over, by suffix or reason; empty for the named datasets.
        mapped: the file of pixels in which ``train`` and then ``test`` lie; None if they are in memory.
    """

    name: str
    class_names: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    index: Tensor
    rank: Tensor | None
    test: Tensor
    test_labels: Tensor
    scale: float = 255.0
    paths: tuple[str, ...] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    mapped: MappedPixels | None = None


def read_source(
    name: str,
    root: str | Path | None,
    *,
    per_class: int | None,
    image_size: int | None,
    download: bool,
    storage: str = "float32",
) -> RawSplits:
    """Reads a dataset by name; the arguments are those of :func:`tad_plugin.data.datasets.load_dataset`."""
    if name.startswith(_FOLDER):
        return _folder(Path(os.path.expanduser(name[len(_FOLDER) :])), root, per_class, image_size, storage)
    root = Path(os.path.expanduser(root or "data"))
    if name == "digits":
        return _first_per_class(_digits(), per_class)
    if name in {"cifar10", "cifar100", "svhn"}:
        return _first_per_class(_torchvision(name, root, download), per_class)
    if name == "tinyimagenet":
        return _tinyimagenet(root, per_class, image_size, storage)
    raise unknown_name("dataset", name, [*DATASETS, _FOLDER + "PATH"])


def dataset_name(name: str) -> str:
    """The name that the data of a ``--dataset`` get: for a folder "folder:" and its last component, without ".zip"."""
    if not name.startswith(_FOLDER):
        return name
    last = Path(os.path.expanduser(name[len(_FOLDER) :])).resolve().name
    return _FOLDER + (last[:-4] if last.lower().endswith(".zip") else last)


def _digits() -> RawSplits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "reproduce", "the digits dataset") from error
    found: Any = load_digits()
    images = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    # Every fifth image of each class is for testing: fixed for ever, whatever a generator's next version draws.
    test = torch.zeros(len(labels), dtype=torch.bool)
    for members in class_members(labels, 10):
        test[members[4::5]] = True
    index = (~test).nonzero().flatten()
    return RawSplits(
        "digits", DIGITS_CLASSES, images[~test], labels[~test], index, None, images[test], labels[test], 16.0
    )


def _torchvision(name: str, root: Path, download: bool) -> RawSplits:
    from torchvision import datasets

    try:
        if name == "svhn":
            train: Any = datasets.SVHN(str(root), split="train", download=download)
            test: Any = datasets.SVHN(str(root), split="test", download=download)
        else:
            source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            train, test = (source(str(root), train=part, download=download) for part in (True, False))
    except Exception as error:  # broken files provoke whatever the parsers raise
        do = "Allow the download, or put the published files there (those that torchvision reads)"
        raise FileFormatError(explain(f"the files of {name} below {root}", str(error), do)) from error
    arrays = []
    for part in (train, test):
        pixels = part.data if name == "svhn" else part.data.transpose(0, 3, 1, 2)
        labels = torch.as_tensor(part.labels if name == "svhn" else part.targets, dtype=torch.int64)
        arrays.append((torch.from_numpy(np.ascontiguousarray(pixels)), labels))
    (images, labels), (test_images, test_labels) = arrays
    names = DIGITS_CLASSES if name == "svhn" else tuple(train.classes)
    return RawSplits(name, names, images, labels, torch.arange(len(labels)), None, test_images, test_labels)


def _folder(
    path: Path, root: str | Path | None, per_class: int | None, image_size: int | None, storage: str
) -> RawSplits:
    with open_tree(path) as tree:
        names, train = class_files(tree, "train", per_class=per_class)
        held = next((split for split in ("test", "val") if tree.has(split)), None)
        if held is None:
            _check_no_test(tree, names, path)
        test = class_files(tree, held, names)[1] if held else _NO_FILES
        # One call, so that both have the same number of channels.
        files, places = [*train.paths, *test.paths], cache_places(path, root)
        pixels, mapped = _pixels(tree, files, image_size, path.name, storage, places)
        skipped = _outside(tree, ("train", held or "test")) + Counter(train.skipped) + Counter(test.skipped)
    n = len(train.paths)
    index = torch.arange(n)
    name = dataset_name(f"{_FOLDER}{path}")
    parts = (pixels[:n], train.labels, index, train.ranks, pixels[n:], test.labels)
    paths = tuple(tree.place(path) for path in train.paths) if tree.flat else train.paths
    return RawSplits(name, names, *parts, paths=paths, skipped=skipped, mapped=mapped)


def _pixels(
    tree: Tree, paths: Sequence[str], image_size: int | None, label: str, storage: str, places: Sequence[Path]
) -> tuple[Tensor, MappedPixels | None]:
    """The pixels of image files: in memory, or in a mapped file where they would take too much as floats."""
    height, width = first_size(tree, paths, image_size)
    if storage == "float32" or (storage == "auto" and 4 * len(paths) * 3 * height * width <= FLOAT_BYTES):
        return decode(tree, paths, image_size, label), None
    mapped = cached_pixels(tree, paths, image_size, places, label)
    return mapped.pixels, mapped


def _check_no_test(tree: Tree, names: Sequence[str], path: Path) -> None:
    """Raises FileFormatError where another folder has the classes of train/: test images under another name."""
    parts = [name.split("/") for name in (*tree.files, *tree.folders)]
    other = sorted({p[0] for p in parts if len(p) > 1 and p[0] != "train" and p[1] in names})
    if other:
        do = "Rename it to test/ or val/, or move it away to go without test images"
        got = ", ".join(f"{name}/" for name in other)
        raise FileFormatError(explain(f"test images below test/<class>/ or val/<class>/ in {path}", got, do))


def _outside(tree: Tree, splits: Sequence[str]) -> Counter[str]:
    """What a tree holds beside the splits that are read, and what could not be listed."""
    found = Counter(tree.skipped)
    for name in tree.files:
        top, below, _ = name.partition("/")
        if top not in splits:
            found[f"below {top}/" if below else suffix_of(name)] += 1
    return found


def _tinyimagenet(root: Path, per_class: int | None, image_size: int | None, storage: str) -> RawSplits:
    top = "tiny-imagenet-200"
    places = [place for place in (root / top, root / f"{top}.zip") if place.exists()]
    with open_tree(places[0] if places else root) as tree:
        names, train = class_files(tree, "train", per_class=per_class)
        listing = "val/val_annotations.txt"
        if listing not in tree.files:
            do = "Use the archive as published. For a rearranged val/<class>/ give folder:PATH as the dataset"
            raise FileFormatError(explain(f"{listing} in {tree.source}", "none", do))
        paths, labels = _annotations(tree.read(listing).decode("utf-8", "replace"), names, set(tree.files), listing)
        files, beside = [*train.paths, *paths], cache_places(places[0] if places else root, root)
        pixels, mapped = _pixels(tree, files, image_size, "tinyimagenet", storage, beside)
    n = len(train.paths)
    parts = (pixels[:n], train.labels, torch.arange(n), train.ranks, pixels[n:], labels)
    return RawSplits("tinyimagenet", names, *parts, paths=train.paths, mapped=mapped)


def _annotations(text: str, names: Sequence[str], files: set[str], listing: str) -> tuple[list[str], Tensor]:
    """Paths and labels from lines ``FILE<tab>CLASS<tab>box``."""
    number = {name: i for i, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for line_number, line in enumerate(filter(None, text.splitlines()), 1):
        fields = line.split("\t")
        path = f"val/images/{fields[0]}"
        if len(fields) < 2 or fields[1] not in number or path not in files:
            got = f"{line[:60]!r} in line {line_number} of {listing}"
            do = "Unpack the archive again, all of it"
            raise FileFormatError(explain("an existing image and a class of train/", got, do))
        paths.append(path)
        labels.append(number[fields[1]])
    missing = [name for name in names if number[name] not in set(labels)]
    if missing:
        do = "Unpack the archive again, all of it"
        raise EmptyClassError(explain(f"every class in {listing}", f"none of {', '.join(missing[:8])}", do))
    return paths, torch.tensor(labels)


def _first_per_class(raw: RawSplits, per_class: int | None) -> RawSplits:
    """The first ``per_class`` training samples of each class, in their order."""
    if per_class is None:
        return raw
    kept = []
    for name, members in zip(raw.class_names, class_members(raw.train_labels, len(raw.class_names)), strict=True):
        if len(members) < per_class:
            got = f"{len(members)} of class {name!r}"
            raise NotEnoughSamplesError(
                explain(f"at least per_class = {per_class} images of each class", got, "Lower per_class")
            )
        kept.append(members[:per_class])
    keep = torch.cat(kept).sort().values
    # Only arrays come here: folders and Tiny ImageNet are cut while their files are listed.
    return replace(raw, train=raw.train[keep], train_labels=raw.train_labels[keep], index=raw.index[keep])
