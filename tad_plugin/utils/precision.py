"""The precision in which networks compute. Everything else stays float32.

Losses, gradients in images and parameters, optimisers and the methods' scores are float32 in every case. The public
codebases compute in float32, so that is the default. The other precisions are meant for GPUs and change numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tad_plugin.errors import ConfigError, explain

__all__ = ["PRECISIONS", "check_precision", "current_precision", "in_precision", "network_precision"]

PRECISIONS = ("fp32", "tf32", "bf16")
"""fp32; tf32 (products of float32 with 10 bits of mantissa, on CUDA); bf16 (bfloat16 inside networks, autocast)."""

# The innermost one last.
_CURRENT = ["fp32"]


def check_precision(name: str, device: torch.device | str) -> None:
    """Raises ConfigError if a precision does not exist on this device."""
    if name not in PRECISIONS:
        do = "Pass one of them as --precision"
        raise ConfigError(explain(f"a precision out of {', '.join(PRECISIONS)}", repr(name), do))
    if name == "tf32" and torch.device(device).type != "cuda":
        do = "Use --precision fp32 or bf16, or --device cuda"
        raise ConfigError(explain("a CUDA device for --precision tf32", f"{device}", do))


def current_precision() -> str:
    """The precision of the innermost :func:`network_precision`; "fp32" outside."""
    return _CURRENT[-1]


@contextmanager
def network_precision(name: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Context in which the package's networks compute in this precision; also a decorator.

    "fp32" on CUDA switches off the TF32 that PyTorch uses in convolutions by default.

    Raises:
        ConfigError: see :func:`check_precision`.
    """
    check_precision(name, device)
    cuda = torch.device(device).type == "cuda"
    before = (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    if cuda:
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    _CURRENT.append(name)
    try:
        yield
    finally:
        _CURRENT.pop()
        if cuda:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])


def in_precision(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``compute(x)`` in the current precision; the result has the type of ``x``."""
    if _CURRENT[-1] != "bf16":
        return compute(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return compute(x).to(x.dtype)
