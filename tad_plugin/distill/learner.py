"""A network that learns from real data while synthetic images are matched on it, as IDM keeps a queue of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Learner"]


class Learner:
    """A network, its optimiser, and its running accuracy on the real batches that it learned from.

    Args:
        network: a fresh network.
        lr: learning rate of its SGD.
        momentum: its momentum.
        weight_decay: its L2 penalty.
    """

    def __init__(self, network: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=weight_decay)
        self.reset()

    def reset(self) -> None:
        """Starts the accuracy anew."""
        self.seen = 0
        self.hits = torch.zeros((), dtype=torch.int64, device=next(self.network.parameters()).device)

    @property
    def accuracy(self) -> float:
        """In percent; 0 while nothing was counted."""
        return 100.0 * float(self.hits) / self.seen if self.seen else 0.0

    def matching(self) -> nn.Module:
        """The network ready to be matched on: eval mode, no gradient in its parameters."""
        return self.network.eval().requires_grad_(False)

    def learning(self) -> nn.Module:
        """The network ready to learn."""
        return self.network.train().requires_grad_(True)

    def step(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One step down ``loss``, and the batch counted: logits [B,K], targets int64 [B]."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seen += len(targets)
        self.hits += (logits.detach().argmax(1) == targets).sum()

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
