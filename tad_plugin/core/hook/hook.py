"""Hook: the object that connects a distillation loop with the methods.

A script asks the hook which samples to draw, and with which weights and targets. The hook asks the methods.
Without a method every handle is an identity and draws no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Learning, Match, Segment
from tad_plugin.core.hook.indexed import IndexedDataset
from tad_plugin.core.hook.loader import TrustedCriterion
from tad_plugin.core.hook.method_run import MethodRun
from tad_plugin.core.hook.samplers import ClassIndices, ClassSampler, PoolSampler, drawn_by_weight
from tad_plugin.nn.training import inner_network
from tad_plugin.utils.arguments import named_errors

__all__ = ["Hook"]

C = TypeVar("C")


class Hook(MethodRun):
    """Connects a loop with the methods: the handles that a loop calls. Made by :func:`tad_plugin.attach`."""

    # -- which samples -----------------------------------------------------------------------------
    def sample(self, c: int, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Up to n indices (int64) of usable samples of class c, without replacement. See :meth:`SampleState.sample`.

        ``generator`` is a CPU generator of the loop, by default the hook's own, seeded by ``attach(seed=...)``. With
        ``attach(draw="weighted")`` and unequal weights: n indices with replacement, in proportion to the weights.
        """
        return self.state.placed([self.draw(c, n, generator)])[0]

    def draw(self, c: int, n: int, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`sample`, but the indices are on the CPU. ``state.placed`` moves them, all classes at once."""
        self.usage.note("sample")
        generator = self.generator if generator is None else generator
        if self.by_weight and n >= 1 and not bool(((w := self.state.weight[(p := self.state.pool(c))]) == 1).all()):
            return drawn_by_weight(p, w, n, generator).cpu()
        return self.state.draw(c, n, generator)

    def pool(self, c: int) -> Tensor:
        """Indices (int64) of usable samples with target c, ascending."""
        self.usage.note("pool")
        self.usage.late_pools += self.iteration > 0
        return self.state.pool(c)

    def pools(self) -> list[list[int]]:
        """Usable indices of each class, for ``indices_class`` of the public codebases. See :meth:`Batches.pools`."""
        self.usage.note("pools")
        self.usage.late_pools += self.iteration > 0
        return self.batches.pools()

    def class_indices(self, c: int) -> ClassIndices:
        """The usable indices of class c as a sequence that follows the pool; see :class:`ClassIndices`."""
        return ClassIndices(self.state, c, self.usage)

    @named_errors
    def batch_sampler(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> PoolSampler:
        """Batches of today's usable samples, for ``DataLoader(..., batch_sampler=...)``. See :class:`PoolSampler`."""
        how: dict[str, Any] = {"generator": generator, "by_weight": self.by_weight, "usage": self.usage}
        return PoolSampler(self.state, batch_size, shuffle=shuffle, drop_last=drop_last, **how)

    @named_errors
    def class_sampler(
        self,
        per_class: int,
        *,
        classes: Sequence[int] | None = None,
        batches: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ClassSampler:
        """Batches with ``per_class`` samples of each class, for a DataLoader. See :class:`ClassSampler`."""
        how: dict[str, Any] = {"generator": generator, "by_weight": self.by_weight, "usage": self.usage}
        return ClassSampler(self.state, per_class, classes=classes, batches=batches, **how)

    def drawn(self, indices: Tensor | Sequence[int]) -> None:
        """Notes a draw [B] for handles that are called without indices. See :meth:`Batches.drawn`."""
        self.usage.note("drawn")
        self.batches.drawn(indices)

    def kept(self, rows: Tensor | Sequence[int]) -> None:
        """Reduces the latest noted draw to these rows (positions or a bool mask)."""
        self.batches.kept(rows)

    # -- which label, which weight -------------------------------------------------------------------
    def targets(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Target labels int64 [B]. Raises InvalidInputError for bad indices."""
        self.usage.note("targets")
        return self.state.targets(indices)

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Matching weights float32 [B], mean 1 per class; the one line in a loop. See :meth:`Batches.weights`."""
        found = self.batches.weights(indices)
        self.usage.note("weights", len(found))
        return self.usage.watch(found)

    def reweight(self, rows: Tensor, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Rows [B,...] times their matching weights, for a plain mean. See :meth:`Batches.reweight`."""
        found = self.batches.reweight(rows, indices)
        self.usage.note("reweight", len(found))
        return self.usage.watch(found) if found is not rows else rows

    def weighted_loss(
        self, loss: Tensor, logits: Tensor, labels: Tensor, indices: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Mean cross-entropy with matching weights, a scalar. See :meth:`Batches.weighted_loss`."""
        found = self.batches.weighted_loss(loss, logits, labels, indices)
        self.usage.note("weighted_loss", len(logits))
        return found

    def matched_gradient(
        self,
        gradient: Sequence[Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """``gradient``, with a graph in the matching weights where needed. See :meth:`Batches.matched_gradient`."""
        found = self.batches.matched_gradient(gradient, network, images, labels, indices)
        self.usage.note("matched_gradient", len(images))
        return found

    # -- a loop that trains networks on the real data ------------------------------------------------
    @named_errors
    def dataset(
        self,
        dataset: Any,
        *,
        label: int | str | None = None,
        key: str = "index",
        positions: Tensor | Sequence[int] | None = None,
    ) -> IndexedDataset:
        """The dataset, whose samples now carry their index and the label of today. See :class:`IndexedDataset`.

        Args:
            dataset: map-style, of all samples of attach() in their order, or a Subset of such a one.
            label: position or key of the label in a sample, if it is not the second part or under a usual key.
            key: the key under which a mapping gets its index.
            positions: int64 [M], the sample of each item, for other datasets.
        """
        return self.indexed.dataset(dataset, label, key, positions)

    @named_errors
    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        indices: Tensor | Sequence[int],
        *,
        partner: Tensor | Sequence[int] | None = None,
        share: Tensor | float | None = None,
        criterion: Any = None,
        again: bool = False,
    ) -> Tensor:
        """The weighted loss of a batch of :meth:`dataset`, on the labels that it is given; see :class:`GivenLoss`.

        Without a method it is ``criterion(logits, labels)``. Every batch is checked.

        Args:
            logits: [B,K].
            labels: int64 [B], the samples' own labels; or float [B,K], soft, smoothed or mixed.
            indices: int64 [B], as they came with the batch.
            partner: int64 [B], the samples that were mixed in: ``idx.roll(1, 0)`` for torchvision's CutMix and MixUp.
            share: share of each row's own sample, a number or [B]. Mixed labels [B,K] tell it themselves; hard labels
                without it are of their samples alone, so that a loop may mix only some of its batches.
            criterion: cross-entropy by default; or a loss module with a ``reduction``.
            again: the batch is evaluated once more (sharpness-aware training).

        Raises:
            InvalidInputError: indices or labels that are not those of the rows; mixed labels without ``partner``.
        """
        scorer = self.trains_on_real and self.enabled and not self._decided
        events = self.events if scorer else None
        return self.indexed.loss(logits, labels, indices, partner, share, criterion, events, again)

    def loader(self, loader: DataLoader[Any]) -> Any:
        """The loader, which now notes the sample indices of each batch; the same object without a method."""
        if self.training.active:
            self.indexed.scores_on(getattr(loader, "dataset", None))
        return self.training.loader(loader)

    def criterion(self, criterion: C) -> C | TrustedCriterion:
        """Criterion with targets and training weights on batches of :meth:`loader`. See :class:`TrustedCriterion`."""
        # After a file has decided, only its weights and targets enter.
        return self.training.criterion(criterion, CallbackList() if self._decided else self.events)

    # -- before the synthetic set is updated ---------------------------------------------------------
    def before_update(
        self,
        loss: Tensor,
        synthetic: Tensor | Sequence[Tensor],
        network: nn.Module,
        *,
        labels: Tensor | None = None,
        kind: str = "distribution",
        fresh_network: Callable[[torch.Generator], nn.Module] | None = None,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        last: bool = True,
        distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] | None = None,
        learning: Learning | None = None,
    ) -> None:
        """Call after the matching loss is built and before ``backward``. Fires on_match and refreshes the scorer.

        Args:
            loss: scalar matching loss, with its graph where :meth:`wants_graph` is true.
            synthetic: the tensors that the loss updates, images first.
            network: the network of this match.
            labels: labels of the synthetic images, int64 [M] or soft [M,K].
            kind, fresh_network, expand, last, distance, learning: see :class:`tad_plugin.Match`.
        """
        self.usage.note("before_update")
        if not self.enabled:
            return
        self.events.position(iteration=self.iteration)
        batches, tensors = self.batches, (synthetic,) if isinstance(synthetic, Tensor) else tuple(synthetic)
        about = (self.iteration, kind, fresh_network, self.data, expand, last, distance, learning)
        match = Match(loss, batches.leaf(), batches.positions(), tensors, labels, inner_network(network), *about)
        with self._scoring():
            self.events.match(self.state, match)
        batches.forget()
        if last:
            self._next_iteration()

    def before_segment_update(self, segment: Segment) -> None:
        """As :meth:`before_update`, for trajectory matching. Sets the segment's ``iteration`` and ``data``."""
        self.usage.note("before_segment_update")
        if self.enabled:
            segment.iteration, segment.data = self.iteration, self.data
            self.events.position(iteration=self.iteration)
            with self._scoring():
                self.events.segment(self.state, segment)
            self._next_iteration()

    # -- handles for scripts that report a segment step by step --------------------------------------
    def student(self, network: nn.Module) -> None:
        """Call with the student's network before it is made functional. See :meth:`Segments.student`."""
        self.segments.student(network)

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
        """Call when a segment has been drawn; returns the target to use from here on. See :meth:`Segments.begin`."""
        self.usage.note("begin_segment")
        segment = (images, labels, start, target, trajectory, start_epoch, epochs)
        return self.segments.begin(*segment, iteration=self.iteration, logits=logits)

    def segment_term(self, term: Tensor, images: Tensor, indices: Tensor) -> None:
        """Call for each term of a loss that is differentiated term by term, before its graph is freed (TESLA).

        Args:
            term: a scalar whose gradient in ``images`` is part of the loss's.
            images: [B,C,H,W], rows of the synthetic images before augmentation.
            indices: int64 [B], which rows.
        """
        segment = self.segments.current
        if segment is not None:
            with self._scoring():
                self.events.segment_term(self.state, segment, term, images, indices.to(images.device))

    def end_segment(self, loss: Tensor) -> None:
        """Call when the segment's loss is computed and before it is differentiated. Counts the iteration."""
        segment = self.segments.end(loss)
        if segment is not None:
            self.before_segment_update(segment)
        elif self.enabled:
            self._next_iteration()
