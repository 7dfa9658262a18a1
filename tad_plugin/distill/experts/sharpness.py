"""Gradient-surgery sharpness-aware steps: what makes an expert's trajectory flat (FTD, CVPR 2023; GSAM, ICLR 2022).

A step takes the gradient g at the parameters, climbs to ``w + e``, takes the gradient g' there, and descends along
``g' - alpha * (the part of g that is orthogonal to g')``. Pure functions on lists of tensors, one per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["frozen_statistics", "perturbation", "surgery"]

_TINY = 1e-12


def perturbation(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, *, adaptive: bool = True
) -> list[Tensor]:
    """The climb e = rho g / ||g||, or with ``adaptive`` e = rho w^2 g / || |w| g || (ASAM), elementwise in w.

    Args:
        parameters: w.
        gradients: g, of the same shapes.
        rho: its length, >= 0.
        adaptive: measure lengths in units of the parameters.
    """
    if adaptive:
        scale = rho / (_norm([p.detach().abs() * g for p, g in zip(parameters, gradients, strict=True)]) + _TINY)
        return [g * scale * p.detach().square() for p, g in zip(parameters, gradients, strict=True)]
    scale = rho / (_norm(gradients) + _TINY)
    return [g * scale for g in gradients]


def surgery(gradients: Sequence[Tensor], climbed: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """g' - alpha * (g - its projection on g').

    Args:
        gradients: g at the parameters.
        climbed: g' at the perturbed parameters.
        alpha: weight of the orthogonal part, >= 0.
    """
    inner = torch.stack([(a * b).sum() for a, b in zip(gradients, climbed, strict=True)]).sum()
    old, new = _norm(gradients), _norm(climbed)
    share = inner / (new * old + _TINY) * old / (new + _TINY)
    return [b - alpha * (a - share * b) for a, b in zip(gradients, climbed, strict=True)]


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, passes in training mode leave the running statistics of batch norms as they are."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
