"""The batched mixture against scikit-learn, and its defined outcomes for degenerate classes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, NonFiniteError
from tad_plugin.tad.mixture import MixtureInit, fit_class_mixture


def two_groups(n, seed=0, share=0.6):
    """Losses of one class: a low and a high group, float32 [n]."""
    rng = np.random.default_rng(seed)
    return torch.tensor(
        np.where(rng.random(n) < share, rng.gamma(2, 0.2, n), rng.gamma(9, 0.4, n)), dtype=torch.float32
    )


def scikit(x, means, variances, proportions, **options):
    """scikit-learn's fit of normalised losses x [n] from the same start."""
    model = GaussianMixture(
        2,
        means_init=np.asarray(means)[:, None],
        precisions_init=1 / np.asarray(variances)[:, None, None],
        weights_init=np.asarray(proportions),
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x[:, None])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_agrees_with_scikit_learn_from_the_same_start(data):
    classes = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    sizes = [data.draw(st.integers(6, 90)) for _ in range(classes)]
    share, gap = data.draw(st.floats(0.1, 0.9)), data.draw(st.floats(0.0, 5.0))
    iterations = data.draw(st.sampled_from([1, 3, 100]))
    tolerance = data.draw(st.sampled_from([1e-2, 1e-3, 1e-6]))
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    losses = np.where(
        rng.random(len(labels)) < share, rng.gamma(2, 0.3, len(labels)), gap + rng.gamma(4, 0.4, len(labels))
    )
    losses = losses.astype(np.float32)
    means = np.sort(rng.uniform(0, 1, (classes, 2)), axis=1)
    variances = rng.uniform(0.005, 0.1, (classes, 2))
    proportions = rng.dirichlet([5, 5], classes)
    ours = fit_class_mixture(
        torch.from_numpy(losses),
        torch.from_numpy(labels),
        classes,
        iterations=iterations,
        tolerance=tolerance,
        init=MixtureInit(*(torch.from_numpy(part) for part in (means, variances, proportions))),
    )
    for c in range(classes):
        index = np.flatnonzero(labels == c)
        x = losses[index].astype(np.float64)
        x = (x - x.min()) / (x.max() - x.min())
        theirs = scikit(x, means[c], variances[c], proportions[c], tol=tolerance, max_iter=iterations)
        order = theirs.means_[:, 0].argsort()
        assert int(ours.iterations[c]) == theirs.n_iter_
        assert bool(ours.converged[c]) == theirs.converged_
        np.testing.assert_allclose(ours.means[c], theirs.means_[order, 0], atol=1e-6)
        np.testing.assert_allclose(ours.variances[c], theirs.covariances_[order, 0, 0], atol=1e-6)
        np.testing.assert_allclose(ours.proportions[c], theirs.weights_[order], atol=1e-6)
        np.testing.assert_allclose(ours.trust[index], theirs.predict_proba(x[:, None])[:, order[0]], atol=1e-3)
        single = GaussianMixture(1).fit(x[:, None])
        d = np.sqrt(2) * np.ptp(theirs.means_) / np.sqrt(theirs.covariances_.sum())
        prefers_two = theirs.bic(x[:, None]) < single.bic(x[:, None])
        assert float(ours.separation[c]) == pytest.approx(d, abs=1e-5)
        assert bool(ours.unimodal[c]) == (d < 2 or not prefers_two)


def test_the_default_start_is_the_best_split_in_two():
    losses = two_groups(200, seed=3)
    x = ((losses - losses.min()) / (losses.max() - losses.min())).double().sort().values.numpy()
    within = [x[:j].var() * j + x[j:].var() * (200 - j) for j in range(1, 200)]
    j = int(np.argmin(within)) + 1
    halves = x[:j], x[j:]
    start = [h.mean() for h in halves], [h.var() + 1e-6 for h in halves], [len(h) / 200 for h in halves]
    theirs = scikit(x, *start)
    ours = fit_class_mixture(losses, torch.zeros(200, dtype=torch.int64), 1)
    np.testing.assert_allclose(ours.means[0], theirs.means_[:, 0], atol=1e-8)
    assert int(ours.iterations[0]) == theirs.n_iter_


def test_a_class_is_fitted_as_if_it_were_alone():
    parts = [two_groups(n, seed=n) for n in (300, 7, 41)]
    labels = torch.cat([torch.full((len(p),), c) for c, p in enumerate(parts)])
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    together = fit_class_mixture(torch.cat(parts)[shuffled], labels[shuffled], 3)
    for c, part in enumerate(parts):
        alone = fit_class_mixture(part, torch.zeros(len(part), dtype=torch.int64), 1)
        trust = torch.empty(len(labels))
        trust[shuffled] = together.trust
        torch.testing.assert_close(trust[labels == c], alone.trust)
        assert int(together.iterations[c]) == int(alone.iterations[0])


def test_raw_units_give_the_same_posterior_with_an_equal_floor():
    losses, labels = two_groups(150), torch.zeros(150, dtype=torch.int64)
    spread = float((losses.max() - losses.min()).double() ** 2)
    scaled = fit_class_mixture(losses, labels, 1)
    raw = fit_class_mixture(losses, labels, 1, normalise=False, min_variance=1e-6 * spread)
    torch.testing.assert_close(raw.trust, scaled.trust)
    torch.testing.assert_close(raw.means, scaled.offset.unsqueeze(1) + scaled.scale.unsqueeze(1) * scaled.means)
    assert float(raw.offset) == 0 and float(raw.scale) == 1
    again = fit_class_mixture(
        losses,
        labels,
        1,
        normalise=False,
        min_variance=1e-6 * spread,
        init=MixtureInit(raw.means, raw.variances, raw.proportions),
    )
    torch.testing.assert_close(again.means, raw.means, atol=2e-2, rtol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_degenerate_classes(normalise):
    """Class 0 has two groups, 1 is empty, 2 has one sample, 3 equal losses, 4 two samples."""
    losses = torch.cat([two_groups(100), torch.tensor([3.0, 2.0, 2.0, 2.0, 0.5, 9.0])])
    labels = torch.cat([torch.zeros(100, dtype=torch.int64), torch.tensor([2, 3, 3, 3, 4, 4])])
    fit = fit_class_mixture(losses, labels, 5, normalise=normalise)
    assert fit.counts.tolist() == [100, 0, 1, 3, 2]
    assert fit.unimodal.tolist() == [False, True, True, True, True]
    assert fit.trust[100:104].tolist() == [1, 1, 1, 1]
    assert fit.separation[1:4].tolist() == [0, 0, 0]
    assert fit.proportions[1:4].tolist() == [[1, 0]] * 3
    assert fit.converged[1:4].all() and fit.iterations[1:4].tolist() == [0, 0, 0]
    for part in (fit.trust, fit.means, fit.variances, fit.proportions, fit.offset, fit.scale):
        assert bool(torch.isfinite(part).all())
    assert fit.posterior(torch.tensor([2.0, 7.0]), torch.tensor([3, 3])).tolist() == [1, 1]


def test_only_degenerate_classes():
    fit = fit_class_mixture(torch.ones(4), torch.tensor([0, 0, 1, 1]), 3)
    assert fit.trust.tolist() == [1] * 4 and bool(fit.unimodal.all())


def test_one_group_is_unimodal_and_two_are_not():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, generator=generator).abs()
    assert bool(fit_class_mixture(one, torch.zeros(500, dtype=torch.int64), 1).unimodal[0])
    two = torch.cat([one, one + 9])
    assert not bool(fit_class_mixture(two, torch.zeros(1000, dtype=torch.int64), 1).unimodal[0])


def test_components_are_ordered_by_mean_whatever_the_start():
    losses, labels = two_groups(80), torch.zeros(80, dtype=torch.int64)
    spread = torch.full((1, 2), 0.02)
    half = torch.full((1, 2), 0.5)
    up = fit_class_mixture(losses, labels, 1, init=MixtureInit(torch.tensor([[0.1, 0.7]]), spread, half))
    down = fit_class_mixture(losses, labels, 1, init=MixtureInit(torch.tensor([[0.7, 0.1]]), spread, half))
    assert float(up.means[0, 0]) < float(up.means[0, 1])
    torch.testing.assert_close(up.trust, down.trust)


def test_density_integrates_to_one_in_raw_units():
    losses = two_groups(200)
    fit = fit_class_mixture(losses, torch.zeros(200, dtype=torch.int64), 1)
    grid = torch.linspace(-20, 40, 60001, dtype=torch.float64)
    area = torch.trapezoid(fit.density(0, grid), grid, dim=0)
    torch.testing.assert_close(area, fit.proportions[0], atol=1e-5, rtol=0)
    both = fit.density(0, losses)
    torch.testing.assert_close((both[:, 0] / both.sum(1)).float(), fit.trust, atol=1e-5, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="got 1"):
        fit.density(1, grid)
    with pytest.raises(NonFiniteError, match="grid"):
        fit.density(0, torch.tensor([0.0, float("nan")]))


def test_posterior_repeats_trust_and_the_monotone_form_never_rises():
    generator = torch.Generator().manual_seed(1)
    narrow = 1 + 0.02 * torch.randn(300, generator=generator)
    wide = 4 + torch.randn(200, generator=generator)
    losses, labels = torch.cat([narrow, wide]).abs(), torch.zeros(500, dtype=torch.int64)
    fit = fit_class_mixture(losses, labels, 1)
    torch.testing.assert_close(fit.posterior(losses, labels), fit.trust)
    grid = torch.linspace(0, 9, 500)
    raw = fit.posterior(grid, torch.zeros(500, dtype=torch.int64))
    flat = fit.posterior(grid, torch.zeros(500, dtype=torch.int64), monotone=True)
    assert float(raw[0]) < 0.5 < float(flat[0])  # the artefact that the monotone form is for
    assert bool((flat.diff() <= 1e-6).all()) and bool((flat >= raw - 1e-6).all())


def test_inputs_of_other_types_and_no_graph():
    losses = two_groups(60).requires_grad_()
    fit = fit_class_mixture(losses, torch.zeros(60, dtype=torch.int32), 1)
    assert fit.trust.dtype == torch.float32 and not fit.trust.requires_grad
    half = fit_class_mixture(losses.detach().half(), torch.zeros(60, dtype=torch.uint8), 1)
    torch.testing.assert_close(half.trust, fit.trust, atol=0.05, rtol=0)


def test_non_finite_losses_are_counted_and_located():
    losses = torch.ones(10)
    losses[3], losses[7] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match="2 of 10.* 3"):
        fit_class_mixture(losses, torch.zeros(10, dtype=torch.int64), 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 5]), "5"),
        (torch.tensor([0, -1, 2, 2]), "-1"),
        (torch.tensor([0, 1, 2]), "4.* 3"),
        (torch.tensor([0.0, 1.0, 2.0, 2.0]), "float32"),
        (torch.eye(4, dtype=torch.int64), r"\[4, 4\]"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InvalidLabelsError, match=message):
        fit_class_mixture(torch.rand(4, generator=torch.Generator()), labels, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"tolerance": 0.0},
        {"min_variance": -1.0},
        {"tolerance": math.nan},
        {"init": MixtureInit(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))},
        {"init": MixtureInit(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))},
    ],
)
def test_bad_options(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        fit_class_mixture(two_groups(20), torch.zeros(20, dtype=torch.int64), 1, **options)


@pytest.mark.parametrize("losses", [torch.ones(2, 2), torch.tensor([1, 2])])
def test_bad_losses(losses):
    with pytest.raises(InvalidInputError, match="losses"):
        fit_class_mixture(losses, torch.tensor([0, 0]), 1)


def test_the_posterior_checks_its_arguments():
    fit = fit_class_mixture(two_groups(20), torch.zeros(20, dtype=torch.int64), 1)
    with pytest.raises(InvalidLabelsError, match="-1"):
        fit.posterior(torch.ones(2), torch.tensor([0, -1]))
    with pytest.raises(InvalidInputError, match="losses"):
        fit.posterior(torch.ones(2, 2), torch.tensor([0, 0]))
    with pytest.raises(NonFiniteError, match="1 of 2"):
        fit.posterior(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
