"""Images that need not fit memory: 8-bit pixels in memory, in a mapped file or in a dataset, normalised per batch.

An :class:`ImageStore` is indexed like a float32 tensor of the images, and gives the same bits, a batch at a time.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.errors import FileFormatError, InvalidInputError, explain
from tad_plugin.utils.transfers import upload

__all__ = ["FLOAT_BYTES", "ImageStore", "Images", "MappedPixels", "PixelSource", "image_rows", "in_parts"]

FLOAT_BYTES = 2**31
"""Images that would take more bytes than this as float32 stay what they are: 8-bit pixels, a file, a dataset."""

_PART_BYTES = 2**25
# The kernel maps up to 16 pages around one that is read, so random reads hold several times as much.
_READ_BYTES = 2**25


class PixelSource(Protocol):
    """Images that are read by position.

    Attributes:
        shape: [N,C,H,W].
        dtype: uint8, or a float type for images that are normalised already.
    """

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    def __getitem__(self, rows: Any) -> Tensor:
        """The images at int64 [B] or a slice, as they are kept, [B,C,H,W]."""


class MappedPixels:
    """8-bit pixels in a file that is mapped into memory. Processes that map it share its pages.

    After every 32 MiB that were read the pages are given back. They stay in the system's cache of files while there
    is room, and do not count as memory of the process.

    Args:
        path: the file.
        shape: [N,C,H,W].
        offset: bytes before the first pixel.

    Attributes:
        pixels: uint8 [N,C,H,W], the mapped tensor.

    Raises:
        FileFormatError: no such file, or one that is too short.
    """

    dtype = torch.uint8

    def __init__(self, path: str | Path, shape: Sequence[int], offset: int = 0) -> None:
        self.path, self.shape, self.offset = Path(path), torch.Size(shape), offset
        try:
            # Copy on write: PyTorch knows no tensor that is read-only, and nothing writes.
            array = np.memmap(self.path, np.uint8, "c", offset, tuple(shape))
        except (OSError, ValueError) as error:
            got, do = str(error), "Restore the file, or remove it so that it is made again"
            raise FileFormatError(explain(f"{math.prod(shape)} pixels in {self.path}", got, do)) from error
        self._map: Any = array.base
        self._read = 0
        self.pixels = torch.from_numpy(array)

    def __getitem__(self, rows: Any) -> Tensor:
        # A copy, so that no batch keeps pages that are given back and read again.
        found = self.pixels[rows].clone() if isinstance(rows, slice) else self.pixels[rows]
        self._read += found.numel()
        if self._read > _READ_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return found

    def __reduce__(self) -> Any:
        return MappedPixels, (self.path, tuple(self.shape), self.offset)


class ImageStore:
    """Images that are indexed like one float32 tensor [N,C,H,W] and are made a batch at a time.

    8-bit pixels x become ``(x / scale - mean) / std``: the bits that the same operations give on all images at once.
    Indices may lie on any device. :meth:`select` restricts a store without copying a pixel.

    Args:
        pixels: uint8 [N,C,H,W], a tensor or an array (an ``np.memmap`` stays one), or a source of images.
        mean: C floats; None subtracts nothing.
        std: C floats above 0; None divides by nothing.
        scale: the pixel value that stands for 1. Only 8-bit pixels are divided by it.
        size: height and width that the images are brought to (bilinear, antialiased); None keeps theirs.
        rows: int64 [M], the positions in ``pixels`` that the store consists of; None takes all.
        device: device of the batches. The pixels stay where they are.

    Raises:
        InvalidInputError: pixels of another type or shape, or statistics that do not fit them.
    """

    dtype: torch.dtype = torch.float32

    def __init__(
        self,
        pixels: Tensor | np.ndarray | PixelSource,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        scale: float = 255.0,
        size: tuple[int, int] | None = None,
        rows: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        source: Any = _source(pixels)
        if len(source.shape) != 4 or source.shape[1] == 0 or not (source.dtype == torch.uint8 or _floats(source)):
            do = "Store the images as uint8, channels first"
            got = f"{source.dtype} {list(source.shape)}"
            raise InvalidInputError(explain("`pixels` as uint8 [N,C,H,W]", got, do))
        channels = source.shape[1]
        numbers = [float(v) for v in (*(mean or ()), *(std or ()), scale)]
        sizes = {len(values) for values in (mean, std) if values is not None}
        if sizes - {channels} or not all(map(math.isfinite, numbers)) or min([scale, *(std or ())]) <= 0:
            got, do = f"mean {mean}, std {std}, scale {scale}", "Give one mean and one std per channel, std above 0"
            raise InvalidInputError(explain(f"{channels} finite means and stds above 0", got, do))
        self.source: PixelSource = source
        self.mean = None if mean is None else tuple(map(float, mean))
        self.std = None if std is None else tuple(map(float, std))
        self.scale, self.size = float(scale), size
        self.dtype = source.dtype if _floats(source) else torch.float32
        self._at = getattr(source, "device", torch.device("cpu"))
        self.rows = None if rows is None else rows.to(self._at)
        self.device = torch.device(self._at if device is None else device)
        self._statistics: list[Tensor | None] | None = None
        count = source.shape[0] if rows is None else len(rows)
        self.shape = torch.Size((count, channels, *(source.shape[2:] if size is None else size)))

    # -- what a tensor has ---------------------------------------------------------------------------
    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        kind = type(self.source).__name__
        return f"ImageStore({list(self.shape)}, {kind} {self.source.dtype}, batches on {self.device})"

    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of a value in a batch."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """True: batches are float32."""
        return True

    def to(self, device: torch.device | str) -> ImageStore:
        """The same store with its batches on another device."""
        return self._with(self.rows, device)

    def __getitem__(self, index: Any) -> Tensor:
        """The images at int64 [B], bool [N], a slice or a position: float32 [B,C,H,W], or [C,H,W] for a position."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(index)
            return self[torch.tensor([index % len(self)])][0]
        if isinstance(index, Tensor):
            if index.ndim != 1:
                do = "Ask for rows with a slice, a mask [N] or positions [B]"
                raise InvalidInputError(explain("rows of images", f"a tensor of shape {list(index.shape)}", do))
            chosen = index.nonzero().flatten() if index.dtype == torch.bool else index
            index = upload([chosen], self._at)[0].to(self._at)
            # Offset from the end, as in a tensor.
            index = torch.where(index < 0, index + len(self), index)
        return self._made(self.source[index if self.rows is None else self.rows[index]])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yields the images in batches of ``size``, in order."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    # -- what a tensor has not -----------------------------------------------------------------------
    def select(self, indices: Tensor) -> ImageStore:
        """The store restricted to ``indices`` (int64 [M] or bool [N]); no pixel is read."""
        indices = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).to(self._at)
        return self._with(indices if self.rows is None else self.rows[indices], self.device)

    def _with(self, rows: Tensor | None, device: torch.device | str) -> ImageStore:
        given = {"scale": self.scale, "size": self.size, "rows": rows, "device": device}
        return ImageStore(self.source, self.mean, self.std, **given)  # type: ignore[arg-type]

    def _made(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        if batch.dtype == torch.uint8:
            batch = batch.float().div(self.scale) if self.scale != 1 else batch.float()
        if self.size is not None and tuple(batch.shape[-2:]) != self.size and len(batch):
            batch = F.interpolate(batch, size=self.size, mode="bilinear", antialias=True)
        elif self.size is not None and not len(batch):
            batch = batch.new_empty(0, batch.shape[1], *self.size)
        if self._statistics is None:  # once, because it is an upload
            values = (None if v is None else torch.tensor(v, device=self.device) for v in (self.mean, self.std))
            self._statistics = [None if v is None else v.view(1, -1, 1, 1) for v in values]
        mean, std = self._statistics
        batch = batch if mean is None else batch - mean
        return batch if std is None else batch / std


Images = Tensor | ImageStore
"""Normalised images [N,C,H,W]: one float tensor, or a store that is indexed like it."""


def image_rows(images: Images, indices: Tensor) -> ImageStore:
    """The images at ``indices`` (int64 [M]), read when they are needed. No image is copied.

    Images of a tensor keep their dtype and device.
    """
    if isinstance(images, ImageStore):
        return images.select(indices)
    return ImageStore(images, rows=indices)


def in_parts(images: Images) -> Iterator[Tensor]:
    """Yields all images in order, some at a time: a tensor whole, a store in batches."""
    if isinstance(images, Tensor):
        yield images
    else:
        yield from images.split(max(1, _PART_BYTES * len(images) // max(1, 4 * images.numel())))


def _floats(source: Any) -> bool:
    return bool(source.dtype.is_floating_point)


def _source(pixels: Any) -> Any:
    # Only a whole map knows where it begins in its file; a part of one does not.
    whole = isinstance(pixels, np.memmap) and isinstance(pixels.base, mmap.mmap) and pixels.flags["C_CONTIGUOUS"]
    if whole and pixels.dtype == np.uint8 and pixels.filename is not None:
        return MappedPixels(pixels.filename, pixels.shape, pixels.offset)
    if isinstance(pixels, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a read-only array: nothing writes to it
            return torch.from_numpy(np.asarray(pixels))
    if isinstance(pixels, Tensor) or all(hasattr(pixels, name) for name in ("shape", "dtype", "__getitem__")):
        return pixels
    do = "Pass a tensor, an array, a memory-mapped file, or an object with shape, dtype and [positions]"
    raise InvalidInputError(explain("`pixels` as uint8 [N,C,H,W]", type(pixels).__name__, do))
