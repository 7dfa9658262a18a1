"""Human label files: an npz without pickle, or the published CIFAR-N ``.pt``, read without running any code.

A file holds several label sets in the dataset's published order, each of length M: ``clean`` (the true labels, by
which the mapping is checked) and, for CIFAR-10N, ``aggre``, ``worse``, ``random1`` to ``random3``; for CIFAR-100N
``noisy``. Names as published (``worse_label``, ``random_label1``) are accepted and shortened.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import FileFormatError, InvalidInputError, StateMismatchError, explain, unknown_name

__all__ = ["human_labels", "read_label_file"]

_CLEAN = "clean"
_RANK = "rank_in_class"


def read_label_file(path: str | Path) -> dict[str, Tensor]:
    """All label sets of a file, by short name ("clean", "worse", "random1", ...), each int64 [M] on the CPU.

    Args:
        path: an ``.npz`` of integer arrays, or a ``.pt`` / ``.pth`` with a dictionary of integer arrays.

    Raises:
        FileFormatError: missing, corrupt, of another format, needing unrestricted pickle, without ``clean``, with
            arrays that are not whole numbers of shape [M], or of several lengths.
    """
    path = Path(path)
    if not path.is_file():
        got = f"nothing at {path}"
        raise FileFormatError(explain("a label file (.npz or .pt)", got, "Download the label file and pass its path"))
    if path.suffix.lower() == ".npz":
        raw = _read_npz(path)
    elif path.suffix.lower() in {".pt", ".pth"}:
        raw = _read_pt(path)
    else:
        do = "Convert it with numpy.savez(path, clean=..., worse=...)"
        raise FileFormatError(explain("a label file ending in .npz, .pt or .pth", str(path), do))
    labels = {_short(str(name)): _as_labels(value, str(name), path) for name, value in raw.items()}
    if _CLEAN not in labels:
        got = f"{path} with {', '.join(sorted(labels)) or 'nothing'}"
        do = "Add the true labels as 'clean': the order of the samples is checked against them"
        raise FileFormatError(explain("a label set named 'clean'", got, do))
    lengths = {name: len(value) for name, value in labels.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{k}: {n}" for k, n in lengths.items())
        raise FileFormatError(explain(f"label sets of one length in {path}", got, "Write the file anew"))
    return labels


def human_labels(
    path: str | Path,
    key: str,
    true_labels: Tensor,
    num_classes: int,
    *,
    source_index: Tensor | None = None,
    source_rank: Tensor | None = None,
) -> Tensor:
    """The label set ``key`` of a file, for the given samples: int64 [N] on ``true_labels``'s device.

    A sample is found in the file by its true class and its rank inside the class when ``source_rank`` is given (image
    folders), otherwise by its position ``source_index``, otherwise by its own place (the file has N entries). The
    file's ``clean`` labels must equal ``true_labels`` after that.

    Args:
        path: see :func:`read_label_file`.
        key: "worse", "aggre", ...; the published "worse_label" works too.
        true_labels: int64 [N] in [0, K).
        num_classes: K.
        source_index: int64 [N], positions in the published order, >= 0.
        source_rank: int64 [N], how many samples of the same class come before it in the published order.

    Raises:
        UnknownNameError: no such label set.
        FileFormatError: see :func:`read_label_file`.
        StateMismatchError: a sample is not in the file, or its clean label there is another.
        InvalidLabelsError: a label of the set is not in [0, K).
    """
    true = check_labels(true_labels, num_classes, name="true_labels").cpu()
    sets = read_label_file(path)
    short = _short(key)
    known = sorted(set(sets) - {_RANK})
    if short not in known:
        raise unknown_name("label set", key, known)
    clean = sets[_CLEAN]
    if int(clean.max()) >= num_classes:
        got = f"class {int(clean.max())} among the clean labels of {path}"
        raise StateMismatchError(explain(f"labels of {num_classes} classes", got, "Use the label file of this dataset"))
    index = _positions(clean, sets.get(_RANK), true, source_index, source_rank, path)
    wrong = (clean[index] != true).nonzero().flatten()
    if len(wrong) > 0:
        first = int(wrong[0])
        classes = f"class {int(clean[index[first]])} in the file, class {int(true[first])} in the dataset"
        raise StateMismatchError(
            explain(
                f"the clean labels of {path} to equal the dataset's true labels",
                f"{len(wrong)} of {len(true)} that differ, first sample {first}: {classes}",
                "Use the label file of this dataset, and load the data in its published order",
            )
        )
    return check_labels(sets[short][index], num_classes, name=short).to(true_labels.device)


def _positions(
    clean: Tensor, rank: Tensor | None, true: Tensor, index: Tensor | None, ranks: Tensor | None, path: str | Path
) -> Tensor:
    """Where in the file each sample stands, int64 [N]."""
    do = "Use the label file of this dataset, and load the data with its published files, order and names"
    for name, given in (("source_index", index), ("source_rank", ranks)):
        if given is not None and given.shape != true.shape:
            got = f"shape {list(given.shape)}"
            raise InvalidInputError(explain(f"`{name}` of shape {list(true.shape)}", got, "Pass one value per sample"))
    if ranks is not None:
        rank = _rank_in_class(clean) if rank is None else rank
        width = int(rank.max()) + 1
        if width > len(clean):
            got = f"rank {width - 1} in {path}"
            raise FileFormatError(explain(f"ranks below {len(clean)} in {_RANK!r}", got, "Write the file anew"))
        table = torch.full((int(max(clean.max(), true.max())) + 1, width), -1, dtype=torch.int64)
        table[clean, rank] = torch.arange(len(clean))
        ranks = ranks.cpu()
        inside = (ranks >= 0) & (ranks < width)
        found = torch.where(inside, table[true, ranks.clamp(0, width - 1)], torch.full_like(true, -1))
        if bool((found < 0).any()):
            first = int((found < 0).nonzero()[0])
            got = f"none for number {int(ranks[first])} of class {int(true[first])}"
            raise StateMismatchError(explain(f"an entry in {path} for every image, numbered from 0", got, do))
        return found
    index = torch.arange(len(true)) if index is None else index.cpu()
    too_far = bool(((index < 0) | (index >= len(clean))).any())
    if too_far:
        got = f"{len(clean)} entries and positions from {int(index.min())} to {int(index.max())}"
        raise StateMismatchError(explain(f"an entry in {path} for every sample", got, do))
    return index


def _rank_in_class(labels: Tensor) -> Tensor:
    rank = torch.empty_like(labels)
    for c in labels.unique():
        members = labels == c
        rank[members] = torch.arange(int(members.sum()))
    return rank


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
    if int(array.min()) < 0:
        got = f"{int(array.min())} under {name!r} in {path}"
        raise FileFormatError(explain("numbers of at least 0", got, do))
    return torch.from_numpy(array.astype(np.int64))


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        do = "Write it with numpy.savez from integer arrays, or download it again"
        raise FileFormatError(explain("an npz file of plain arrays", f"{path}: {error}", do)) from error


def _read_pt(path: Path) -> dict[Any, Any]:
    # The published file pickles numpy arrays. weights_only admits tensors and plain containers; the names below are
    # all that an integer array needs besides, and none of them runs anything.
    do = "Check the download; or convert it once, where you trust it, with numpy.savez(path, clean=..., worse=...)"
    serialization: Any = torch.serialization
    if not hasattr(serialization, "safe_globals"):
        got = f"torch {torch.__version__}"
        do = "Upgrade torch, or convert the file once to npz with numpy.savez(path, clean=..., worse=...)"
        raise FileFormatError(explain("torch >= 2.5 to read a .pt of numpy arrays safely", got, do))
    multiarray: Any = np.zeros(1).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "bhilqBHILQ"}]
    allowed += [(multiarray, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")]
    try:
        with serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        reason = str(error).split("\n", 1)[0][:200]
        raise FileFormatError(explain("a .pt file of plain arrays", f"{path}: {reason}", do)) from error
    if not isinstance(content, Mapping):
        raise FileFormatError(explain("a dictionary of label arrays", f"{type(content).__name__} in {path}", do))
    return dict(content)
