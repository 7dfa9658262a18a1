"""Training a network on the observed labels, and keeping the best-ranked samples of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.distributed import ranks
from tad_plugin.core.scorer import Scorer, ScorerConfig, score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.data.splits import rank_in_class

__all__ = ["keep_lowest", "mean_losses", "train_logits"]


def keep_lowest(scores: Tensor, labels: Tensor, num_classes: int, share: float, minimum: int = 1) -> Tensor:
    """Selects the ``share`` of each class with the lowest scores.

    Args:
        scores: float [N].
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        share: in (0, 1].
        minimum: fewest samples kept in each class, as far as it reaches.

    Returns:
        Bool [N]. Ties are broken by index.
    """
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    quota = torch.tensor([max(minimum, round(share * count)) for count in counts], device=labels.device)
    return rank_in_class(scores, labels, num_classes) < quota[labels]


def train_logits(
    data: RealData, config: ScorerConfig, *, seed: int, on: Tensor | None = None, average_last: int = 1
) -> list[Tensor]:
    """Trains one network on the observed labels and returns its logits on all of ``data``.

    Args:
        data: the real data.
        config: settings of the scorer; runs ``config.epochs`` epochs.
        seed: of the network and its batches.
        on: int64 indices to train on; None trains on everything.
        average_last: number of last epochs whose logits are returned.

    Returns:
        ``average_last`` tensors float32 [N, K], in the order of the epochs.
    """
    training = data if on is None else data.subset(on)
    # A cross-validation fold may have no sample of a small class.
    state = SampleState.of(training, allow_empty=True)
    scorer = Scorer(training, config, seed=seed)
    kept: list[Tensor] = []
    for epoch in range(config.epochs):
        scorer.run_epoch(state, CallbackList())
        if epoch >= config.epochs - average_last:
            kept.append(score_all(scorer.network, data, ranks()).logits)
    return kept


def mean_losses(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Computes the cross-entropy of each sample, float32 [N], averaged over the given logits.

    Args:
        logits: tensors float32 [N, K], one per epoch.
        labels: int64 [N] in [0, K).
    """
    return torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits]).mean(0)
