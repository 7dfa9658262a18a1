"""Where the real samples of a run come from, so that a file made elsewhere can name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain

__all__ = ["ORDERS", "Origin"]

ORDERS = ("published", "train", "given")
"""Orders in which a file may list the samples; see :class:`Origin`."""


@dataclass(frozen=True, eq=False)
class Origin:
    """The names of N samples.

    A file may list samples in three orders. ``published``: that of the dataset as a whole. ``train``: that of all
    training samples, held-out ones included. ``given``: that of the N samples themselves.

    Attributes:
        index: int64 [N], position of each sample in the published order, all different.
        held_out: int64 [V], positions of the training samples that are held out.
        paths: N file names below the dataset's top, or None.
        class_names: K names in label order, or None.

    Raises:
        InvalidInputError: positions that are negative or not all different, or not one path per sample.
    """

    index: Tensor
    held_out: Tensor | None = None
    paths: Sequence[str] | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        every = self._every()
        if len(every) and (int(every.min()) < 0 or len(every.unique()) < len(every)):
            raise InvalidInputError(explain("positions from 0, all different", "others", "Pass each sample's own"))
        if self.paths is not None and len(self.paths) != len(self.index):
            got = f"{len(self.paths)} for {len(self.index)} samples"
            raise InvalidInputError(explain("one path per sample", got, "Pass them in the order of the samples"))

    @classmethod
    def plain(cls, n: int) -> Origin:
        """N samples that are a dataset of their own: the three orders are the same."""
        return cls(torch.arange(n))

    def _every(self) -> Tensor:
        held = self.index.new_empty(0) if self.held_out is None else self.held_out.to(self.index.device)
        return torch.cat([self.index, held]).cpu()

    @property
    def one_order(self) -> bool:
        """Whether the three orders are the same, so that a position has one meaning."""
        return torch.equal(self.index.cpu(), torch.arange(len(self.index))) and len(self._every()) == len(self.index)

    def positions(self, order: str) -> Tensor:
        """The place int64 [N] of each sample in one of the orders."""
        if order == "given":
            return torch.arange(len(self.index))
        index = self.index.cpu()
        return index if order == "published" else torch.searchsorted(self._every().sort().values, index)

    def length(self, order: str) -> tuple[int, bool]:
        """How many samples an order lists at least, and whether that is exactly the number."""
        every = self._every()
        if order == "given":
            return len(self.index), True
        if order == "train":
            return len(every), True
        most = int(every.max()) + 1
        return most, most == len(every)
