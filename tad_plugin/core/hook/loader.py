"""Wrappers that carry the state into a training loop through the two objects it already has.

``hook.loader(loader)`` notes the sample indices of each batch. ``hook.criterion(criterion)`` uses them to weight and
relabel. Neither draws a random number: the wrapped loader makes the same calls to the same generators as the plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, explain

__all__ = ["BatchIndex", "IndexedLoader", "RealTraining", "TrustedCriterion"]

C = TypeVar("C")


class BatchIndex:
    """Indices of the batch in flight: int64 [B], or None outside a training batch."""

    def __init__(self) -> None:
        self.current: Tensor | None = None


class _Indexed(Dataset):  # type: ignore[type-arg]
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return int(i), self.dataset[i]


class _Collate:
    """Collates with the original function and keeps the indices; a class, so that worker processes can pickle it."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, rows: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([i for i, _ in rows], dtype=torch.int64), self.inner([row for _, row in rows])


class IndexedLoader:
    """A DataLoader that yields the batches of the wrapped one and notes their sample indices.

    Args:
        loader: a map-style DataLoader over the whole real dataset, in the state's order.
        index: receives the indices; cleared when the epoch is over.
        length: N of the state.

    Raises:
        InvalidInputError: not a map-style DataLoader, or over another number of samples.
    """

    def __init__(self, loader: DataLoader[Any], index: BatchIndex, length: int) -> None:
        dataset: Any = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
            got = f"{type(loader).__name__} over {type(dataset).__name__}"
            do = "Wrap the DataLoader (with a batch_size) of the real training data"
            raise InvalidInputError(explain("a torch DataLoader of batches over a map-style dataset", got, do))
        if len(dataset) != length:
            got = f"one over {len(dataset)}"
            do = "Wrap the loader of the same data that attach() got"
            raise InvalidInputError(explain(f"a loader over {length} samples", got, do))
        self.loader = loader
        self.index = index
        # The same batch_sampler object: it draws the same numbers from the same generator.
        self._indexed: DataLoader[Any] = DataLoader(
            _Indexed(loader.dataset),
            batch_sampler=loader.batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=_Collate(loader.collate_fn),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            for indices, batch in self._indexed:
                self.index.current = indices
                yield batch
        finally:
            # A test after this epoch must see the plain criterion.
            self.index.current = None


class TrustedCriterion(nn.Module):
    """The wrapped criterion with the state's targets and training weights; outside training it is the plain one.

    The loss of a training batch is sum_i w_i l_i / sum_i w_i, or sum_i w_i l_i if its reduction is "sum". w_i is
    :meth:`SampleState.training_weights`, and l_i the criterion's own loss, label smoothing and class weights included.
    A call counts as training if a batch of the wrapped loader is in flight and the logits have a graph. So a test
    inside or after an epoch gets the plain criterion. A batch may be evaluated twice (sharpness-aware training).

    Args:
        criterion: a loss module with a ``reduction`` of "mean" or "sum" (``nn.CrossEntropyLoss()``), or
            ``torch.nn.functional.cross_entropy``.
        state: the sample state.
        index: the batch in flight.
        events: fires on_scorer_batch, and on_scorer_again if a batch is evaluated once more.
        labels: int64 [N], the labels that the loader gives; compared in the first batch. By default the observed ones.

    Raises:
        InvalidInputError: the criterion cannot give one loss per sample.
    """

    def __init__(
        self, criterion: Any, state: SampleState, index: BatchIndex, events: CallbackList, labels: Tensor | None = None
    ) -> None:
        super().__init__()
        if criterion is not F.cross_entropy and getattr(criterion, "reduction", None) not in ("mean", "sum"):
            expected = 'a criterion with a `reduction` of "mean" or "sum"'
            do = "Pass nn.CrossEntropyLoss() or another loss module that can leave its batch unreduced"
            raise InvalidInputError(explain(expected, repr(criterion), do))
        self.criterion = criterion
        self._state = state
        self._index = index
        self._events = events
        self._labels: Tensor | None = state.observed if labels is None else labels
        self._seen: Tensor | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of logits [B,K] and labels int64 [B].

        Raises:
            InvalidInputError: not the whole batch, or labels in another order than attach() got them.
        """
        indices = self._index.current
        if indices is None or not logits.requires_grad:
            loss: Tensor = self.criterion(logits, labels)
            return loss
        if len(indices) != len(logits):
            do = "Pass the whole batch of the wrapped loader to the criterion"
            raise InvalidInputError(explain(f"a batch of {len(indices)} logits", str(len(logits)), do))
        # The loader makes a new tensor for each batch, so the same one is the same batch.
        again, self._seen = indices is self._seen, indices
        state, indices = self._state, indices.to(self._state.device)
        self._check_order(indices, labels)
        weights = state.training_weights(indices).to(logits.device)
        loss = self._weighted(logits, state.targets(indices).to(logits.device), weights)
        fire = self._events.scorer_again if again else self._events.scorer_batch
        return fire(state, indices, logits, loss)

    def _weighted(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        if self.criterion is F.cross_entropy:
            rows: Tensor = F.cross_entropy(logits, targets, reduction="none")
        else:
            single = copy.copy(self.criterion)
            single.reduction = "none"
            rows = single(logits, targets)
        if rows.shape != weights.shape:
            do = "Pass a criterion that gives one loss per sample with reduction='none'"
            raise InvalidInputError(explain(f"losses of shape {list(weights.shape)}", f"{list(rows.shape)}", do))
        if getattr(self.criterion, "reduction", "mean") == "sum":
            return (weights * rows).sum()
        # torch's mean divides by the class weights of the batch, so ours does.
        per_class = getattr(self.criterion, "weight", None)
        total = (weights if per_class is None else weights * per_class[targets]).sum()
        return (weights * rows).sum() / total.clamp_min(torch.finfo(rows.dtype).tiny)

    def _check_order(self, indices: Tensor, labels: Tensor) -> None:
        if self._labels is None or labels.shape != indices.shape or labels.is_floating_point():
            return
        expected, self._labels = self._labels[indices].to(labels.device), None
        if not torch.equal(expected, labels.long()):
            first = int((expected != labels).nonzero()[0])
            wanted = f"label {int(expected[first])} for sample {int(indices[first])}, as attach() got it"
            do = "Give attach() the labels in the order of the loader's dataset"
            raise InvalidInputError(explain(wanted, f"{int(labels[first])} from the loader", do))


class RealTraining:
    """The wrappers of a loop that trains networks on real data. They share the batch in flight.

    Args:
        state: the sample state.
        labels: int64 [N], the labels that the loader gives.
        active: False makes both wrappers identities.
    """

    def __init__(self, state: SampleState, labels: Tensor | None, *, active: bool) -> None:
        self.state = state
        self.labels = labels
        self.active = active
        self.index = BatchIndex()

    def loader(self, loader: DataLoader[Any]) -> Any:
        """The :class:`IndexedLoader` of a loader, or the same object."""
        return IndexedLoader(loader, self.index, len(self.state)) if self.active else loader

    def criterion(self, criterion: C, events: CallbackList) -> C | TrustedCriterion:
        """The :class:`TrustedCriterion` of a criterion, or the same object."""
        if not self.active:
            return criterion
        return TrustedCriterion(criterion, self.state, self.index, events, self.labels)
