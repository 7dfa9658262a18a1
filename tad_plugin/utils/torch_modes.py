"""PyTorch's modes, as a computation of ours needs them whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tad_plugin.utils.precision import network_precision

__all__ = ["default_modes"]


@contextmanager
def default_modes() -> Iterator[None]:
    """Runs a block, or a decorated function, in PyTorch's default modes and gives the caller's back.

    Gradients are on, inference mode and autocast are off, networks compute in float32, and the default dtype is
    float32. So a method computes the same under ``torch.no_grad()``, ``torch.inference_mode()``, ``torch.autocast``, a
    lower precision of networks and another default dtype.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            network_precision("fp32"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
