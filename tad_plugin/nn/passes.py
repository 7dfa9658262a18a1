"""How many images go through a network in one pass.

The size of a pass changes speed and memory, and results only by rounding. A network that takes the statistics of its
batch is the exception (:func:`batch_statistics`): there a whole batch must go through in one pass. On an accelerator
passes are large. On a CPU they are small, so that activations stay in the cache:

- Without a graph (scoring, evaluation) a layer's activations are dropped at once: :func:`chunk_size`.
- With a backward pass the activations are read twice, so their bytes count: :func:`pass_size`.

Per-sample gradients have limits of their own, see :mod:`tad_plugin.nn.derivatives.per_sample`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "LARGE_PASS",
    "Embed",
    "batch_statistics",
    "chunk_size",
    "embed_in_passes",
    "pass_size",
    "with_fixed_statistics",
]

LARGE_PASS = 2048
"""Images per pass on an accelerator."""

# Measured without a graph: 64 images per pass are twice as fast as 256.
_CPU_PASS = 64
# Bytes of a pass's widest activation that stay in the cache until the backward pass. Measured: 16 images of 32x32 at
# width 128 took 0.52 times, 64 at width 32 took 0.50 times as long as 256 in one pass.
_CACHE_BYTES = 2**23

Embed = Callable[[Tensor], Tensor]
"""Images [B,C,H,W] -> features [B,D]."""


def chunk_size(device: torch.device) -> int:
    """Images per forward pass without a graph: 64 on a CPU, else ``LARGE_PASS``."""
    return _CPU_PASS if device.type == "cpu" else LARGE_PASS


def pass_size(images: Tensor, width: int) -> int:
    """Images per forward and backward pass.

    Args:
        images: [B,C,H,W]; only size and device matter.
        width: channels of the widest layer. Its maps are taken to be as large as the images.

    Returns:
        On a CPU the number that fits the cache, at least 1; else ``LARGE_PASS``.
    """
    if images.device.type != "cpu":
        return LARGE_PASS
    return max(1, _CACHE_BYTES // (4 * width * images.shape[-2] * images.shape[-1]))


def batch_statistics(network: nn.Module) -> bool:
    """True if the output for an image depends on the rest of its pass: a batch norm that does not use running ones."""
    norms = (m for m in network.modules() if isinstance(m, _BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)


def with_fixed_statistics(network: nn.Module, images: Tensor) -> nn.Module:
    """The network itself, or, if it has batch statistics, a copy whose batch norms use those of ``images`` [B,C,H,W].

    The images go through once, without dropout and without a gradient.
    """
    if not batch_statistics(network):
        return network
    fixed = copy.deepcopy(network).eval()
    norms = [m for m in fixed.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.track_running_stats, norm.momentum = True, 1.0
        mean = torch.zeros(norm.num_features, device=images.device, dtype=images.dtype)
        norm.running_mean, norm.running_var = mean, torch.ones_like(mean)
        norm.train()
    with torch.no_grad():
        fixed(images)
    for norm, given in zip(norms, (m for m in network.modules() if isinstance(m, _BatchNorm)), strict=True):
        norm.eval()
        norm.momentum = given.momentum
    # Other layers, such as dropout, keep their mode.
    for module, given_module in zip(fixed.modules(), network.modules(), strict=True):
        if not isinstance(module, _BatchNorm):
            module.training = given_module.training
    return fixed


def embed_in_passes(embed: Embed, images: Tensor, size: int) -> Tensor:
    """Computes ``embed(images)``, [B,D], with at most ``size`` images per pass. Differentiable."""
    if len(images) <= size:
        return embed(images)
    return torch.cat([embed(part) for part in images.split(size)])
