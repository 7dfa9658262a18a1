"""Match, Segment, Learning: the arguments of the events before an update of the synthetic set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tad_plugin.data.real import RealData

__all__ = ["Learning", "Match", "Segment"]


@dataclass(frozen=True)
class Learning:
    """How a loop trains its networks on the real data: SGD on the weighted mean loss of a batch.

    Attributes:
        rate: learning rate, divided by 1 - momentum.
        batch: samples per step.
        network: CPU generator -> a copy of one of the networks in their current state.
    """

    rate: float
    batch: int
    network: Callable[[torch.Generator], nn.Module]


@dataclass
class Match:
    """One matching step, as :meth:`Callback.on_match` gets it.

    Attributes:
        loss: the matching loss, a scalar. It has its graph if a callback wants one; otherwise it may be detached.
        weights: float32 [N], zeros that were added to the samples' weights. If a callback wants the graph it is a leaf
            that requires grad: ``grad(..., weights)[indices]`` is then the derivative in each drawn sample's weight.
        indices: int64 [B], positions of the real samples.
        synthetic: the tensors that the loss updates (images [M,C,H,W] first).
        synthetic_labels: int64 [M] or soft float [M,K].
        network: the network on which the statistic was matched.
        iteration: 0-based.
        kind: "distribution" (class means of embeddings) or "gradient" (class gradients).
        fresh_network: CPU generator -> another network of the same kind, or None if the loop cannot make one.
        data: the real data, or None if attach() got labels only.
        expand: (images, labels) -> the images and labels that the network sees, if they are not the synthetic ones
            themselves (IDM). Differentiable and linear in the images.
        last: whether the iteration ends with this match. A loop that updates class after class (IDM's public script)
            has one match for each class, with the samples of that class.
        distance: for gradient matching: (synthetic gradients, real gradients), one tensor for each parameter of the
            network -> scalar. None if the loop does not give it.
        learning: how the loop trains its networks on the real data with the samples' weights, or None if it does not.
            IDM does.
    """

    loss: Tensor
    weights: Tensor
    indices: Tensor
    synthetic: tuple[Tensor, ...]
    synthetic_labels: Tensor | None
    network: nn.Module
    iteration: int
    kind: str = "distribution"
    fresh_network: Callable[[torch.Generator], nn.Module] | None = None
    data: RealData | None = None
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    last: bool = True
    distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] | None = None
    learning: Learning | None = None


@dataclass
class Segment:
    """One step of trajectory matching, as :meth:`Callback.on_segment` gets it.

    Attributes:
        loss: the matching loss, a scalar. It has its graph if a callback wants one; otherwise it may be detached.
        start: float32 [P], flat parameters at which the student starts.
        target: float32 [P], flat parameters of the expert; a leaf that requires grad if a callback wants the graph.
        synthetic: the tensors that the loss updates (images first; learning rate and soft labels after it).
        synthetic_labels: int64 [M] or soft float [M,K].
        network: the architecture, for functional calls.
        expert: index of the expert; -1 if unknown.
        start_epoch: the epoch at which the segment starts.
        epochs: its length.
        iteration: 0-based; the hook sets it.
        expert_lr: learning rate of the expert along the segment, or None if unknown.
        checkpoints: flat parameters [epochs+1, P] along the segment, if the loop has them.
        data: the real data, or None if attach() got labels only; the hook sets it.
        direction: float32 [P], dM/dtarget summed by a method over ``on_segment_term``, in loops that fire it.
    """

    loss: Tensor
    start: Tensor
    target: Tensor
    synthetic: tuple[Tensor, ...]
    synthetic_labels: Tensor | None
    network: nn.Module
    expert: int
    start_epoch: int
    epochs: int
    iteration: int
    expert_lr: float | None = None
    checkpoints: Tensor | None = None
    data: RealData | None = None
    direction: Tensor | None = None
