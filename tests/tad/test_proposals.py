"""Geometry against scipy and scikit-learn; proposals, scores and degenerate classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.special import log_softmax
from sklearn.covariance import LedoitWolf
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, NonFiniteError, NotEnoughSamplesError
from tad_plugin.tad.feature_model import fit_features
from tad_plugin.tad.geometry import class_anchors, cosine, ledoit_wolf, mahalanobis, principal_axes
from tad_plugin.tad.proposals import fit_temperature, propose, reliability, reliability_score


def clusters(classes=4, each=40, dims=6, gap=4.0, seed=0, dtype=torch.float32):
    """Features around one centre per class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = gap * torch.randn(classes, dims, generator=generator, dtype=torch.float64)
    targets = torch.arange(classes).repeat(each)
    features = centres[targets] + torch.randn(len(targets), dims, generator=generator, dtype=torch.float64)
    return features.to(dtype), targets


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "dims"), [(200, 7), (10, 30), (5000, 3), (9000, 1)])
def test_ledoit_wolf_equals_scikit_learn(rows, dims, seed):
    rng = np.random.default_rng(seed)
    residuals = rng.normal(size=(rows, dims)) @ rng.normal(size=(dims, dims))
    covariance, shrinkage = ledoit_wolf(torch.from_numpy(residuals))
    expected, amount = sklearn_ledoit_wolf(residuals, assume_centered=True)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-12)
    assert float(shrinkage) == pytest.approx(amount, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(
        covariance, LedoitWolf(assume_centered=True).fit(residuals).covariance_, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mahalanobis_equals_scipy(offset):
    rng = np.random.default_rng(0)
    features, anchors = rng.normal(size=(30, 5)) + offset, rng.normal(size=(4, 5)) + offset
    root = rng.normal(size=(5, 5))
    covariance = root @ root.T + 0.1 * np.eye(5)
    ours = mahalanobis(
        torch.from_numpy(features), torch.from_numpy(anchors), torch.linalg.cholesky(torch.from_numpy(covariance))
    )
    inverse = np.linalg.inv(covariance)
    expected = [[scipy_mahalanobis(z, a, inverse) for a in anchors] for z in features]
    np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_cosine_equals_scikit_learn_and_zero_rows_give_zero():
    rng = np.random.default_rng(0)
    features, anchors = rng.normal(size=(30, 5)), rng.normal(size=(4, 5))
    features[3], anchors[1] = 0, 0
    ours = cosine(torch.from_numpy(features), torch.from_numpy(anchors))
    np.testing.assert_allclose(ours, cosine_similarity(features, anchors), atol=1e-12)


@pytest.mark.parametrize(("rows", "dims", "kept"), [(100, 8, 3), (6, 20, 4), (6, 20, 10)])
def test_principal_axes_equal_scikit_learn(rows, dims, kept):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, dims)) * np.linspace(5, 0.5, dims)
    axes = principal_axes(torch.from_numpy(x), kept).numpy()
    np.testing.assert_allclose(axes.T @ axes, np.eye(kept), atol=1e-10)
    known = min(kept, rows - 1)
    expected = PCA(known).fit(x).components_
    np.testing.assert_allclose(np.abs((expected * axes.T[:known]).sum(1)), 1, atol=1e-6)


def test_principal_axes_of_many_rows_use_an_even_share_of_them():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0])
    all_rows, some = principal_axes(x, 2), principal_axes(x, 2, limit=500)
    assert bool(((all_rows * some).sum(0).abs() > 0.98).all())
    for arguments in ({"dimensions": 6}, {"dimensions": 0}, {"dimensions": 2, "limit": 1}):
        with pytest.raises(InvalidInputError, match="dimensions"):
            principal_axes(x, **arguments)
    with pytest.raises(NotEnoughSamplesError, match="got 1"):
        principal_axes(x[:1], 2)


def test_few_wide_rows_take_no_square_matrix():
    """6 rows of 60,000 dimensions: a D x D matrix would take 27 GiB."""
    x = torch.randn(6, 60_000, generator=torch.Generator().manual_seed(0))
    axes = principal_axes(x, 8)
    assert axes.shape == (60_000, 8)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8, dtype=axes.dtype), atol=1e-9, rtol=0)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(centred @ axes[:, :5] @ axes[:, :5].T, centred, atol=1e-6, rtol=1e-6)


def test_anchors_equal_a_loop():
    features, targets = clusters()
    trusted = torch.rand(len(targets), generator=torch.Generator().manual_seed(1)) < 0.6
    means, counts = class_anchors(features, targets, trusted & (targets != 2), 5)
    for c in (0, 1, 3):
        rows = trusted & (targets == c)
        torch.testing.assert_close(means[c], features[rows].double().mean(0))
        assert int(counts[c]) == int(rows.sum())
    assert counts[[2, 4]].tolist() == [0, 0] and not bool(means[[2, 4]].any())


def test_proposal_and_score_equal_a_loop():
    features, targets = clusters(gap=1.0)
    generator = torch.Generator().manual_seed(2)
    trusted = torch.rand(len(targets), generator=generator) < 0.5
    logits = torch.randn(len(targets), 4, generator=generator) + 2 * torch.nn.functional.one_hot(targets, 4)
    result = reliability(features, targets, trusted, logits, 4, temperature=3.0)
    anchors = class_anchors(features, targets, trusted, 4).means.numpy()
    z = features.double().numpy()
    residuals = z[trusted] - anchors[targets[trusted].numpy()]
    inverse = np.linalg.inv(sklearn_ledoit_wolf(residuals, assume_centered=True)[0])
    # Any root of the inverse covariance gives the same angles.
    root, middle = np.linalg.cholesky(inverse), anchors.mean(0)
    made = 0
    for i in range(len(z)):
        d = np.array([scipy_mahalanobis(z[i], a, inverse) for a in anchors])
        c = cosine_similarity((z[i : i + 1] - middle) @ root, (anchors - middle) @ root)[0]
        np.testing.assert_allclose(result.distance[i], d, rtol=1e-5)
        np.testing.assert_allclose(result.cosine[i], c, atol=1e-6)
        k = int(d.argmin())
        if not trusted[i] and k == int(c.argmax()) == int(logits[i].argmax()):
            made += 1
            score = np.exp(log_softmax(-(d**2) / 6))[k] * (1 + c[k]) / 2
            assert int(result.proposal[i]) == k
            assert float(result.score[i]) == pytest.approx(score, rel=1e-4)
        else:
            assert int(result.proposal[i]) == -1 and float(result.score[i]) == 0
    assert 10 < made < int((~trusted).sum())


def test_labels_or_logits_and_untouched_targets_of_untrusted_samples():
    features, targets = clusters(gap=1.0)
    trusted = torch.arange(len(targets)) % 3 > 0
    logits = torch.nn.functional.one_hot(targets, 4).float()
    first = reliability(features, targets, trusted, logits, 4)
    second = reliability(features, torch.where(trusted, targets, 0), trusted, targets, 4)
    assert torch.equal(first.proposal, second.proposal) and torch.equal(first.score, second.score)
    assert first.temperature == second.temperature


def test_wide_features_are_projected():
    features, targets = clusters(dims=20)
    trusted = torch.arange(len(targets)) % 3 > 0
    axes = principal_axes(features[trusted], 5)
    wide = reliability(features, targets, trusted, targets, 4, max_dim=5, temperature=1.0)
    given = reliability(features, targets, trusted, targets, 4, axes=axes, temperature=1.0)
    narrow = reliability(features @ axes.float(), targets, trusted, targets, 4, temperature=1.0)
    torch.testing.assert_close(wide.distance, narrow.distance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide.distance, given.distance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide.cosine, narrow.cosine, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide.cosine, given.cosine, rtol=1e-3, atol=1e-3)


def test_a_common_offset_does_not_blind_the_cosine():
    """Features behind a ReLU share a large mean, in which plain cosines are all near 1."""
    features, targets = clusters(gap=2.0)
    trusted = torch.arange(len(targets)) % 3 > 0
    near, far = (reliability(features + offset, targets, trusted, targets, 4) for offset in (0.0, 50.0))
    torch.testing.assert_close(near.cosine, far.cosine, rtol=1e-3, atol=1e-3)
    plain = cosine(features + 50.0, class_anchors(features + 50.0, targets, trusted, 4).means)
    assert float(plain.min()) > 0.98
    assert float((near.cosine.argmax(1) == targets).float().mean()) > 0.85


def test_temperature_has_the_greatest_likelihood():
    rng = np.random.default_rng(0)
    distance = np.sqrt(rng.chisquare(60, size=(400, 5)))
    targets = rng.integers(0, 5, 400)
    distance[np.arange(400), targets] *= 0.97

    def loss(log_temperature):
        logits = -(distance**2) / (2 * math.exp(log_temperature))
        return -log_softmax(logits, axis=1)[np.arange(400), targets].mean()

    best = math.exp(minimize_scalar(loss, bounds=(0, 10), method="bounded").x)
    ours = fit_temperature(torch.from_numpy(distance), torch.from_numpy(targets))
    assert best > 2 and ours == pytest.approx(best, rel=1e-3)


def test_temperature_stays_between_its_bounds():
    separated = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert fit_temperature(separated, torch.tensor([0, 1])) == 1
    assert fit_temperature(separated, torch.tensor([1, 0])) == 1e6
    assert fit_temperature(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)) == 1
    # A sample whose class has no anchor says nothing, and a class without an anchor takes no share.
    gone = torch.tensor([[1.0, 1.2, math.inf], [1.2, 1.0, math.inf], [1.0, 1.2, math.inf], [1.0, 2.0, math.inf]])
    kept = gone[:3, :2]
    assert fit_temperature(gone, torch.tensor([0, 1, 1, 2])) == fit_temperature(kept, torch.tensor([0, 1, 1]))


def test_the_fitted_temperature_leaves_each_sample_out_of_its_anchor():
    features, targets = clusters(each=5, gap=0.5, dtype=torch.float64)
    trusted = torch.ones(len(targets), dtype=torch.bool)
    model = fit_features(features, targets, trusted, 4)
    distance = []
    for i in range(len(targets)):
        others = trusted.clone()
        others[i] = False
        distance.append(
            mahalanobis(features[i : i + 1], class_anchors(features, targets, others, 4).means, model.cholesky)
        )
    expected = fit_temperature(torch.cat(distance), targets)
    assert expected > 1
    assert reliability(features, targets, trusted, targets, 4).temperature == pytest.approx(expected, rel=1e-3)


def test_a_class_with_fewer_than_two_trusted_samples_is_never_proposed():
    features, targets = clusters(gap=6.0)
    trusted = (targets < 2) & (torch.arange(len(targets)) % 2 == 0)
    trusted[targets.eq(2).nonzero()[0]] = True  # one sample of class 2, none of class 3
    result = reliability(features, targets, trusted, targets, 4)
    assert set(result.proposal.tolist()) <= {-1, 0, 1}
    assert bool(torch.isinf(result.distance[:, 2:]).all()) and bool((result.cosine[:, 2:] == -1).all())
    assert bool(torch.isfinite(result.score).all()) and bool((result.proposal[trusted] == -1).all())


@pytest.mark.parametrize("count", [0, 1])
def test_no_anchor_at_all_proposes_nothing(count):
    features, targets = clusters()
    trusted = torch.arange(len(targets)) < count
    result = reliability(features, targets, trusted, targets, 4)
    assert bool((result.proposal == -1).all()) and not bool(result.score.any()) and result.temperature == 1


def test_dead_features_do_no_harm_and_collapsed_ones_are_named():
    features, targets = clusters()
    trusted = torch.arange(len(targets)) % 2 == 0
    dead = torch.cat([features, torch.zeros(len(targets), 3)], dim=1)
    assert bool(torch.isfinite(reliability(dead, targets, trusted, targets, 4).score).all())
    with pytest.raises(InvalidInputError, match="one point per class"):
        reliability(torch.ones_like(features), targets, trusted, targets, 4)


def test_score_bounds_and_masking():
    distance = torch.tensor([[0.0, 50.0], [math.inf, math.inf], [3.0, 3.0]])
    similar = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert propose(distance, similar, torch.tensor([0, 0, 0])).tolist() == [0, -1, 0]
    score = reliability_score(distance, similar, torch.tensor([0, -1, 0]), 1.0)
    torch.testing.assert_close(score, torch.tensor([1.0, 0.0, 0.25]))
    with pytest.raises(InvalidInputError, match="temperature.* 0.0"):
        reliability_score(distance, similar, torch.tensor([0, -1, 0]), 0.0)
    with pytest.raises(InvalidInputError, match="proposal"):
        reliability_score(distance, similar, torch.tensor([0, -1]), 1.0)


def test_bad_input():
    features, targets = clusters()
    trusted = torch.ones(len(targets), dtype=torch.bool)
    bad = features.clone()
    bad[3, 1], bad[9] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match="2 of 160.* 3"):
        reliability(bad, targets, trusted, targets, 4)
    with pytest.raises(InvalidLabelsError, match="targets"):
        reliability(features, targets + 1, trusted, targets, 4)
    with pytest.raises(InvalidLabelsError, match="predictions"):
        reliability(features, targets, trusted, targets[:-1], 4)
    for change in (
        {"features": features[:, 0]},
        {"features": features.long()},
        {"trusted": trusted.long()},
        {"trusted": trusted[:-1]},
        {"predictions": torch.zeros(len(targets), 5)},
        {"max_dim": 0},
        {"temperature": 0.0},
        {"axes": torch.zeros(3, 2)},
    ):
        arguments = {
            "features": features,
            "targets": targets,
            "trusted": trusted,
            "predictions": targets,
            "num_classes": 4,
        }
        with pytest.raises(InvalidInputError):
            reliability(**(arguments | change))
        if "temperature" not in change and "predictions" not in change:
            fitted = {k: v for k, v in (arguments | change).items() if k != "predictions"}
            with pytest.raises(InvalidInputError):
                fit_features(**fitted)
    with pytest.raises(InvalidInputError, match=r"\[2, 3\]"):
        mahalanobis(features, features[:2, :3], torch.eye(6))
    with pytest.raises(InvalidInputError, match=r"\[2, 3\]"):
        cosine(features, features[:2, :3])
    with pytest.raises(InvalidInputError, match=r"\[2, 4\]"):
        propose(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 0]))
    with pytest.raises(InvalidLabelsError, match="predictions"):
        propose(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(InvalidInputError, match="distance"):
        fit_temperature(torch.zeros(2), torch.tensor([0, 0]))
    with pytest.raises(InvalidLabelsError, match="targets"):
        fit_temperature(torch.zeros(2, 3), torch.tensor([0, 3]))
