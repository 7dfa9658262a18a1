from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.errors import InvalidInputError, NoHeldOutError
from tad_plugin.iwd.targets import (
    class_mean_distance,
    cross_fit,
    matching_target,
    validation_gradient,
    validation_target,
)
from tests.iwd.problems import convnet, digits_problem


@pytest.mark.parametrize("steps", [1, 3])
def test_validation_target_is_the_loss_after_real_sgd_steps(steps: int) -> None:
    p, network = digits_problem(), convnet()
    before = copy.deepcopy(network.state_dict())
    value = validation_target(
        network, p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, alpha=0.1, steps=steps
    )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    trained = copy.deepcopy(network)
    sgd = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(steps):
        sgd.zero_grad()
        F.cross_entropy(trained(p.synthetic), p.synthetic_labels).backward()
        sgd.step()
    assert torch.allclose(value, F.cross_entropy(trained(p.held_out), p.held_out_labels), atol=1e-12)


def test_validation_gradient_against_finite_differences_and_in_chunks() -> None:
    p, network = digits_problem(), convnet()
    s = p.synthetic.clone().requires_grad_()

    def value(s: Tensor) -> Tensor:
        return validation_target(network, s, p.synthetic_labels, p.held_out, p.held_out_labels, alpha=0.1, steps=2)

    (expected,) = torch.autograd.grad(value(s), s)
    found_value, found = validation_gradient(
        network, p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, alpha=0.1, steps=2, chunk_size=7
    )
    assert found_value == pytest.approx(float(value(p.synthetic).detach()), abs=1e-12)
    assert torch.allclose(found, expected, atol=1e-12)
    along = torch.randn(s.shape, dtype=s.dtype, generator=torch.Generator().manual_seed(0))
    difference = (value(p.synthetic + 1e-5 * along) - value(p.synthetic - 1e-5 * along)) / 2e-5
    assert float((found * along).sum()) == pytest.approx(float(difference.detach()), rel=1e-5)


def test_soft_labels_and_a_learned_rate_get_gradients() -> None:
    p, network = digits_problem(), convnet()
    soft = torch.full((10, 10), 0.1, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    value = validation_target(network, p.synthetic, soft, p.held_out, p.held_out_labels, alpha=alpha)
    gradients = torch.autograd.grad(value, (soft, alpha))
    assert all(bool((g != 0).any()) for g in gradients)


def test_running_statistics_are_not_changed() -> None:
    p, network = digits_problem(), convnet("batch")
    network.train()
    before = copy.deepcopy(network.state_dict())
    validation_target(network, p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))


def test_class_mean_distance_against_a_loop_over_classes() -> None:
    p, network = digits_problem(), convnet()
    w = torch.rand(len(p.real), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real, own = network.embed(p.real), network.embed(p.synthetic[2:])
    expected = torch.zeros((), dtype=torch.float64)
    for c in p.synthetic_labels[2:].tolist():
        inside = p.real_labels == c
        mean = (w[inside, None] * real[inside]).sum(0) / w[inside].sum()
        expected = expected + (mean - own[p.synthetic_labels[2:] == c].mean(0)).square().sum()
    arguments = (network, p.synthetic[2:], p.synthetic_labels[2:], p.real, p.real_labels, 10)
    assert torch.allclose(class_mean_distance(*arguments, weights=w), expected, atol=1e-12)


def test_matching_target_is_the_mean_over_networks() -> None:
    p, networks = digits_problem(), [convnet(seed=1), convnet(seed=2)]
    s = p.synthetic.clone().requires_grad_()
    arguments = (s, p.synthetic_labels, p.held_out, p.held_out_labels, 10)
    value = matching_target(networks, *arguments)
    assert torch.allclose(value, sum(class_mean_distance(n, *arguments) for n in networks) / 2)
    (gradient,) = torch.autograd.grad(value, s)
    assert bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())


def test_no_held_out_samples() -> None:
    p, network = digits_problem(), convnet()
    none, no_labels = p.held_out[:0], p.held_out_labels[:0]
    with pytest.raises(NoHeldOutError, match="cross_fit"):
        validation_target(network, p.synthetic, p.synthetic_labels, none, no_labels)
    with pytest.raises(NoHeldOutError):
        validation_gradient(network, p.synthetic, p.synthetic_labels, none, no_labels)
    with pytest.raises(NoHeldOutError):
        matching_target(network, p.synthetic, p.synthetic_labels, none, no_labels, 10)
    with pytest.raises(NoHeldOutError):  # held-out samples of class 0 only, synthetic images of the others
        keep = p.held_out_labels == 0
        matching_target(network, p.synthetic[1:], p.synthetic_labels[1:], p.held_out[keep], p.held_out_labels[keep], 10)


def test_wrong_arguments() -> None:
    p, network = digits_problem(), convnet()
    arguments = (network, p.synthetic, p.synthetic_labels, p.held_out)
    for extra in ({"steps": 0}, {"alpha": 0.0}):
        with pytest.raises(InvalidInputError, match="steps"):
            validation_target(*arguments, p.held_out_labels, **extra)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="labels"):
        validation_target(*arguments, p.held_out_labels[:3])
    with pytest.raises(InvalidInputError, match="network"):
        matching_target([], p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, 10)


@pytest.mark.parametrize("folds", [2, 5])
def test_cross_fit_never_scores_by_a_target_that_contains_the_sample(
    folds: int, generator: torch.Generator, global_rng_untouched: None
) -> None:
    labels = torch.randint(0, 7, (211,), generator=torch.Generator().manual_seed(1))
    found = cross_fit(labels, 7, folds, generator=generator)
    times_held_out = torch.zeros(211, dtype=torch.int64)
    times_scored = torch.zeros(211, dtype=torch.int64)
    for fold in found:
        assert not set(fold.held_out.tolist()) & set(fold.scored.tolist())
        assert len(fold.held_out) + len(fold.scored) == 211
        times_held_out[fold.held_out] += 1
        times_scored[fold.scored] += 1
        counts = torch.bincount(labels[fold.held_out], minlength=7)
        assert bool(((counts - torch.bincount(labels, minlength=7) / folds).abs() < 1).all())  # stratified
    assert bool((times_held_out == 1).all())
    assert bool((times_scored == folds - 1).all())
    again = cross_fit(labels, 7, folds, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a.held_out, b.held_out) for a, b in zip(found, again, strict=True))


def test_cross_fit_with_mask_and_limit(generator: torch.Generator) -> None:
    labels = torch.arange(3).repeat(40)
    mask = torch.arange(120) % 4 != 0
    for fold in cross_fit(labels, 3, 3, generator=generator, mask=mask, per_class=2):
        assert bool(mask[fold.held_out].all())
        assert torch.bincount(labels[fold.held_out], minlength=3).tolist() == [2, 2, 2]
        assert len(fold.scored) == 120 - 6


def test_cross_fit_errors(generator: torch.Generator) -> None:
    labels = torch.arange(3).repeat(4)
    with pytest.raises(NoHeldOutError, match="fewer folds"):
        cross_fit(labels, 3, 3, generator=generator, mask=torch.zeros(12, dtype=torch.bool))
    with pytest.raises(NoHeldOutError):
        cross_fit(labels, 3, 13, generator=generator)
    with pytest.raises(InvalidInputError, match="folds"):
        cross_fit(labels, 3, 1, generator=generator)
    with pytest.raises(InvalidInputError, match="mask"):
        cross_fit(labels, 3, 2, generator=generator, mask=torch.ones(3, dtype=torch.bool))
