"""Trajectory matching in a script that can only be given further lines: the segment is told of piece by piece.

The student's architecture before the script makes it functional, the segment when it is drawn, the loss when it is
there. Between :meth:`SegmentHandles.begin_segment` and :meth:`SegmentHandles.end_segment` the hook holds the segment.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Segment
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, InvalidInputError, explain

__all__ = ["SegmentHandles"]


class SegmentHandles:
    """Base of :class:`tad_plugin.core.hook.Hook`; where no method scores in an iteration, nothing is copied."""

    state: SampleState
    data: RealData | None
    events: CallbackList
    enabled: bool
    iteration: int
    scoring_seconds: float
    _student: nn.Module | None
    _segment: Segment | None

    def wants_graph(self) -> bool:
        """Whether this iteration's weights (or segment target) carry a graph for a method."""
        return self.enabled and self.events.wants_graph(self.iteration)

    def _next_iteration(self) -> None:
        self.iteration += 1

    def before_segment_update(self, segment: Segment) -> None:
        """As ``before_update``, for trajectory matching; the segment's ``iteration`` and ``data`` are set here."""
        if self.enabled:
            segment.iteration, segment.data = self.iteration, self.data
            self.events.position(iteration=self.iteration)
            began = perf_counter()
            self.events.segment(self.state, segment)
            self.scoring_seconds += perf_counter() - began
            self._next_iteration()

    # -- piece by piece ------------------------------------------------------------------------------
    def student(self, network: nn.Module) -> None:
        """Call it with the student's network while it still has its own parameters; a copy of it is kept if needed."""
        if self.wants_graph():
            self._student = copy.deepcopy(network).eval()

    def begin_segment(
        self,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        target: Tensor,
        trajectory: Sequence[Sequence[Tensor]],
        start_epoch: int,
        epochs: int,
        *,
        logits: bool = False,
    ) -> Tensor:
        """Call it when a segment of an expert has been drawn, before anything is computed of it.

        Args:
            images: the synthetic images [M,C,H,W] that the loss updates.
            labels: of them, int64 [M] or soft [M,K].
            start: float32 [P], flat parameters at which the student starts.
            target: float32 [P], flat parameters of the expert.
            trajectory: the expert: for each epoch its parameters.
            start_epoch: the epoch of ``start``.
            epochs: from there to ``target``.
            logits: the soft labels are logits; the loss takes their softmax.

        Returns:
            The target to go on with: the same object, or in iterations that score the same values as a leaf.

        Raises:
            ConfigError: synthetic images of another size than the real ones (a canvas of textures).
            InvalidInputError: :meth:`student` was not called in this iteration.
        """
        if not self.wants_graph():
            return target
        network, self._student = self._student, None
        if network is None:
            do = "Call hook.student(network) where the script makes it, before ReparamModule"
            raise InvalidInputError(explain("the student's network of this iteration", "none", do))
        if self.data is not None and images.shape[1:] != self.data.images.shape[1:]:
            do = "Attach a method that scores none here, or distil images instead of textures"
            got = f"{list(images.shape[1:])} for real images of {list(self.data.images.shape[1:])}"
            raise ConfigError(explain("synthetic images of the real ones' size to score with", got, do))
        along = trajectory[start_epoch : start_epoch + epochs + 1]
        checkpoints = torch.stack([_flat(parameters, start) for parameters in along])
        soft = labels.detach().softmax(1) if logits else labels.detach()
        leaf = target.detach().clone().requires_grad_()
        self._segment = Segment(
            torch.zeros((), device=start.device),
            start,
            leaf,
            (images,),
            soft,
            network,
            -1,  # the scripts shuffle their experts
            start_epoch,
            epochs,
            self.iteration,
            checkpoints=checkpoints,
            data=self.data,
        )
        return leaf

    def segment_term(self, term: Tensor, images: Tensor, indices: Tensor) -> None:
        """Call it for each term of a loss that is differentiated term by term, before its graph is freed (TESLA).

        Args:
            term: a scalar whose gradient in ``images`` is part of the loss's.
            images: [B,C,H,W], rows of the synthetic images before augmentation.
            indices: int64 [B], which rows.
        """
        if self._segment is not None:
            began = perf_counter()
            self.events.segment_term(self.state, self._segment, term, images, indices.to(images.device))
            self.scoring_seconds += perf_counter() - began

    def end_segment(self, loss: Tensor) -> None:
        """Call it when the segment's loss is there and before it is differentiated; counts the iteration."""
        if not self.enabled:
            return
        segment, self._segment = self._segment, None
        if segment is None:
            self._next_iteration()
            return
        segment.loss = loss
        self.before_segment_update(segment)


def _flat(parameters: Sequence[Any], like: Tensor) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters]).to(like.device, like.dtype)
