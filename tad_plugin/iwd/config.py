"""Settings of IWD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tad_plugin.iwd.scoring import valid_size
from tad_plugin.iwd.targets import TARGETS
from tad_plugin.nn.derivatives.per_sample import DEFAULT_MEMORY_BUDGET
from tad_plugin.utils.settings import Settings, setting

__all__ = ["DEFAULT_EVERY", "STATISTICS", "IWDConfig"]

DEFAULT_EVERY = {"all": 500, "batch": 1}
"""Iterations between refreshes of each mode, for ``every=0``."""

STATISTICS = ("loop", "means")
"""Statistics through which mode "all" can score."""


@dataclass
class IWDConfig(Settings):
    """Settings of IWD. All defaults are [ours]; README.md in this folder has the experiments behind them.

    Attributes:
        mode: "all" scores every sample at each refresh, on fresh networks. "batch" scores the samples of the batch,
            on the network and with the loss of the iteration.
        explicit: count the path through the matched statistic (DM, IDM, DC).
        implicit: count the path through the experts (MTT, DATM).
        learned: IDM, mode "all": add the path through the trained networks. Ranked mislabelled samples no better
            than chance.
        statistic: DC and DSA, mode "all": score through class "means" of embeddings, or through the class gradients
            that the "loop" matches. Means rank mislabelled samples better at a fifth of the cost. No effect in other
            loops.
        target: "validation" (held-out loss after learning from S) or "matching" (the unweighted matching loss).
        held_out: size of V: a share of the usable samples in (0, 0.5], or a whole number of samples per class.
        ess: effective sample size of each class after weighting, as a share of all its samples. Samples that an
            earlier method removed count as lost: if TAD trusts 95%, 0.9 becomes 0.9 / 0.95 of those. 1 never weights.
        saturate: share of each class's best samples that get the same weight; at most ``ess``. 0 is a plain softmax.
        every: iterations between refreshes; 0 means 500 in mode "all" and 1 in mode "batch".
        early: mode "all" also refreshes at iterations early, 2 early, 4 early, ... below ``every``. 0 switches it off.
            In a run of fewer than 20 early iterations, as announced, it is a twentieth of them, at least 1.
        networks: fresh networks per refresh of mode "all".
        warmup: refreshes before the first weights. Until then every weight is exactly 1.
        alpha: inner step size of the target "validation".
        steps: inner steps of the target "validation".
        decay: share of the old score that is kept at each new one; 0 takes the plain mean of all scores.
        sign: 1, or -1 for the reversed control, which raises the weights of harmful samples.
        chunk_size: images per forward pass of a refresh; 0 chooses by device.
        memory_budget: bytes for one chunk of per-sample derivatives (implicit path).
    """

    prefix: ClassVar[str] = "iwd."

    mode: str = setting("all", one_of=tuple(DEFAULT_EVERY))
    explicit: bool = True
    implicit: bool = True
    learned: bool = False
    statistic: str = setting("means", one_of=STATISTICS)
    target: str = setting("validation", one_of=TARGETS)
    held_out: float = 0.1
    ess: float = setting(0.9, above=0, at_most=1)
    saturate: float = setting(0.0, at_least=0, below=1)
    every: int = setting(0, at_least=0)
    early: int = setting(10, at_least=0)
    networks: int = setting(2, at_least=1)
    warmup: int = setting(1, at_least=0)
    alpha: float = setting(0.01, above=0)
    steps: int = setting(1, at_least=1)
    decay: float = setting(0.0, at_least=0, below=1)
    sign: int = setting(1, one_of=(1, -1))
    chunk_size: int = setting(0, at_least=0)
    memory_budget: int = setting(DEFAULT_MEMORY_BUDGET, at_least=1)

    def check(self) -> None:
        """Rules over several fields, and the two forms of ``held_out``."""
        super().check()
        self.require(self.explicit or self.implicit, "explicit or implicit (or both) switched on", "neither")
        expected = "held_out as a share in (0, 0.5] or a whole number per class"
        self.require(valid_size(self.held_out), expected, self.held_out)
        self.require(self.saturate <= self.ess, f"saturate of at most ess ({self.ess})", self.saturate)
