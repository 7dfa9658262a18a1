"""Samples of a user's dataset: where the image and the label stand, and where the index goes.

A sample is a tuple or list (image, label, ...), or a mapping such as ``{"image": ..., "label": ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from tad_plugin.data.labels import integers_of
from tad_plugin.errors import InvalidInputError, explain

__all__ = ["IMAGE_KEYS", "LABEL_KEYS", "hard_label", "labels_of", "part", "place_of", "with_index", "with_label"]

IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs", "data")
"""Keys under which a mapping may hold its image, in the order in which they are looked for."""
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "fine_label")
"""Keys under which a mapping may hold its label."""
_DO = "Make dataset[i] return (image, label), or a mapping with an image and a label, or name their places"


def place_of(sample: Any, what: str, given: int | str | None = None) -> Any:
    """The position or key of the "image" or the "label" in a sample.

    Args:
        sample: a tuple or list, whose first two parts are image and label; or a mapping with usual keys.
        what: "image" or "label".
        given: the place, if the user named it.

    Raises:
        InvalidInputError: there is no such place.
    """
    usual: tuple[Any, ...] = IMAGE_KEYS if what == "image" else LABEL_KEYS
    if isinstance(sample, tuple | list):
        place: Any = (0 if what == "image" else 1) if given is None else given
        if isinstance(place, int) and -len(sample) <= place < len(sample):
            return place
        got = f"a {type(sample).__name__} of {len(sample)}"
    elif isinstance(sample, Mapping):
        found = [key for key in (usual if given is None else (given,)) if key in sample]
        if found:
            return found[0]
        got = f"a mapping with {', '.join(map(repr, list(sample)[:8]))}"
    else:
        got = f"a {type(sample).__name__}"
    named = "" if given is None else f" at {given!r}"
    raise InvalidInputError(explain(f"a sample with {'an' if what == 'image' else 'a'} {what}{named}", got, _DO))


def part(sample: Any, what: str, given: int | str | None = None) -> Any:
    """The "image" or the "label" of a sample. Raises InvalidInputError if it has none."""
    return sample[place_of(sample, what, given)]


def hard_label(label: Any) -> int | None:
    """The class of an integer label; None for a soft one (a vector)."""
    if isinstance(label, bool):
        return None
    if isinstance(label, int | np.integer):
        return int(label)
    if isinstance(label, Tensor | np.ndarray):
        values = torch.as_tensor(label)
        whole = not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool
        return int(values) if values.numel() == 1 and values.ndim <= 1 and whole else None
    return None


def _like(label: Any, target: int) -> Any:
    """``target`` in the form of ``label``: an integer of its type, or a one-hot vector of its length."""
    if isinstance(label, Tensor):
        if hard_label(label) is not None:
            return torch.full_like(label, target)
        return F.one_hot(torch.tensor(target), label.numel()).to(label.dtype).view_as(label)
    if isinstance(label, np.ndarray):
        return _like(torch.from_numpy(label.copy()), target).numpy()
    if isinstance(label, np.integer):
        return type(label)(target)
    return target


def with_label(sample: Any, target: int, given: int | str | None = None) -> Any:
    """The sample with another label, in the form of the old one; a new object."""
    place = place_of(sample, "label", given)
    label = _like(sample[place], target)
    if isinstance(sample, Mapping):
        return _added(sample, place, label)
    return _sequence(sample, [label if i == place % len(sample) else value for i, value in enumerate(sample)])


def with_index(sample: Any, index: int, key: str = "index") -> Any:
    """The sample with its index: as the last part of a tuple or list, or under ``key`` of a mapping; a new object.

    Raises:
        InvalidInputError: a mapping that has this key, or another kind of sample.
    """
    if isinstance(sample, Mapping):
        if key in sample:
            do = 'Choose another name for it: hook.dataset(dataset, key="position")'
            raise InvalidInputError(explain(f"samples without the key {key!r}", "one that has it", do))
        return _added(sample, key, index)
    if isinstance(sample, tuple | list):
        # A named tuple has no place for one more part.
        return [*sample, index] if isinstance(sample, list) else (*sample, index)
    raise InvalidInputError(explain("a sample as a tuple, list or mapping", type(sample).__name__, _DO))


def _added(sample: Mapping[Any, Any], key: Any, value: Any) -> Any:
    if isinstance(sample, MutableMapping) and type(sample) is not dict and hasattr(sample, "copy"):
        copied: Any = sample.copy()  # type: ignore[attr-defined]
        copied[key] = value
        return copied
    return {**sample, key: value}


def _sequence(sample: Any, values: list[Any]) -> Any:
    if hasattr(sample, "_fields"):  # a named tuple
        return type(sample)(*values)
    return values if isinstance(sample, list) else tuple(values)


def labels_of(dataset: Any) -> Tensor | None:
    """The labels int64 [N] of a dataset, if it tells them without reading an image; else None.

    It looks through Subset and ConcatDataset, into the second tensor of a TensorDataset, the attributes ``targets``,
    ``labels`` and ``samples`` of torchvision's datasets, and the label column of a Hugging Face dataset.
    """
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(d) for d in dataset.datasets]
        return None if any(p is None for p in parts) else torch.cat([p for p in parts if p is not None])
    found: Any = None
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    elif hasattr(dataset, "column_names"):
        names = [key for key in LABEL_KEYS if key in dataset.column_names]
        found = dataset[names[0]] if names else None
    elif isinstance(dataset, Dataset):
        for name in ("targets", "labels"):
            found = getattr(dataset, name, None) if found is None else found
        samples = getattr(dataset, "samples", None)
        if found is None and isinstance(samples, list) and samples and isinstance(samples[0], tuple):
            found = [s[1] for s in samples if len(s) > 1]
    try:
        labels = None if found is None else integers_of(found if isinstance(found, Tensor) else list(found))
    except (InvalidInputError, TypeError):
        return None
    return labels if labels is not None and labels.ndim == 1 and len(labels) == len(dataset) else None
