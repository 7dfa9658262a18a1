"""The matching loss of trajectories: both forms against each other, a plain loop, and finite differences."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.distill import student as module
from tad_plugin.distill.student import Student, StudentStep, flat_parameters, matching_loss, plan_steps
from tad_plugin.errors import InvalidInputError, UnknownNameError
from tad_plugin.nn.augment import DEFAULT_STRATEGY, Augmentation
from tad_plugin.nn.networks import make_network

COUNT, CLASSES, SIDE = 7, 3, 8


class Problem:
    """A student on random images, the segment of a made-up expert, and the student's steps."""

    def __init__(
        self, strategy: str = "none", *, soft: bool = True, steps: int = 5, batch: int = 3, chunk: int = 0, **net: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        options = {"in_channels": 2, "num_classes": CLASSES, "image_size": SIDE, "width": 4, "depth": 2, **net}
        self.network = make_network("convnet", generator=generator, **options).double()
        augmentation = Augmentation(strategy)
        self.student = Student(self.network, augmentation, chunk=chunk)
        self.start = torch.cat([p.detach().reshape(-1) for p in self.network.parameters()])
        noise = torch.randn(self.start.shape, generator=generator, dtype=torch.float64)
        self.target = (self.start + 0.1 * noise).requires_grad_()
        shape = (COUNT, 2, SIDE, SIDE)
        self.images = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        logits = torch.randn(COUNT, CLASSES, generator=generator, dtype=torch.float64)
        self.labels = logits.requires_grad_() if soft else torch.arange(COUNT) % CLASSES
        self.rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        self.steps = plan_steps(COUNT, steps, batch, augmentation, (SIDE, SIDE), generator=generator)

    @property
    def learned(self) -> list[Tensor]:
        return [self.images, self.rate, *([self.labels] if self.labels.is_floating_point() else [])]

    def loss(self, form: str) -> Tensor:
        return matching_loss(
            self.student, self.start, self.target, self.images, self.labels, self.rate, self.steps, form=form
        )

    def gradients(self, form: str) -> list[Tensor]:
        loss = self.loss(form)
        return [loss.detach(), *torch.autograd.grad(loss, self.learned)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and float(b.abs().max()) > 0
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("strategy", ["none", *DEFAULT_STRATEGY.split("_"), DEFAULT_STRATEGY])
def test_the_constant_form_is_the_plain_one(strategy: str) -> None:
    problem = Problem(strategy)
    close(problem.gradients("constant"), problem.gradients("plain"))


@pytest.mark.parametrize(("chunk", "kept"), [(1, 2**25), (2, 1), (0, 1), (0, 3000)])
@pytest.mark.parametrize("soft", [True, False])
def test_chunks_and_recomputed_parameters_change_nothing(
    chunk: int, kept: int, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("color_crop_scale", soft=soft, chunk=chunk, steps=11)
    expected = problem.gradients("plain")
    monkeypatch.setattr(module, "_KEPT_BYTES", kept)
    walk = module._Walk(problem.student, problem.start, problem.steps)
    assert walk.stride == (1 if kept > 3000 else 3)
    close(problem.gradients("constant"), expected)


def test_float32_agrees_to_1e_5() -> None:
    problem = Problem(DEFAULT_STRATEGY, steps=10)
    exact = problem.gradients("plain")
    problem.network.float()
    for name in ("start", "target", "images", "labels", "rate"):
        value = getattr(problem, name).detach().float()
        setattr(problem, name, value.requires_grad_(name not in ("start", "target")))
    close([t.double() for t in problem.gradients("constant")], exact, 1e-5)
    close([t.double() for t in problem.gradients("plain")], exact, 1e-5)


def test_batch_norm_sees_whole_steps() -> None:
    problem = Problem(norm="batch", chunk=1)
    assert problem.student.chunk == 0
    close(problem.gradients("constant"), problem.gradients("plain"), 1e-9)


def test_the_student_takes_steps_of_plain_sgd() -> None:
    """Against torch's own optimiser on a copy of the network."""
    problem = Problem("none", soft=False)
    network = copy.deepcopy(problem.network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in problem.steps:
        optimizer.zero_grad()
        F.cross_entropy(network(problem.images.detach()[step.indices]), problem.labels[step.indices]).backward()
        optimizer.step()
    end = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    target = problem.target.detach()
    expected = (end - target).square().sum() / (problem.start - target).square().sum()
    for form in module.FORMS:
        assert float(problem.loss(form).detach()) == pytest.approx(float(expected), rel=1e-12)


def test_soft_labels_are_the_softmax_of_what_is_learned() -> None:
    hard = Problem(soft=False)
    sure = Problem(soft=True)
    sure.labels = (1e3 * F.one_hot(hard.labels, CLASSES)).double()
    assert float(sure.loss("constant").detach()) == pytest.approx(float(hard.loss("plain").detach()), rel=1e-12)


def test_gradients_against_finite_differences() -> None:
    problem = Problem("crop_rotate", activation="sigmoid")
    _, *found = problem.gradients("constant")
    step = 1e-6
    for tensor, gradient in zip(problem.learned, found, strict=True):
        flat = tensor.detach().view(-1)  # shares its memory
        for i in range(0, len(flat), max(1, len(flat) // 5)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(float(problem.loss("plain").detach()))
                flat[i] -= sign * step
            oracle = (values[0] - values[1]) / (2 * step)
            assert float(gradient.reshape(-1)[i]) == pytest.approx(oracle, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("strategy", ["none", "color"])
def test_the_second_derivative_in_the_target_that_influence_needs(strategy: str) -> None:
    problem = Problem(strategy, chunk=2)
    directions = [torch.cos(torch.arange(t.numel()).double()).view(t.shape) for t in problem.learned]
    found = []
    for form in module.FORMS:
        gradients = torch.autograd.grad(problem.loss(form), problem.learned, create_graph=True)
        for chosen in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
            parts = zip(gradients[chosen], directions[chosen], strict=True)
            value = torch.stack([(g * d).sum() for g, d in parts]).sum()
            found.append(torch.autograd.grad(value, problem.target, retain_graph=True)[0])
    close(found[:4], found[4:])


def test_the_graph_of_the_constant_form_does_not_grow() -> None:
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def saved(form: str, steps: int) -> int:
        alive: weakref.WeakSet[Box] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Box:
            alive.add(box := Box(tensor))
            return box

        problem = Problem(steps=steps)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            loss = problem.loss(form)
        gc.collect()
        assert loss.requires_grad
        held = {b.tensor.untyped_storage().data_ptr(): b.tensor.untyped_storage().nbytes() for b in alive}
        return sum(held.values())

    assert saved("constant", 20) == saved("constant", 2)
    assert saved("plain", 20) > 5 * saved("plain", 2)


def test_parameters_kept_along_the_way_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    size = problem.start.numel() * 8
    for count, room, stride in ((100, 100, 1), (100, 60, 2), (100, 25, 5), (100, 5, 10), (1, 1, 1)):
        monkeypatch.setattr(module, "_KEPT_BYTES", room * size)
        steps = [StudentStep(torch.tensor([0]))] * count
        assert module._Walk(problem.student, problem.start, steps).stride == stride


def test_steps_come_in_the_fields_order(global_rng_untouched: None) -> None:
    generator = torch.Generator().manual_seed(4)
    steps = plan_steps(7, 5, 3, Augmentation("none"), (8, 8), generator=generator)
    generator.manual_seed(4)
    first, second = (torch.randperm(7, generator=generator).split(3) for _ in range(2))
    expected = [*reversed(first), *reversed(second)][:5]
    assert all(torch.equal(s.indices, e) and s.draw is None for s, e in zip(steps, expected, strict=True))
    whole = plan_steps(7, 2, 0, Augmentation("crop"), (8, 8), generator=generator)
    assert [len(s.indices) for s in whole] == [7, 7]
    assert all(s.draw is not None and len(s.draw.values["crop"]) == 7 and not s.draw.siamese for s in whole)


def test_bad_input_is_named() -> None:
    problem = Problem()
    with pytest.raises(UnknownNameError, match="tesla"):
        problem.loss("tesla")
    with pytest.raises(InvalidInputError, match=str(len(problem.start))):
        matching_loss(
            problem.student, problem.start[:-1], problem.target, problem.images, problem.labels, problem.rate,
            problem.steps,
        )  # fmt: skip
    problem.steps = []
    with pytest.raises(InvalidInputError, match="steps"):
        problem.loss("constant")
    problem = Problem()
    problem.target = problem.start
    with pytest.raises(InvalidInputError):
        problem.loss("constant")


def test_flat_parameters_are_in_the_networks_order() -> None:
    network = Problem().network.float()
    flat = flat_parameters(list(network.parameters()))
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(network.parameters()).detach())
