"""The division against a plain loop, and its rules one by one."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, NonFiniteError, UnimodalClassWarning
from tad_plugin.tad.mixture import fit_class_mixture
from tad_plugin.tad.threshold import divide


def noisy(sizes, seed=0, shares=None):
    """Losses and labels of classes with a low group of the given share (1: one group)."""
    rng = np.random.default_rng(seed)
    losses, labels = [], []
    for c, n in enumerate(sizes):
        low = rng.random(n) < (0.6 if shares is None else shares[c])
        losses.append(np.where(low, np.abs(rng.normal(0.5, 0.2, n)), rng.normal(5, 0.5, n)))
        labels.append(np.full(n, c))
    order = rng.permutation(sum(sizes))
    return torch.tensor(np.concatenate(losses)[order], dtype=torch.float32), torch.tensor(np.concatenate(labels)[order])


def by_loop(losses, labels, mixture, classes, threshold, smallest):
    """The rules of the division, sample by sample."""
    trust = mixture.posterior(losses, labels, monotone=True)
    trusted = trust > threshold
    shares = [
        float(trusted[labels == c].double().mean())
        for c in range(classes)
        if (labels == c).any() and not mixture.unimodal[c]
    ]
    for c in range(classes):
        members = sorted((labels == c).nonzero().flatten().tolist(), key=lambda i: float(losses[i]))
        if members and mixture.unimodal[c]:
            keep = round((float(np.median(shares)) if shares else 1.0) * len(members))
            for position, i in enumerate(members):
                trusted[i] = position < keep
        for i in members:
            if int(trusted[labels == c].sum()) >= smallest:
                break
            trusted[i] = True
    return trusted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("threshold", "smallest"), [(0.5, 1), (0.9, 30), (0.2, 5)])
def test_equals_the_loop(seed, threshold, smallest):
    losses, labels = noisy([120, 80, 3, 60, 0, 25], seed, [0.6, 0.3, 0.5, 1.0, 0.5, 0.9])
    mixture = fit_class_mixture(losses, labels, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnimodalClassWarning)
        division = divide(losses, labels, mixture, 6, threshold=threshold, min_per_class=smallest)
    expected = by_loop(losses, labels, mixture, 6, threshold, smallest)
    assert torch.equal(division.trusted, expected)
    for c in (0, 1, 2, 3, 5):
        assert float(division.kept_share[c]) == pytest.approx(float(expected[labels == c].double().mean()))
    assert float(division.kept_share[4]) == 0 and not bool(division.replaced[4])
    assert torch.equal(division.replaced, mixture.unimodal & (mixture.counts > 0))


def test_two_groups_are_told_apart_without_a_warning():
    losses, labels = noisy([200, 200])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        division = divide(losses, labels, fit_class_mixture(losses, labels, 2), 2)
    assert torch.equal(division.trusted, losses < 2.5)


def test_a_unimodal_class_keeps_the_median_share_of_the_others():
    losses, labels = noisy([200, 200, 200, 100], shares=[0.5, 0.6, 0.7, 1.0])
    mixture = fit_class_mixture(losses, labels, 4)
    with pytest.warns(UnimodalClassWarning, match=f"class 3 .*{float(mixture.separation[3]):.2f}"):
        division = divide(losses, labels, mixture, 4)
    assert division.replaced.tolist() == [False, False, False, True]
    assert float(division.kept_share[3]) == pytest.approx(float(division.kept_share[:3].median()), abs=0.01)
    own = labels == 3
    assert float(losses[own & division.trusted].max()) <= float(losses[own & ~division.trusted].min())


def test_the_median_of_an_even_number_is_between_the_middle_two():
    losses, labels = noisy([200, 200, 200], shares=[0.4, 0.8, 1.0])
    mixture = fit_class_mixture(losses, labels, 3)
    with pytest.warns(UnimodalClassWarning, match="class 2"):
        division = divide(losses, labels, mixture, 3)
    assert float(division.kept_share[2]) == pytest.approx(float(division.kept_share[:2].mean()), abs=0.01)


def test_no_evidence_of_noise_trusts_everything():
    losses, labels = noisy([50, 50], shares=[1.0, 1.0])
    with pytest.warns(UnimodalClassWarning, match="class 0 .*class 1") as warned:
        division = divide(losses, labels, fit_class_mixture(losses, labels, 2), 2)
    assert bool(division.trusted.all()) and division.kept_share.tolist() == [1, 1]
    assert [w.filename for w in warned] == [__file__]  # shown at the line that called it


def test_many_unimodal_classes_are_counted_not_all_named():
    losses, labels = noisy([30] * 14, shares=[1.0] * 14)
    with pytest.warns(UnimodalClassWarning, match=r"class 9 .*\b4 more"):
        divide(losses, labels, fit_class_mixture(losses, labels, 14), 14)


def test_a_class_is_filled_up_by_lowest_loss_as_far_as_it_reaches():
    losses, labels = noisy([100, 20], shares=[0.2, 0.5])
    mixture = fit_class_mixture(losses, labels, 2)
    division = divide(losses, labels, mixture, 2, min_per_class=40)
    assert torch.bincount(labels[division.trusted], minlength=2).tolist() == [40, 20]
    own = labels == 0
    assert float(losses[own & division.trusted].max()) <= float(losses[own & ~division.trusted].min())


def test_the_literal_posterior_on_request():
    generator = torch.Generator().manual_seed(1)
    narrow, wide = 1 + 0.02 * torch.randn(300, generator=generator), 4 + torch.randn(200, generator=generator)
    losses, labels = torch.cat([narrow, wide, torch.zeros(1)]), torch.zeros(501, dtype=torch.int64)
    mixture = fit_class_mixture(losses, labels, 1)
    assert bool(divide(losses, labels, mixture, 1).trusted[-1])
    literal = divide(losses, labels, mixture, 1, monotone=False)
    assert torch.equal(literal.trusted, mixture.trust > 0.5) and not bool(literal.trusted[-1])


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"threshold": -0.1}, {"min_per_class": -1}])
def test_bad_options(options):
    losses, labels = noisy([20])
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        divide(losses, labels, fit_class_mixture(losses, labels, 1), 1, **options)


def test_bad_data():
    losses, labels = noisy([20, 20])
    mixture = fit_class_mixture(losses, labels, 2)
    with pytest.raises(InvalidInputError, match="39 losses.* 40"):
        divide(losses[:-1], labels[:-1], mixture, 2)
    with pytest.raises(InvalidInputError, match="labels"):
        divide(losses, torch.zeros_like(labels), mixture, 2)
    with pytest.raises(InvalidLabelsError):
        divide(losses, labels + 1, mixture, 2)
    losses[2] = math.nan
    with pytest.raises(NonFiniteError, match="1 of 40.* 2"):
        divide(losses, labels, mixture, 2)
