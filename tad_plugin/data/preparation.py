"""From 8-bit pixels to normalised images: float tensors, or stores that normalise per batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.sources import RawSplits
from tad_plugin.utils.image_store import FLOAT_BYTES, Images, ImageStore, MappedPixels

__all__ = ["PublishedPixels", "float_images", "pixel_blocks", "pixel_stores", "stays_8_bit"]

_CHUNK = 512
_WHITENED_CHUNK = 4096
_BLOCK_BYTES = 33 * 2**20


def pixel_blocks(images: Tensor) -> list[Tensor]:
    """The images in blocks with memory of their own, so that one can be dropped while the others are in use."""
    # The C library returns blocks of this size to the system at once.
    size = max(1, _BLOCK_BYTES // max(1, math.prod(images.shape[1:])))
    return [part.clone() for part in images.split(size)]


def float_images(
    blocks: list[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
    image_size: int | None,
    preprocessing: Preprocessing,
    device: torch.device,
) -> list[Tensor]:
    """uint8 images as normalised float32 on the device: those of each of ``rows`` (ascending), or all for None.

    The blocks are dropped from the list when they were read.
    """
    total, channels = sum(map(len, blocks)), blocks[0].shape[1]
    size = tuple(blocks[0].shape[-2:]) if image_size is None else (image_size, image_size)
    every = [torch.arange(total) if own is None else own for own in rows]
    found = [torch.empty(len(own), channels, *size, device=device) for own in every]
    # Whitening is a matrix product, whose rounding depends on the number of rows.
    chunk = _CHUNK if preprocessing.zca is None else _WHITENED_CHUNK
    first = 0
    for number, block in enumerate(blocks):
        last = first + len(block)
        for own, out in zip(every, found, strict=True):
            begin, end = (int(i) for i in torch.searchsorted(own, torch.tensor([first, last])))
            for start in range(begin, end, chunk):
                part = slice(start, min(start + chunk, end))
                pixels = block[own[part] - first].to(device).float().div(scale)
                if pixels.shape[-2:] != size:
                    # Only arrays come here with another size: folders are resized, and cut to a square, when decoded.
                    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
                out[part] = preprocessing(pixels)
        first = last
        blocks[number] = block = block.new_empty(0)
    return found


def stays_8_bit(raw: RawSplits, image_size: int | None, storage: str) -> bool:
    """Whether images that were read to memory stay as they are."""
    if storage == "auto":
        height, width = raw.train.shape[-2:] if image_size is None else (image_size, image_size)
        count = len(raw.train) + len(raw.test)
        return 4 * count * raw.train.shape[1] * height * width > FLOAT_BYTES
    return storage == "uint8"


def pixel_stores(
    raw: RawSplits,
    train: Tensor,
    held: Tensor,
    image_size: int | None,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[ImageStore, ImageStore, ImageStore]:
    """Training, held-out and test images on the pixels as they were read."""
    size = None if image_size is None or raw.mapped is not None else (image_size, image_size)

    def store(pixels: Tensor | MappedPixels, rows: Tensor | None) -> ImageStore:
        mean, std = preprocessing.mean, preprocessing.std
        return ImageStore(pixels, mean, std, scale=raw.scale, size=size, rows=rows, device=device)

    test = None if raw.mapped is None else torch.arange(len(raw.train), len(raw.train) + len(raw.test))
    pixels, test_pixels = (raw.train, raw.test) if raw.mapped is None else (raw.mapped, raw.mapped)
    return store(pixels, train), store(pixels, held), store(test_pixels, test)


class PublishedPixels:
    """The published pixels in [0, 1] of the training and held-out part, read from normalised ones by position.

    Args:
        parts: the normalised training and held-out images.
        preprocessing: how they were normalised.
        scale: the pixel value that stands for 1.
        order: int64 [N], the position of each published image among the training and then the held-out ones.
    """

    dtype = torch.float32

    def __init__(self, parts: tuple[Images, Images], preprocessing: Preprocessing, scale: float, order: Tensor) -> None:
        self.parts, self.preprocessing, self.scale, self.order = parts, preprocessing, scale, order
        self.shape = torch.Size((len(order), *parts[0].shape[1:]))

    def __getitem__(self, rows: Any) -> Tensor:
        places, n = self.order[rows], len(self.parts[0])
        found = torch.empty(len(places), *self.shape[1:])
        for inside, images, first in ((places < n, self.parts[0], 0), (places >= n, self.parts[1], n)):
            for part in inside.nonzero().flatten().split(_CHUNK):
                own = images[places[part].to(images.device) - first]
                found[part] = (self.preprocessing.inverse(own) * self.scale).round().cpu()
        return found / self.scale
