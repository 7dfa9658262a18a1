"""Real training data: what is refused, and batches."""

from __future__ import annotations

import pytest
import torch

from tad_plugin.data.real import RealData
from tad_plugin.errors import InvalidInputError

IMAGES, LABELS = torch.arange(24.0).view(6, 1, 2, 2), torch.arange(6) % 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_named(bad: float) -> None:
    images = IMAGES.clone()
    images[4, 0, 1, 0] = bad
    with pytest.raises(InvalidInputError, match="image 4"):
        RealData(images, LABELS, 3)


def test_batches_and_subsets_keep_images_and_labels_together() -> None:
    data = RealData(IMAGES, LABELS, 3, true_labels=LABELS.flip(0))
    batches = list(data.batches(4))
    assert [len(i) for i, _ in batches] == [4, 2] and torch.equal(torch.cat([x for _, x in batches]), IMAGES)
    part = data.subset(torch.tensor([5, 0]))
    assert torch.equal(part.images[:], IMAGES[[5, 0]]) and part.labels.tolist() == [2, 0]
    assert part.true_labels is not None and part.true_labels.tolist() == [0, 2]
    assert len(RealData(torch.zeros(6, 0), LABELS, 3)) == 6  # labels only
