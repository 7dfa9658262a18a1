"""How good a division is where the true labels are known: an observer that only reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tad_plugin.callback import Observer, StateView
from tad_plugin.scorer import RealData

__all__ = ["SplitDiagnostics", "area_under_roc", "split_quality"]


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of ``score`` (float [N], higher = more positive) for ``positive`` (bool [N]); ties count half.

    NaN where one of the two groups is empty. O(N log N).
    """
    from scipy.stats import rankdata

    hit = positive.detach().cpu().bool()
    n_pos, n_neg = int(hit.sum()), int((~hit).sum())
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    ranks = torch.from_numpy(rankdata(score.detach().cpu().double().numpy()))
    return float((ranks[hit].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def split_quality(observed: Tensor, target: Tensor, trusted: Tensor, trust: Tensor, true: Tensor) -> dict[str, float]:
    """Quality of a division, as shares in [0, 1]; all arguments [N].

    Returns:
        precision: share of trusted samples whose target is the true label.
        recall: share of correctly labelled samples that are trusted with their true label.
        auc: of ``trust`` for "the observed label is the true one".
        relabel_accuracy: share of relabelled trusted samples whose new target is true; NaN if there is none.
        relabelled: how many there are.
    """
    right = target == true
    clean = observed == true
    moved = trusted & (target != observed)

    def share(hit: Tensor, among: Tensor) -> float:
        return float((hit & among).sum() / among.sum()) if bool(among.any()) else float("nan")

    return {
        "precision": share(right, trusted),
        "recall": share(trusted & right, clean),
        "auc": area_under_roc(trust, clean),
        "relabel_accuracy": share(right, moved),
        "relabelled": float(moved.sum()),
    }


class SplitDiagnostics(Observer):
    """Logs :func:`split_quality` after each scorer epoch; keeps the last one in ``last``."""

    def __init__(self) -> None:
        self.last: dict[str, float] | None = None

    def on_scorer_epoch(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """See :class:`Observer`."""
        if data.true_labels is None:
            return None
        self.last = split_quality(
            state["observed"], state["target"], state["trusted"], state["trust"], data.true_labels
        )
        return {"event": "split", **self.last}
