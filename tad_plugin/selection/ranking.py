"""What the rivals share: a network trained on the observed labels, and keeping each class's best-ranked samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.scorer import Scorer, ScorerConfig, score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain

__all__ = ["check_share", "keep_lowest", "mean_losses", "train_logits"]


def check_share(name: str, value: float) -> None:
    """Raises ConfigError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ConfigError(explain(f"{name} in (0, 1]", str(value), "Give the share of samples to keep"))


def keep_lowest(scores: Tensor, labels: Tensor, num_classes: int, share: float, minimum: int = 1) -> Tensor:
    """Bool [N]: in each class the ``share`` of samples with the lowest score, at least ``minimum`` of them.

    Args:
        scores: float [N].
        labels: int64 [N].
        num_classes: K.
        share: in (0, 1].
        minimum: samples kept in each class where there are that many.
    """
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for c in range(num_classes):
        members = (labels == c).nonzero().flatten()
        count = min(len(members), max(minimum, round(share * len(members))))
        kept[members[scores[members].argsort(stable=True)[:count]]] = True
    return kept


def train_logits(
    data: RealData, config: ScorerConfig, *, seed: int, on: Tensor | None = None, average_last: int = 1
) -> list[Tensor]:
    """Trains one network on the observed labels and returns its logits on all of ``data``.

    Args:
        data: the real data.
        config: the scorer's settings; all of ``config.epochs`` are run.
        seed: of the network and its batches.
        on: int64 indices to train on; None trains on everything.
        average_last: from how many of the last epochs logits are returned.

    Returns:
        ``average_last`` tensors float32 [N,K], one for each of the last epochs.
    """
    training = data if on is None else data.subset(on)
    # A fold may lose a small class altogether.
    state = SampleState.of(training, allow_empty=True)
    scorer = Scorer(training, config, seed=seed)
    kept: list[Tensor] = []
    for epoch in range(config.epochs):
        scorer.run_epoch(state, CallbackList())
        if epoch >= config.epochs - average_last:
            kept.append(score_all(scorer.network, data).logits)
    return kept


def mean_losses(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy float32 [N] of each sample against ``labels``, averaged over the given logits."""
    return torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits]).mean(0)
