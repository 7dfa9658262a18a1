"""A network that trains on real data while synthetic images are matched on it. IDM keeps a queue of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.utils.transfers import read

__all__ = ["Learner"]


class Learner:
    """A network, its SGD optimiser, and its running training accuracy.

    Args:
        network: a newly initialised network.
        lr: learning rate.
        momentum: momentum.
        weight_decay: L2 penalty.
    """

    def __init__(self, network: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=weight_decay)
        self.reset()

    def reset(self) -> None:
        """Resets the running accuracy."""
        self.seen = 0
        self.hits = torch.zeros((), dtype=torch.int64, device=next(self.network.parameters()).device)
        self._counted: int | None = 0

    @property
    def accuracy(self) -> float:
        """Running training accuracy in percent; 0 before the first batch."""
        if self._counted is None:
            self.count([self])
        return 100.0 * float(self._counted or 0) / self.seen if self.seen else 0.0

    @staticmethod
    def count(learners: Sequence[Learner], *more: Tensor) -> list[float]:
        """Reads the hits of several learners in one transfer, with more scalars, whose values are returned."""
        stale = [learner for learner in learners if learner._counted is None]
        if not stale and not more:
            return []
        found = read(*(learner.hits for learner in stale), *more)
        for learner, hits in zip(stale, found, strict=False):
            learner._counted = int(hits)
        return found[len(stale) :]

    def matching(self) -> nn.Module:
        """The network in eval mode, with gradients of its parameters switched off, for matching."""
        return self.network.eval().requires_grad_(False)

    def learning(self) -> nn.Module:
        """The network in train mode, with gradients of its parameters switched on."""
        return self.network.train().requires_grad_(True)

    def step(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Takes one SGD step on ``loss`` and counts the hits of the batch: logits [B,K], targets int64 [B]."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seen += len(targets)
        self.hits += (logits.detach().argmax(1) == targets).sum()
        self._counted = None

    def state_dict(self) -> dict[str, Any]:
        """Network, optimiser and counts."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seen": self.seen,
            "hits": self.hits.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen = int(state["seen"])
        self.hits.copy_(state["hits"])
        self._counted = None
