"""Wrappers that carry the state into a training loop through the two objects it already has.

``hook.loader(loader)`` notes the sample indices of each batch. ``hook.criterion(criterion)`` uses them to weight and
relabel. Neither draws a random number: the wrapped loader makes the same calls to the same generators as the plain one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.hook.given_batches import GivenBatches
from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, TadPluginWarning, explain
from tad_plugin.utils.arguments import named_errors

__all__ = ["IndexedLoader", "RealTraining", "TrustedCriterion"]

C = TypeVar("C")


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

    A loader that never rebuilds its iterator (``MultiEpochsDataLoader`` of IDC, DREAM and NCFM: an endless batch
    sampler, and an ``__iter__`` that takes ``len(loader)`` batches from one iterator) is followed in the same way.

    Args:
        loader: a map-style DataLoader over the whole real dataset, in the state's order.
        given: receives the batches.
        length: N of the state.

    Raises:
        InvalidInputError: not a map-style DataLoader, over another number of samples, or endless and without a length.

    Warns:
        TadPluginWarning: the loader's class has an ``__iter__`` of its own, which is not followed.
    """

    def __init__(self, loader: DataLoader[Any], given: GivenBatches, length: int) -> None:
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
        self.given = given
        given.loaders += 1
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
            **{name: getattr(loader, name) for name in ("pin_memory_device", "in_order") if hasattr(loader, name)},
        )
        self._endless: Iterator[Any] | None = None
        self._per_pass = _batches_per_pass(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        if self._per_pass is None:
            return self.given.passed(self.loader, iter(self._indexed))
        if self._endless is None:
            self._endless = self._one_iterator()
        return self.given.passed(self.loader, islice(self._endless, self._per_pass))

    def _one_iterator(self) -> Iterator[Any]:
        """The iterator of all passes. The wrapped loader has drawn its seed already, so this one draws none."""
        generator = self.loader.generator
        kept = torch.get_rng_state() if generator is None else generator.get_state()
        made = iter(self._indexed)
        if self.loader.num_workers == 0:
            if generator is None:
                torch.set_rng_state(kept)
            else:
                generator.set_state(kept)
        return made


def _batches_per_pass(loader: DataLoader[Any]) -> int | None:
    """Batches of one pass over a loader with an endless batch sampler and an ``__iter__`` of its own; else None."""
    if type(loader).__iter__ is DataLoader.__iter__:
        return None
    if any(isinstance(part, _BaseDataLoaderIter) for part in vars(loader).values()) or not hasattr(
        loader.batch_sampler, "__len__"
    ):
        try:
            return len(loader)
        except TypeError as error:
            do = "Give the class a __len__: the number of batches of one epoch"
            got = f"{type(loader).__name__}, whose batches never end, without one"
            raise InvalidInputError(explain("a loader with a length", got, do)) from error
    do = "Move what it does into the dataset or the collate_fn"
    got = f"an __iter__ of {type(loader).__name__}, which is not followed"
    warnings.warn(explain("the batches of a plain DataLoader", got, do), TadPluginWarning, stacklevel=6)
    return None


class TrustedCriterion(nn.Module):
    """The wrapped criterion with the state's targets and training weights; outside training it is the plain one.

    The loss of a training batch is sum_i w_i l_i / sum_i w_i, or sum_i w_i l_i if its reduction is "sum". w_i is
    :meth:`SampleState.training_weights`, and l_i the criterion's own loss against the target, label smoothing and
    class weights included. A call counts as training if a batch of a wrapped loader is in flight and the logits have
    a graph. So a test after an epoch, or under ``torch.no_grad()``, gets the plain criterion. A batch may be evaluated
    twice (sharpness-aware training), and batches may be taken ahead of their loss.

    The labels of every training batch must be those that the loader gave. They tell which batch it is. Mixed and soft
    labels (CutMix, MixUp) are refused, since a row of them is of more than one sample.

    Args:
        criterion: a loss module with a ``reduction`` of "mean" or "sum" (``nn.CrossEntropyLoss()``), or
            ``torch.nn.functional.cross_entropy``.
        state: the sample state.
        given: the batches in flight.
        events: fires on_scorer_batch, and on_scorer_again if a batch is evaluated once more.
        labels: int64 [N], the labels that the loader gives. By default the observed ones.
        usage: counts the losses.

    Raises:
        InvalidInputError: the criterion cannot give one loss per sample.
    """

    def __init__(
        self,
        criterion: Any,
        state: SampleState,
        given: GivenBatches,
        events: CallbackList,
        labels: Tensor | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__()
        if criterion is not F.cross_entropy and getattr(criterion, "reduction", None) not in ("mean", "sum"):
            expected = 'a criterion with a `reduction` of "mean" or "sum"'
            do = "Pass nn.CrossEntropyLoss() or another loss module that can leave its batch unreduced"
            raise InvalidInputError(explain(expected, repr(criterion), do))
        self.criterion = criterion
        self._state = state
        self._given = given
        self._events = events
        self._labels = state.observed if labels is None else labels.to(state.device)
        self._usage = Usage() if usage is None else usage

    @named_errors
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of logits [B,K] and labels int64 [B].

        Raises:
            InvalidInputError: no loader was wrapped; or not the whole batch, or labels that are not those of a batch in
                flight (another order than attach() got them, mixed, soft).
        """
        training = isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.requires_grad
        if training and not self._given.loaders:
            do = "Train on the batches of hook.loader(loader)"
            raise InvalidInputError(explain("a loader that hook.loader() wrapped", "none", do))
        batch = self._given.find(labels, len(logits), self._labels) if training else None
        if batch is None:
            loss: Tensor = self.criterion(logits, labels)
            return loss
        again, batch.used = batch.used, True
        state, indices = self._state, batch.indices.to(self._state.device)
        weights = state.training_weights(indices).to(logits.device)
        loss = self._weighted(logits, state.targets(indices).to(logits.device), weights)
        if not again:
            self._usage.note("criterion", len(indices))
        fire = self._events.scorer_again if again else self._events.scorer_batch
        return self._usage.watch(fire(state, indices, logits, loss))

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


class RealTraining:
    """The wrappers of a loop that trains networks on real data. They share the batches in flight.

    Args:
        state: the sample state.
        labels: int64 [N], the labels that the loader gives.
        usage: counts what the wrappers give and take.
        active: False makes both wrappers identities.
    """

    def __init__(self, state: SampleState, labels: Tensor | None, usage: Usage, *, active: bool) -> None:
        self.state = state
        self.labels = labels
        self.usage = usage
        self.active = active
        self.given = GivenBatches(usage)

    def loader(self, loader: DataLoader[Any]) -> Any:
        """The :class:`IndexedLoader` of a loader, or the same object."""
        return IndexedLoader(loader, self.given, len(self.state)) if self.active else loader

    def criterion(self, criterion: C, events: CallbackList) -> C | TrustedCriterion:
        """The :class:`TrustedCriterion` of a criterion, or the same object."""
        if not self.active:
            return criterion
        return TrustedCriterion(criterion, self.state, self.given, events, self.labels, self.usage)
