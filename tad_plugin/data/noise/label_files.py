"""Human label files, and the place of each sample in them.

Files of arrays are an npz without pickle, or the published CIFAR-N ``.pt``, read without running any code. They hold
label sets in the dataset's published order, each of length M: ``clean`` (the true labels, for checking the mapping)
and, for CIFAR-10N, ``aggre``, ``worse``, ``random1`` to ``random3``; for CIFAR-100N ``noisy``. The published names
(``worse_label``, ``random_label1``) are shortened. CSV and JSON files name the images instead, see
:mod:`tad_plugin.data.noise.named_labels`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels, whole_number
from tad_plugin.data.noise.array_files import load_pt, read_npz, regular_file
from tad_plugin.data.noise.named_labels import plain_path, read_named_labels
from tad_plugin.data.splits import rank_in_class
from tad_plugin.errors import FileFormatError, InvalidInputError, StateMismatchError, UnknownNameError, explain
from tad_plugin.utils.arguments import named_errors

__all__ = ["human_labels", "read_label_file"]

_CLEAN = "clean"
_RANK = "rank_in_class"
_NAMED = {".csv", ".json"}
_SCHEMES = (
    "Accepted are: file names that are numbers in their class, from 0 in every class (train/cat/0007.png);"
    " file names with the position in the published order, as in 40217.png or 40217_cat.png;"
    " a label file in CSV or JSON that names the images (path, label)"
)


@named_errors
def read_label_file(path: str | Path) -> dict[str, Tensor]:
    """All label sets of a file of arrays by short name ("clean", "worse", "random1", ...), each int64 [M] on the CPU.

    Args:
        path: an ``.npz`` of integer arrays, or a ``.pt`` / ``.pth`` with a dictionary of integer arrays.

    Raises:
        FileFormatError: missing, corrupt, larger than 1 GiB, of another format, needing unrestricted pickle, without
            ``clean``, with arrays that are not whole numbers of shape [M], or of several lengths.
    """
    path = regular_file(path, "a label file (.npz, .pt, .csv or .json)")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        raw = read_npz(path)
    elif suffix in {".pt", ".pth"}:
        raw = _read_pt(path)
    else:
        do = "Convert it with numpy.savez(path, clean=..., worse=...)"
        raise FileFormatError(explain("a label file of arrays, ending in .npz, .pt or .pth", str(path), do))
    labels = {_short(str(name)): _as_labels(value, str(name), path) for name, value in raw.items()}
    if _CLEAN not in labels:
        got = f"{path} with {', '.join(sorted(labels)) or 'nothing'}"
        do = "Add the true labels as 'clean', for checking the order of the samples"
        raise FileFormatError(explain("a label set named 'clean'", got, do))
    lengths = {name: len(value) for name, value in labels.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{k}: {n}" for k, n in lengths.items())
        raise FileFormatError(explain(f"label sets of one length in {path}", got, "Write the file again"))
    return labels


@named_errors
def human_labels(
    path: str | Path,
    key: str,
    true_labels: Tensor,
    num_classes: int,
    *,
    source_index: Tensor | None = None,
    source_rank: Tensor | None = None,
    source_paths: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """The label set ``key`` of a file, for the given samples: int64 [N] on ``true_labels``'s device.

    The place of a sample in the file is found in one of five ways, the first that applies:

    1. a CSV or JSON file names it (``source_paths``);
    2. true class and rank inside the class (``source_rank``), for image folders whose file names are ranks;
    3. the number in its file name (``source_paths``), as position in the published order: ``40217.png``,
       ``40217_cat.png`` or ``cat_40217.png``. The clean labels there must agree, and must disagree one position
       further and one back, so that numbers from 1 are noticed;
    4. its position ``source_index``;
    5. its own position (the file has N entries).

    The file's ``clean`` labels must equal ``true_labels`` after that. A CSV or JSON file may lack them.

    Args:
        path: see :func:`read_label_file` and :func:`tad_plugin.data.noise.named_labels.read_named_labels`.
        key: "worse", "aggre", ...; the published "worse_label" works too.
        true_labels: int64 [N] in [0, K).
        num_classes: K.
        source_index: int64 [N], positions in the published order, >= 0.
        source_rank: int64 [N], how many samples of the same class come before it in the published order.
        source_paths: N file names below the dataset's top ("train/cat/7.png").
        class_names: K names, which a CSV or JSON file may use for labels.

    Raises:
        UnknownNameError: no such label set.
        FileFormatError: see ``path``.
        StateMismatchError: a sample is not in the file, its place cannot be known, or its clean label there differs.
        InvalidInputError: not one position, rank or path per sample.
        InvalidLabelsError: a label of the set is not in [0, K).
    """
    true = check_labels(true_labels, num_classes, name="true_labels").cpu()
    for name, given in (("source_index", source_index), ("source_rank", source_rank), ("source_paths", source_paths)):
        if given is not None and len(given) != len(true):
            do = "Pass one value per sample"
            raise InvalidInputError(explain(f"`{name}` of length {len(true)}", str(len(given)), do))
    path = regular_file(path, "a label file (.npz, .pt, .csv or .json)")
    short = _short(key)
    if path.suffix.lower() in _NAMED:
        labels = _by_name(path, key, true, num_classes, source_paths, class_names)
        return check_labels(labels, num_classes, name=short).to(true_labels.device)
    sets = read_label_file(path)
    _check_key(key, set(sets) - {_RANK}, path)
    clean = sets[_CLEAN]
    if int(clean.max()) >= num_classes:
        got = f"class {int(clean.max())} among the clean labels of {path}"
        raise StateMismatchError(explain(f"labels of {num_classes} classes", got, "Use the label file of this dataset"))
    if source_rank is not None:
        index = _by_rank(clean, sets.get(_RANK), true, source_rank.cpu(), path)
    elif source_paths is not None:
        index = _by_number(clean, true, source_paths, class_names, path)
    else:
        index = torch.arange(len(true)) if source_index is None else source_index.cpu()
        if not _inside(index, clean):
            got = f"{len(clean)} entries and positions from {int(index.min())} to {int(index.max())}"
            do = "Use the label file of this dataset, and load the data in its published order"
            raise StateMismatchError(explain(f"an entry in {path} for every sample", got, do))
    _check_clean(clean[index], true, path)
    return check_labels(sets[short][index], num_classes, name=short).to(true_labels.device)


def _by_name(
    path: Path,
    key: str,
    true: Tensor,
    num_classes: int,
    paths: Sequence[str] | None,
    class_names: Sequence[str] | None,
) -> Tensor:
    """Labels int64 [N] from a file that names the images."""
    if paths is None:
        do = "Use an image folder, or a label file of arrays (.npz)"
        raise StateMismatchError(explain(f"images with file names, because {path} names files", "none", do))
    found = read_named_labels(path)
    names = {_short(name): name for name in found.sets}
    _check_key(key, set(names), path)
    rows = [found.rows.get(plain_path(name)) for name in paths]
    if None in rows:
        first = paths[rows.index(None)]
        do = "Name every training image by its path below the dataset's top or below train/"
        raise StateMismatchError(explain(f"a record in {path} for every image", f"none for {first!r}", do))
    index = torch.tensor(rows)
    if _CLEAN in names:
        _check_clean(found.labels(names[_CLEAN], num_classes, class_names)[index], true, path)
    return found.labels(names[_short(key)], num_classes, class_names)[index]


def _by_rank(clean: Tensor, rank: Tensor | None, true: Tensor, ranks: Tensor, path: Path) -> Tensor:
    """Positions int64 [N] of samples with these classes and ranks."""
    if rank is None:
        classes, own = clean.unique(return_inverse=True)
        rank = rank_in_class(torch.zeros(len(own)), own, len(classes))
    width = int(rank.max()) + 1
    if width > len(clean):
        got = f"rank {width - 1} in {path}"
        raise FileFormatError(explain(f"ranks below {len(clean)} in {_RANK!r}", got, "Write the file again"))
    table = torch.full((int(max(clean.max(), true.max())) + 1, width), -1, dtype=torch.int64)
    table[clean, rank] = torch.arange(len(clean))
    inside = (ranks >= 0) & (ranks < width)
    found = torch.where(inside, table[true, ranks.clamp(0, width - 1)], torch.full_like(true, -1))
    if bool((found < 0).any()):
        first = int((found < 0).nonzero()[0])
        got = f"none for number {int(ranks[first])} of class {int(true[first])}"
        raise StateMismatchError(explain(f"an entry in {path} for every image, numbered from 0", got, _SCHEMES))
    return found


def _by_number(
    clean: Tensor, true: Tensor, paths: Sequence[str], class_names: Sequence[str] | None, path: Path
) -> Tensor:
    """Positions int64 [N] out of the file names."""
    own = [""] * len(true) if class_names is None else [class_names[c] for c in true.tolist()]
    numbers = [_position_in(PurePosixPath(name).stem, c) for name, c in zip(paths, own, strict=True)]
    if None in numbers:
        got = f"{paths[numbers.index(None)]!r}"
        raise StateMismatchError(explain(f"file names that give the images' places in {path}", got, _SCHEMES))
    index = torch.tensor(numbers)
    if len(index.unique()) < len(index):
        got = "numbers that are neither ranks from 0 in every class nor all different"
        raise StateMismatchError(explain(f"file names that give the images' places in {path}", got, _SCHEMES))
    if not _inside(index, clean):
        got = f"{len(clean)} entries and numbers from {int(index.min())} to {int(index.max())}"
        raise StateMismatchError(explain(f"numbers of entries in {path}", got, _SCHEMES))
    for shift in (1, -1):
        moved = index + shift
        if _inside(moved, clean) and torch.equal(clean[moved], true):
            got = "clean labels that also agree with the neighbouring entries"
            raise StateMismatchError(explain(f"file names that give the images' places in {path}", got, _SCHEMES))
    wrong = int((clean[index] != true).sum())
    if wrong:
        got = f"{wrong} of {len(true)} that differ"
        raise StateMismatchError(explain(f"equal clean labels in {path} at the files' numbers", got, _SCHEMES))
    return index


def _position_in(stem: str, class_name: str) -> int | None:
    """The number in 40217, 40217_cat, cat_40217; None for other names."""
    short = stem.removesuffix(f"_{class_name}")
    return whole_number(short if short != stem else stem.removeprefix(f"{class_name}_"))


def _inside(index: Tensor, clean: Tensor) -> bool:
    return bool(((index >= 0) & (index < len(clean))).all())


def _check_clean(clean: Tensor, true: Tensor, path: Path) -> None:
    wrong = (clean != true).nonzero().flatten()
    if len(wrong) > 0:
        first = int(wrong[0])
        classes = f"class {int(clean[first])} in the file, class {int(true[first])} in the dataset"
        raise StateMismatchError(
            explain(
                f"the clean labels of {path} to equal the dataset's true labels",
                f"{len(wrong)} of {len(true)} that differ, first sample {first}: {classes}",
                "Use the label file of this dataset, and load the data in its published order",
            )
        )


def _check_key(key: str, known: set[str], path: Path) -> None:
    if _short(key) not in known:
        close = difflib.get_close_matches(_short(key), sorted(known), n=1)
        do = f"Did you mean {close[0]!r}" if close else "Name one of these, as in human:NAME"
        expected = f"a label set of {path} out of {', '.join(sorted(known))}"
        raise UnknownNameError(explain(expected, repr(key), do))


def _short(name: str) -> str:
    return name.replace("_label", "")


def _as_labels(value: Any, name: str, path: Path) -> Tensor:
    do = "Store every label set as an integer array with one entry per sample"
    try:
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError) as error:
        raise FileFormatError(explain(f"an array under {name!r} in {path}", str(error), do)) from error
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        got = f"shape {list(array.shape)}, dtype {array.dtype}"
        raise FileFormatError(explain(f"whole numbers of shape [M] under {name!r} in {path}", got, do))
    if int(array.min()) < 0 or int(array.max()) >= 2**62:
        got = f"{int(array.min())} to {int(array.max())} under {name!r} in {path}"
        raise FileFormatError(explain("numbers in [0, 2^62)", got, do))
    return torch.from_numpy(array.astype(np.int64))


def _read_pt(path: Path) -> dict[Any, Any]:
    content = load_pt(path)
    if not isinstance(content, Mapping):
        do = "Check the download; or convert it once, where you trust it, with numpy.savez(path, clean=..., worse=...)"
        raise FileFormatError(explain("a dictionary of label arrays", f"{type(content).__name__} in {path}", do))
    return dict(content)
