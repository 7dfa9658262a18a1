"""Quality of a division and of influences, where the true labels are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.observer import Observer, StateView
from tad_plugin.data.real import RealData

__all__ = [
    "InfluenceDiagnostics",
    "SplitDiagnostics",
    "area_under_roc",
    "average_precision",
    "influence_quality",
    "split_quality",
]


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]; ties count half. NaN if one of the two groups is empty. O(N log N).

    Args:
        score: float [N], higher means more positive.
        positive: bool [N].
    """
    from scipy.stats import rankdata

    hit = positive.detach().cpu().bool()
    n_pos, n_neg = int(hit.sum()), int((~hit).sum())
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    ranks = torch.from_numpy(rankdata(score.detach().cpu().double().numpy()))
    return float((ranks[hit].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Computes the average precision of a ranking by falling score; ties by index. [standard]

    Args:
        score: float [N].
        positive: bool [N], what the ranking is to find.

    Returns:
        In [0, 1]; 0 without a positive.
    """
    hit = positive[score.argsort(descending=True, stable=True)].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1, device=hit.device)
    return float((precision * hit).sum() / hit.sum().clamp_min(1))


def split_quality(observed: Tensor, target: Tensor, trusted: Tensor, trust: Tensor, true: Tensor) -> dict[str, float]:
    """Quality of a division, as shares in [0, 1]; all arguments [N].

    Returns:
        precision: share of trusted samples whose target is the true label.
        recall: share of correctly labelled samples that are trusted with their true label.
        auc: of ``trust`` for "the observed label is the true one"; NaN if all samples have the same trust.
        relabel_accuracy: share of relabelled trusted samples whose new target is true; NaN if there is none.
        relabelled: number of relabelled trusted samples.
    """
    right = target == true
    clean = observed == true
    moved = trusted & (target != observed)

    def share(hit: Tensor, among: Tensor) -> float:
        return float((hit & among).sum() / among.sum()) if bool(among.any()) else float("nan")

    return {
        "precision": share(right, trusted),
        "recall": share(trusted & right, clean),
        "auc": area_under_roc(trust, clean) if bool((trust != trust[:1]).any()) else float("nan"),
        "relabel_accuracy": share(right, moved),
        "relabelled": float(moved.sum()),
    }


def influence_quality(
    target: Tensor, influence: Tensor, count: Tensor, usable: Tensor, true: Tensor, weight: Tensor
) -> dict[str, float]:
    """How well influences rank correctly labelled samples before mislabelled ones; all arguments [N].

    Returns:
        auc: of ``-influence`` for "the target is the true label", over scored usable samples. NaN if only right or
            only wrong targets are among them.
        clean_weight: share of these samples' weight that falls on correctly labelled ones.
    """
    inside = usable & (count > 0)
    clean = (target == true)[inside]
    mass = weight[inside].double()
    share = float(mass[clean].sum() / mass.sum()) if bool(mass.sum() > 0) else float("nan")
    return {"auc": area_under_roc(-influence[inside], clean), "clean_weight": share}


class InfluenceDiagnostics(Observer):
    """Logs :func:`influence_quality` after each refresh of influences; keeps the last result in ``last``."""

    def __init__(self) -> None:
        self.last: dict[str, float] | None = None

    def on_refresh(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """See :class:`Observer`."""
        if data.true_labels is None or not state.has("influence"):
            return None
        names = ("target", "influence", "influence_count", "trusted")
        target, influence, count, trusted = (state[n] for n in names)
        self.last = influence_quality(target, influence, count, trusted, data.true_labels, state["weight"])
        return {"event": "influence_quality", **self.last}


class SplitDiagnostics(Observer):
    """Logs :func:`split_quality` after each scorer epoch; keeps the last result in ``last``."""

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
