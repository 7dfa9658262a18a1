"""The hook's handles for scripts that report a segment step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Segment
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.errors import ConfigError, InvalidInputError
from tests.problems import blobs

K, RATE = 3, 0.1


class Watcher(Callback):
    """Wants every second segment and keeps what it is given."""

    name = "watcher"
    needs_graph = True

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.terms: list[tuple[Segment, Tensor, Tensor, Tensor]] = []

    def wants_graph(self, iteration: int) -> bool:
        return iteration % 2 == 0

    def on_segment_term(
        self, *, state: SampleState, segment: Segment, term: Tensor, images: Tensor, indices: Tensor
    ) -> None:
        self.terms.append((segment, term, images, indices))

    def on_segment(self, *, state: SampleState, segment: Segment) -> None:
        self.segments.append(segment)


def network(width: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, K))


def expert(epochs: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    first = [p.detach() for p in network().parameters()]
    return [[p + 0.05 * e * torch.randn(p.shape, generator=generator) for p in first] for e in range(epochs + 1)]


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters])


def watched() -> tuple[Hook, Watcher]:
    images, labels = blobs()
    made, watcher = attach("none", labels=labels, data=images, num_classes=K), Watcher()
    return Hook(made.state, made.data, [watcher]).start(), watcher


def test_without_a_method_nothing_is_kept_or_computed() -> None:
    images, labels = blobs()
    hook, trajectory = attach("none", labels=labels, data=images, num_classes=K), expert()
    start, target = flat(trajectory[0]), flat(trajectory[2])
    hook.student(network())
    assert hook.begin_segment(images[:3], labels[:3], start, target, trajectory, 0, 2, logits=True) is target
    hook.segment_term(target.sum(), images[:2], torch.tensor([0, 1]))
    hook.end_segment(target.sum())
    hook.begin_expert()
    assert hook.iteration == 0 and hook.segments.network is None and hook.segments.current is None


def test_a_segment_is_reported_step_by_step() -> None:
    hook, watcher = watched()
    images, _ = blobs()
    trajectory, soft = expert(), torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    start, target = flat(trajectory[1]), flat(trajectory[3])
    for iteration in range(2):
        student = network().train()
        hook.student(student)
        leaf = hook.begin_segment(images[:3], soft, start, target, trajectory, 1, 2, logits=True)
        assert torch.equal(leaf, target) and (leaf is target) == (iteration == 1)
        hook.segment_term(leaf.sum(), images[:2], torch.tensor([1, 0]))
        loss = leaf.square().sum()
        hook.end_segment(loss)
        assert hook.iteration == iteration + 1
    (segment,) = watcher.segments  # the second iteration is not one that scores
    assert segment.iteration == 0 and segment.data is hook.data and segment.loss.requires_grad
    assert segment.target.is_leaf and segment.target.requires_grad and not target.requires_grad
    assert segment.synthetic_labels is not None and torch.equal(segment.synthetic_labels, soft.softmax(1))
    assert segment.checkpoints is not None and segment.checkpoints.shape == (3, len(start))
    assert torch.equal(segment.checkpoints, torch.stack([flat(p) for p in trajectory[1:]]))
    assert (segment.start_epoch, segment.epochs) == (1, 2)
    assert segment.network is not student and not segment.network.training
    (term,) = watcher.terms
    assert term[0] is segment and term[3].tolist() == [1, 0]


def test_bad_order_and_textures_are_named() -> None:
    hook, _ = watched()
    images, labels = blobs()
    trajectory = expert()
    given: Any = (labels[:3], flat(trajectory[0]), flat(trajectory[1]), trajectory, 0, 1)
    with pytest.raises(InvalidInputError, match=r"hook\.student"):
        hook.begin_segment(images[:3], *given)
    hook.student(network())
    with pytest.raises(ConfigError, match=r"\[1, 16, 16\].*\[1, 8, 8\]"):
        hook.begin_segment(torch.zeros(3, 1, 16, 16), *given)


def gradients(images: Tensor, labels: Tensor, start: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two student steps on halves of S, at parameters that do not depend on S: (rows, their images, gradient)."""
    model, theta, found = network(), start.clone().requires_grad_(), []
    sizes = [p.numel() for p in model.parameters()]
    for rows in (torch.tensor([0, 2, 4]), torch.tensor([5, 3, 1])):
        parts = zip(model.named_parameters(), theta.split(sizes), strict=True)
        named = {n: v.view_as(p) for (n, p), v in parts}
        x = images[rows]
        loss = F.cross_entropy(functional_call(model, named, (x,)), labels[rows])
        found.append((rows, x, torch.autograd.grad(loss, theta, create_graph=True)[0]))
    return found


@pytest.mark.parametrize("target", ["validation", "matching"])
def test_a_loss_term_by_term_gives_the_influence_of_the_whole(target: str) -> None:
    """As the TESLA script does it: gradients in S without a graph of the loss."""
    real, labels = blobs()
    trajectory = expert()
    start, end = flat(trajectory[0]), flat(trajectory[2])
    synthetic = real[:6].clone().requires_grad_()
    found = {}
    for how in ("whole", "terms"):
        settings = {"iwd": {"target": target, "held_out": 3, "warmup": 0, "ess": 0.7}}
        hook = attach("iwd", labels=labels, data=real, num_classes=K, config=settings)
        hook.student(network())
        leaf = hook.begin_segment(synthetic, labels[:6], start, end, trajectory, 0, 2)
        assert leaf.requires_grad
        steps, distance = gradients(synthetic, labels, start), (start - leaf).square().sum()
        total = sum(g for _, _, g in steps)
        if how == "whole":
            hook.end_segment((start - RATE * total - leaf).square().sum() / distance)
        else:
            for rows, x, gradient in steps:
                ahead = 2 * (RATE * (leaf - start) + RATE**2 * total.detach())
                hook.segment_term(ahead @ gradient / distance, x, rows)
            hook.end_segment((start - RATE * total.detach() - leaf).square().sum() / distance)
        found[how] = hook.state["influence"].clone()
        assert float(hook.state["influence_weight"].std()) > 0
        assert hook.segments.current is None and hook.iteration == 1
    assert float(found["whole"].abs().max()) > 0
    torch.testing.assert_close(found["whole"], found["terms"], rtol=1e-4, atol=1e-5)
