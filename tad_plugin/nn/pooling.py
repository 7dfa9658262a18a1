"""2x2 average pooling, alone and after a ReLU, fast on a CPU and differentiable to any order.

On a CPU torch's pooling kernel is not vectorised: in a small ConvNet activation and pooling take as long as a
convolution. Adding rows first vectorises most of the work. The order of rounding then differs from torch's kernel
(measured in reproduce/benchmarks/pooling.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HalvingAvgPool", "ReluHalvingAvgPool"]


class HalvingAvgPool(nn.AvgPool2d):
    """2x2 average pooling with stride 2."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H//2,W//2]."""
        if not _fits(x):
            return super().forward(x)
        halved: Tensor = _Halve.apply(x)
        return halved


class ReluHalvingAvgPool(nn.Module):
    """ReLU, then 2x2 average pooling with stride 2. May overwrite its input (if torch's kernels are used)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H//2,W//2]."""
        if not _fits(x):
            return F.avg_pool2d(F.relu(x, inplace=True), 2)
        halved: Tensor = _HalveRelu.apply(x)
        return halved


def _fits(x: Tensor) -> bool:
    whole = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and whole and x.shape[-2] % 2 == 0 and x.shape[-1] % 2 == 0


def _halved(rows: Tensor) -> Tensor:
    """Sums of two rows [..., H/2, W] -> means of 2x2 blocks [..., H/2, W/2]."""
    return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)


def _pairs(gradient: Tensor) -> Tensor:
    """A quarter of each value, side by side twice: [..., H/2, W/2] -> [..., H/2, W]."""
    quarter = gradient * 0.25
    # As the parts of one complex number: the fastest way that was measured.
    return torch.view_as_real(torch.complex(quarter, quarter)).flatten(-2)


class _Linear(torch.autograd.Function):
    """A map that is linear in its first argument. A second argument enters by its sign only.

    It works on the last two dimensions, so a batched call is a call with one more dimension.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @classmethod
    def _batched(cls, info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, int]:
        moved = [
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(inputs, dims, strict=True)
        ]
        return cls.apply(*moved), 0


class _Halve(_Linear):
    """Means of 2x2 blocks; the derivative is :class:`_Spread`.

    Autograd's own derivative of a sum of slices would fill tensors of the size of the images with zeros.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _halved(x[..., 0::2, :] + x[..., 1::2, :])

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Tensor) -> Any:
        return _Halve._batched(info, dims, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return _Halve.apply(tangent)


class _Spread(_Linear):
    """The adjoint of :class:`_Halve`: a quarter of each value on each of its four pixels."""

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        pairs = _pairs(gradient)
        return torch.stack((pairs, pairs), -2).flatten(-3, -2)

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Tensor) -> Any:
        return _Spread._batched(info, dims, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Halve.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return _Spread.apply(tangent)


class _HalveRelu(_Linear):
    """Means over 2x2 blocks of the positive parts; the derivative is :class:`_SpreadWhere`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _Halve.forward(F.relu(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Tensor) -> Any:
        return _HalveRelu._batched(info, dims, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _SpreadWhere.apply(gradient, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return _halve_where(tangent, *ctx.saved_tensors)


def _halve_where(t: Tensor, x: Tensor) -> Tensor:
    """Means over 2x2 blocks of ``t``, set to 0 where ``x`` is not positive."""
    halved: Tensor = _Halve.apply(torch.ops.aten.threshold_backward(t, x, 0))
    return halved


class _SpreadWhere(_Linear):
    """A quarter of each value on those of its four pixels at which ``x`` is positive."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        spread = _Spread.forward(gradient)
        torch.ops.aten.threshold_backward.grad_input(spread, x, 0, grad_input=spread)  # in place, to save a pass
        return spread

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Tensor) -> Any:
        return _SpreadWhere._batched(info, dims, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _halve_where(gradient, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _SpreadWhere.apply(tangent, *ctx.saved_tensors)
