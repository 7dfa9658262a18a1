"""Shared by the tests of the baselines: a small gradient-matching loop, a method that sets weights, a hook."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dc import DC, DSA, DCConfig, DSAConfig
from tests.problems import PLAIN, plain_hook


def dc_loop(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    hook: Hook | None,
    *,
    cls: type[DC] = DC,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> DC:
    """A loop of width 4 with 2 images per class, 3 updates per network and 2 epochs between them.

    None as hook stands for :func:`tests.problems.plain_hook`.
    """
    config_class = DSAConfig if cls is DSA else DCConfig
    config = config_class(**{"ipc": 2, "width": 4, "batch_real": 8, "outer": 3, "inner": 2, "init": "real", **settings})
    generator = torch.Generator().manual_seed(seed)
    data = RealData(images.to(dtype), labels, num_classes)
    hook = hook or plain_hook(data)
    start = SyntheticSet(*initial_images(config, data, hook, generator), num_classes, PLAIN)
    loop = cls(config, data, hook, start, generator)
    loop.network.to(dtype)
    return loop


class Scales(Callback):
    """Sets weights in [0.5, 1.5] at the start."""

    name: ClassVar[str] = "scales"

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        generator = torch.Generator().manual_seed(5)
        state.set_weights(self.name, torch.rand(len(state), generator=generator) + 0.5)


def hook_with(images: Tensor, labels: Tensor, *callbacks: Callback) -> Hook:
    """A started hook with these callbacks, for 3 classes."""
    hook = Hook(SampleState(labels, 3), RealData(images, labels, 3), callbacks, method="test")
    return hook.start()
