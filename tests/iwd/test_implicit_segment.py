from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tad_plugin.core.events import Segment
from tad_plugin.core.hook.attach import attach
from tad_plugin.errors import ConfigError, DisconnectedGraphError, MemoryBudgetError
from tad_plugin.iwd.implicit_segment import segment_influence
from tad_plugin.iwd.targets import validation_target
from tests.iwd.problems import Problem, convnet, correlation_and_slope, digits_problem

RATE, ALPHA = 0.1, 0.1


def at(network: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    sizes = [p.numel() for p in network.parameters()]
    named = list(network.named_parameters())
    return {n: v.view_as(p) for (n, p), v in zip(named, flat.split(sizes), strict=True)}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def trained(network: nn.Module, start: Tensor, x: Tensor, y: Tensor, w: Tensor, rate: float) -> Tensor:
    """One full-batch step on weighted real data."""
    theta = start.detach().clone().requires_grad_()
    loss = (w * F.cross_entropy(functional_call(network, at(network, theta), (x,)), y, reduction="none")).mean()
    return (theta - rate * torch.autograd.grad(loss, theta)[0]).detach()


def matching(network: nn.Module, start: Tensor, target: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """The trajectory-matching loss of one student step."""
    theta = start.detach().clone().requires_grad_()
    loss = F.cross_entropy(functional_call(network, at(network, theta), (s,)), labels)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    student = start - RATE * gradient
    return (student - target).square().sum() / (start - target).square().sum()


def setting() -> tuple[Problem, nn.Module, Tensor, Tensor]:
    p = digits_problem(real=32, held_out=60)
    network = convnet(width=4, activation="sigmoid")
    start = flat(p.detach() for p in network.parameters())
    return p, network, start, trained(network, start, p.real, p.real_labels, torch.ones(32).double(), RATE)


def segment_of(p: Problem, network: nn.Module, start: Tensor, target: Tensor, iteration: int = 0) -> Segment:
    leaf, s = target.clone().requires_grad_(), p.synthetic.clone().requires_grad_()
    loss = matching(network, start, leaf, s, p.synthetic_labels)
    return Segment(loss, start, leaf, (s,), p.synthetic_labels, network, 0, 0, 1, iteration, expert_lr=RATE)


@pytest.mark.parametrize("kind", ["validation", "matching"])
def test_against_finite_differences_of_the_weights(kind: str) -> None:
    """Raise a weight, train the expert anew, take the step of S, measure M."""
    p, network, start, target = setting()
    eta = 1e-3

    def measured(w: Tensor) -> float:
        own = trained(network, start, p.real, p.real_labels, w, RATE)
        s = p.synthetic.clone().requires_grad_()
        loss = matching(network, start, own, s, p.synthetic_labels)
        if kind == "matching":
            return float(loss.detach())
        moved = s - eta * torch.autograd.grad(loss, s)[0]
        found = validation_target(
            network, moved.detach(), p.synthetic_labels, p.held_out, p.held_out_labels, alpha=ALPHA
        )
        return float(found.detach()) / eta

    oracle = []
    for i in range(32):
        values = []
        for sign in (1, -1):
            w = torch.ones(32).double()
            w[i] += sign * 1e-3
            values.append(measured(w))
        oracle.append((values[0] - values[1]) / 2e-3)
    segment = segment_of(p, network, start, target)
    found = segment_influence(segment, p.real, p.real_labels, (p.held_out, p.held_out_labels), target=kind, alpha=ALPHA)
    correlation, slope = correlation_and_slope(found, torch.tensor(oracle, dtype=torch.float64))
    assert correlation > 0.999 and slope == pytest.approx(1.0, abs=0.01)
    segment.loss.backward()  # type: ignore[no-untyped-call]
    assert segment.synthetic[0].grad is not None  # the loop's own backward pass still has its graph


def test_through_the_hook() -> None:
    p, network, start, target = setting()
    network, settings = network.float(), {"every": 2, "early": 0, "warmup": 0, "ess": 0.5}
    hook = attach(
        "iwd", labels=p.real_labels, data=p.real.float(), num_classes=10, config={"iwd": settings}, start=False
    ) if len(p.real_labels.unique()) == 10 else None  # fmt: skip
    assert hook is not None
    hook.start()
    assert hook.wants_graph()
    p = Problem(**{k: v.float() if v.is_floating_point() else v for k, v in vars(p).items()})
    hook.before_segment_update(segment_of(p, network, start.float(), target.float()))
    assert not hook.wants_graph()
    counts = hook.state["influence_count"]
    assert 0 < int(counts.sum()) < 32 and float(hook.state["influence_weight"].std()) > 0
    segment = segment_of(p, network, start.float(), target.float())
    segment.target.requires_grad_(False)
    hook.before_segment_update(segment)  # not due, so nothing is asked of it
    with pytest.raises(DisconnectedGraphError, match="requires_grad=False"):
        hook.before_segment_update(segment)


def test_bad_input() -> None:
    p, network, start, target = setting()
    held_out = (p.held_out, p.held_out_labels)
    segment = segment_of(p, network, start, target)
    with pytest.raises(ConfigError, match="best"):
        segment_influence(segment, p.real, p.real_labels, held_out, target="best")
    with pytest.raises(MemoryBudgetError):
        segment_influence(segment, p.real, p.real_labels, held_out, memory_budget=1)
    segment.synthetic_labels = None
    with pytest.raises(ConfigError, match="labels"):
        segment_influence(segment, p.real, p.real_labels, held_out)
    segment.loss = (segment.synthetic[0] ** 2).sum()
    with pytest.raises(DisconnectedGraphError, match="segment.target"):
        segment_influence(segment, p.real, p.real_labels, held_out, target="matching")
    hook = attach("iwd", labels=p.real_labels, data=p.real.float(), num_classes=10, config={"iwd": {"implicit": False}})
    with pytest.raises(ConfigError, match="implicit"):
        hook.before_segment_update(segment_of(p, network, start, target))
