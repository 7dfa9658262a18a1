"""attach("check"): runs a loop with no method's decisions, and tells whether it uses the hook as a method needs it.

Every weight is exactly 1 and every sample keeps its label, so the loop's results are those of the baseline. Wrong
indices and labels raise their named error where they occur, as with any method. What would pass in silence is counted,
and :func:`wiring_table` judges it at ``finish()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.state import SampleState
from tad_plugin.errors import WiringError

__all__ = ["Finding", "WiringCheck", "check_wiring", "wiring_table"]

_DRAWS = ("sample", "pool", "pools", "class_indices", "class_sampler", "batch_sampler", "drawn")
_BY_CLASS = ("sample", "pool", "pools", "class_indices", "class_sampler")
_WEIGHTS = ("weights", "reweight", "weighted_loss", "matched_gradient", "loss", "criterion")
_LABELS = ("targets", "loss", "criterion", "dataset")
# A loop that matches real samples asks for one of these.
_MATCHING = ("reweight", "sample", "drawn", "pools", "matched_gradient", "class_indices")
# Batches that a loader has read ahead when a loop leaves it.
_AHEAD = 8


class WiringCheck(Callback):
    """Watches whether the matching loss contains the weights. It decides nothing.

    Attributes:
        matches: calls of ``before_update`` so far.
        without: those whose loss did not contain the weights.
        unweighted: those before which no weight was asked.
    """

    name: ClassVar[str] = "check"
    needs_graph: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.matches = self.without = self.unweighted = 0

    def on_match(self, *, state: SampleState, match: Match) -> None:
        """Differentiates the loss in the weights. The loss keeps its graph."""
        self.matches += 1
        if not len(match.indices):
            self.unweighted += 1
        elif not match.loss.requires_grad:
            self.without += 1
        else:
            (found,) = torch.autograd.grad(match.loss, match.weights, retain_graph=True, allow_unused=True)
            self.without += found is None or not bool(found[match.indices].any())

    def on_segment(self, *, state: SampleState, segment: Segment) -> None:
        """Counts the segment."""
        self.matches += 1

    def wants_graph(self, iteration: int) -> bool:
        """Always: the check differentiates."""
        return True

    def acted(self, *, state: SampleState) -> bool:
        """The check decides nothing on purpose."""
        return True


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: what was looked at.
        found: what was seen.
        missing: what to do, or "" if all is right.
    """

    what: str
    found: str
    missing: str = ""


def _counts(usage: Usage, names: tuple[str, ...]) -> str:
    return ", ".join(f"{n} {usage.calls[n]:,}" for n in names if usage.calls[n]) or "none"


def _any(usage: Usage, names: tuple[str, ...]) -> bool:
    return any(usage.calls[n] for n in names)


def wiring_table(usage: Usage, check: WiringCheck, *, trains_on_real: bool, iteration: int) -> list[Finding]:
    """Judges the counts of a loop.

    Args:
        usage: the counts.
        check: what was seen at each match.
        trains_on_real: as attach() got it.
        iteration: updates of the synthetic set.
    """
    calls, samples, found = usage.calls, usage.samples, []

    def line(what: str, seen: str, missing: str = "") -> None:
        found.append(Finding(what, seen, missing))

    indexed = ("dataset", "loader")
    segments = bool(calls["begin_segment"] or calls["before_segment_update"])
    drawn = _any(usage, (*_DRAWS, *indexed, "weights", "targets", "loss")) or segments
    line(
        "which samples",
        _counts(usage, (*_DRAWS, *indexed)),
        "" if drawn else "Draw with hook.sample(c, n, generator), or wrap the data: hook.dataset(train_set)",
    )
    labels = _any(usage, (*_LABELS, *_BY_CLASS, "weighted_loss")) or segments
    line(
        "labels follow the hook",
        _counts(usage, (*_LABELS, *_BY_CLASS)),
        "" if labels else "Train on hook.targets(idx), or draw by class with hook.sample(c, ...): a method may relabel",
    )
    early = calls["pools"] + calls["pool"]
    others = ("sample", "class_indices", "class_sampler", "batch_sampler", *indexed)
    if early and iteration > 1 and not (usage.late_pools or _any(usage, others)):
        do = "Ask hook.pools() in each iteration, or use hook.class_indices(c)"
        line("pools of today", f"{early:,} calls before the first update, none after it", do)
    weighted = _any(usage, _WEIGHTS)
    if not segments or weighted:
        asks = "Weight each real sample: hook.loss(logits, labels, idx), hook.reweight(rows, idx) or hook.weights(idx)"
        line("weights asked", _counts(usage, _WEIGHTS), "" if weighted else asks)
    if usage.watched or check.without:
        # A loop may also compute a loss to look at it.
        use = (
            ""
            if 10 * usage.used >= 9 * usage.watched
            else "Use what the hook returned in the loss on which backward() is called"
        )
        line("weights reach a loss", f"{usage.used:,} of {usage.watched:,}", use)
    for given, asked, handle in (("dataset reads", "loss", "hook.loss"), ("loader", "criterion", "the criterion")):
        read, seen = samples[given], samples[asked]
        if read and not seen and calls["weights"]:
            seen = samples["weights"]
        if read:
            whole = read - seen <= _AHEAD * max(1, usage.largest)
            do = f"Pass every batch to {handle} with its indices"
            line("every batch announced", f"{min(seen, read):,} of {read:,} samples", "" if whole and seen else do)
    matching = _any(usage, _MATCHING) and not (segments or trains_on_real)
    if check.matches or matching:
        do = "" if check.matches else "Call hook.before_update(loss, synthetic, network, labels=...) before backward()"
        line("before_update", f"{check.matches:,} calls", do)
    if check.without or check.unweighted:
        do = "Pass the loss that contains what hook.reweight(rows, idx) or hook.weights(idx) returned, with its graph"
        line("its loss contains the weights", f"not in {check.without + check.unweighted:,} of {check.matches:,}", do)
    if trains_on_real:
        ends = calls["epoch_end"]
        line("epoch_end", f"{ends:,} calls", "" if ends else "Call hook.epoch_end(network) after each epoch")
        trained = _any(usage, ("loss", "criterion"))
        do = "" if trained else "Train it with hook.loss(logits, labels, idx), or with hook.loader and hook.criterion"
        line("network trained through the hook", _counts(usage, ("loss", "criterion")), do)
    return found


def check_wiring(usage: Usage, check: WiringCheck, *, trains_on_real: bool, iteration: int) -> None:
    """Prints the table. Raises WiringError if something is missing."""
    found = wiring_table(usage, check, trains_on_real=trains_on_real, iteration=iteration)
    wide, middle = (max(len(getattr(f, name)) for f in found) for name in ("what", "found"))
    lines = [f"  {f.what:<{wide}}  {f.found:<{middle}}  {'MISSING' if f.missing else 'ok'}" for f in found]
    print("\n".join(["tad_plugin: wiring check", *lines]))
    missing = [f"{f.what}: {f.found}. {f.missing}." for f in found if f.missing]
    if missing:
        raise WiringError("The wiring check found:\n  " + "\n  ".join(missing))
