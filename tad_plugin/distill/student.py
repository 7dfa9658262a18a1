"""The matching loss of trajectory matching: how far a student trained on the synthetic set ends from an expert.

The student starts at the expert's parameters theta_0. It takes T steps of plain SGD on the synthetic set,

    theta_{t+1} = theta_t - rate * g_t    with    g_t = grad_theta CE(theta_t; step t).

With ``target``, the expert's later parameters, the loss is

    loss = |theta_T - target|^2 / |theta_0 - target|^2      (Cazenavette et al., CVPR 2022).

It depends on the images, the labels and the rate through all steps. There are two forms of the same function:

- ``plain`` keeps the graph of all T steps.
- ``constant`` keeps only the parameters theta_t. The backward pass goes through the steps in reverse with the adjoint
  lambda_T = dloss/dtheta_T, and builds the graph of one step at a time. With s_t = <lambda_{t+1}, g_t>,

      dloss/dimages -= rate * ds_t/dimages,   dloss/drate -= s_t,   lambda_t = lambda_{t+1} - rate * ds_t/dtheta_t.

The constant form gives the exact derivative. TESLA (Cui et al., ICML 2023) drops the last term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.errors import InvalidInputError, explain, unknown_name
from tad_plugin.nn.augment import Augmentation, Draw
from tad_plugin.utils.transfers import upload

__all__ = [
    "FORMS",
    "Student",
    "StudentStep",
    "check_moves",
    "flat_parameters",
    "matching_loss",
    "plan_steps",
    "student_end",
]

FORMS = ("constant", "plain")

# Memory for the parameters theta_t. Beyond it only some of them are kept; the others are recomputed.
_KEPT_BYTES = 2**22


@dataclass(frozen=True)
class StudentStep:
    """One training step of the student.

    Attributes:
        indices: int64 [B], distinct positions in the synthetic set.
        draw: augmentation parameters, one set for each of the B images; None for no augmentation.
    """

    indices: Tensor
    draw: Draw | None = None


def plan_steps(
    count: int,
    syn_steps: int,
    batch_syn: int,
    augmentation: Augmentation,
    image_size: tuple[int, int],
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> list[StudentStep]:
    """Draws the batches and augmentations of the student's steps, in the order of the public code.

    The set is shuffled and split into batches of ``batch_syn``; the last one may be smaller. The batches are used from
    the last to the first. Then the set is shuffled again. Each image gets its own augmentation draw.

    Args:
        count: images in the synthetic set.
        syn_steps: number of steps T.
        batch_syn: images per step; 0 or more than ``count`` takes all.
        augmentation: augmentation of the synthetic images.
        image_size: (height, width).
        generator: CPU generator of all draws.
        device: device of the synthetic set.
    """
    steps: list[StudentStep] = []
    chunks: list[Tensor] = []
    for _ in range(syn_steps):
        if not chunks:
            chunks = list(torch.randperm(count, generator=generator).split(min(batch_syn or count, count)))
        indices, draw = chunks.pop(), None
        if augmentation.strategies:
            draw = augmentation.draw(len(indices), image_size, generator=generator, siamese=False)
        steps.append(StudentStep(indices, draw))
    return _moved(steps, device)


def _moved(steps: Sequence[StudentStep], device: torch.device | str) -> list[StudentStep]:
    """The steps with all their tensors on ``device``, moved in one copy."""
    drawn = [(step.draw, {} if step.draw is None else step.draw.values) for step in steps]
    flat = [t for step, (_, values) in zip(steps, drawn, strict=True) for t in (step.indices, *values.values())]
    there = iter(upload(flat, device))
    found = []
    for draw, values in drawn:
        indices, own = next(there), {name: next(there) for name in values}
        found.append(StudentStep(indices, None if draw is None else Draw(draw.strategies, draw.siamese, own)))
    return found


def flat_parameters(parameters: Sequence[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Concatenates parameters, in the order given, into a float32 vector [P] on ``device``.

    Parameters on the CPU go up in one copy that does not wait.
    """
    vector = torch.cat([p.detach().to(torch.float32).reshape(-1) for p in parameters])
    return upload([vector], device)[0].to(device)


class Student:
    """A network as a function of its parameters, with the augmentation of its training images.

    Args:
        network: images -> logits [B,K]; its own parameters are neither read nor changed.
        augmentation: applied to the images of each step with the step's draw.
        chunk: images per pass of the constant form; 0 takes a whole step. It changes memory and speed; values change
            by rounding only. A network with batch norm always takes a whole step, because its samples interact.
    """

    def __init__(self, network: nn.Module, augmentation: Augmentation, *, chunk: int = 0) -> None:
        self.network = network
        self.augmentation = augmentation
        named = list(network.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.sizes = [p.numel() for _, p in named]
        self.chunk = 0 if any(isinstance(m, _BatchNorm) for m in network.modules()) else chunk

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor, draw: Draw | None, count: int) -> Tensor:
        """Cross-entropy, summed over the images and divided by ``count``; a scalar.

        Args:
            theta: float [P], parameters.
            images: float [B,C,H,W], before augmentation.
            labels: int64 [B], or the *logits* of soft labels, float [B,K].
            draw: augmentation draw; None for no augmentation.
            count: images of the whole step.
        """
        if draw is not None:
            images = self.augmentation.apply(images, draw)
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        logits = torch.func.functional_call(self.network, {n: v.view(s) for n, v, s in parts}, (images,))
        targets = labels.softmax(1) if labels.is_floating_point() else labels
        return F.cross_entropy(logits, targets, reduction="sum") / count

    def parts(self, step: StudentStep) -> Iterator[tuple[Tensor, Draw | None]]:
        """Yields (indices, draw) of each pass of a step of the constant form."""
        size = self.chunk or len(step.indices)
        for start in range(0, len(step.indices), size):
            part, draw = slice(start, start + size), step.draw
            if draw is not None:
                draw = Draw(draw.strategies, draw.siamese, {k: v[part] for k, v in draw.values.items()})
            yield step.indices[part], draw


def matching_loss(
    student: Student,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    steps: Sequence[StudentStep],
    *,
    form: str = "constant",
    moving: bool = False,
) -> Tensor:
    """|theta_T - target|^2 / |start - target|^2, a scalar >= 0 with a graph to images, label logits and rate.

    Args:
        student: network and augmentation.
        start: float [P], the expert's parameters at the start of the segment; treated as a constant.
        target: float [P], the expert's parameters at its end; may require a gradient.
        images: synthetic images, float [M,C,H,W].
        labels: int64 [M], or the logits of soft labels, float [M,K].
        rate: synthetic learning rate, a scalar tensor.
        steps: the student's steps.
        form: "constant" or "plain". The constant form has second derivatives in ``target`` only.
        moving: True leaves out the check that the expert moves, which waits for the device. The loss of an expert that
            does not is NaN or infinite; :func:`check_moves` then tells why.

    Raises:
        InvalidInputError: there is no step, a vector has another length, or the expert does not move.
        UnknownNameError: no such form.
    """
    size = sum(student.sizes)
    if not steps or start.shape != (size,) or target.shape != (size,):
        expected, got = f"steps and two vectors of {size} parameters", f"{len(steps)}, {start.shape} and {target.shape}"
        raise InvalidInputError(explain(expected, got, "Pass experts of the network that is matched on"))
    distance = (start.detach() - target).square().sum()
    if not moving:
        check_moves(start, target)
    end = student_end(student, start, images, labels, rate, steps, form=form)
    return (end - target).square().sum() / distance


def check_moves(start: Tensor, target: Tensor) -> None:
    """Raises InvalidInputError if an expert has the same parameters at both ends of a segment, or NaN."""
    if not float((start.detach() - target.detach()).square().sum()) > 0:
        do = "Train the experts again: files written on a CPU by code that saves live parameters hold one epoch only"
        got = "the same parameters at both, or NaN"
        raise InvalidInputError(explain("an expert that moves between its start and its target", got, do))


def student_end(
    student: Student,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    steps: Sequence[StudentStep],
    *,
    form: str = "constant",
) -> Tensor:
    """theta_T, float [P], with a graph to images, label logits and rate; arguments as :func:`matching_loss`."""
    if form not in FORMS:
        raise unknown_name("form", form, list(FORMS))
    if form == "constant":
        end: Tensor = _Rollout.apply(images, labels, rate, _Walk(student, start.detach(), list(steps)))
        return end
    theta = start.detach().clone().requires_grad_()
    for step in steps:
        rows = images[step.indices]
        loss = student.loss(theta, rows, labels[step.indices], step.draw, len(rows))
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rate * gradient
    return theta


class _Walk:
    """The steps of one student. Keeps every ``stride``-th parameter vector."""

    def __init__(self, student: Student, start: Tensor, steps: list[StudentStep]) -> None:
        self.student, self.start, self.steps = student, start, steps
        room, count = max(1, _KEPT_BYTES // (start.numel() * start.element_size())), len(steps)
        fitting = (k for k in range(1, count + 1) if math.ceil(count / k) + k <= room + 1)
        self.stride = next(fitting, math.isqrt(count))
        self.kept: list[Tensor] = []

    def forward(self, images: Tensor, labels: Tensor, rate: Tensor) -> Tensor:
        """Returns theta_T."""
        theta, self.kept = self.start, []
        for t, step in enumerate(self.steps):
            if t % self.stride == 0:
                self.kept.append(theta)
            theta = theta - rate * self.gradient(theta, step, images, labels)
        return theta

    def backwards(self, images: Tensor, labels: Tensor, rate: Tensor) -> Iterator[tuple[StudentStep, Tensor]]:
        """Yields (step t, theta_t) from the last to the first; vectors that were not kept are recomputed."""
        for block in range(len(self.kept) - 1, -1, -1):
            steps = self.steps[block * self.stride : (block + 1) * self.stride]
            along = [self.kept[block]]
            for step in steps[:-1]:
                along.append(along[-1] - rate * self.gradient(along[-1], step, images, labels))
            while steps:
                yield steps.pop(), along.pop()

    def gradient(self, theta: Tensor, step: StudentStep, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient g_t, without a graph."""
        total = torch.zeros_like(theta)
        with torch.enable_grad():
            for indices, draw in self.student.parts(step):
                leaf = theta.detach().requires_grad_()
                loss = self.student.loss(leaf, images[indices], labels[indices], draw, len(step.indices))
                total += torch.autograd.grad(loss, leaf)[0]
        return total

    def adjoint(
        self, slope: Tensor, images: Tensor, labels: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Derivatives of <slope, theta_T> in images, label logits (None for hard labels) and rate."""
        soft = labels.is_floating_point()
        by_image, by_rate = torch.zeros_like(images), torch.zeros_like(rate)
        by_label = torch.zeros_like(labels) if soft else None
        for step, theta in self.backwards(images, labels, rate):
            pulled = slope.clone()
            for indices, draw in self.student.parts(step):
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in (theta, images[indices])]
                    own = labels[indices].detach().requires_grad_(soft)
                    loss = self.student.loss(leaves[0], leaves[1], own, draw, len(step.indices))
                    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
                    along = gradient @ slope
                    found = torch.autograd.grad(along, [*leaves, own] if soft else leaves)
                pulled -= rate * found[0]
                by_image.index_add_(0, indices, -rate * found[1])
                by_rate -= along.detach()
                if by_label is not None:
                    by_label.index_add_(0, indices, -rate * found[2])
            slope = pulled
        return by_image, by_label, by_rate

    def tangent(self, images: Tensor, labels: Tensor, rate: Tensor, along: Sequence[Tensor | None]) -> Tensor:
        """Derivative of theta_T in the direction ``along`` of (images, label logits, rate).

        Second derivatives are symmetric. So the derivative of g_t in a direction of (theta, images, labels) is the
        gradient in theta of the loss's directional derivative. Two backward passes per step are enough.
        """
        soft = labels.is_floating_point()
        theta, moved = self.start, torch.zeros_like(self.start)
        by_image, by_label, by_rate = along
        for step in self.steps:
            gradient, bent = torch.zeros_like(theta), torch.zeros_like(theta)
            for indices, draw in self.student.parts(step):
                with torch.enable_grad():
                    leaf = theta.detach().requires_grad_()
                    rows = images[indices].detach().requires_grad_(by_image is not None)
                    own = labels[indices].detach().requires_grad_(soft and by_label is not None)
                    leaves = [t for t in (leaf, rows, own) if t.requires_grad]
                    loss = self.student.loss(leaf, rows, own, draw, len(step.indices))
                    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
                    directions = [moved, *(d[indices] for d in (by_image, by_label if soft else None) if d is not None)]
                    value = torch.stack([(a * b).sum() for a, b in zip(slopes, directions, strict=True)]).sum()
                    bent += torch.autograd.grad(value, leaf)[0]
                gradient += slopes[0].detach()
            moved = moved - rate * bent - (0 if by_rate is None else by_rate * gradient)
            theta = theta - rate * gradient
        return moved


class _Rollout(torch.autograd.Function):
    """theta_T. The backward pass goes through the steps in reverse."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, labels: Tensor, rate: Tensor, walk: _Walk) -> Tensor:
        ctx.save_for_backward(images, labels, rate)
        ctx.walk = walk
        return walk.forward(images.detach(), labels.detach(), rate.detach())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # Detached: the backward pass is differentiable in the slope only.
        images, labels, rate = (t.detach() for t in ctx.saved_tensors)
        by_image, by_label, by_rate = _Adjoint.apply(slope, images, labels, rate, ctx.walk)
        return by_image, by_label, by_rate, None


class _Adjoint(torch.autograd.Function):
    """The backward pass as a linear function of the slope. Its own derivative is the tangent of the walk."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, images: Tensor, labels: Tensor, rate: Tensor, walk: _Walk
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(images, labels, rate)
        ctx.set_materialize_grads(False)
        ctx.walk = walk
        return walk.adjoint(slope, images, labels, rate)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.walk.tangent(*ctx.saved_tensors, along), None, None, None, None
