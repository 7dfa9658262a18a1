from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, MemoryBudgetError, NonFiniteError
from tad_plugin.nn.derivatives.per_sample import (
    activation_bytes,
    as_parameters,
    per_sample_directional,
    per_sample_gradient_chunks,
    per_sample_gradients,
)
from tad_plugin.nn.derivatives.vectors import flatten
from tests.iwd.problems import convnet, digits_problem

NORMS = ["instance", "group", "batch", "none"]


def network_with(norm: str) -> nn.Module:
    network = convnet(norm)
    if norm == "batch":  # running statistics that differ from 0 and 1
        network.train()
        network(digits_problem().held_out)
    return network.eval()


def for_loop(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
        rows.append(flatten(torch.autograd.grad(loss, list(network.parameters()))))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_equal_a_for_loop(norm: str) -> None:
    p, network = digits_problem(real=13), network_with(norm)
    expected = for_loop(network, p.real, p.real_labels)
    found = per_sample_gradients(network, p.real, p.real_labels)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_equal_a_for_loop_in_float32(norm: str) -> None:
    p, network = digits_problem(real=13), network_with(norm).float()
    expected = for_loop(network, p.real.float(), p.real_labels)
    found = per_sample_gradients(network, p.real.float(), p.real_labels)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("norm", NORMS)
def test_directional_equals_inner_products(norm: str) -> None:
    p, network = digits_problem(real=13), network_with(norm)
    expected = for_loop(network, p.real, p.real_labels)
    u = torch.randn(expected.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = per_sample_directional(network, p.real, p.real_labels, u)
    assert torch.allclose(found, expected @ u, atol=1e-11)
    by_name = per_sample_directional(network, p.real, p.real_labels, as_parameters(network, u))
    assert torch.equal(found, by_name)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_soft_labels_and_other_parameters() -> None:
    p, network, other = digits_problem(real=5), convnet(seed=0), convnet(seed=1)
    soft = F.softmax(torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    values = {name: parameter.detach() for name, parameter in other.named_parameters()}
    found = per_sample_gradients(network, p.real, soft, parameters=flatten(values))
    assert torch.allclose(found, for_loop(other, p.real, soft), atol=1e-12)


def test_chunking_changes_nothing() -> None:
    p, network = digits_problem(real=13), convnet()
    whole = per_sample_gradients(network, p.real, p.real_labels)
    u = torch.ones(whole.shape[1], dtype=torch.float64)
    directional = per_sample_directional(network, p.real, p.real_labels, u)
    one = 2 * whole.shape[1] * 8 + 2 * activation_bytes(network, p.real[0]) + p.real[0].numel() * 8
    sizes = []
    for samples in (1, 4, 13):
        chunks = list(per_sample_gradient_chunks(network, p.real, p.real_labels, memory_budget=samples * one))
        sizes.append(chunks[0][0].stop)
        assert torch.allclose(torch.cat([g for _, g in chunks]), whole, atol=1e-14)
        again = per_sample_directional(network, p.real, p.real_labels, u, memory_budget=samples * one)
        assert torch.allclose(again, directional, atol=1e-13)
    assert sizes == [1, 4, 13]


def test_a_budget_below_one_sample_names_both_numbers() -> None:
    p, network = digits_problem(real=3), convnet()
    with pytest.raises(MemoryBudgetError, match=r"\d{4,} .* 1000"):
        per_sample_gradients(network, p.real, p.real_labels, memory_budget=1000)
    with pytest.raises(MemoryBudgetError, match="1000"):
        per_sample_directional(network, p.real, p.real_labels, as_parameters(network), memory_budget=1000)


class WithBatchStatistics(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(1), "BatchNorm2d"),
        (nn.BatchNorm2d(1, track_running_stats=False).eval(), "BatchNorm2d"),
        (nn.InstanceNorm2d(1, track_running_stats=True), "InstanceNorm2d"),
        (nn.Dropout(0.5), "Dropout"),
    ],
)
def test_samples_that_depend_on_each_other_or_on_chance(module: nn.Module, message: str) -> None:
    network = WithBatchStatistics(module).double()
    if not module.training:
        network.eval()
    p = digits_problem(real=3)
    with pytest.raises(InvalidInputError, match=message):
        per_sample_gradients(network, p.real, p.real_labels)
    with pytest.raises(InvalidInputError, match=message):
        per_sample_directional(network, p.real, p.real_labels, as_parameters(network))


def test_wrong_arguments() -> None:
    p, network = digits_problem(real=3), convnet()
    with pytest.raises(InvalidInputError, match=r"\[5\]"):
        per_sample_directional(network, p.real, p.real_labels, torch.ones(5))
    with pytest.raises(InvalidInputError, match="features.0.weight"):
        per_sample_directional(network, p.real, p.real_labels, {"nothing": torch.ones(5)})
    with pytest.raises(InvalidInputError, match="3 images"):
        per_sample_gradients(network, p.real, p.real_labels[:2])
    with pytest.raises(InvalidInputError):
        as_parameters(nn.ReLU())
    with pytest.raises(NonFiniteError, match="directional"):
        per_sample_directional(network, p.real * float("nan"), p.real_labels, as_parameters(network))
