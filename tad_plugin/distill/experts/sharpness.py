"""Sharpness-aware steps with gradient surgery, for flat trajectories (FTD, CVPR 2023; GSAM, ICLR 2022).

A step takes the gradient g at the parameters w and the gradient g' at the perturbed parameters ``w + e``. It descends
along ``g' - alpha * (the part of g that is orthogonal to g')``. Pure functions on lists of tensors, one per parameter.
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
    """Computes the perturbation e = rho g / ||g||, or e = rho w^2 g / || |w| g || (ASAM, elementwise in w).

    Args:
        parameters: w.
        gradients: g, of the same shapes.
        rho: radius, >= 0.
        adaptive: use the second form, which measures the radius in units of the parameters.

    Returns:
        e, one tensor per parameter.
    """
    if adaptive:
        scale = rho / (_norm([p.detach().abs() * g for p, g in zip(parameters, gradients, strict=True)]) + _TINY)
        return [g * scale * p.detach().square() for p, g in zip(parameters, gradients, strict=True)]
    scale = rho / (_norm(gradients) + _TINY)
    return [g * scale for g in gradients]


def surgery(gradients: Sequence[Tensor], perturbed: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """Computes g' - alpha * (g - projection of g onto g').

    Args:
        gradients: g, the gradient at the parameters.
        perturbed: g', the gradient at the perturbed parameters.
        alpha: weight of the orthogonal part, >= 0.

    Returns:
        One tensor per parameter.
    """
    inner = torch.stack([(a * b).sum() for a, b in zip(gradients, perturbed, strict=True)]).sum()
    old, new = _norm(gradients), _norm(perturbed)
    share = inner / (new * old + _TINY) * old / (new + _TINY)
    return [b - alpha * (a - share * b) for a, b in zip(gradients, perturbed, strict=True)]


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Context in which passes in training mode do not change the running statistics of batch norms."""
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
