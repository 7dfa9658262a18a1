"""Images: what a user gives to attach(), as one float32 tensor [N,C,H,W], or as a store if they are large."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tad_plugin.errors import InvalidInputError, TadPluginWarning, explain
from tad_plugin.utils.arguments import holds_values
from tad_plugin.utils.image_store import FLOAT_BYTES, Images, ImageStore
from tad_plugin.utils.seeds import global_generators_kept

__all__ = ["as_images", "is_dataset"]

_EXPECTED = "`data` as a tensor, array or list of images [N,C,H,W], or a map-style dataset of (image, label)"
# Normalised images have a mean near 0 and values of a few standard deviations.
_FAR_MEAN, _FAR_VALUE = 3.0, 50.0
_LOOKED_AT = 512


def is_dataset(data: Any) -> bool:
    """True if ``data`` must be read item by item: neither None, nor a tensor, array, or list of images."""
    if data is None or isinstance(data, Tensor | np.ndarray | ImageStore):
        return False
    return not isinstance(data, list | tuple) or (len(data) > 0 and _is_pair(data[0]))


def as_images(data: Any, count: int, *, read: bool = True) -> Images | None:
    """Normalised images float32 [N,C,H,W] of what a user gave; None for None.

    A float32 tensor [N,C,H,W] is not copied. Images [N,H,W] get their channel. Other real dtypes are cast. A dataset
    is read once, item by item, and the global generators are given back as they were.

    No image of an :class:`ImageStore` is copied, nor of a ``np.memmap`` of uint8 or float32. Of uint8 arrays and
    datasets that would take more than 2 GiB as float32 a store is made as well. The items of such a dataset are read
    each time they are needed.

    Args:
        data: a tensor, array or list of images; a store of them; or a map-style dataset whose items are tuples (image,
            label).
        count: the number of labels, which a dataset must have as its length.
        read: False only looks at a dataset's type and length, and returns None for it.

    Raises:
        InvalidInputError: another kind, shape or length, channels last, or a NaN or infinite value.

    Warns:
        TadPluginWarning: images that are not normalised; it names their mean and range.
    """
    if data is None:
        return None
    if is_dataset(data):
        _check_dataset(data, count)
        if not read:
            return None
        with global_generators_kept():
            found = [_image(data, i) for i in range(min(count, 1))]
            large = bool(found) and 4 * count * found[0].numel() > FLOAT_BYTES
            found += [_image(data, i) for i in range(1, 0 if large else count)]
        data = ImageStore(_Items(data, count, _shaped(found[0]).shape)) if large else found
    store = _store(data)
    if store is not None:
        # A part tells whether they are normalised. A whole pass would take long.
        _check(store[torch.linspace(0, len(store) - 1, min(len(store), _LOOKED_AT)).long()] if len(store) else store[:])
        return store
    images = _tensor(data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    _check(images)
    return images


def _store(data: Any) -> ImageStore | None:
    """A store of images that are not to be copied; None for others."""
    if isinstance(data, ImageStore):
        return data
    if not isinstance(data, np.ndarray | Tensor) or data.ndim not in (3, 4):
        return None
    mapped = isinstance(data, np.memmap) and data.dtype in (np.uint8, np.float32)
    large = data.dtype in (np.uint8, torch.uint8) and 4 * math.prod(data.shape) > FLOAT_BYTES
    # The values as they are: a user who wants them normalised gives a store with mean and std.
    return ImageStore(data if data.ndim == 4 else data[:, None], scale=1) if mapped or large else None


class _Items:
    """The images of a map-style dataset, read when they are asked for."""

    dtype = torch.float32

    def __init__(self, data: Any, count: int, shape: torch.Size) -> None:
        self.data, self.shape = data, torch.Size((count, *shape))

    def __getitem__(self, rows: Any) -> Tensor:
        indices = range(self.shape[0])[rows] if isinstance(rows, slice) else rows.tolist()
        with global_generators_kept():
            found = [_shaped(_image(self.data, i)) for i in indices]
        for i, image in zip(indices, found, strict=True):
            if image.shape != self.shape[1:]:
                do = "Resize all images to one size in the dataset"
                expected = f"images of the shape of the first, {list(self.shape[1:])}"
                raise InvalidInputError(explain(expected, f"{list(image.shape)} at item {i}", do))
            if not bool(torch.isfinite(image).all()):
                got, do = f"a NaN or infinite value in image {i}", "Leave out or repair this image"
                raise InvalidInputError(explain("finite images", got, do))
        return torch.stack(found) if found else torch.empty(0, *self.shape[1:])


def _shaped(image: Tensor) -> Tensor:
    """An image as float32 [C,H,W]."""
    found = _tensor(image)
    return found[None] if found.ndim == 2 else found


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) >= 2 and isinstance(item[0], Tensor | np.ndarray)


def _check_dataset(data: Any, count: int) -> None:
    try:
        length = len(data)
    except (TypeError, NotImplementedError):
        length = -1
    known = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset | str | bytes | dict)
    if length < 0 or not known:
        raise InvalidInputError(explain(_EXPECTED, type(data).__name__, "Stack the images to a tensor first"))
    if length != count:
        do = "Pass the dataset that the labels belong to, in the same order"
        raise InvalidInputError(explain(f"`data` of {count} images, one per label", f"{length} items", do))


def _image(data: Any, i: int) -> Tensor:
    """The image of item ``i`` of a dataset."""
    try:
        item = data[i]
    except Exception as error:  # the user's own code: whatever it raises
        got = f"{type(error).__name__} at item {i}: {error}"
        raise InvalidInputError(explain(_EXPECTED, got, "Make data[i] return (image, label)")) from error
    if not _is_pair(item):
        got = f"{type(data).__name__} whose item {i} is a {type(item).__name__}"
        if isinstance(item, tuple | list):
            got += f" of {len(item)}" + (f", first a {type(item[0]).__name__}" if item else "")
        do = "Make data[i] return (image, label) with a tensor as image (for example with torchvision's ToTensor)"
        raise InvalidInputError(explain(_EXPECTED, got, do))
    return torch.as_tensor(item[0])


def _tensor(data: Any) -> Tensor:
    """A tensor, array, or list of them as float32."""
    try:
        if isinstance(data, list | tuple):
            if not data:
                raise ValueError("an empty list")
            inner = isinstance(data[0], Tensor | np.ndarray)
            data = torch.stack([_tensor(x) for x in data]) if inner else np.asarray(data)
        if isinstance(data, np.ndarray):
            if data.dtype.kind not in "biuf":
                raise TypeError(f"dtype {data.dtype}")
            # Old versions of PyTorch know no uint16 and no array that is read-only or runs backwards.
            data = torch.from_numpy(np.require(data, np.float32, ["C", "W"]))
        if data.is_complex() or not holds_values(data):
            raise TypeError(f"{data.dtype}, {data.layout} on {data.device}")
        plain: Tensor = data.detach().clone() if data.is_inference() else data.detach()
        return plain.float()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"{type(data).__name__}: {str(error).partition(chr(10))[0]}"
        raise InvalidInputError(explain(_EXPECTED, got, "Stack the images to one tensor first")) from error


def _check(images: Tensor) -> None:
    shape = list(images.shape)
    if images.ndim != 4 or 0 in shape:
        do = "Give each image its channels, rows and columns; reshape vectors [N,D] to [N,1,1,D]"
        raise InvalidInputError(explain("`data` of shape [N,C,H,W] or [N,H,W]", f"shape {shape}", do))
    if shape[3] <= 4 < shape[1] == shape[2]:
        do = "Move the channels to the front: permute(0, 3, 1, 2)"
        raise InvalidInputError(explain("`data` of shape [N,C,H,W]", f"{shape}, with channels last", do))
    low, high = (float(x) for x in images.aminmax())
    mean = float(images.mean())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):  # aminmax passes NaN on
        first = int((~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0])
        do = "Leave out or repair this image"
        raise InvalidInputError(explain("finite images", f"a NaN or infinite value in image {first}", do))
    if (low >= 0 and high > low) or abs(mean) > _FAR_MEAN or max(-low, high) > _FAR_VALUE:
        got = f"mean {mean:.4g}, values from {low:.4g} to {high:.4g}"
        do = (
            "Normalise them as for your networks: (images - mean) / std of each channel. For 8-bit images pass"
            " tad_plugin.data.ImageStore(images, mean, std)"
        )
        warnings.warn(explain("normalised images", got, do), TadPluginWarning, stacklevel=6)
