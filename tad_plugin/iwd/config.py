"""Settings of IWD."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tad_plugin.errors import ConfigError, explain
from tad_plugin.iwd.scoring import TARGETS
from tad_plugin.nn.derivatives.per_sample import DEFAULT_MEMORY_BUDGET

__all__ = ["DEFAULT_EVERY", "IWDConfig"]

DEFAULT_EVERY = {"all": 500, "batch": 1}
"""Iterations between refreshes by mode, where the settings say 0."""

STATISTICS = ("loop", "means")
"""What the scores of mode "all" go through."""


@dataclass
class IWDConfig:
    """Settings of IWD. All defaults are ours, chosen by the experiments in this folder's README.

    Attributes:
        mode: "all" scores every sample at each refresh on fresh networks; "batch" only the samples of the batch, on
            the network and the loss of the iteration.
        explicit: whether the path through the matched statistic counts (DM, IDM, DC).
        implicit: whether the path through networks trained on real data counts (MTT, DATM).
        learned: whether, in a loop of class means that trains networks on the real data (IDM), the path through these
            counts as well, in mode "all". Scores are then taken on them instead of on fresh networks, and they ranked
            mislabelled samples no better than chance.
        statistic: of mode "all" in a loop that matches class gradients (DC, DSA): "loop" scores through these, "means"
            through class means of embeddings on the same networks, which ranks mislabelled samples better at a fifth
            of the cost. Without effect in other loops.
        target: "validation" (held-out loss after learning from S) or "matching" (the unweighted matching loss).
        held_out: size of V: a share of the usable samples in (0, 0.5], or a whole number per class.
        ess: effective sample size that is left of each class, as a share of all its samples in (0, 1]. What a method
            before this one set aside counts: after TAD has trusted 95%, 0.9 means 0.95 of those. 1 never weights.
        saturate: share of each class's best-scored samples that all get the same weight, in [0, 1), at most ``ess``;
            0 is a plain softmax over all.
        every: iterations between refreshes; 0 takes 500 in mode "all" and 1 in mode "batch".
        early: mode "all" also refreshes at iterations early, 2 early, 4 early, ... below ``every``; 0 does not.
        networks: fresh networks per refresh of mode "all".
        warmup: refreshes before the first weights; until then every weight is exactly 1.
        alpha: inner step size of the target "validation".
        steps: its inner steps.
        decay: share of the old score that stays at each new one, in (0, 1); 0 keeps the plain mean of all.
        sign: 1, or -1 for the reversed control, which weights the harmful samples up.
        chunk_size: images per forward pass of a refresh; 0 takes what suits the device.
        memory_budget: bytes for one chunk of per-sample derivatives (implicit path).
    """

    mode: str = "all"
    explicit: bool = True
    implicit: bool = True
    learned: bool = False
    statistic: str = "means"
    target: str = "validation"
    held_out: float = 0.1
    ess: float = 0.9
    saturate: float = 0.0
    every: int = 0
    early: int = 10
    networks: int = 2
    warmup: int = 1
    alpha: float = 0.01
    steps: int = 1
    decay: float = 0.0
    sign: int = 1
    chunk_size: int = 0
    memory_budget: int = DEFAULT_MEMORY_BUDGET

    def __post_init__(self) -> None:
        share = self.held_out
        checks = [
            (self.mode in ("all", "batch"), 'mode "all" or "batch"', self.mode),
            (self.explicit or self.implicit, "explicit or implicit (or both) switched on", "neither"),
            (self.statistic in STATISTICS, f"statistic out of {STATISTICS}", self.statistic),
            (self.target in TARGETS, f"target out of {TARGETS}", self.target),
            (
                0 < share <= 0.5 or (share >= 1 and float(share).is_integer()),
                "held_out as a share in (0, 0.5] or a whole number per class",
                share,
            ),
            (0 < self.ess <= 1, "ess in (0, 1]", self.ess),
            (0 <= self.saturate < 1, "saturate in [0, 1)", self.saturate),
            (self.saturate <= self.ess, f"saturate of at most ess ({self.ess})", self.saturate),
            (self.every >= 0, "every of at least 0", self.every),
            (self.early >= 0, "early of at least 0", self.early),
            (self.networks >= 1, "networks of at least 1", self.networks),
            (self.warmup >= 0, "warmup of at least 0", self.warmup),
            (self.alpha > 0 and math.isfinite(self.alpha), "alpha above 0", self.alpha),
            (self.steps >= 1, "steps of at least 1", self.steps),
            (0 <= self.decay < 1, "decay in [0, 1)", self.decay),
            (self.sign in (1, -1), "sign 1 or -1", self.sign),
            (self.chunk_size >= 0, "chunk_size of at least 0", self.chunk_size),
            (self.memory_budget >= 1, "memory_budget of at least 1", self.memory_budget),
        ]
        for good, expected, got in checks:
            if not good:
                raise ConfigError(explain(f"iwd.{expected}", repr(got), "Correct the setting"))
