"""The usable samples of each class, and draws from them."""

from __future__ import annotations

import torch
from torch import Tensor

from tad_plugin.data.splits import class_members
from tad_plugin.errors import EmptyClassError, InvalidInputError, explain
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["KEEP_ONE", "Pools"]

KEEP_ONE = (
    """Let the method keep a sample of each class (--methods '{"tad": {"min_per_class": 1}}'), or load more data"""
)
"""What to do where a class has no usable sample."""


class Pools:
    """Usable samples by class, at one time.

    Args:
        target: int64 [N] in [0, num_classes).
        num_classes: K.
        usable: bool [N].

    Attributes:
        members: one int64 tensor per class, ascending, on the device of ``target``.
    """

    def __init__(self, target: Tensor, num_classes: int, usable: Tensor) -> None:
        self.members = class_members(target, num_classes, usable)
        self._host: list[Tensor] | None = None
        self._joined: Tensor | None = None

    @property
    def host(self) -> list[Tensor]:
        """The same on the CPU, copied once."""
        if self._host is None:
            sizes = [len(pool) for pool in self.members]
            self._host = list(torch.cat(self.members).cpu().split(sizes))
        return self._host

    def of(self, c: int) -> Tensor:
        """The members of class c. Raises InvalidInputError if it is not a class."""
        return self.members[check_whole("a class", c, 0, len(self.members))]

    def draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """Up to n members of class c, int64 on the CPU; see :meth:`SampleState.sample` for arguments and errors."""
        pool = self.host[check_whole("a class", c, 0, len(self.members))]
        n = check_whole("n", n, 1)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            do = "Pass torch.Generator().manual_seed(...)"
            raise InvalidInputError(explain("a CPU generator", repr(generator), do))
        if len(pool) == 0:
            raise EmptyClassError(explain(f"a usable sample of class {c}", "an empty pool", KEEP_ONE))
        return pool[torch.randperm(len(pool), generator=generator)[:n]]

    def draw_any(self, n: int, generator: torch.Generator) -> Tensor:
        """Up to n members of any class, each as likely, int64 on the CPU, by one permutation of all members."""
        if self._joined is None:
            self._joined = torch.cat(self.host)
        return self._joined[torch.randperm(len(self._joined), generator=generator)[:n]]
