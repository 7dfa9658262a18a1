"""Segments: the trajectory segment that a patched script reports step by step.

The script shows the student's network, then the segment that it drew, then the loss. The segment is held in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.events import Segment
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, InvalidInputError, explain

__all__ = ["Segments"]


class Segments:
    """The segment in flight. Nothing is copied in an iteration in which no method scores.

    Args:
        data: the real data, or None.
        wants_graph: whether a method scores in this iteration.

    Attributes:
        network: copy of the student's network in eval mode, until :meth:`begin` takes it.
        current: the segment between :meth:`begin` and :meth:`end`.
    """

    def __init__(self, data: RealData | None, wants_graph: Callable[[], bool]) -> None:
        self.data = data
        self.wants_graph = wants_graph
        self.network: nn.Module | None = None
        self.current: Segment | None = None

    def student(self, network: nn.Module) -> None:
        """Call with the student's network while it still has its own parameters. Keeps a copy where one is needed."""
        if self.wants_graph():
            self.network = copy.deepcopy(network).eval()

    def begin(
        self,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        target: Tensor,
        trajectory: Sequence[Sequence[Tensor]],
        start_epoch: int,
        epochs: int,
        *,
        iteration: int,
        logits: bool,
    ) -> Tensor:
        """Call when a segment of an expert has been drawn, before anything is computed from it.

        Args:
            images: the synthetic images [M,C,H,W] that the loss updates.
            labels: their labels, int64 [M] or soft [M,K].
            start: float32 [P], flat parameters at which the student starts.
            target: float32 [P], flat parameters of the expert.
            trajectory: the expert's parameters of each epoch.
            start_epoch: the epoch of ``start``.
            epochs: number of epochs from ``start`` to ``target``.
            logits: the soft labels are logits; the loss takes their softmax.

        Returns:
            The target to use from here on: the same object, or a leaf of the same values if a method scores.

        Raises:
            ConfigError: synthetic images of another size than the real ones (a canvas of textures).
            InvalidInputError: :meth:`student` was not called in this iteration.
        """
        if not self.wants_graph():
            return target
        network, self.network = self.network, None
        if network is None:
            do = "Call hook.student(network) where the script makes it, before ReparamModule"
            raise InvalidInputError(explain("the student's network of this iteration", "none", do))
        if self.data is not None and images.shape[1:] != self.data.images.shape[1:]:
            do = "Attach a method that scores none here, or distil images instead of textures"
            got = f"{list(images.shape[1:])} for real images of {list(self.data.images.shape[1:])}"
            raise ConfigError(explain("synthetic images of the real ones' size to score with", got, do))
        along = trajectory[start_epoch : start_epoch + epochs + 1]
        leaf = target.detach().clone().requires_grad_()
        self.current = Segment(
            loss=torch.zeros((), device=start.device),
            start=start,
            target=leaf,
            synthetic=(images,),
            synthetic_labels=labels.detach().softmax(1) if logits else labels.detach(),
            network=network,
            expert=-1,  # the scripts shuffle their experts
            start_epoch=start_epoch,
            epochs=epochs,
            iteration=iteration,
            checkpoints=torch.stack([_flat(parameters, start) for parameters in along]),
            data=self.data,
        )
        return leaf

    def end(self, loss: Tensor) -> Segment | None:
        """The segment with its loss, which is then forgotten; None in an iteration in which no method scores."""
        segment, self.current = self.current, None
        if segment is not None:
            segment.loss = loss
        return segment


def _flat(parameters: Sequence[Any], like: Tensor) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters]).to(like.device, like.dtype)
