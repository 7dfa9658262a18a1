"""Pooling layers against torch's own, values and derivatives of first and second order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from tad_plugin.nn.networks import make_network
from tad_plugin.nn.pooling import HalvingAvgPool, ReluHalvingAvgPool

Layer = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def plain_relu(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(x), 2)


LAYERS: list[tuple[Layer, Layer]] = [(HalvingAvgPool(), plain), (ReluHalvingAvgPool(), plain_relu)]


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found.view(-1)[::7] = 0.0  # the kink itself
    return found


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
@pytest.mark.parametrize("shape", [(3, 2, 8, 6), (1, 1, 2, 2), (2, 3, 7, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torch_s(
    ours: Layer, theirs: Layer, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    results = []
    for layer in (ours, theirs):
        x = images(*shape, dtype=dtype).requires_grad_()
        y = layer(x * 1)
        (g,) = torch.autograd.grad((y * images(*y.shape, dtype=dtype)).sum(), x)
        results.append((y.detach(), g))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[0][1], results[1][1])  # nothing is added up there


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_any_order_and_every_mode_of_differentiation(ours: Layer, theirs: Layer) -> None:
    x = images(2, 3, 4, 6)[..., :].where(images(2, 3, 4, 6) != 0, torch.full((), 0.3, dtype=torch.float64))
    torch.autograd.gradcheck(ours, x.clone().requires_grad_(), check_forward_ad=True)
    torch.autograd.gradgradcheck(ours, x.clone().requires_grad_())

    def energy(layer: Layer, x: Tensor) -> Tensor:
        return layer(x).pow(3).sum()

    for derivative in (
        lambda layer: vmap(grad(lambda v: energy(layer, v[None])))(x),
        lambda layer: vmap(lambda w: grad(lambda v: (layer(v) * w).pow(2).sum())(x))(images(3, 2, 3, 2, 3)),
        lambda layer: vmap(grad(lambda v: energy(layer, v)), in_dims=3)(torch.stack((x, -x, 2 * x), 3)),
        lambda layer: jvp(lambda v: grad(lambda u: energy(layer, u))(v), (x,), (x.flip(0),))[1],
        lambda layer: grad(lambda v: (grad(lambda u: energy(layer, u))(v) * x.flip(0)).sum())(x),
        lambda layer: jvp(grad(lambda v: (grad(lambda u: energy(layer, u))(v) * x).sum()), (x,), (x.flip(1),))[1],
    ):
        torch.testing.assert_close(derivative(ours), derivative(theirs))


def test_nan_and_infinity_stay_in_their_block() -> None:
    x = images(1, 1, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = float("nan"), float("inf")
    for ours, theirs in LAYERS:
        torch.testing.assert_close(ours(x.clone()), theirs(x), equal_nan=True)


def test_a_network_s_parameters_keep_their_names_and_its_activation_acts_once() -> None:
    network = make_network(
        "convnet", in_channels=3, num_classes=5, image_size=8, width=4, depth=2, generator=torch.Generator()
    )
    names = [n for n, _ in network.named_parameters()]
    assert names[:8:2] == ["features.0.weight", "features.1.weight", "features.4.weight", "features.5.weight"]
    parameters, x = dict(network.named_parameters()), images(2, 3, 8, 8, dtype=torch.float32)
    expected = x
    for conv in (0, 4):
        weight = parameters[f"features.{conv}.weight"]
        expected = F.conv2d(expected, weight, parameters[f"features.{conv}.bias"], padding=1)
        norm = nn.GroupNorm(4, 4)
        norm.load_state_dict({k: parameters[f"features.{conv + 1}.{k}"].detach() for k in ("weight", "bias")})
        expected = plain_relu(norm(expected))
    torch.testing.assert_close(functional_call(network, parameters, (x,)), network(x))
    torch.testing.assert_close(network.embed(x), expected.flatten(1))  # type: ignore[operator]
