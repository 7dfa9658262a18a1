"""Gradient of the mean loss of many images, computed in passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.nn.passes import LARGE_PASS, batch_statistics, halved
from tad_plugin.utils.image_store import Images

__all__ = ["mean_gradient"]


def mean_gradient(
    network: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    images: Images,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    chunk_size: int = LARGE_PASS,
) -> list[Tensor]:
    """Computes the gradient of sum_i w_i CE_i / B over a batch, without a graph of its own.

    Args:
        network: images -> logits [B,K]; treats samples independently (a batch norm in eval mode).
        parameters: tensors to differentiate in.
        images: float [B,C,H,W], B >= 1.
        targets: int64 [B].
        weights: w, float [B], mean 1; None for w = 1.
        chunk_size: images per pass.

    Returns:
        One detached tensor per parameter.
    """

    def gradient(size: int) -> list[Tensor]:
        total: list[Tensor] = []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                logits = network(images[part])
                if weights is None:
                    loss = F.cross_entropy(logits, targets[part], reduction="sum")
                else:
                    loss = (weights[part].detach() * F.cross_entropy(logits, targets[part], reduction="none")).sum()
            found = torch.autograd.grad(loss / len(images), parameters)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        return total

    if isinstance(network, nn.Module) and batch_statistics(network):
        return gradient(chunk_size)
    return halved(gradient, min(chunk_size, len(images)))
