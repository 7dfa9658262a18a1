"""Distances between the gradients of real and synthetic images, as pure functions.

The three distances compared in Zhao, Mopuri & Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021. Each
takes one tensor per parameter of the network, in the same order for both arguments. All are differentiable in both
arguments to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, explain

__all__ = [
    "DISTANCES",
    "cosine_distance",
    "layerwise_distance",
    "matched_parameters",
    "mse_distance",
]

# Prevents a division by zero for a gradient of zero; the published value.
EPSILON = 1e-6


def layerwise_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over output units of 1 - cosine. The published default, called "ours" in the field.

    A weight [out, ...] counts as ``out`` vectors, one per output channel or unit. Parameters with one dimension
    (biases, scale and shift of a norm) are left out.

    Args:
        synthetic: gradients of the synthetic images, one tensor per parameter.
        real: gradients of the real images, in the same order and shapes.

    Returns:
        A scalar in [0, 2 x units].

    Raises:
        InvalidInputError: the shapes differ, or no parameter has two or more dimensions.
    """
    _check(synthetic, real)
    terms = []
    for s, r in zip(synthetic, real, strict=True):
        if s.ndim > 1:
            a, b = s.flatten(1), r.flatten(1)
            terms.append((1 - _cosine(a, b)).sum())
    if not terms:
        got = f"shapes {[list(s.shape) for s in synthetic]}"
        do = 'Use the distance "mse" or "cosine" for a network without weight matrices'
        raise InvalidInputError(explain("a gradient with two or more dimensions", got, do))
    return torch.stack(terms).sum()


def mse_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean distance of all gradients as one vector, *summed* over its entries.

    Args as :func:`layerwise_distance`; every parameter is included.

    Raises:
        InvalidInputError: the shapes differ.
    """
    _check(synthetic, real)
    return torch.stack([(s - r).square().sum() for s, r in zip(synthetic, real, strict=True)]).sum()


def cosine_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """1 - cosine of all gradients as one vector, in [0, 2].

    Args as :func:`layerwise_distance`; every parameter is included.

    Raises:
        InvalidInputError: the shapes differ.
    """
    _check(synthetic, real)
    return 1 - _cosine(torch.cat([s.flatten() for s in synthetic]), torch.cat([r.flatten() for r in real]))


DISTANCES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "layerwise": layerwise_distance,
    "mse": mse_distance,
    "cosine": cosine_distance,
}
"""Distance by name. The public code calls them "ours", "mse" and "cos"."""


def matched_parameters(network: nn.Module, distance: str) -> list[nn.Parameter]:
    """Parameters whose gradients a distance reads, in the network's order. Other gradients need not be computed."""
    parameters: Iterable[nn.Parameter] = (p for p in network.parameters() if p.requires_grad)
    return [p for p in parameters if distance != "layerwise" or p.ndim > 1]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last dimension; 0 with a zero vector."""
    return (a * b).sum(-1) / (_length(a) * _length(b) + EPSILON)


def _length(a: Tensor) -> Tensor:
    """Euclidean length along the last dimension. At zero, its derivatives of every order are 0, not NaN.

    A unit that no image activates has a gradient of exactly zero. Influence differentiates the distance twice.
    """
    square = a.square().sum(-1)
    alive = square > 0
    return torch.where(alive, torch.where(alive, square, 1.0).sqrt(), 0.0)


def _check(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> None:
    shapes = [[list(g.shape) for g in gradients] for gradients in (synthetic, real)]
    if not synthetic or shapes[0] != shapes[1]:
        expected, got = "synthetic and real gradients of the same parameters", f"shapes {shapes[0]} and {shapes[1]}"
        raise InvalidInputError(explain(expected, got, "Pass one tensor for each parameter, in the same order"))
