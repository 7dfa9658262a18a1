"""Networks in training: the state of one that is trained over epochs, and the one inside a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["EpochTrainer", "inner_network"]


class EpochTrainer:
    """Base of trainers that can be resumed after any epoch with the same bits.

    Attributes:
        network: the network.
        optimizer: optimiser of its parameters.
        generator: CPU generator of every draw.
        epoch: epochs done.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    epoch: int

    def state_dict(self) -> dict[str, Any]:
        """Network, optimiser, generator and epoch."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch = int(state["epoch"])


def inner_network(network: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and ``torch.compile``; else the network itself."""
    inner = network
    while True:
        compiled = getattr(inner, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            inner = compiled
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner
