"""The gradient of a weighted batch of real images, and its derivative in the weights. [ours]

Let l_i be the loss of real sample i in a batch of B samples. The gradient G(w) = grad (1/B) sum_i w_i l_i is linear in
the weights w. So for a direction u in parameter space

    d/dw_i <G(w), u> = (1/B) <grad l_i, u>,

which is the directional derivative of l_i along u. One forward-mode pass computes it for the whole batch
(:func:`weighted_gradient`). Reverse mode needs a graph of G and a third derivative through it
(:func:`weighted_gradient_graph`). Both give the same numbers; README.md, section "Cost" compares them.
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
    """Makes the given gradient differentiable in the weights, by a forward-mode pass. [ours]

    The pass runs in the backward pass only. It uses the network as it is then, so the parameters must not be updated
    before. The result can be differentiated once, not twice.

    Args:
        gradient: the result of :func:`tad_plugin.nn.derivatives.mean_gradient.mean_gradient` with these weights.
        network: images -> logits [B,K].
        parameters: parameters of the network in which the gradient was taken.
        batch: returns (images float [B,C,H,W], targets int64 [B]). It is called in the backward pass, so that no
            batch is kept in memory.
        weights: float [B] with a graph.
        chunk_size: images per forward-mode pass; see :func:`tad_plugin.nn.passes.pass_size`.

    Returns:
        One tensor for each of ``parameters``: the same values, with a graph to ``weights``.

    Raises:
        InvalidInputError: in the backward pass, if the samples of a batch depend on each other in the network.
        NonFiniteError: in the backward pass, if a derivative is NaN or infinite.
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
    """The same by reverse mode: a second pass over the batch, whose graph is kept. The reference implementation.

    Arguments and values as :func:`weighted_gradient`; the cost differs. The result can be differentiated any number of
    times. ``chunk_size`` has no effect, because the graph spans the whole batch.
    """
    images, targets = batch()
    losses = F.cross_entropy(network(images), targets, reduction="none")
    found = torch.autograd.grad((weights * losses).mean(), list(parameters), create_graph=True)
    # Exactly the values of the given gradient: a loop must not change because a method asks for a graph.
    return [g.detach() + (f - f.detach()) for g, f in zip(gradient, found, strict=True)]


class _ForwardMode(torch.autograd.Function):
    """Identity on the gradient. Its backward pass computes the directional derivative of each sample's loss."""

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
