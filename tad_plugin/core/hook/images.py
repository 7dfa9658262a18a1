"""Images: what a user gives to attach(), as one float32 tensor [N,C,H,W], or as a store if they are large."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tad_plugin.data.dataset_images import DatasetImages
from tad_plugin.errors import InvalidInputError, TadPluginWarning, explain
from tad_plugin.utils.arguments import holds_values
from tad_plugin.utils.image_store import FLOAT_BYTES, Images, ImageStore

__all__ = ["KEEP_BYTES", "as_images", "is_dataset"]

KEEP_BYTES = 2**30
"""Bytes of float32 images of a dataset that attach() keeps in memory; more are read when they are asked for."""
# Images of a larger dataset that are looked at for their normalisation.
_FEW = 64

_EXPECTED = "`data` as a tensor, array or list of images [N,C,H,W], or a map-style dataset of (image, label)"
# Normalised images have a mean near 0 and values of a few standard deviations.
_FAR_MEAN, _FAR_VALUE = 3.0, 50.0


def is_dataset(data: Any) -> bool:
    """True if ``data`` must be read item by item: neither None, nor a tensor, array, or list of images."""
    if data is None or isinstance(data, Tensor | np.ndarray | ImageStore):
        return False
    return not isinstance(data, list | tuple) or (len(data) > 0 and _is_pair(data[0]))


def as_images(
    data: Any,
    count: int,
    *,
    read: bool = True,
    transform: Callable[[Any], Any] | None = None,
    seed: int = 0,
    keep_bytes: int = KEEP_BYTES,
) -> Images | None:
    """Normalised images float32 [N,C,H,W] of what a user gave; None for None.

    A float32 tensor [N,C,H,W] is not copied. Images [N,H,W] get their channel. Other real dtypes are cast. A store
    stays as it is. The images of a dataset are read once if they fit into ``keep_bytes``. Otherwise they are read
    whenever a method asks for them, in batches. See :class:`DatasetImages`.

    No image of an ``np.memmap`` of uint8 or float32 is copied. Of uint8 arrays that would take more than 2 GiB as
    float32 a store is made as well.

    Args:
        data: a tensor, array or list of images; an ImageStore; or a map-style dataset whose items are tuples
            (image, label) or mappings with an image.
        count: the number of labels, which a dataset must have as its length.
        read: False only looks at a dataset's type and length, and returns None for it.
        transform: how a dataset's image is made for scoring.
        seed: seeds the reading of a dataset.
        keep_bytes: largest size of a dataset's images that are kept in memory.

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
        items = DatasetImages(data, prepare=_tensor, transform=transform, seed=seed)
        large = 4 * math.prod(items.shape) > keep_bytes
        data = ImageStore(items) if large else items[:]
    elif transform is not None:
        do = "Pass the dataset as data=, or transform the images yourself"
        raise InvalidInputError(explain("a dataset whose images scoring_transform makes", type(data).__name__, do))
    store = _store(data)
    if store is not None:
        # A part tells whether they are normalised. A whole pass would take long.
        few = torch.linspace(0, max(0, len(store) - 1), min(len(store), _FEW)).long()
        _check(store[few])
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


def _is_pair(item: Any) -> bool:
    if isinstance(item, dict):
        return True
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
    if not (math.isfinite(low) and math.isfinite(high)):
        return  # RealData names the image
    if (low >= 0 and high > low) or abs(mean) > _FAR_MEAN or max(-low, high) > _FAR_VALUE:
        got = f"mean {mean:.4g}, values from {low:.4g} to {high:.4g}"
        do = (
            "Normalise them as for your networks: (images - mean) / std of each channel. For 8-bit images pass"
            " tad_plugin.data.ImageStore(images, mean, std)"
        )
        warnings.warn(explain("normalised images", got, do), TadPluginWarning, stacklevel=6)
