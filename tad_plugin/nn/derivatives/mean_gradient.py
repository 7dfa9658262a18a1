"""The gradient of a loss of many images, in passes that fit the memory or the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mean_gradient"]


def mean_gradient(
    network: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    images: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    chunk_size: int = 2048,
) -> list[Tensor]:
    """Gradient of the (weighted) mean cross-entropy of a batch, without a graph, in passes of ``chunk_size`` images.

    Args:
        network: images -> logits [B,K]; treats samples independently (a batch norm in eval mode).
        parameters: in which the gradient is taken.
        images: float [B,C,H,W].
        targets: int64 [B].
        weights: float [B], mean 1; None for a plain mean.
        chunk_size: images per pass; it changes speed and memory, and the values only by rounding.

    Returns:
        One detached tensor for each of ``parameters``.
    """
    total: list[Tensor] = []
    for start in range(0, len(images), chunk_size):
        part = slice(start, start + chunk_size)
        with torch.enable_grad():
            logits = network(images[part])
            if weights is None:
                loss = F.cross_entropy(logits, targets[part], reduction="sum")
            else:
                loss = (weights[part].detach() * F.cross_entropy(logits, targets[part], reduction="none")).sum()
        found = torch.autograd.grad(loss / len(images), parameters)
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
    return total
