"""What the tests of the baselines share: a small gradient-matching loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tad_plugin.distill.dc import DC, DSA, DCConfig, DSAConfig
from tad_plugin.distill.loop import initial_images
from tad_plugin.hook import Hook
from tad_plugin.scorer import RealData
from tad_plugin.synthetic import SyntheticSet
from tests.problems import PLAIN


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
    """A loop of width 4 with 2 images per class, 3 updates per network and 2 epochs between them."""
    config_class = DSAConfig if cls is DSA else DCConfig
    config = config_class(**{"ipc": 2, "width": 4, "batch_real": 8, "outer": 3, "inner": 2, "init": "real", **settings})
    generator = torch.Generator().manual_seed(seed)
    data = RealData(images.to(dtype), labels, num_classes)
    start = SyntheticSet(*initial_images(config, data, hook, generator), num_classes, PLAIN)
    loop = cls(config, data, hook, start, generator)
    loop.network.to(dtype)
    return loop
