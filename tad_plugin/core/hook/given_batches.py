"""GivenBatches: the batches that wrapped loaders gave, until their loss is computed.

A criterion gets labels and no indices. The labels tensor of a batch tells which batch it is; where it was copied (to
an accelerator, for example) its values tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.usage import Usage
from tad_plugin.errors import InvalidInputError, explain

__all__ = ["GivenBatch", "GivenBatches"]

# A loop takes at most so many batches before it computes the loss of the first of them.
_AHEAD = 32


@dataclass(eq=False)
class GivenBatch:
    """One batch.

    Attributes:
        indices: int64 [B], positions of its samples.
        tensors: the 1-D tensors of length B in it; one of them holds the labels.
        used: whether its loss was computed.
    """

    indices: Tensor
    tensors: list[Tensor]
    used: bool = False

    def holds(self, labels: Tensor) -> bool:
        """Whether ``labels`` is a tensor of this batch, or a view of all of one."""
        return any(_place(labels) == _place(t) for t in self.tensors)


@dataclass(eq=False)
class _Pass:
    """One pass over a loader: its batches that wait for their loss, and the one before them."""

    loader: object
    batches: deque[GivenBatch] = field(default_factory=lambda: deque(maxlen=_AHEAD))
    over: bool = False


class GivenBatches:
    """The batches in flight of all wrapped loaders of a hook."""

    def __init__(self, usage: Usage | None = None) -> None:
        self._passes: list[_Pass] = []
        self._usage = Usage() if usage is None else usage
        #: number of loaders that were wrapped
        self.loaders = 0

    def passed(self, loader: object, batches: Iterator[tuple[Tensor, Any]]) -> Iterator[Any]:
        """Yields the batches of one pass over ``loader`` and keeps them until their loss is computed.

        Args:
            loader: the wrapped loader; its earlier pass is forgotten.
            batches: (indices int64 [B], batch).
        """
        self._passes = [p for p in self._passes if p.loader is not loader]
        current = _Pass(loader)
        self._passes.append(current)
        try:
            for indices, batch in batches:
                self._usage.note("loader", len(indices))
                current.batches.append(GivenBatch(indices, list(_label_tensors(batch, len(indices)))))
                yield batch
            # A loop that takes batches ahead still computes the last ones' losses.
            current.over = True
        finally:
            if not current.over and current in self._passes:  # the loop left the pass
                self._passes.remove(current)

    def find(self, labels: Tensor, rows: int, expected: Tensor) -> GivenBatch | None:
        """The batch of ``labels``, or None if none is in flight: then it is a test.

        Batches before it in its pass are forgotten.

        Args:
            labels: what the criterion got.
            rows: number of logits.
            expected: int64 [N], the label of each sample.

        Raises:
            InvalidInputError: no batch in flight has these labels, or several have.
        """
        every = [(p, b) for p in self._passes for b in p.batches]
        waiting = [(p, b) for p, b in every if not b.used]
        if not waiting and all(p.over for p in self._passes):
            every = [(p, b) for p, b in every if b.holds(labels)]
        if not every:
            return None
        own = [(p, b) for p, b in every if b.holds(labels)]
        matching = [pair for pair in own or waiting if _same(pair[1], labels, rows, expected)]
        if not matching and not own:  # evaluated once more
            matching = [pair for pair in every if pair[1].used and _same(pair[1], labels, rows, expected)]
        if not matching:
            if not own and all(p.over for p in self._passes):
                return None
            _refuse(own or waiting or every, labels, rows, expected)
        if len(matching) > 1:
            do = "Pass the labels tensor of the batch itself, or compute its loss before you take the next batch"
            got = f"{len(matching)} batches in flight with the same labels"
            raise InvalidInputError(explain("labels that tell which batch they are of", got, do))
        found, batch = matching[0]
        while found.batches[0] is not batch:
            found.batches.popleft()
        return batch


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor.device


def _label_tensors(batch: Any, length: int) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim >= 1 and len(batch) == batch.numel() == length:
            yield batch
    elif isinstance(batch, dict):
        for part in batch.values():
            yield from _label_tensors(part, length)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _label_tensors(part, length)


def _same(batch: GivenBatch, labels: Tensor, rows: int, expected: Tensor) -> bool:
    if labels.ndim != 1 or not len(labels) == rows == len(batch.indices):
        return False
    if labels.is_floating_point() or labels.is_complex():
        return False
    wanted = expected[batch.indices.to(expected.device)]
    return torch.equal(wanted, labels.to(expected.device, torch.int64))


def _refuse(pairs: list[tuple[_Pass, GivenBatch]], labels: Tensor, rows: int, expected: Tensor) -> None:
    """Raises InvalidInputError: says how ``labels`` differ from those of the batch that was given last."""
    batch = pairs[-1][1]
    size = len(batch.indices)
    if rows != size:
        do = "Pass the whole batch of the wrapped loader to the criterion, and compute a test under torch.no_grad()"
        raise InvalidInputError(explain(f"a batch of {size} logits", str(rows), do))
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != size:
        do = (
            "Pass the labels as the loader gave them. For MixUp, CutMix or soft labels let the index travel with the"
            " batch: hook.dataset(dataset) and hook.loss(logits, labels, idx, partner=...)"
        )
        got = f"{labels.dtype} of shape {list(labels.shape)}"
        raise InvalidInputError(explain(f"hard labels as integers [{size}]", got, do))
    wanted = expected[batch.indices.to(expected.device)].to(labels.device)
    first = int((wanted != labels).nonzero()[0])
    sample = int(batch.indices[first])
    do = (
        "Give attach() the labels in the order of the loader's dataset, and pass the batch's labels unmixed (no CutMix)"
        " to the criterion, those of a test under torch.no_grad()"
    )
    expected_label = f"label {int(wanted[first])} for sample {sample}, as attach() got it"
    raise InvalidInputError(explain(expected_label, f"{int(labels[first])} from the loader", do))
