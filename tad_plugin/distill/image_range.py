"""Whether synthetic images are still in the range of real ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tad_plugin.errors import explain
from tad_plugin.utils.image_store import Images, in_parts

__all__ = ["MOST_SPREAD", "out_of_range", "spread_of", "too_wide"]

# 83 sets of 40 to 200 updates that had learned spread 1.1 to 1.9 times as real images, one that had not 8.8 times.
MOST_SPREAD = 5.0
"""Standard deviation of all pixels, as a multiple of that of real images, above which a set is out of their range."""


def spread_of(images: Images) -> float:
    """Standard deviation of all pixels of images [N,C,H,W], at least 1e-12. A store is read once, in parts."""
    if isinstance(images, Tensor):
        return max(float(images.std()), 1e-12)
    sums = [torch.stack([x.double().sum(), x.double().square().sum()]) for x in in_parts(images)]
    first, second = torch.stack(sums).sum(0).tolist()
    count = images.numel()
    return max(math.sqrt(max(second - first * first / count, 0.0) / max(count - 1, 1)), 1e-12)


def out_of_range(images: Tensor, usual: float, lr_img: float, when: str) -> str | None:
    """A message if synthetic images spread more than :data:`MOST_SPREAD` times as real ones; else None.

    Args:
        images: the synthetic images, float [M,C,H,W], normalised as the real ones.
        usual: :func:`spread_of` real images.
        lr_img: the learning rate of the images, for the message.
        when: "at iteration 7".
    """
    return too_wide(float(images.detach().std()), usual, lr_img, when)


def too_wide(spread: float, usual: float, lr_img: float, when: str) -> str | None:
    """:func:`out_of_range` for a ``spread`` that is known: the standard deviation of all pixels."""
    times = spread / usual
    if times <= MOST_SPREAD:  # False for NaN
        return None
    got = f"{times:.3g} times that {when}, out of their range"
    do = f"Lower lr_img (now {lr_img:g}) and start over: such a set is seldom of use"
    return explain("images that spread about as real ones do", got, do)
