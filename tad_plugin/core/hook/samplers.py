"""Samplers for a DataLoader, and index lists of classes, that follow the pools as methods change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.pools import KEEP_ONE
from tad_plugin.core.state import SampleState
from tad_plugin.errors import ConfigError, EmptyClassError, InvalidInputError, explain
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["ClassIndices", "ClassSampler", "PoolSampler", "drawn_by_weight"]


def drawn_by_weight(pool: Tensor, weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draws n of a pool with replacement, each in proportion to its weight: int64 [n].

    The plain mean over the draw has the weighted mean as its expectation.

    Args:
        pool: int64 [M].
        weight: float [M], >= 0, not all 0.
        n: at least 1.
        generator: a CPU generator; n numbers are drawn.
    """
    bounds = weight.double().cpu().cumsum(0)
    points = torch.rand(n, generator=generator, dtype=torch.float64) * bounds[-1]
    chosen = torch.searchsorted(bounds, points, right=True).clamp_max(len(pool) - 1)
    return pool[chosen.to(pool.device)]


class ClassIndices(Sequence[int]):
    """The usable indices of one class, ascending, as they are whenever one looks.

    It takes the place of a list in ``indices_class[c]``: ``len``, iteration, ``random.sample``,
    ``np.random.permutation`` and indexing by an integer, a slice or an array see the pool of that moment.
    """

    def __init__(self, state: SampleState, c: int, usage: Usage) -> None:
        self._state, self._c, self._usage = state, check_whole("a class", c, 0, state.num_classes), usage
        self._made: tuple[int, list[int]] | None = None

    def _list(self) -> list[int]:
        if self._made is None or self._made[0] != self._state.version:
            self._made = (self._state.version, self._state.pool(self._c).tolist())
        return self._made[1]

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[int]:
        self._usage.note("class_indices")
        return iter(list(self._list()))

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> list[int]: ...
    def __getitem__(self, i: Any) -> Any:
        self._usage.note("class_indices")
        found = self._list()
        if isinstance(i, slice | int):
            return found[i]
        return np.asarray(found)[np.asarray(i)].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self._usage.note("class_indices")
        return np.array(self._list(), dtype=dtype)

    def __repr__(self) -> str:
        return f"ClassIndices(class {self._c}, {len(self)} usable samples)"


class PoolSampler(Sampler[list[int]]):
    """Batches of the usable samples, for ``DataLoader(..., batch_sampler=...)``. Each pass starts from today's pool.

    While all samples are usable it draws what ``DataLoader(batch_size, shuffle=..., drop_last=...)`` would draw.

    Args:
        state: the sample state.
        batch_size: samples of a batch.
        shuffle: in random order.
        drop_last: leaves out a smaller last batch.
        generator: a CPU generator; by default, as in a DataLoader, one seeded from torch's global generator.
        by_weight: draws as many samples with replacement, in proportion to their weights.
        usage: counts.

    Raises:
        InvalidInputError: a batch size that is no whole number of at least 1.
    """

    def __init__(
        self,
        state: SampleState,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        generator: torch.Generator | None,
        by_weight: bool,
        usage: Usage,
    ) -> None:
        self.state, self.batch_size = state, check_whole("batch_size", batch_size, 1)
        self.shuffle, self.drop_last, self.generator = shuffle, drop_last, generator
        self.by_weight, self._usage = by_weight, usage
        if by_weight and not shuffle:
            do = 'Leave shuffle=True, or attach with draw="uniform"'
            raise ConfigError(explain("a random order, to draw by weight", "shuffle=False", do))

    def __len__(self) -> int:
        count = int(self.state.usable().sum())
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        pool = self.state.usable().nonzero().flatten().cpu()
        if self.by_weight and not bool((self.state.weight == 1).all()):
            weight = self.state.weight.cpu()[pool]
            order = drawn_by_weight(pool, weight, len(pool), _generator(self.generator)).tolist()
        else:
            every: Any = range(len(pool))
            sampler = RandomSampler(every, generator=self.generator) if self.shuffle else SequentialSampler(every)
            order = pool[torch.tensor(list(sampler), dtype=torch.int64)].tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                self._usage.note("batch_sampler", len(batch))
                yield batch


class ClassSampler(Sampler[list[int]]):
    """Batches with the same number of samples of each class, for ``DataLoader(..., batch_sampler=...)``.

    Each class is gone through in random order, anew when it is used up. When a method changes a class's pool, the class
    starts anew from the new pool at the next batch.

    Args:
        state: the sample state.
        per_class: samples of each class in a batch, sorted by class.
        classes: the classes of a batch; all by default.
        batches: batches of one pass; by default as many as the largest pool fills.
        generator: a CPU generator; by default one seeded from torch's global generator at each pass.
        by_weight: draws with replacement, in proportion to the weights.
        usage: counts.

    Raises:
        InvalidInputError: a number out of range.
    """

    def __init__(
        self,
        state: SampleState,
        per_class: int,
        *,
        classes: Sequence[int] | None,
        batches: int | None,
        generator: torch.Generator | None,
        by_weight: bool,
        usage: Usage,
    ) -> None:
        self.state, self.per_class = state, check_whole("per_class", per_class, 1)
        given = range(state.num_classes) if classes is None else classes
        self.classes = [check_whole("a class", c, 0, state.num_classes) for c in given]
        if not self.classes or len(set(self.classes)) < len(self.classes):
            do = "Name each class of a batch once"
            raise InvalidInputError(explain("`classes`", f"{self.classes}", do))
        self.batches = None if batches is None else check_whole("batches", batches, 1)
        self.generator, self.by_weight, self._usage = generator, by_weight, usage

    def __len__(self) -> int:
        if self.batches is not None:
            return self.batches
        return max(-(-len(self.state.pool(c)) // self.per_class) for c in self.classes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = _generator(self.generator)
        queues: dict[int, list[int]] = {}
        version = self.state.version
        for _ in range(len(self)):
            if version != self.state.version:
                version, queues = self.state.version, {}
            batch = [i for c in self.classes for i in self._of_class(c, queues, generator)]
            self._usage.note("class_sampler", len(batch))
            yield batch

    def _of_class(self, c: int, queues: dict[int, list[int]], generator: torch.Generator) -> list[int]:
        pool = self.state.pool(c).cpu()
        if len(pool) == 0:
            raise EmptyClassError(explain(f"a usable sample of class {c}", "an empty pool", KEEP_ONE))
        if self.by_weight and not bool(((weight := self.state.weight.cpu()[pool]) == 1).all()):
            return drawn_by_weight(pool, weight, self.per_class, generator).tolist()
        waiting = queues.get(c, [])
        while len(waiting) < self.per_class:
            waiting = waiting + pool[torch.randperm(len(pool), generator=generator)].tolist()
        queues[c] = waiting[self.per_class :]
        return waiting[: self.per_class]


def _generator(given: torch.Generator | None) -> torch.Generator:
    """The given generator, or one seeded from torch's global generator, as a DataLoader does."""
    if given is not None:
        return given
    return torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
