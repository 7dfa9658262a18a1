"""Shared by the tests of MTT and DATM: experts in memory and a small loop that matches them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.datm import DATM
from tad_plugin.distill.experts.buffer import Trajectory
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.distill.mtt import MTT
from tad_plugin.utils.seeds import expert_generator
from tests.distill.experts.training import plain
from tests.problems import PLAIN

SETTINGS: dict[str, Any] = {
    "ipc": 2, "width": 4, "augment": "color_crop", "syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2,
    "batch_syn": 4, "lr_img": 1.0, "lr_lr": 1e-4, "lr_teacher": 0.05, "iterations": 8,
}  # fmt: skip
#: settings of the experts
TRAINING: dict[str, Any] = {"epochs": 3, "width": 4, "batch_train": 16, "lr": 0.1, "augment": "none"}


def trained(
    data: RealData, hook: Hook | None = None, *, first: int = 0, count: int = 2, **more: Any
) -> list[Trajectory]:
    """Trajectories of small experts, by default without methods."""
    config = ExpertConfig(**{**TRAINING, **more})
    found = []
    for number in range(first, first + count):
        trainer = ExpertTrainer(config, data, hook or plain(data), expert_generator(0, number))
        for _ in range(config.epochs):
            trainer.run_epoch()
        found.append(trainer.trajectory)
    return found


def loop_of(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    hook: Hook | None,
    experts: Experts | None = None,
    *,
    cls: type[MTT] = MTT,
    seed: int = 3,
    **settings: Any,
) -> MTT:
    """A loop of width 4 with 2 images per class on two experts of 3 epochs each."""
    values = dict(SETTINGS)
    if cls is DATM:
        values |= {"init": "real", "threshold": 10.0}
    config: Any = cls.Config(**{**values, **settings})
    generator = torch.Generator().manual_seed(seed)
    data = RealData(images, labels, num_classes)
    experts = experts or Experts([trained(data)])
    start = SyntheticSet(*cls.initial_images(config, data, hook, generator, experts), num_classes, PLAIN)
    return cls(config, data, hook, start, generator, experts)


def run(loop: MTT, iterations: int, first: int = 0) -> list[Tensor]:
    """Takes some steps; returns images, learning rate, and label logits if the labels are learned."""
    for iteration in range(first, first + iterations):
        loop.step(iteration)
    logits = getattr(loop, "logits", None)
    return [loop.result().images, loop.rate.detach().clone(), *([] if logits is None else [logits.detach().clone()])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all are equal to the last bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
