from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax
from scipy.stats import zscore
from torch import Tensor

from tad_plugin.errors import (
    ConfigError,
    ConvergenceWarning,
    InvalidInputError,
    InvalidLabelsError,
    NonFiniteError,
    StateMismatchError,
)
from tad_plugin.iwd.running_score import RunningScore
from tad_plugin.iwd.weighting import (
    effective_sample_size,
    fit_temperature,
    saturate,
    softmax_weights,
    standardise,
    weights_from_scores,
)


def problem(n: int = 300, k: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=generator)])
    return torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** (labels - 2) + labels, labels


def test_standardise_against_scipy() -> None:
    scores, labels = problem()
    found = standardise(scores, labels, 5)
    for c in range(5):
        expected = torch.tensor(zscore(scores[labels == c].numpy()))
        assert torch.allclose(found[labels == c], expected, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_and_offset_do_not_matter(factor: float) -> None:
    scores, labels = problem()
    assert torch.allclose(standardise(scores * factor, labels, 5), standardise(scores, labels, 5), atol=1e-9)
    assert torch.allclose(
        weights_from_scores(scores * factor, labels, 5), weights_from_scores(scores, labels, 5), atol=1e-6
    )


def test_constant_scores_are_not_blown_up() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    scores = torch.full((1000,), 0.1, dtype=torch.float64)  # its mean is not exactly 0.1
    assert bool((standardise(scores, labels, 1) == 0).all())
    assert bool((weights_from_scores(scores, labels, 1) == 1).all())
    assert bool((weights_from_scores(torch.tensor([3.0]), torch.tensor([0]), 1, ess=0.1) == 1).all())


@pytest.mark.parametrize("ess", [0.1, 0.25, 0.5, 0.8, 0.99])
def test_temperature_and_weights_against_scipy_root_finding(ess: float) -> None:
    scores, labels = problem()
    weights = weights_from_scores(scores, labels, 5, ess=ess)
    fitted = fit_temperature(scores, labels, 5, ess=ess)
    assert bool(fitted.reached.all())
    for c in range(5):
        z = zscore(scores[labels == c].numpy())

        def share(inverse: float, z: object = z) -> float:
            w = softmax(-inverse * z)  # type: ignore[operator]
            return float(w.sum() ** 2 / (len(w) * (w**2).sum())) - ess

        inverse = brentq(share, 1e-9, 1e3, xtol=1e-14)
        assert float(fitted.temperature[c]) == pytest.approx(1 / inverse, rel=1e-6)
        expected = torch.tensor(len(z) * softmax(-inverse * z))
        assert torch.allclose(weights[labels == c], expected, atol=1e-6)
    assert torch.allclose(effective_sample_size(weights, labels, 5), torch.full((5,), ess, dtype=torch.float64))


@given(
    scores=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40),
    k=st.integers(1, 3),
    ess=st.floats(0.05, 1.0),
    masked=st.integers(0, 10),
)
def test_weights_are_always_sane(scores: list[float], k: int, ess: float, masked: int) -> None:
    values = torch.tensor(scores)
    labels = torch.arange(len(scores)) % k
    mask = torch.arange(len(scores)) >= min(masked, len(scores) - 1)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few samples: not every size can be reached
        weights = weights_from_scores(values, labels, k, ess=ess, mask=mask)
    assert weights.dtype == torch.float32
    assert bool((weights >= 0).all()) and bool((weights[~mask] == 0).all())
    found = effective_sample_size(weights, labels, k, mask)
    for c in range(k):
        inside = mask & (labels == c)
        if bool(inside.any()):
            assert float(weights[inside].double().mean()) == pytest.approx(1.0, abs=1e-5)
            assert float(found[c]) >= ess - 1e-3  # never fewer than wanted: ties can only make it larger
            order = values[inside].argsort(stable=True)
            assert bool((weights[inside][order].diff() <= 0).all())  # lower score, no less weight


def test_ess_of_one_gives_exactly_one() -> None:
    scores, labels = problem()
    assert bool((weights_from_scores(scores, labels, 5, ess=1.0) == 1).all())


def test_helpful_means_heavier() -> None:
    weights = weights_from_scores(torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.zeros(4, dtype=torch.int64), 1, ess=0.6)
    assert bool((weights.diff() < 0).all())
    assert float(weights[0]) > 1 > float(weights[-1])


def test_masked_samples_do_not_matter_even_if_nan() -> None:
    scores, labels = problem()
    mask = torch.arange(300) % 3 != 0
    spoilt = torch.where(mask, scores, math.nan)
    found = weights_from_scores(spoilt, labels, 5, mask=mask)
    assert torch.allclose(found[mask], weights_from_scores(scores[mask], labels[mask], 5))
    assert bool((found[~mask] == 0).all())
    empty = weights_from_scores(scores, labels, 5, mask=labels != 2)  # a class without samples
    assert bool((empty[labels == 2] == 0).all()) and bool(torch.isfinite(empty).all())


def test_ties_give_the_nearest_size_and_say_so() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0])
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.warns(ConvergenceWarning, match=r"0\.5.*0: 0\.75"):
        weights = weights_from_scores(scores, labels, 1, ess=0.5)
    assert torch.allclose(weights, torch.tensor([4 / 3, 4 / 3, 4 / 3, 0.0]), atol=1e-6)
    assert fit_temperature(scores, labels, 1, ess=0.5).reached.tolist() == [False]


def test_softmax_weights_with_a_fixed_temperature() -> None:
    scores, labels = problem()
    even = softmax_weights(scores, labels, 5, torch.tensor(math.inf))
    assert bool((even == 1).all())
    found = softmax_weights(scores, labels, 5, torch.tensor(0.5))
    z = torch.tensor(zscore(scores[labels == 3].numpy()))
    assert torch.allclose(found[labels == 3], len(z) * torch.softmax(-z / 0.5, 0), atol=1e-9)


def test_effective_sample_size() -> None:
    weights, labels = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2])
    found = effective_sample_size(weights, labels, 4)
    assert found.tolist() == [1.0, 0.5, 0.0, 0.0]
    inside = torch.tensor([True, True, True, False, True])
    assert effective_sample_size(weights, labels, 4, inside).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_running_sum_and_average() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randperm(10, generator=generator)[:6], torch.randn(6, generator=generator)) for _ in range(8)]
    total, average = RunningScore(10), RunningScore(10, decay=0.8)
    expected_sum, history = torch.zeros(10), [[] for _ in range(10)]  # type: ignore[var-annotated]
    for indices, scores in batches:
        total.add(indices, scores)
        average.add(indices, scores)
        for i, s in zip(indices.tolist(), scores.tolist(), strict=True):
            expected_sum[i] += s
            history[i].append(s)
    assert torch.allclose(total.value, expected_sum, atol=1e-6)
    for i, seen in enumerate(history):
        powers = [0.8 ** (len(seen) - 1 - j) for j in range(len(seen))]
        expected = sum(p * s for p, s in zip(powers, seen, strict=True)) / sum(powers) if seen else 0.0
        assert float(average.value[i]) == pytest.approx(expected, abs=1e-5)
        assert int(total.counts[i]) == len(seen)
    total.add(None, torch.ones(10))
    assert bool(total.seen.all())


def test_running_score_resumes_bit_for_bit() -> None:
    first, second = RunningScore(4, decay=0.5), RunningScore(4, decay=0.5)
    first.add(torch.tensor([1, 3]), torch.tensor([0.3, 0.7]))
    second.load_state_dict(first.state_dict())
    for score in (first, second):
        score.add(None, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.equal(first.value, second.value) and torch.equal(first.counts, second.counts)
    with pytest.raises(StateMismatchError, match="5"):
        RunningScore(5, decay=0.5).load_state_dict(first.state_dict())
    with pytest.raises(StateMismatchError, match="decay"):
        RunningScore(4).load_state_dict(first.state_dict())


def test_wrong_arguments() -> None:
    scores, labels = problem()
    with pytest.raises(InvalidInputError, match="ess"):
        weights_from_scores(scores, labels, 5, ess=0.0)
    with pytest.raises(InvalidLabelsError):
        weights_from_scores(scores, labels, 4)
    with pytest.raises(InvalidInputError, match="mask"):
        weights_from_scores(scores, labels, 5, mask=torch.ones(300))
    with pytest.raises(InvalidInputError, match="temperature"):
        softmax_weights(scores, labels, 5, torch.tensor(0.0))
    scores[7] = math.nan
    with pytest.raises(NonFiniteError, match=r"1 of 300.* 7"):
        weights_from_scores(scores, labels, 5)
    with pytest.raises(ConfigError, match="decay"):
        RunningScore(3, decay=1.0)
    running = RunningScore(3)
    with pytest.raises(NonFiniteError):
        running.add(None, torch.tensor([1.0, math.inf, 0.0]))
    assert not bool(running.seen.any())
    with pytest.raises(InvalidInputError):
        running.add(torch.tensor([1, 1]), torch.ones(2))
    with pytest.raises(InvalidInputError, match=r"\[1\].*\[2\]"):
        running.add(torch.tensor([1]), torch.ones(2))


@pytest.mark.parametrize("decay", [None, 0.7])
def test_estimate_shrinks_forgets_and_restores(decay: float | None) -> None:
    running = RunningScore(3, decay=decay)
    for _ in range(3):
        running.add(torch.tensor([0]), torch.tensor([2.0]))
    running.add(torch.tensor([1]), torch.tensor([2.0]))
    assert torch.allclose(running.estimate, torch.tensor([2 * 3 / 4, 2 * 1 / 2, 0.0]))
    other = RunningScore(3, decay=decay)
    other.restore(running.estimate, running.counts)
    assert torch.allclose(other.value, running.value) and torch.equal(other.counts, running.counts)
    running.forget(torch.tensor([True, False, False]))
    assert running.counts.tolist() == [0, 1, 0] and float(running.value[0]) == 0
    assert torch.allclose(running.estimate, torch.tensor([0.0, 1.0, 0.0]))


def test_an_effective_sample_size_for_each_class(generator: torch.Generator) -> None:
    labels, wanted = torch.arange(3).repeat(200), torch.tensor([0.3, 0.7, 1.0])
    scores = torch.randn(600, generator=generator)
    fitted = fit_temperature(scores, labels, 3, wanted)
    assert torch.allclose(fitted.ess, wanted.double(), atol=1e-3) and bool(fitted.reached.all())
    weights = softmax_weights(scores, labels, 3, fitted.temperature)
    assert torch.equal(weights[labels == 2], torch.ones(200))
    for bad in (torch.tensor([0.5, 0.0, 1.0]), torch.tensor([0.5, 0.5])):
        with pytest.raises(InvalidInputError, match="ess"):
            fit_temperature(scores, labels, 3, bad)


def test_saturation_raises_the_best_scores_of_each_class_to_one_value(generator: torch.Generator) -> None:
    labels = torch.arange(3).repeat(100)
    scores, mask = torch.randn(300, generator=generator), torch.rand(300, generator=generator) < 0.8
    found = saturate(scores, labels, 3, 0.4, mask)
    assert torch.equal(found[~mask], scores[~mask])
    for c in range(3):
        rows = mask & (labels == c)
        low = float(np.quantile(scores[rows].double().numpy(), 0.4))
        assert torch.allclose(found[rows], scores[rows].clamp_min(low))
    assert torch.equal(saturate(scores, labels, 3, 0.0), scores)
    many, own = problem(400, 7, seed=3)
    for share, dtype in ((0.31, torch.float32), (0.5, torch.float64), (0.997, torch.float32)):
        values, inside = many.to(dtype), own != 4
        expected = values.clone()
        for c in (0, 1, 2, 3, 5, 6):
            level = float(values[own == c].double().quantile(share))
            expected[own == c] = values[own == c].clamp_min(level)
        assert torch.equal(saturate(values, own, 7, share, inside), expected)
    weights = weights_from_scores(saturate(scores, labels, 3, 0.5), labels, 3, 0.75)
    best = weights[labels == 0].max()
    assert float((weights[labels == 0] == best).float().mean()) == pytest.approx(0.5, abs=0.02) and float(best) < 1.6
    with pytest.raises(InvalidInputError, match="share"):
        saturate(scores, labels, 3, 1.0)
