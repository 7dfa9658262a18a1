"""Small problems that several tests share: separable images, flipped labels, a hook and a loop on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, initial_images
from tad_plugin.distill.dm import DM, DMConfig

PLAIN = Preprocessing((0.0,), (1.0,))


def blobs(per_class: int = 20, num_classes: int = 3, *, size: int = 8, spread: float = 0.5, seed: int = 0) -> Any:
    """Gaussian blobs as images: (images float32 [N,1,size,size], true labels int64 [N]), classes interleaved."""
    generator = torch.Generator().manual_seed(seed)
    # Smooth 2x2 patterns, so that convolution and pooling keep them apart.
    centres = torch.randn(num_classes, 1, 2, 2, generator=generator).repeat_interleave(size // 2, 2)
    centres = centres.repeat_interleave(size // 2, 3) * 2
    labels = torch.arange(num_classes).repeat(per_class)
    images = centres[labels] + spread * torch.randn(len(labels), 1, size, size, generator=generator)
    return images, labels


def flip(labels: Tensor, num_classes: int, rate: float, seed: int = 0) -> Tensor:
    """Labels of which a share ``rate`` is moved to another class, at random."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < rate
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % num_classes, labels)


def plain_hook(data: RealData) -> Hook:
    """The hook without a method."""
    return attach("none", labels=data.labels, data=data.images, num_classes=data.num_classes)


def dm_loop(
    images: Tensor, labels: Tensor, num_classes: int, hook: Hook | None, *, seed: int = 3, **settings: Any
) -> DM:
    """A DM loop of width 4 with 2 images per class; None as hook stands for :func:`plain_hook`."""
    config = DMConfig(**{"ipc": 2, "width": 4, "batch_real": 8, "augment": "color_crop", **settings})
    generator = torch.Generator().manual_seed(seed)
    data = RealData(images, labels, num_classes)
    hook = hook or plain_hook(data)
    start = SyntheticSet(*initial_images(config, data, hook, generator), num_classes, PLAIN)
    return DM(config, data, hook, start, generator)


def distilled(loop: Baseline, iterations: int, first: int = 0) -> Tensor:
    """The synthetic images after the given number of iterations."""
    for iteration in range(first, first + iterations):
        loop.step(iteration)
    return loop.result().images
