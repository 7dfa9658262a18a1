"""The gradient of a weighted batch of real images, and its derivative in the weights. [ours]

With l_i the loss of real sample i and B samples, G(w) = grad (1/B) sum_i w_i l_i is linear in w, so for a direction u
in the space of parameters

    d/dw_i <G(w), u> = (1/B) <grad l_i, u>,

the directional derivative of l_i along u. One forward-mode pass gives that for the whole batch
(:func:`weighted_gradient`); reverse mode needs a graph of G itself instead, kept until it is used, and a third
derivative through it (:func:`weighted_gradient_graph`). Both give the same numbers to whoever differentiates a loss
that contains G; what each costs is in the README beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.nn.derivatives.per_sample import per_sample_directional

__all__ = ["weighted_gradient", "weighted_gradient_graph"]


def weighted_gradient(
    gradient: Sequence[Tensor],
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Callable[[], tuple[Tensor, Tensor]],
    weights: Tensor,
    *,
    chunk_size: int = 2048,
) -> list[Tensor]:
    """The given gradient, made differentiable in the weights by a forward-mode pass. [ours: METHODS.md 2.1]

    The pass is made when (and only if) somebody differentiates by the weights, with the network as it is then: the
    parameters must not have been updated in between. It can be differentiated once, not twice.

    Args:
        gradient: from :func:`mean_gradient` with these weights.
        network: as there.
        parameters: as there.
        batch: gives (images float [B,C,H,W], targets int64 [B]) again; called when the pass is made, so that no
            batch has to be kept.
        weights: float [B] with a graph.
        chunk_size: images per forward-mode pass; see :func:`pass_size`.

    Returns:
        One tensor for each of ``parameters``: the same values, with a graph to ``weights``.

    Raises (when differentiated):
        InvalidInputError: the network's samples depend on each other.
        NonFiniteError: a derivative is NaN or infinite.
    """
    return list(_ForwardMode.apply(weights, (list(gradient), network, list(parameters), batch, chunk_size)))


def weighted_gradient_graph(
    gradient: Sequence[Tensor],
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Callable[[], tuple[Tensor, Tensor]],
    weights: Tensor,
    *,
    chunk_size: int = 2048,
) -> list[Tensor]:
    """The same by reverse mode: a second pass over the batch whose graph is kept. The reference for the other one.

    Args and values as :func:`weighted_gradient`, from which it differs in cost only (and it can be differentiated any
    number of times); ``chunk_size`` has no effect, as the graph spans the whole batch.
    """
    images, targets = batch()
    losses = F.cross_entropy(network(images), targets, reduction="none")
    found = torch.autograd.grad((weights * losses).mean(), list(parameters), create_graph=True)
    # The values to the last bit of the given gradient: a loop must not change with what a method asks for.
    return [g.detach() + (f - f.detach()) for g, f in zip(gradient, found, strict=True)]


class _ForwardMode(torch.autograd.Function):
    """Identity on the gradient, whose backward pass is the directional derivative of every sample's loss."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        gradient, ctx.network, ctx.parameters, ctx.batch, ctx.chunk_size = given
        return tuple(g.detach().clone() for g in gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor, None]:
        along = {id(p): u for p, u in zip(ctx.parameters, directions, strict=True)}
        named = {n: along.get(id(p), torch.zeros_like(p)) for n, p in ctx.network.named_parameters() if p.requires_grad}
        images, targets = ctx.batch()
        parts = zip(images.detach().split(ctx.chunk_size), targets.split(ctx.chunk_size), strict=True)
        found = [per_sample_directional(ctx.network, x, y, named) for x, y in parts]
        return torch.cat(found) / len(images), None
