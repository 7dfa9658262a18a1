"""The eight differentiable image operations of Siamese augmentation (Zhao & Bilen, ICML 2021), as pure functions.

Each function maps images, float [B, C, H, W], to new images of the same shape, dtype and device, and is differentiable
in the images to any order. Its parameters are tensors of length 1 (shared by the batch) or B (one per image), on the
images' device or on the CPU. Images are normalised, so no value is clipped.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.utils.transfers import upload

__all__ = ["brightness", "contrast", "crop", "cutout", "flip", "rotate", "saturation", "scale"]


def brightness(images: Tensor, shift: Tensor) -> Tensor:
    """Adds ``shift``, float [1 | B], to every pixel."""
    return images + _per_image(shift, images)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance of each pixel to its mean over channels by ``factor``, float [1 | B], >= 0."""
    return _about_mean(images, images.mean(dim=1, keepdim=True), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance of each pixel to the mean of its image by ``factor``, float [1 | B], >= 0."""
    return _about_mean(images, images.mean(dim=(1, 2, 3), keepdim=True), factor)


def crop(images: Tensor, offset: Tensor) -> Tensor:
    """Pads with zeros and crops to the original size.

    Args:
        images: float [B, C, H, W].
        offset: int64 [1 | B, 2], shift of the cropped window in pixels (down, right). A shift by a whole side or more
            gives zeros only.
    """
    height, width = images.shape[-2:]
    if len(offset) == 1:
        down, right = (max(-side, min(side, int(v))) for v, side in zip(offset[0], (height, width), strict=True))
        return F.pad(images, (-right, right, -down, down))
    # One ring of zeros around the image replaces the padding: positions beyond it are clamped to the ring.
    offset = offset.to(images.device)
    rows = (torch.arange(1, height + 1, device=images.device) + offset[:, :1]).clamp(0, height + 1)
    columns = (torch.arange(1, width + 1, device=images.device) + offset[:, 1:]).clamp(0, width + 1)
    flat = (rows[:, :, None] * (width + 2) + columns[:, None, :]).view(len(images), 1, -1)
    padded = F.pad(images, (1, 1, 1, 1)).flatten(2)
    return padded.gather(2, flat.expand(-1, images.shape[1], -1)).view(images.shape)


def cutout(images: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Sets a rectangle to zero. The rectangle is clipped at the borders.

    Args:
        images: float [B, C, H, W].
        centre: int64 [1 | B, 2], (row, column); the rectangle starts at ``centre - size // 2``.
        size: (height, width) of the rectangle in pixels.
    """
    inside = []
    for axis, (length, extent) in enumerate(zip(images.shape[-2:], size, strict=True)):
        first = centre[:, axis] - extent // 2
        # A shared number stays on the CPU: a 0-d tensor there works with any device, without waiting for it.
        first = first[0] if len(first) == 1 else first.to(images.device)[:, None]
        position = torch.arange(length, device=images.device)
        inside.append((position >= first) & (position < first + extent))
    rectangle = inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)
    return images.masked_fill(rectangle.unsqueeze(-3), 0.0)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirrors the images for which ``flipped``, bool [1 | B], is True horizontally."""
    if len(flipped) == 1:
        return images.flip(3) if bool(flipped[0]) else images
    return torch.where(flipped.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def scale(images: Tensor, factors: Tensor, *, align_corners: bool = False) -> Tensor:
    """Samples the image on a grid stretched about the centre: bilinear, zeros outside.

    Args:
        images: float [B, C, H, W].
        factors: float [1 | B, 2], (horizontal, vertical) stretch of the grid, > 0. A factor of 0.5 doubles the content.
        align_corners: True if -1 and 1 are the centres of the corner pixels, False if they are the outer edges.
    """
    zero = torch.zeros_like(factors[:, 0])
    theta = torch.stack((factors[:, 0], zero, zero, zero, factors[:, 1], zero), dim=1)
    return _affine(images, theta, align_corners)


def rotate(images: Tensor, angle: Tensor, *, align_corners: bool = False) -> Tensor:
    """Rotates about the centre: anticlockwise for positive angles, bilinear, zeros outside.

    Args:
        images: float [B, C, H, W].
        angle: float [1 | B], radians.
        align_corners: as in :func:`scale`.
    """
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _affine(images, torch.stack((cosine, -sine, zero, sine, cosine, zero), dim=1), align_corners)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """``values`` [1 | B] in a shape that broadcasts over images. A shared one is 0-d and needs no transfer."""
    if len(values) == 1:
        return values[0].to(images.dtype)
    return values.to(images.device, images.dtype).view(-1, 1, 1, 1)


def _about_mean(images: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    # One pass over the images. The written-out sum takes three passes and three large temporaries.
    if len(factor) == 1:
        return torch.lerp(mean, images, float(factor[0]))
    return torch.lerp(mean, images, _per_image(factor, images))


def _affine(images: Tensor, theta: Tensor, align_corners: bool) -> Tensor:
    theta = upload([theta], images.device)[0].to(images.device, images.dtype).view(-1, 2, 3)
    # A shared grid is made once and expanded: making it costs more than sampling.
    grid = F.affine_grid(theta, [len(theta), *images.shape[1:]], align_corners=align_corners)
    sampled: Tensor = _Sample.apply(images, grid.expand(len(images), -1, -1, -1), align_corners)
    return sampled


class _Sample(torch.autograd.Function):
    """Bilinear sampling on a constant grid. It is linear in the images; its derivative is :class:`_SampleAdjoint`.

    Second-order losses differentiate the backward pass, which older releases of torch cannot do for ``grid_sample``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, grid: Tensor, align_corners: bool) -> Tensor:
        dtype = _sampling_type(images)
        sampled = F.grid_sample(
            images.to(dtype), grid.to(dtype), mode="bilinear", padding_mode="zeros", align_corners=align_corners
        )
        return sampled.to(images.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _SampleAdjoint.apply(gradient, ctx.saved_tensors[0], ctx.align_corners), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        result: Tensor = _Sample.apply(tangent, ctx.saved_tensors[0], ctx.align_corners)
        return result


class _SampleAdjoint(torch.autograd.Function):
    """The adjoint of :class:`_Sample`: adds each output pixel to the four pixels that it was interpolated from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, grid: Tensor, align_corners: bool) -> Tensor:
        # The images' values matter only for the grid's gradient, which is not computed. So the gradient, which has the
        # same shape, is passed in their place. 0, 0 = bilinear, zero padding.
        dtype = _sampling_type(gradient)
        values = gradient.to(dtype)
        result: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            values.contiguous(), values, grid.to(dtype), 0, 0, align_corners, [True, False]
        )[0]
        return result.to(gradient.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(gradient, ctx.saved_tensors[0], ctx.align_corners), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        result: Tensor = _SampleAdjoint.apply(tangent, ctx.saved_tensors[0], ctx.align_corners)
        return result


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, grid, ctx.align_corners = inputs
    ctx.save_for_backward(grid)
    ctx.save_for_forward(grid)


def _sampling_type(images: Tensor) -> torch.dtype:
    """The images' type, or float32 where ``grid_sample`` does not know it: 16 bits on the CPU in older torch."""
    if images.device.type == "cpu" and images.dtype.itemsize == 2 and not _cpu_samples(images.dtype):
        return torch.float32
    return images.dtype


@cache
def _cpu_samples(dtype: torch.dtype) -> bool:
    one = torch.zeros(1, 1, 1, 2, dtype=dtype, device="cpu")
    try:
        torch.ops.aten.grid_sampler_2d(one, one, 0, 0, False)  # as it is, also under autocast
    except RuntimeError:
        return False
    return True
