"""Wrappers that carry the state into a training loop through the two objects it already has.

``hook.loader(loader)`` remembers which samples each batch holds, ``hook.criterion(criterion)`` uses
that to weight and relabel. Neither draws a random number of its own: the wrapped loader makes the
same calls to the same generators as the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tad_plugin.callback import CallbackList
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.scorer import weighted_cross_entropy
from tad_plugin.state import SampleState

__all__ = ["BatchIndex", "IndexedLoader", "TrustedCriterion"]


class BatchIndex:
    """Which samples the batch in flight holds: int64 [B], or None outside a training batch."""

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
    """A DataLoader that yields what the wrapped one yields, and notes each batch's sample indices.

    Args:
        loader: a map-style DataLoader over the whole real dataset, in the state's order.
        index: where the indices are noted; cleared when the epoch is over.
        length: N of the state.

    Raises:
        InvalidInputError: not a map-style DataLoader, or over another number of samples.
    """

    def __init__(self, loader: DataLoader[Any], index: BatchIndex, length: int) -> None:
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise InvalidInputError(
                explain(
                    "a torch DataLoader with batches",
                    type(loader).__name__,
                    "Wrap the DataLoader of the real training data",
                )
            )
        if len(loader.dataset) != length:  # type: ignore[arg-type]
            raise InvalidInputError(
                explain(
                    f"a loader over {length} samples",
                    f"one over {len(loader.dataset)}",
                    "Wrap the loader of the same data that attach() got",
                )  # type: ignore[arg-type]
            )
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
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            for indices, batch in self._indexed:
                self.index.current = indices
                yield batch
        finally:
            # A test epoch after this one must see the plain criterion.
            self.index.current = None


class TrustedCriterion(nn.Module):
    """Weighted cross-entropy on the state's targets while a training batch is in flight, else the wrapped criterion.

    Args:
        criterion: the loop's own criterion; used as it is when no batch index is set (testing), with its
            label smoothing or class weights respected only there.
        state: the sample state.
        index: the batch in flight.
        events: fires on_scorer_batch.
    """

    def __init__(self, criterion: nn.Module, state: SampleState, index: BatchIndex, events: CallbackList) -> None:
        super().__init__()
        self.criterion = criterion
        self._state = state
        self._index = index
        self._events = events

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of logits [B,K] and labels int64 [B]."""
        indices = self._index.current
        if indices is None:
            loss: Tensor = self.criterion(logits, labels)
            return loss
        if len(indices) != len(logits):
            raise InvalidInputError(
                explain(
                    f"a batch of {len(indices)} logits",
                    str(len(logits)),
                    "Pass the whole batch of the wrapped loader to the criterion",
                )
            )
        indices = indices.to(self._state.device)
        weights = (self._state.weight * self._state.trusted)[indices].to(logits.device)
        loss = weighted_cross_entropy(logits, self._state.target[indices].to(logits.device), weights)
        return self._events.scorer_batch(self._state, indices, logits, loss)
