"""Implicit influence in trajectory matching: the sample trained the expert that the student is matched to.

[ours: README.md, 2]. u = dM(S')/dtheta_target, then the unrolled (TracIn-like) sum along the segment.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tad_plugin.core.events import Segment
from tad_plugin.errors import ConfigError, DisconnectedGraphError, explain
from tad_plugin.iwd.explicit import target_direction
from tad_plugin.iwd.implicit import SegmentStep, unrolled_influence
from tad_plugin.iwd.targets import validation_gradient
from tad_plugin.nn.derivatives.per_sample import DEFAULT_MEMORY_BUDGET
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images

__all__ = ["add_term", "segment_influence", "synthetic_gradient"]


@named_errors
def segment_influence(
    segment: Segment,
    images: Images,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    target: str = "validation",
    weights: Tensor | None = None,
    alpha: float = 0.01,
    steps: int = 1,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes the influence of real samples through one expert segment: dM/dw per unit step of S and per epoch.

    ``validation``: M is the held-out loss of a network that starts at the student's start and learns from S. If
    :func:`add_term` has summed ``segment.direction``, that is used.
    ``matching``: M is the segment's own loss, so u = dL/dtheta_target and no held-out sample is needed.

    Each epoch of the segment counts as one full-batch step at its starting parameters, with the expert's learning
    rate. Curvature along the segment is neglected.

    Args:
        segment: ``target`` must be a leaf that requires a gradient. Segments of several epochs need ``checkpoints``.
        images: real images [B, C, H, W].
        labels: int64 [B], labels of the expert's training.
        held_out: (images, labels) of V.
        target: "validation" or "matching".
        weights: weights of the expert's training [B]; None for 1.
        alpha: inner step size of "validation".
        steps: inner steps of "validation".
        memory_budget: bytes for one chunk of per-sample derivatives.

    Returns:
        [B], detached. Negative = helpful.

    Raises:
        DisconnectedGraphError: the loss does not depend on the target parameters.
        MemoryBudgetError: a single sample does not fit the budget.
        NonFiniteError: an influence is NaN or infinite.
        ConfigError: unknown target, or no labels of S for "validation".
    """
    if not (segment.target.requires_grad and segment.target.is_leaf):
        raise DisconnectedGraphError(
            explain(
                "segment.target as a leaf that requires a gradient",
                f"requires_grad={segment.target.requires_grad}, is_leaf={segment.target.is_leaf}",
                "If hook.wants_graph() is true, make it with .detach().clone().requires_grad_() before the loss",
            )
        )
    if target == "matching":
        (slope,) = torch.autograd.grad(segment.loss, segment.target, retain_graph=True, allow_unused=True)
        if slope is None:
            raise DisconnectedGraphError(
                explain(
                    "a loss that depends on segment.target",
                    "one that does not",
                    "Compute the loss from segment.target itself",
                )
            )
        direction = slope
    elif target == "validation" and segment.direction is not None:
        direction = segment.direction
    elif target == "validation":
        synthetic = segment.synthetic[0]
        gradient = synthetic_gradient(segment, held_out, alpha=alpha, steps=steps)
        (direction,) = target_direction(segment.loss, segment.target, synthetic, gradient)
    else:
        raise ConfigError(explain("target 'validation' or 'matching'", repr(target), "Correct iwd.target"))
    rate = segment.expert_lr if segment.expert_lr is not None else 1.0  # a common factor does not change the ranks
    where = [segment.start] if segment.checkpoints is None else list(segment.checkpoints[:-1])
    along = [SegmentStep(parameters=theta.detach(), learning_rate=rate) for theta in where]
    return unrolled_influence(
        segment.network, along, images, labels, direction, weights=weights, memory_budget=memory_budget
    ).detach()


def synthetic_gradient(
    segment: Segment, held_out: tuple[Tensor, Tensor], *, alpha: float = 0.01, steps: int = 1
) -> Tensor:
    """Computes grad_S M of the target "validation", [M, C, H, W], on the student at the segment's start.

    Arguments and errors as for :func:`segment_influence`.
    """
    synthetic, labels = segment.synthetic[0], segment.synthetic_labels
    if labels is None:
        raise ConfigError(
            explain("segment.synthetic_labels for the target 'validation'", "none", "Pass the labels of S")
        )
    student = _at(segment.network, segment.start)
    _, gradient = validation_gradient(student, synthetic, labels, *held_out, alpha=alpha, steps=steps)
    return gradient


def add_term(segment: Segment, term: Tensor, images: Tensor, gradient: Tensor) -> None:
    """Adds the share of one loss term to ``segment.direction``, for loops that keep no graph of the loss (TESLA).

    The direction of the target "validation" is linear in the gradient of the loss in S. So each term of that gradient
    adds its part, and :func:`segment_influence` uses the sum.

    Args:
        segment: ``target`` must be a leaf that requires a gradient.
        term: a scalar with its graph; its gradient in ``images`` is one part of the loss gradient.
        images: rows of the synthetic images [B, C, H, W].
        gradient: the same rows of :func:`synthetic_gradient`.

    Raises:
        DisconnectedGraphError: the term's gradient does not depend on the target parameters.
        NonFiniteError: a gradient is NaN or infinite.
    """
    (found,) = target_direction(term, segment.target, images, gradient)
    segment.direction = found if segment.direction is None else segment.direction + found


def _at(network: nn.Module, flat: Tensor) -> nn.Module:
    """A copy of the network with the flat parameters [P]."""
    made = copy.deepcopy(network)
    with torch.no_grad():
        parameters = list(made.parameters())
        parts = flat.detach().split([p.numel() for p in parameters])
        for parameter, values in zip(parameters, parts, strict=True):
            parameter.copy_(values.view_as(parameter))
    return made
