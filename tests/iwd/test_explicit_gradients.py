"""The influence through class gradients, held against the general identity and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.distill.gradient_distance import DISTANCES
from tad_plugin.errors import InvalidInputError, NonFiniteError
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.iwd.explicit_gradients import gradient_influence
from tests.iwd.problems import Problem, convnet, correlation_and_slope, digits_problem


def class_gradient_loss(network: nn.Module, p: Problem, distance: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(w, S) -> sum over classes of the distance between the gradients of weighted *means*."""
    parameters = list(network.parameters())

    def gradient(images: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        loss = (share * F.cross_entropy(network(images), labels, reduction="none")).sum()
        return torch.autograd.grad(loss, parameters, create_graph=True)

    def loss(w: Tensor, s: Tensor) -> Tensor:
        total = torch.zeros((), dtype=s.dtype)
        for c in p.real_labels.unique().tolist():
            rows, own = p.real_labels == c, p.synthetic_labels == c
            real = gradient(p.real[rows], p.real_labels[rows], w[rows] / w[rows].sum())
            fake = gradient(s[own], p.synthetic_labels[own], torch.ones(int(own.sum()), dtype=s.dtype) / own.sum())
            total = total + DISTANCES[distance](fake, real)
        return total

    return loss


def found_for(p: Problem, network: nn.Module, gradient: Tensor, **more: object) -> Tensor:
    arguments = {"distance": DISTANCES["layerwise"], **more}
    return gradient_influence(
        network, p.real, p.real_labels, p.synthetic, p.synthetic_labels, gradient, 10, **arguments
    )


@pytest.mark.parametrize("distance", list(DISTANCES))
def test_equals_the_general_identity_at_any_weights(distance: str) -> None:
    p, network = digits_problem(real=40), convnet(activation="sigmoid")
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(p.synthetic.shape, generator=generator, dtype=torch.float64)
    w = (0.5 + torch.rand(40, generator=generator, dtype=torch.float64)).requires_grad_()
    s = p.synthetic.clone().requires_grad_()
    expected = explicit_influence(class_gradient_loss(network, p, distance)(w, s), w, s, gradient, eta=0.3)
    found = found_for(p, network, gradient, distance=DISTANCES[distance], weights=w, eta=0.3, chunk_size=3)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_equals_finite_differences_of_the_step() -> None:
    """Raise w_i, take the real descent step, measure M: M is linear here, so its gradient is the same everywhere."""
    p, network, eta, h = digits_problem(real=24), convnet(activation="sigmoid"), 0.5, 1e-5
    loss = class_gradient_loss(network, p, "layerwise")
    direction = torch.randn(p.synthetic.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def after(w: Tensor) -> float:
        s = p.synthetic.clone().requires_grad_()
        return float(((s.detach() - eta * torch.autograd.grad(loss(w, s), s)[0].detach()) * direction).sum())

    steps = h * torch.eye(24, dtype=torch.float64)
    oracle = torch.tensor([(after(1 + step) - after(1 - step)) / (2 * h) for step in steps], dtype=torch.float64)
    correlation, slope = correlation_and_slope(found_for(p, network, direction, eta=eta), oracle)
    assert correlation > 0.99999 and slope == pytest.approx(1, abs=1e-4)


def test_a_class_without_synthetic_images_has_no_influence_and_the_network_is_left_alone() -> None:
    p, network = digits_problem(real=30), convnet()
    before = [v.clone() for v in network.parameters()]
    labels = p.synthetic_labels.clone()
    labels[0] = 1
    found = gradient_influence(
        network, p.real, p.real_labels, p.synthetic, labels, torch.ones_like(p.synthetic), 10, DISTANCES["layerwise"]
    )
    assert not bool(found[p.real_labels == 0].any()) and bool(found[p.real_labels == 2].any())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, network.parameters(), strict=True))


def test_bad_input() -> None:
    p, network = digits_problem(real=20), convnet()
    gradient = torch.ones_like(p.synthetic)
    with pytest.raises(InvalidInputError, match="weights"):
        found_for(p, network, gradient, weights=torch.zeros(20, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="target_gradient"):
        found_for(p, network, gradient[:-1])
    with pytest.raises(InvalidInputError, match="eta"):
        found_for(p, network, gradient, eta=0.0)
    with pytest.raises(InvalidInputError, match="BatchNorm"):
        found_for(p, convnet("batch").train(), gradient)
    with pytest.raises(NonFiniteError):
        found_for(p, network, gradient * float("nan"))
    with pytest.raises(InvalidInputError, match="chunk_size 0"):
        found_for(p, network, gradient, chunk_size=0)
    p = replace(p, synthetic_labels=p.synthetic_labels + 1)
    with pytest.raises(InvalidInputError, match="synthetic_labels"):
        found_for(p, network, gradient)
