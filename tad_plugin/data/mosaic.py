"""Partition and expand (IDM, CVPR 2023): one image, a mosaic, holds F x F small ones.

A mosaic needs the storage of one image. For training each of its F^2 tiles is enlarged to full size. Images are shrunk
and enlarged by bilinear interpolation without antialiasing, as in the public code [paper]. For F = 2 a small pixel is
the mean of 2 x 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.errors import ConfigError, InvalidInputError, explain

__all__ = ["check_factor", "decode", "expand", "mosaic"]


def check_factor(size: tuple[int, int], factor: int) -> None:
    """Raises ConfigError unless images of ``size`` (height, width) can be cut into ``factor`` x ``factor`` tiles."""
    height, width = size
    if factor < 1:
        raise ConfigError(
            explain("a partition factor of at least 1", str(factor), "Use 2, as published, or 1 for none")
        )
    if height % factor or width % factor:
        fitting = [f for f in range(1, min(size) + 1) if not height % f and not width % f]
        got, do = f"{height}x{width} pixels", f"Use a factor out of {fitting}, or images of another size"
        raise ConfigError(explain(f"images whose sides are divisible by the partition factor {factor}", got, do))


def expand(images: Tensor, factor: int) -> Tensor:
    """The F^2 tiles of every mosaic, each at full size. Differentiable, and linear in the images.

    Args:
        images: [M,C,H,W].
        factor: F; 1 returns the images as they are.

    Returns:
        [F^2 M,C,H,W], tile after tile: first the M top left tiles, then the M below them, column by column.

    Raises:
        ConfigError: a side is not divisible by the factor.
    """
    m, c, height, width = images.shape
    check_factor((height, width), factor)
    if factor == 1:
        return images
    h, w = height // factor, width // factor
    tiles = images.reshape(m, c, factor, h, factor, w).permute(4, 2, 0, 1, 3, 5).reshape(-1, c, h, w)
    return F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)


def mosaic(parts: Sequence[Tensor], factor: int) -> Tensor:
    """Mosaics [M,C,H,W] from F^2 sets of images [M,C,H,W], each shrunk into its tile, in the order of :func:`expand`.

    Raises:
        ConfigError: a side is not divisible by the factor.
        InvalidInputError: another number of sets.
    """
    if len(parts) != factor**2:
        do = "Pass one set of images for each tile"
        raise InvalidInputError(explain(f"{factor**2} sets of images", str(len(parts)), do))
    m, c, height, width = parts[0].shape
    check_factor((height, width), factor)
    if factor == 1:
        return parts[0]
    h, w = height // factor, width // factor
    small = F.interpolate(torch.cat(list(parts)), size=(h, w), mode="bilinear", align_corners=False)
    return small.reshape(factor, factor, m, c, h, w).permute(2, 3, 1, 4, 0, 5).reshape(m, c, height, width)


def decode(images: Tensor, labels: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Training images and labels of mosaics: F^2 for each, in the order of :func:`expand`.

    Args:
        images: [M,C,H,W].
        labels: int64 [M] or soft [M,K].
        factor: F.
    """
    return expand(images, factor), labels.repeat(factor**2, *[1] * (labels.ndim - 1))
