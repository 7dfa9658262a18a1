"""Losses of samples, and keeping the best-ranked samples of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.data.splits import rank_in_class

__all__ = ["keep_lowest", "mean_losses"]


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


def mean_losses(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Computes the cross-entropy of each sample, float32 [N], averaged over the given logits.

    Args:
        logits: tensors float32 [N, K], one per epoch.
        labels: int64 [N] in [0, K).
    """
    return torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits]).mean(0)
