"""ImageStore: real images that are read when they are asked for, in the place of a tensor that holds them all."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain

__all__ = ["ImageStore"]


class ImageStore(ABC):
    """Normalised images float32 [N,C,H,W] of which only the asked rows are in memory.

    ``RealData.images`` is a tensor or a store. Both answer ``images[indices]``, ``images[a:b]``, ``shape``, ``ndim``,
    ``dtype``, ``device``, ``numel()``, ``len()`` and ``to(device)``.

    Attributes:
        shape: [N,C,H,W].
        device: where the rows go.
    """

    dtype = torch.float32
    shape: torch.Size
    device: torch.device

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """The images at these positions, float32 [B,C,H,W] on :attr:`device`. ``indices`` is int64 [B] on the CPU."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of dimensions, 4."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of values of all images."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """True: rows are float32."""
        return True

    def to(self, device: torch.device | str) -> ImageStore:
        """The same store with its rows on ``device``."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        if isinstance(index, int):
            return self.rows(torch.arange(len(self))[index : index + 1 or None])[0]
        if isinstance(index, slice):
            return self.rows(torch.arange(len(self))[index])
        if not isinstance(index, Tensor) or index.ndim != 1:
            got = f"a tensor of shape {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            do = "Ask for rows with a slice, a mask [N] or positions [B]"
            raise InvalidInputError(explain("rows of images", got, do))
        positions = index.nonzero().flatten() if index.dtype == torch.bool else index
        return self.rows(positions.to("cpu", torch.int64))
