"""Weights with mean 1 in each class: over the whole data, and over a batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain

__all__ = ["batch_weights", "check_means", "class_means", "product_of_factors"]

_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max
# A mean that rounding moves by more than this is put right. Below it the bits of one float32 pass stay.
_EXACT = 1e-5


def _sums(values: Tensor, target: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(num_classes, dtype=values.dtype, device=values.device).index_add_(0, target, values)


def class_means(weight: Tensor, target: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """Computes the mean weight of each class's trusted samples, float64 [K]; NaN for a class without any.

    Args:
        weight: float [N].
        target: int64 [N] in [0, K).
        trusted: bool [N].
        num_classes: K.
    """
    # Zeros instead of a choice by the mask: the same sums, and an accelerator need not tell how many are chosen.
    total = _sums(torch.where(trusted, weight.double(), 0.0), target, num_classes)
    return total / _sums(trusted.double(), target, num_classes)


def check_means(weight: Tensor, target: Tensor, trusted: Tensor, num_classes: int, source: str) -> None:
    """Raises InvalidInputError if a class's trusted samples do not weigh 1 on average; arguments as above."""
    means = class_means(weight, target, trusted, num_classes)
    off = ((means - 1).abs() > 1e-3).nonzero()
    if len(off):
        got = f"{float(means[off[0]]):.6g} in class {int(off[0])} of {source}"
        do = "Delete it and let the method compute it again"
        raise InvalidInputError(explain("weights with mean 1 over each class's trusted samples", got, do))


def product_of_factors(factors: Iterable[Tensor], target: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """Computes the product of factors, float32 [N], scaled to mean 1 over each class's trusted samples.

    The product is formed in float64. After each factor a class is divided by the power of two below its largest
    trusted value, so no product overflows. That is exact, so factors of ordinary size give the bits of a float32
    product. A class whose trusted samples all weigh 0 weighs 1.

    Args:
        factors: float [N] each, finite and >= 0.
        target: int64 [N] in [0, K).
        trusted: bool [N].
        num_classes: K.
    """
    product = torch.ones(len(target), dtype=torch.float64, device=target.device)
    positive = torch.ones_like(trusted)
    for values in factors:
        positive &= values > 0
        product = _scaled(
            product * _scaled(values.double(), target, trusted, num_classes), target, trusted, num_classes
        )
    # What weighs something stays above zero. An untrusted sample may weigh anything finite.
    product = product.clamp(max=_LARGEST).float()
    product = torch.where(positive, product.clamp_min(_SMALLEST), product)
    ones = torch.ones_like(product)
    count = _sums(trusted.to(product.dtype), target, num_classes)
    total = _sums(torch.where(trusted, product, 0.0), target, num_classes)
    scale = torch.where(total > 0, count / total.clamp_min(_SMALLEST), torch.zeros_like(total))
    # A class without any weight would divide by zero. It counts evenly instead.
    weight = torch.where((total > 0)[target], product * scale[target], ones)
    mean = class_means(weight, target, trusted, num_classes)
    off = (mean - 1).abs() > _EXACT  # false for NaN
    if off.device.type != "cpu" or bool(off.any()):
        weight = torch.where(off[target], (weight.double() / mean[target]).float(), weight)
    return weight.clamp(max=_LARGEST)


def _scaled(values: Tensor, target: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """``values`` float64 [N] over the power of two below the largest trusted value of their class."""
    largest = torch.zeros(num_classes, dtype=torch.float64, device=values.device)
    largest.scatter_reduce_(0, target, torch.where(trusted, values, 0.0), "amax")
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)  # 0 for 0; 2^1024 would be infinite
    return (values * torch.pow(2.0, -exponent.double())[target]).clamp(max=1e300)


def batch_weights(weight: Tensor, target: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """Computes weights float32 [B] with mean 1 over the batch's samples of each class; 0 for an untrusted sample.

    Args:
        weight: float32 [B].
        target: int64 [B] in [0, K).
        trusted: bool [B].
        num_classes: K.
    """
    even_weights = (trusted & (weight == weight[:1])).all()
    # On the CPU the answer is at hand. An accelerator computes both, because reading it would wait.
    if weight.device.type == "cpu" and bool(even_weights):
        return torch.ones_like(weight)
    even = trusted.double()
    own = weight.double() * even
    own = torch.where((_sums(own, target, num_classes) > 0)[target], own, even)
    count = _sums(torch.ones_like(own), target, num_classes)
    scale = count / _sums(own, target, num_classes).clamp_min(1e-300)
    found = torch.where(trusted, (own * scale[target]).float(), torch.zeros_like(weight))
    return torch.where(even_weights, torch.ones_like(weight), found)
