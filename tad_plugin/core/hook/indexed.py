"""IndexedDataset: a dataset whose samples carry their index, through every loader, worker, prefetcher and sampler.

Labels are replaced where they are read. The targets stand in shared memory, so worker processes see a new target at
their next read. Batches that were read ahead of a change still have the old label; :class:`GivenLoss` knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from tad_plugin.core.indices import check_indices
from tad_plugin.core.state import SampleState
from tad_plugin.data.samples import hard_label, part, with_index, with_label
from tad_plugin.errors import InvalidInputError, InvalidLabelsError, explain

__all__ = ["IndexedDataset", "SharedTargets", "positions_of"]


class SharedTargets:
    """The targets of a state, int64 [N] on the CPU, in memory that worker processes share.

    Of a state on the CPU it is the state's own tensor. Of another state it is a copy, which :meth:`refresh` renews.
    """

    def __init__(self, state: SampleState) -> None:
        self._state = state
        self._own = state.device.type == "cpu"
        self.values = (state.target if self._own else state.target.cpu()).share_memory_()
        self._version = state.version

    def refresh(self) -> None:
        """Takes over what methods have written. Called after each of their decisions, and with each loss."""
        if not self._own and self._version != self._state.version:
            self.values.copy_(self._state.target.cpu())
        self._version = self._state.version


def _check_map_style(dataset: Any) -> None:
    known = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not known:
        do = "Read it into a map-style dataset: only its samples have an index"
        raise InvalidInputError(explain("a map-style dataset", type(dataset).__name__, do))


def positions_of(dataset: Any, length: int, known: Any, given: Tensor | Sequence[int] | None) -> Tensor | None:
    """Which sample of the state each item of a dataset is: int64 [M], or None if item i is sample i.

    Args:
        dataset: the dataset to index.
        length: N of the state.
        known: the dataset that attach() got, or None.
        given: the positions, if the user names them.

    Raises:
        InvalidInputError: no map-style dataset, or one of another length, and nothing tells which samples it holds.
    """
    _check_map_style(dataset)
    if given is not None:
        return check_indices(given, length, count=len(dataset), name="positions")
    if dataset is known:
        return None
    root, positions = dataset, None
    while isinstance(root, Subset) and (len(root) != length or (known is not None and root is not known)):
        inner = torch.as_tensor(root.indices, dtype=torch.int64)
        positions = inner if positions is None else inner[positions]
        root = root.dataset
    if positions is not None and (root is known or len(root) == length):
        return positions
    if len(dataset) != length:
        do = "Pass positions=...: for each item of this dataset the position of its label in attach(labels=...)"
        got = f"{type(dataset).__name__} of {len(dataset)}"
        raise InvalidInputError(explain(f"the {length} samples that attach() got, or a Subset of them", got, do))
    return None


class IndexedDataset(Dataset):  # type: ignore[type-arg]
    """Gives the samples of a dataset with their index and with the label of today.

    A tuple or list gets its index as the last part; a mapping gets it under a key. Attributes of the dataset are
    passed on. It draws no random number.

    Args:
        dataset: map-style.
        targets: int64 [N], the labels to give.
        given: int64 [N], the labels that the dataset itself gives.
        positions: int64 [M], the sample of each item, or None if item i is sample i.
        label: position or key of the label in a sample, if it is an unusual one.
        key: the key of the index in a mapping.
        reads: int64 [N] in shared memory that counts the reads of each sample, or None.

    Raises:
        InvalidInputError: not a map-style dataset.
    """

    def __init__(
        self,
        dataset: Any,
        targets: Tensor,
        given: Tensor,
        positions: Tensor | None,
        *,
        label: int | str | None = None,
        key: str = "index",
        reads: Tensor | None = None,
    ) -> None:
        _check_map_style(dataset)
        self.dataset = dataset
        self._targets, self._given, self._positions, self._reads = targets, given, positions, reads
        self._label, self._key = label, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # not set yet, while a copy or a worker's one is made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, i: int) -> Any:
        return self._indexed(i, self.dataset[i])

    def __getitems__(self, items: list[int]) -> list[Any]:
        """A batch at once, as newer loaders ask for it."""
        many = getattr(self.dataset, "__getitems__", None)
        rows = many(items) if callable(many) else [self.dataset[i] for i in items]
        return [self._indexed(i, row) for i, row in zip(items, rows, strict=True)]

    def _indexed(self, item: int, sample: Any) -> Any:
        i = range(len(self.dataset))[int(item)]
        position = i if self._positions is None else int(self._positions[i])
        given, target = int(self._given[position]), int(self._targets[position])
        label = part(sample, "label", self._label)
        found = hard_label(label)
        if found is None:
            _check_soft(label, item)
        elif found != given:
            do = "Give attach() the labels of this dataset in its order, or pass hook.dataset(dataset, positions=...)"
            expected = f"label {given} in item {i}, as attach() got it for sample {position}"
            raise InvalidLabelsError(explain(expected, str(found), do))
        if self._reads is not None:
            self._reads[position] += 1
        if target != given:
            sample = with_label(sample, target, self._label)
        return with_index(sample, position, self._key)


def _check_soft(label: Any, item: int) -> None:
    if not hasattr(label, "ndim") or label.ndim != 1 or not hasattr(label, "dtype") or "float" not in str(label.dtype):
        do = 'Name its place: hook.dataset(dataset, label="...") with a key or a position'
        shown = f"{type(label).__name__} {str(label)[:40]}"
        raise InvalidLabelsError(explain(f"an integer label, or a soft one [K], in item {item}", shown, do))
