"""A step of an optimiser that may turn out too long, and is then taken again with a lower rate. [ours]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import explain

__all__ = ["LimitedStep"]

# Length of a shortened step, as a share of the longest one allowed.
_SHORTENED = 0.1


class LimitedStep:
    """Takes one step of an optimiser of one tensor.

    Gradients of trajectory matching are divided by the squared length of the expert's segment. Experts of a small
    dataset move little, so one step of published length makes the synthetic learning rate negative, or takes the images
    out of range. Such a step is shortened to a tenth of ``most``, and the lower rate holds from then on.

    Args:
        name: setting of the learning rate, for messages.
        optimizer: of one tensor, which has a gradient.
        most: root mean square of the longest step allowed, a scalar: the standard deviation of real images, or the
            synthetic learning rate itself.

    Attributes:
        fits: bool scalar on the tensor's device, True if the step was no longer than that.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, most: Tensor) -> None:
        self.name, self.optimizer, self.most = name, optimizer, most
        (self.group,) = optimizer.param_groups
        (self.tensor,) = self.group["params"]
        self.before = self.tensor.detach().clone()
        optimizer.step()
        self.fits: Tensor = (self.tensor.detach() - self.before).square().mean().sqrt() < most

    @torch.no_grad()
    def undo(self) -> None:
        """Takes the tensor back to where it was."""
        self.tensor.copy_(self.before)

    def shorten(self, when: str) -> str:
        """Takes the step again, shorter. Returns a message; ``when`` is "at iteration 7"."""
        self.undo()
        group: dict[str, Any] = self.group
        old, slope, most = float(group["lr"]), float(self.tensor.grad.square().mean().sqrt()), float(self.most)
        self.optimizer.state.clear()  # its momentum is made of steps of the old length
        group["lr"] = min(old / 2, _SHORTENED * most / max(slope, torch.finfo(torch.float32).tiny))
        self.optimizer.step()
        got = f"{self.name} {old:g} {when}, which does not fit these experts"
        do = f"It is lowered to {group['lr']:.1e}. Set a lower {self.name}, or train experts that move more"
        return explain(f"steps no longer than {most:.3g}", got, do)
