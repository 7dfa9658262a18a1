from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, NoHeldOutError
from tad_plugin.iwd.targets import (
    class_mean_distance,
    matching_target,
    target_gradient,
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
    with pytest.raises(NoHeldOutError):
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
    for name, value in {"steps": 0, "alpha": 0.0}.items():
        with pytest.raises(InvalidInputError, match=f"{name} {value}"):
            validation_target(*arguments, p.held_out_labels, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="chunk_size 0"):
        validation_gradient(*arguments, p.held_out_labels, chunk_size=0)
    with pytest.raises(InvalidInputError, match="3 held out"):
        validation_target(*arguments, p.held_out_labels[:3])
    with pytest.raises(InvalidInputError):
        matching_target([], p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, 10)


def test_gradient_is_the_mean_over_networks() -> None:
    p = digits_problem()
    networks: list[nn.Module] = [convnet(seed=s) for s in (0, 1)]
    leaf = p.synthetic.clone().requires_grad_()
    args = (leaf, p.synthetic_labels, p.held_out, p.held_out_labels)
    value = torch.stack([validation_target(n, *args, alpha=0.1, steps=2) for n in networks]).mean()
    (expected,) = torch.autograd.grad(value, leaf)
    found = target_gradient(
        "validation", networks, p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, 10, alpha=0.1, steps=2
    )
    assert found[0] == pytest.approx(float(value.detach()))
    assert torch.allclose(found[1], expected, rtol=1e-9)
    value = matching_target(networks, *args, 10)
    (expected,) = torch.autograd.grad(value, leaf)
    soft = torch.nn.functional.one_hot(p.synthetic_labels, 10).double()
    found = target_gradient("matching", networks, p.synthetic, soft, p.held_out, p.held_out_labels, 10)
    assert torch.allclose(found[1], expected, rtol=1e-9)


def test_wrong_arguments_of_the_target_gradient() -> None:
    p = digits_problem()
    given = (p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels)
    with pytest.raises(InvalidInputError, match="best"):
        target_gradient("best", [convnet()], *given, 10)
    with pytest.raises(InvalidInputError, match="0 networks"):
        target_gradient("validation", [], *given, 10)
    with pytest.raises(InvalidLabelsError):
        target_gradient("matching", [convnet()], *given, 9)
    with pytest.raises(NoHeldOutError):
        target_gradient("matching", [convnet()], *given[:2], p.held_out[:0], p.held_out_labels[:0], 10)
    with pytest.raises(InvalidInputError, match="chunk_size 0"):
        target_gradient("validation", [convnet()], *given, 10, chunk_size=0)
