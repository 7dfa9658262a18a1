"""Ranking samples, and the networks whose outputs rank them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tad_plugin.core.scorer import ScorerConfig, train_logits
from tad_plugin.data.real import RealData
from tad_plugin.selection.ranking import keep_lowest, mean_losses
from tests.problems import blobs

SMALL = ScorerConfig(width=4, epochs=3, batch_size=16)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("minimum", [1, 4, 100])
def test_the_lowest_of_each_class_are_kept_as_by_a_sort(share: float, minimum: int) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (50,), generator=generator)
    scores = torch.randint(0, 9, (50,), generator=generator).float()  # with ties
    kept = keep_lowest(scores, labels, 4, share, minimum)
    for c in range(4):
        members = [i for i in range(50) if labels[i] == c]
        members.sort(key=lambda i: float(scores[i]))
        count = min(len(members), max(minimum, round(share * len(members))))
        assert {i for i in members if kept[i]} == set(members[:count])


def test_a_class_without_samples_keeps_none() -> None:
    assert keep_lowest(torch.zeros(2), torch.tensor([0, 2]), 3, 0.5).tolist() == [True, True]


def test_losses_are_averaged_over_the_last_epochs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    labels = torch.tensor([0, 1, 2, 0, 1])
    for i, found in enumerate(mean_losses(logits, labels)):
        expected = sum(float(F.cross_entropy(z[i], labels[i])) for z in logits) / 2
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_training_on_a_part_does_not_see_the_rest(global_rng_untouched: None) -> None:
    images, labels = blobs()
    part = torch.arange(40)
    found = []
    for observed in (labels, torch.where(torch.arange(60) < 40, labels, (labels + 1) % 3)):
        logits = train_logits(RealData(images, observed, 3), SMALL, seed=1, on=part, average_last=2)
        assert len(logits) == 2 and logits[0].shape == (60, 3) and not torch.equal(*logits)
        found.append(logits[-1])
    assert torch.equal(*found)


def test_a_part_may_lack_a_class() -> None:
    images, labels = blobs()
    on = (labels != 2).nonzero().flatten()
    assert torch.isfinite(train_logits(RealData(images, labels, 3), SMALL, seed=0, on=on)[0]).all()
