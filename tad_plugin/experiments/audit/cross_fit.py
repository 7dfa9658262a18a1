"""Cross-fitted predictions: each sample is predicted by networks that did not train on it. [standard]"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.core.scorer import ScorerConfig, train_logits
from tad_plugin.data.real import RealData
from tad_plugin.data.splits import dealt_evenly
from tad_plugin.errors import NotEnoughSamplesError, explain
from tad_plugin.utils.seeds import derived_seed, generator_of

__all__ = ["Part", "cross_fit", "draw_folds", "predict_fold"]


@dataclass(frozen=True)
class Part:
    """One training of a cross-fit.

    Attributes:
        round: from 0; later rounds train without the suspects of the round before.
        network: number of the network of this fold.
        fold: the fold that is held out and predicted.
    """

    round: int
    network: int
    fold: int

    def __str__(self) -> str:
        return f"round{self.round}-network{self.network}-fold{self.fold}"


def draw_folds(labels: Tensor, num_classes: int, folds: int, seed: int) -> Tensor:
    """Deals the samples of each class evenly into folds.

    Args:
        labels: int64 [N], observed labels.
        num_classes: K.
        folds: number of folds, at least 2.
        seed: of the draw.

    Returns:
        int64 [N] in [0, folds).

    Raises:
        NotEnoughSamplesError: a class has fewer samples than there are folds.
    """
    smallest = int(torch.bincount(labels, minlength=num_classes).min())
    if smallest < folds:
        do = "Lower --folds, or add images to the class"
        raise NotEnoughSamplesError(explain(f"at least {folds} samples in each class", str(smallest), do))
    return dealt_evenly(labels, num_classes, folds, generator_of(seed, "audit", "folds"))


def predict_fold(data: RealData, used: Tensor, config: ScorerConfig, *, last: int, seed: int) -> Tensor:
    """Trains one network on the samples ``used`` and predicts all samples.

    Args:
        data: the real data with observed labels.
        used: bool [N], the samples that are trained on.
        config: settings of the network.
        last: number of last epochs whose probabilities are averaged.
        seed: of the network, its batches and augmentation.

    Returns:
        float32 [N, K], probabilities.
    """
    logits = train_logits(data, config, seed=seed, on=used.nonzero().flatten(), average_last=last)
    total = torch.zeros_like(logits[0])
    for each in logits:
        total += each.softmax(1) / len(logits)
    return total


def cross_fit(
    data: RealData,
    folds: Tensor,
    config: ScorerConfig,
    *,
    round: int,
    networks: int,
    seed: int,
    usable: Tensor,
    once: Callable[[Part, Callable[[], Tensor]], Tensor],
) -> Tensor:
    """Predicts every sample by networks that were trained on the other folds.

    Args:
        data: the real data with observed labels.
        folds: int64 [N], from :func:`draw_folds`.
        config: settings of the networks.
        round: number of the round, for the seeds.
        networks: networks per fold, whose probabilities are averaged.
        seed: of everything.
        usable: bool [N], the samples that may be trained on.
        once: gives the predictions of a part, from a file if that part is finished.

    Returns:
        float32 [N, K], probabilities.
    """
    total = torch.zeros(len(data), data.num_classes, device=data.labels.device)
    last = max(1, config.epochs // 4)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        for network in range(networks):
            part = Part(round, network, fold)
            own = derived_seed(seed, "audit", round, network, fold) % 2**31
            used = ~held & usable

            def train(used: Tensor = used, own: int = own, held: Tensor = held) -> Tensor:
                return predict_fold(data, used, config, last=last, seed=own)[held]

            total[held] += once(part, train).to(total.device) / networks
    return total
