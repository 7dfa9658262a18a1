"""The images of a user's map-style dataset, as methods score them: without augmentation, and leaving no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from tad_plugin.data.samples import part
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.utils.seeds import global_generators_kept

__all__ = ["DatasetImages", "plain_view"]

_EXPECTED = "`data` as a tensor, array or list of images [N,C,H,W], or a map-style dataset of (image, label)"

Transform = Callable[[Any], Any]


def plain_view(dataset: Any, transform: Transform) -> tuple[Any, bool]:
    """The dataset with ``transform`` in the place of its own one, and whether a place was found.

    The place is the attribute ``transform``, also inside Subset and ConcatDataset. The given dataset is not changed.
    """
    if isinstance(dataset, Subset):
        inner, found = plain_view(dataset.dataset, transform)
        return Subset(inner, dataset.indices), found
    if isinstance(dataset, ConcatDataset):
        parts = [plain_view(d, transform) for d in dataset.datasets]
        if len({found for _, found in parts}) > 1:
            do = "Give each dataset the attribute `transform`, or pass a plain dataset as data="
            got = "a ConcatDataset of which only some have it"
            raise InvalidInputError(explain("datasets with a `transform` to replace", got, do))
        return ConcatDataset([view for view, _ in parts]), parts[0][1]
    if not hasattr(dataset, "transform"):
        return dataset, False
    view = copy.copy(dataset)
    view.transform = transform
    both = getattr(view, "transforms", None)  # torchvision keeps image and target transform once more, together
    if both is not None and hasattr(both, "transform"):
        view.transforms = copy.copy(both)
        view.transforms.transform = transform
    return view, True


class DatasetImages:
    """Reads images of a dataset when they are asked for, in batches: the source of an ``ImageStore``.

    Each image is read with the global generators seeded by its position, and they are given back as they were. So an
    image is the same in every pass, and the training loop draws what it would have drawn.

    Args:
        dataset: map-style; ``dataset[i]`` gives (image, label, ...) or a mapping with an image.
        transform: how an image is made for scoring. It takes the place of the dataset's attribute ``transform``, also
            inside Subset and ConcatDataset. Without such an attribute it is applied to the dataset's image.
        image: position or key of the image in a sample, if it is an unusual one.
        seed: seeds the reading.
        prepare: makes float32 [C,H,W] or [H,W] of an image.

    Raises:
        InvalidInputError: an item without an image, or a transform that is no function.
    """

    dtype = torch.float32

    def __init__(
        self,
        dataset: Any,
        *,
        prepare: Callable[[Any], Tensor],
        transform: Transform | None = None,
        image: int | str | None = None,
        seed: int = 0,
    ) -> None:
        if transform is not None and not callable(transform):
            do = "Pass a function that makes a normalised tensor of an image"
            raise InvalidInputError(explain("`scoring_transform` as a function", repr(transform), do))
        self._view, inside = (dataset, True) if transform is None else plain_view(dataset, transform)
        self._after = None if inside else transform
        self._prepare, self._image, self._seed = prepare, image, seed % 2**31
        with global_generators_kept():
            self._first = self._read(0)
        self.shape = torch.Size((len(dataset), *self._first.shape))

    def _read(self, i: int) -> Tensor:
        seed = (self._seed + 2654435761 * (i + 1)) % 2**32
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            found = part(self._view[i], "image", self._image)
            found = found if self._after is None else self._after(found)
        except InvalidInputError as error:
            raise InvalidInputError(f"Item {i} of the dataset: {error}") from error
        except Exception as error:  # the user's own code: whatever it raises
            got = f"{type(error).__name__} at item {i}: {error}"
            do = "Make data[i] return (image, label), and scoring_transform take its image"
            raise InvalidInputError(explain(_EXPECTED, got, do)) from error
        if not isinstance(found, Tensor | np.ndarray):
            do = "Pass scoring_transform=..., for example torchvision's ToTensor and Normalize, or data=images"
            raise InvalidInputError(explain("images as tensors", f"a {type(found).__name__} at item {i}", do))
        made = self._prepare(found)
        return made.unsqueeze(0) if made.ndim == 2 else made

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """The images at int64 [B] or a slice, [B,C,H,W]. Raises InvalidInputError for an item that fits no other."""
        indices = torch.arange(self.shape[0])[rows]
        found = []
        with global_generators_kept():
            for i in indices.tolist():
                row = self._read(i) if i else self._first
                if row.shape != self.shape[1:] or not bool(torch.isfinite(row).all()):
                    got = f"{list(row.shape)} at item {i}" if row.shape != self.shape[1:] else f"a NaN in image {i}"
                    do = "Repair or leave out this image, or resize all in scoring_transform"
                    raise InvalidInputError(explain(f"finite images of shape {list(self.shape[1:])}", got, do))
                found.append(row)
        empty = torch.zeros(0, *self.shape[1:])
        return torch.stack(found) if found else empty
