"""Arms: the variants that a comparison puts side by side."""

from __future__ import annotations

from dataclasses import dataclass

from tad_plugin.core.registry import available_methods
from tad_plugin.errors import unknown_name

__all__ = ["ARMS", "Arm", "parse_arm"]


@dataclass(frozen=True)
class Arm:
    """One variant: which labels the loop sees, and which method acts.

    Attributes:
        method: as in :func:`tad_plugin.attach`.
        true_labels: the loop sees the true labels instead of the noisy ones.
        distil: False keeps the initial real images unchanged.
        about: one line for tables and help.
    """

    method: str = "none"
    true_labels: bool = False
    distil: bool = True
    about: str = ""


ARMS: dict[str, Arm] = {
    "clean": Arm(true_labels=True, about="true labels, no method: the upper reference"),
    "noisy": Arm(about="observed labels, no method: the baseline"),
    "random": Arm(distil=False, about="random real images with observed labels, no distillation"),
    "random-subset": Arm("random", about="a random part of the real data: the control for fewer samples"),
    "oracle": Arm("oracle", about="only the correctly labelled samples; needs the true labels"),
    "loss-prune": Arm("loss-prune", about="lowest-loss samples of each class; knows the nominal noise rate"),
    "el2n": Arm("el2n", about="EL2N pruning; knows the nominal noise rate"),
    "clean-then-distil": Arm("clean-then-distil", about="cross-validated confident learning, then the baseline"),
    "tad": Arm("tad", about="trust-aware diversion"),
    "iwd": Arm("iwd", about="influence-weighted distillation"),
    "tad+iwd": Arm("tad+iwd", about="both"),
    "verdict": Arm("verdict", about="a verdict on the samples made elsewhere: --verdict FILE"),
    "verdict+iwd": Arm("verdict+iwd", about="that verdict, and influence weighting"),
}
"""Named arms. Any other registered method, or several joined by "+", is an arm too."""


def parse_arm(name: str) -> Arm:
    """The arm called ``name``. Raises UnknownNameError."""
    if name in ARMS:
        return ARMS[name]
    known = available_methods()
    for part in name.split("+"):
        if part not in known:
            raise unknown_name("arm or method", part, [*ARMS, *known])
    return Arm(name, about="registered method")
