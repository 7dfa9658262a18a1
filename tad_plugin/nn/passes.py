"""How many images go through a network in one pass, from the size of the images, the network and the memory.

The size of a pass changes speed and memory, and results only by rounding. A network that takes the statistics of its
batch is the exception (:func:`batch_statistics`): there a whole batch must go through in one pass. On an accelerator
passes are large. On a CPU they are small, so that activations stay in the cache:

- Without a graph (scoring, evaluation) a layer's activations are dropped at once: :func:`chunk_size`.
- With a backward pass the activations are read twice, so their bytes count: :func:`pass_size`.

All passes together may take half of the memory budget (:func:`set_memory_budget`): the other half is for the data, the
networks and what else is on the device. If memory runs out all the same, :func:`halved` goes on with smaller passes.

Per-sample gradients have limits of their own, see :mod:`tad_plugin.nn.derivatives.per_sample`.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.errors import MemoryBudgetError, TadPluginWarning, explain
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.machine import free_memory_bytes

__all__ = [
    "LARGE_PASS",
    "Embed",
    "batch_statistics",
    "bytes_for_passes",
    "chunk_size",
    "embed_in_passes",
    "forward_size",
    "given_budget",
    "graph_bytes",
    "halved",
    "memory_budget",
    "pass_size",
    "set_memory_budget",
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


# Maps of the widest layer that a block keeps for the backward pass: convolution, norm, activation and pooling keep
# about five. Without a graph, a layer's input, its output and a work space are in memory.
_MAPS_KEPT, _MAPS_FORWARD = 6, 3

T = TypeVar("T")
_budget: int | None = None
_worked: dict[int, int] = {}
"""Size of a pass that was asked for -> the one that memory allowed."""


# -- the budget --------------------------------------------------------------------------------------
def set_memory_budget(budget: int | None) -> None:
    """Sets how many bytes this process may use on its device, at least 1; None for what the machine has."""
    global _budget
    _budget = budget
    _worked.clear()


def given_budget() -> int | None:
    """What :func:`set_memory_budget` was given last."""
    return _budget


@contextmanager
def memory_budget(budget: int | None) -> Iterator[None]:
    """:func:`set_memory_budget` for the body; None leaves the budget as it is."""
    before = _budget
    if budget is not None:
        set_memory_budget(budget)
    try:
        yield
    finally:
        if budget is not None:
            set_memory_budget(before)


def bytes_for_passes(device: torch.device) -> int:
    """Half of the memory budget of a device, in bytes."""
    return max(1, (_device_bytes(str(device)) if _budget is None else _budget) // 2)


@functools.cache
def _device_bytes(device: str) -> int:
    # Asked once, so that passes have one size during a run.
    return free_memory_bytes(device) or 2**33


# -- sizes -------------------------------------------------------------------------------------------
def chunk_size(device: torch.device) -> int:
    """Images per forward pass without a graph, if memory is enough: 64 on a CPU, else ``LARGE_PASS``."""
    return _CPU_PASS if device.type == "cpu" else LARGE_PASS


def forward_size(images: Images, network: nn.Module) -> int:
    """Images [N,C,H,W] (or [N,D]) per forward pass of a network without a graph: :func:`chunk_size`, or what fits."""
    most = chunk_size(images.device)
    if images.ndim < 4:
        return most
    width = max((m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)), default=1)
    needed = _MAPS_FORWARD * _map_bytes(images, max(width, images.shape[1]))
    return min(most, _round_down(bytes_for_passes(images.device) // needed))


def pass_size(images: Images, width: int, depth: int = 3) -> int:
    """Images per forward and backward pass.

    Args:
        images: [B,C,H,W]; only size and device matter.
        width: channels of the widest layer. Its maps are taken to be as large as the images.
        depth: blocks of the network, each of which halves height and width.

    Returns:
        On a CPU the number that fits the cache, at least 1; else what fits the memory budget, at most ``LARGE_PASS``.
    """
    if images.device.type == "cpu":
        return max(1, _CACHE_BYTES // _map_bytes(images, width))
    return min(LARGE_PASS, _round_down(bytes_for_passes(images.device) // graph_bytes(images, width, depth)))


def graph_bytes(images: Images, width: int, depth: int = 3) -> int:
    """Bytes that the graph of one image keeps for its backward pass, estimated. Arguments as for :func:`pass_size`."""
    return int(_MAPS_KEPT * _map_bytes(images, width) * sum(0.25**block for block in range(max(1, depth))))


def _map_bytes(images: Images, width: int) -> int:
    return max(1, 4 * width * images.shape[-2] * images.shape[-1])


def _round_down(count: int) -> int:
    """The next smaller power of two, at least 1: sizes do not follow every change of the free memory."""
    return 1 << (max(1, count).bit_length() - 1)


# -- lack of memory ----------------------------------------------------------------------------------
def halved(compute: Callable[[int], T], size: int) -> T:
    """``compute(size)``; if memory runs out, again with half the size, and so on. A warning says so once.

    Args:
        compute: takes the images per pass. It must change nothing before it succeeds, and give the same result for
            every size up to rounding.
        size: images per pass, at least 1. A size that ran out of memory is not tried again.

    Raises:
        MemoryBudgetError: memory runs out for a single image.
    """
    now = min(size, _worked.get(size, size))
    while True:
        try:
            return compute(now)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if now == 1:
                do = "Use smaller images, a narrower network, or a device with more memory"
                got = str(error).partition("\n")[0]
                raise MemoryBudgetError(explain("memory for a pass of one image", got, do)) from error
        # Outside of the handler: the error holds the tensors of the pass that failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now //= 2
        if not _worked:
            do = "Nothing to do: passes are halved. Set --memory_budget to choose them smaller from the start"
            got = f"too little: passes of {now} images from now on"
            warnings.warn(explain(f"memory for {2 * now} images in a pass", got, do), TadPluginWarning, stacklevel=2)
        _worked[size] = now


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# -- networks ----------------------------------------------------------------------------------------
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


def embed_in_passes(embed: Embed, images: Images, size: int) -> Tensor:
    """Computes ``embed(images)``, [B,D], with at most ``size`` images per pass. Differentiable.

    For networks without batch statistics: passes get smaller if memory runs out.
    """

    def embedded(size: int) -> Tensor:
        if len(images) <= size:
            return embed(images if isinstance(images, Tensor) else images[:])
        return torch.cat([embed(part) for part in images.split(size)])

    return halved(embedded, max(1, size))
