"""Values for the fuzzer: valid ones from a seed, and ways to break them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

N, K, D = 24, 3, 4
Arguments = dict[str, Any]


class Draw:
    """Valid arguments, and ways to break them, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def flags(self, n: int = N) -> Tensor:
        chosen = self.uniform(n) < 0.8
        chosen[: 2 * K] = True
        return chosen

    def labels(self, n: int = N) -> Tensor:
        return torch.arange(n) % K

    def images(self, n: int = N) -> Tensor:
        return self.normal(n, 1, D, D)

    def indices(self) -> Tensor:
        return torch.randperm(N, generator=self.generator)[:6]

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random.randrange(100))
            return Small()

    def broken(self, value: Any) -> Any:
        """A value of another kind, shape, dtype or range."""
        choices = ANYTHING if not isinstance(value, Tensor) else [*ANYTHING[:4], *TENSORS * 2]
        change = self.random.choice(choices)
        return change(value) if callable(change) else change


class Small(nn.Module):
    """A network with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D * D, 5)
        self.head = nn.Linear(5, K)

    def embed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


class Pairs(Dataset):  # type: ignore[type-arg]
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.images[i], i % K


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        made = tensor.detach().clone(memory_format=torch.contiguous_format)
        made.view(-1)[made.numel() // 2] = value
        return made

    return change


#: changes of any value, and of a tensor; what is no function is the value itself
ANYTHING: list[Any] = [
    None, "text", 2**70, -1, 0, 0.5, float("nan"), float("inf"), 1e300, True, [], {}, [1, 2], np.zeros(3),
    2**31, (1, "a"), b"bytes", lambda _: object(),
]  # fmt: skip
TENSORS: list[Any] = [
    lambda t: t[:-1] if t.ndim else t, lambda t: t[:0] if t.ndim else t, lambda t: t[..., :1] if t.ndim else t,
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0), lambda t: t.movedim(0, -1) if t.ndim else t, lambda t: torch.cat([t, t]) if t.ndim else t,
    lambda t: t.double(), lambda t: t.half(), lambda t: t.bool(), lambda t: t.long(), lambda t: t.to(torch.uint8),
    lambda t: t.to(torch.complex64), lambda t: t.bfloat16(), lambda t: t.to("meta"), lambda t: t.tolist(),
    lambda t: -t if t.dtype != torch.bool else ~t, lambda t: t.double() * 1e300, lambda t: t * 0,
    lambda t: t + 99 if t.dtype != torch.bool else t, lambda t: t.numpy(force=True), lambda t: t.to_sparse(),
    _with(float("nan")), _with(float("inf")), _with(1e38), _with(-1e-45), _with(-5.0),
]  # fmt: skip
