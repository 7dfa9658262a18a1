"""The real gradient against a loop over samples, and its derivative in their weights against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.distill.real_gradient import weighted_gradient, weighted_gradient_graph
from tad_plugin.errors import InvalidInputError
from tad_plugin.nn.derivatives.mean_gradient import mean_gradient
from tad_plugin.nn.networks import make_network
from tad_plugin.nn.passes import memory_budget, pass_size

FORMS = (weighted_gradient, weighted_gradient_graph)


def problem(norm: str = "instance") -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Network, images, targets, weights; float64."""
    generator = torch.Generator().manual_seed(0)
    network = make_network(
        "convnet", in_channels=1, num_classes=3, image_size=8, width=4, depth=2, norm=norm, generator=generator
    )
    images = torch.randn(7, 1, 8, 8, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    return network.double(), images, torch.randint(0, 3, (7,), generator=generator), weights


def by_hand(network: nn.Module, parameters: list[nn.Parameter], image: Tensor, target: Tensor) -> list[Tensor]:
    loss = -network(image[None])[0].log_softmax(0)[int(target)]
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [2, 7, 100])
def test_it_is_the_mean_over_samples_in_chunks_of_any_size(weighted: bool, chunk: int) -> None:
    network, images, targets, weights = problem()
    parameters = list(network.parameters())
    found = mean_gradient(network, parameters, images, targets, weights if weighted else None, chunk_size=chunk)
    expected = [torch.zeros_like(p) for p in parameters]
    for image, target, weight in zip(images, targets, weights, strict=True):
        for total, part in zip(expected, by_hand(network, parameters, image, target), strict=True):
            total += part * (float(weight) if weighted else 1.0) / len(images)
    for a, b in zip(found, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_its_derivative_is_every_samples_gradient_along_the_direction(form: object) -> None:
    network, images, targets, weights = problem()
    parameters = [p for p in network.parameters() if p.ndim > 1]
    leaf = weights.clone().requires_grad_()
    given = mean_gradient(network, parameters, images, targets, weights)
    gradient = form(given, network, parameters, lambda: (images, targets), leaf, chunk_size=3)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(gradient, given, strict=True))
    direction = [torch.randn(g.shape, generator=torch.Generator().manual_seed(1), dtype=g.dtype) for g in gradient]
    inner = torch.stack([(g * u).sum() for g, u in zip(gradient, direction, strict=True)]).sum()
    (found,) = torch.autograd.grad(inner, leaf)
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        own = by_hand(network, parameters, image, target)
        product = sum(float((g * u).sum()) for g, u in zip(own, direction, strict=True))
        assert float(found[i]) == pytest.approx(product / len(images), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_of_it_is_differentiated_as_finite_differences_say(form: object) -> None:
    """Here the direction depends on the gradient itself, as it does in a distance."""
    network, images, targets, weights = problem()
    parameters = list(network.parameters())

    def value(w: Tensor) -> Tensor:
        given = mean_gradient(network, parameters, images, targets, w)
        if w.requires_grad:
            given = form(given, network, parameters, lambda: (images, targets), w)  # type: ignore[operator]
        return torch.stack([(g.square() + g.sin()).sum() for g in given]).sum()

    leaf = weights.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    for i in range(len(weights)):
        step = torch.zeros_like(weights)
        step[i] = 1e-6
        slope = (float(value(weights + step)) - float(value(weights - step))) / 2e-6
        assert float(found[i]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_batch_is_asked_for_only_when_somebody_differentiates() -> None:
    network, images, targets, weights = problem()
    parameters = list(network.parameters())
    asked = []

    def batch() -> tuple[Tensor, Tensor]:
        asked.append(1)
        return images, targets

    given = mean_gradient(network, parameters, images, targets)
    leaf = weights.clone().requires_grad_()
    gradient = weighted_gradient(given, network, parameters, batch, leaf)
    assert not asked
    torch.autograd.grad(gradient[0].sum(), leaf)
    assert len(asked) == 1


def test_a_network_that_mixes_samples_is_named_and_frozen_statistics_are_not() -> None:
    network, images, targets, weights = problem("batch")
    parameters, leaf = list(network.parameters()), weights.clone().requires_grad_()
    given = mean_gradient(network, parameters, images, targets)
    gradient = weighted_gradient(given, network, parameters, lambda: (images, targets), leaf)
    with pytest.raises(InvalidInputError):
        torch.autograd.grad(gradient[0].sum(), leaf, retain_graph=True)
    network.eval()
    assert bool(torch.isfinite(torch.autograd.grad(gradient[0].sum(), leaf)[0]).all())


def test_a_pass_holds_what_fits_the_cache() -> None:
    def size(side: int, width: int) -> int:
        return pass_size(torch.empty(1, 3, side, side), width)

    assert size(32, 128) == 16 and size(32, 32) == 64 and size(8, 32) > 512 and size(1024, 512) == 1
    with memory_budget(80 * 10**9):
        assert pass_size(torch.empty(1, 3, 32, 32, device="meta"), 128) == 2048


def test_cross_entropy_by_hand_is_torchs() -> None:
    network, images, targets, _ = problem()
    parameters = list(network.parameters())
    whole = torch.autograd.grad(F.cross_entropy(network(images), targets), parameters)
    for a, b in zip(mean_gradient(network, parameters, images, targets), whole, strict=True):
        torch.testing.assert_close(a, b)
