"""Copies between the host and a device, few of them and none that waits without need.

A loop on an accelerator runs ahead of it. Each copy of a plain tensor, and each number that Python reads, makes it wait
until the device has caught up. So what goes up is packed into one copy from pinned memory (:func:`upload`), and what
comes down is read together (:func:`read`). On the CPU nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["download", "host_twin", "place", "read", "upload"]

# Bytes to which each part of a packed copy is aligned: a multiple of every element size.
_ALIGNED = 16


def upload(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The same tensors on ``device``, by one copy that does not wait.

    Tensors that are not on the CPU are returned as they are, and all are if ``device`` is the CPU. The others become
    views of one buffer: do not write into them.
    """
    device = torch.device(device)
    here = [t for t in tensors if t.device.type == "cpu"]
    if device.type == "cpu" or not here:
        return list(tensors)
    ends, size = [], 0
    for tensor in here:
        size = -(-size // _ALIGNED) * _ALIGNED + tensor.numel() * tensor.element_size()
        ends.append(size)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, end in zip(here, ends, strict=True):
        _part(buffer, tensor, end).copy_(tensor.detach())
    moved = buffer.to(device, non_blocking=True)
    found = iter([_part(moved, tensor, end) for tensor, end in zip(here, ends, strict=True)])
    return [next(found) if t.device.type == "cpu" else t for t in tensors]


def _part(buffer: Tensor, like: Tensor, end: int) -> Tensor:
    """The bytes of a packed tensor that ends before ``end``, in its type and shape."""
    return buffer[end - like.numel() * like.element_size() : end].view(like.dtype).view(like.shape)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one device, of any types, on the CPU, by one transfer."""
    if tensors[0].device.type == "cpu":
        return [t.to("cpu", copy=True) for t in tensors]
    packed = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors]).cpu()
    parts = packed.split([t.numel() * t.element_size() for t in tensors])
    return [part.clone().view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def read(*scalars: Tensor) -> list[float]:
    """Values of scalar tensors of one device, of any types, in one transfer. Integers are exact below 2^53."""
    if scalars[0].device.type == "cpu":
        return [float(s) for s in scalars]
    found: list[float] = torch.stack([s.detach().double() for s in scalars]).tolist()
    return found


def place(network: nn.Module, device: torch.device | str) -> nn.Module:
    """``network.to(device)`` for a network on the CPU, by one copy that does not wait. Returns the network."""
    device = torch.device(device)
    if device.type == "cpu":
        return network.to(device)
    own = {id(t): t for t in (*network.parameters(), *network.buffers())}
    # Each gets memory of its own: optimisers write into them.
    moved = dict(zip(own, (t.clone() for t in upload([t.detach() for t in own.values()], device)), strict=True))
    return network._apply(lambda t: moved[id(t)])


_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def host_twin(network: nn.Module) -> nn.Module:
    """A copy of the network on the CPU in contiguous float32, made once. Its values are of no meaning."""
    twin = _TWINS.get(network)
    if twin is None or _form(twin) != _form(network):
        twin = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
        twin.requires_grad_(False)
        _TWINS[network] = twin
    return twin


def _form(network: nn.Module) -> list[object]:
    """What tells whether two networks have the same layers: their types, and the shapes of their parameters."""
    return [type(m) for m in network.modules()] + [(n, t.shape) for n, t in network.named_parameters()]
