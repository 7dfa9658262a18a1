"""The distances of gradient matching against loops by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tad_plugin.distill.gradient_distance import DISTANCES, matched_parameters
from tad_plugin.errors import InvalidInputError
from tad_plugin.nn.networks import make_network

SHAPES = [(3, 2, 3, 3), (3,), (4, 2, 2), (5, 4), (5,)]


def gradients(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)) + 1e-6)


def test_layerwise_is_one_minus_cosine_for_each_output_unit() -> None:
    s, r = gradients(0), gradients(1)
    expected = sum(
        1 - cosine(a[unit].flatten().tolist(), b[unit].flatten().tolist())
        for a, b in zip(s, r, strict=True)
        if a.ndim > 1
        for unit in range(len(a))
    )
    assert float(DISTANCES["layerwise"](s, r)) == pytest.approx(expected, rel=1e-12)
    # biases do not take part, and no unit's length does (but for the published 1e-6 in the denominator)
    other = [3 * b if b.ndim > 1 else torch.randn_like(b) for b in r]
    assert float(DISTANCES["layerwise"](s, other)) == pytest.approx(expected, rel=1e-6)


def test_mse_and_cosine_take_all_gradients_as_one_vector() -> None:
    s, r = gradients(0), gradients(1)
    a, b = ([float(x) for g in side for x in g.flatten()] for side in (s, r))
    assert float(DISTANCES["mse"](s, r)) == pytest.approx(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    assert float(DISTANCES["cosine"](s, r)) == pytest.approx(1 - cosine(a, b), rel=1e-12)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_a_gradient_is_nearest_to_itself(name: str) -> None:
    s = gradients(0)
    distance = DISTANCES[name]
    assert abs(float(distance(s, s))) < 1e-5
    assert float(distance(s, [-g for g in s])) > float(distance(s, gradients(1))) > 0.5


@pytest.mark.parametrize("name", list(DISTANCES))
def test_derivatives_of_two_orders_are_right_and_finite_where_a_unit_is_dead(name: str) -> None:
    s, r = ([g.requires_grad_() for g in gradients(seed)] for seed in (0, 1))
    count = len(s)
    distance = DISTANCES[name]
    inputs = tuple(s + r)
    assert torch.autograd.gradcheck(lambda *g: distance(g[:count], g[count:]), inputs)
    assert torch.autograd.gradgradcheck(lambda *g: distance(g[:count], g[count:]), inputs)
    for side in (s, r):
        with torch.no_grad():
            side[0][1] = 0
    first = torch.autograd.grad(distance(s, r), inputs, create_graph=True, allow_unused=True)
    used = [g for g in first if g is not None and g.requires_grad]
    second = torch.autograd.grad(torch.stack([g.square().sum() for g in used]).sum(), inputs, allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in (*first, *second) if g is not None)


def test_only_what_a_distance_reads_has_to_be_computed() -> None:
    network = make_network("convnet", in_channels=1, num_classes=3, image_size=8, width=4, depth=2,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    everything = list(network.parameters())
    assert [p.ndim for p in matched_parameters(network, "layerwise")] == [4, 4, 2]
    for name in ("mse", "cosine"):
        assert all(a is b for a, b in zip(matched_parameters(network, name), everything, strict=True))
    everything[0].requires_grad_(False)
    assert len(matched_parameters(network, "layerwise")) == 2


def test_what_does_not_fit_is_named() -> None:
    s = gradients(0)
    for name in DISTANCES:
        for wrong in (s[:-1], [g.transpose(0, -1) for g in s]):
            with pytest.raises(InvalidInputError):
                DISTANCES[name](s, wrong)
        with pytest.raises(InvalidInputError):
            DISTANCES[name]([], [])
    with pytest.raises(InvalidInputError, match="mse"):
        DISTANCES["layerwise"]([s[1]], [s[1]])
