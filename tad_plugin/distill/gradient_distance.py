"""How far the gradients of real and synthetic images are apart: the distances of gradient matching, pure functions.

The three that the field compares (Zhao, Mopuri & Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021).
All take one tensor per parameter of the network, in the same order, and are differentiable in both to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, explain, unknown_name

__all__ = [
    "DISTANCES",
    "cosine_distance",
    "gradient_distance",
    "layerwise_distance",
    "matched_parameters",
    "mse_distance",
]

# What keeps a gradient of zero from a division by zero; the published value.
EPSILON = 1e-6


def layerwise_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over output units of 1 - cosine: "ours" in the field, the published default.

    A weight [out, ...] counts as ``out`` vectors, one per output channel or unit; parameters with one dimension
    (biases, scale and shift of a norm) do not take part.

    Args:
        synthetic: gradients of the synthetic images, one tensor per parameter.
        real: those of the real images, in the same order and shapes.

    Returns:
        A scalar in [0, 2 x units].

    Raises:
        InvalidInputError: other shapes, or no parameter with two or more dimensions.
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

    Args and errors as :func:`layerwise_distance`; every parameter takes part.
    """
    _check(synthetic, real)
    return torch.stack([(s - r).square().sum() for s, r in zip(synthetic, real, strict=True)]).sum()


def cosine_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """1 - cosine of all gradients as one vector, in [0, 2].

    Args and errors as :func:`layerwise_distance`; every parameter takes part.
    """
    _check(synthetic, real)
    return 1 - _cosine(torch.cat([s.flatten() for s in synthetic]), torch.cat([r.flatten() for r in real]))


DISTANCES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "layerwise": layerwise_distance,
    "mse": mse_distance,
    "cosine": cosine_distance,
}
"""Distance by name; the field's names are "ours", "mse" and "cos"."""


def gradient_distance(name: str) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """The distance called ``name``. Raises UnknownNameError."""
    if name not in DISTANCES:
        raise unknown_name("gradient distance", name, list(DISTANCES))
    return DISTANCES[name]


def matched_parameters(network: nn.Module, distance: str) -> list[nn.Parameter]:
    """The parameters whose gradients the distance reads, in the network's order: the others need not be computed."""
    parameters: Iterable[nn.Parameter] = (p for p in network.parameters() if p.requires_grad)
    return [p for p in parameters if distance != "layerwise" or p.ndim > 1]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last dimension; 0 with a zero vector."""
    return (a * b).sum(-1) / (_length(a) * _length(b) + EPSILON)


def _length(a: Tensor) -> Tensor:
    """Euclidean length along the last dimension, whose derivatives of every order are 0 (not NaN) at zero.

    A unit that no image activates has a gradient of exactly zero, and influence differentiates the distance twice.
    """
    square = a.square().sum(-1)
    alive = square > 0
    return torch.where(alive, torch.where(alive, square, 1.0).sqrt(), 0.0)


def _check(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> None:
    shapes = [[list(g.shape) for g in gradients] for gradients in (synthetic, real)]
    if not synthetic or shapes[0] != shapes[1]:
        expected, got = "synthetic and real gradients of the same parameters", f"shapes {shapes[0]} and {shapes[1]}"
        raise InvalidInputError(explain(expected, got, "Pass one tensor for each parameter, in the same order"))
