"""Implicit influence through networks trained on real data, in a loop that matches class means (IDM).

[ours: README.md, 2]. A real sample enters the means of L = sum_c |mu_c - nu_c(S)|^2 (explicit path,
``explicit.dm_influence``). It also trained the network theta on which the means are taken. Hold g = grad_S M fixed,
let v_c = J_c g, and count one epoch of the training as a single step at the present parameters. Then

    u = dM/dtheta = -d/dtheta < g, grad_S L > = 2 d/dtheta sum_c < v_c, mu_c - nu_c >,   I_i = -rate/B < u, grad l_i >.

u is summed over passes: first the synthetic images with their tangents, class by class, then the real images. One
forward-mode pass along u gives every sample. Neglected: curvature along the training, and terms of the loss on S that
contain no real sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tad_plugin.core.events import Learning
from tad_plugin.data.splits import class_members
from tad_plugin.iwd.explicit import Embed
from tad_plugin.iwd.implicit import SegmentStep, unrolled_influence
from tad_plugin.nn.derivatives.per_sample import DEFAULT_MEMORY_BUDGET
from tad_plugin.nn.derivatives.vectors import pushed_forward
from tad_plugin.utils.image_store import Images

__all__ = ["learned_influence"]


def learned_influence(
    network: nn.Module,
    embed: Embed,
    images: Images,
    labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    target_gradient: Tensor,
    num_classes: int,
    learning: Learning,
    *,
    weights: Tensor | None = None,
    chunk_size: int = 1024,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes dM/dw of every real sample through the network, per epoch of its training and unit step of S.

    Arguments are trusted: ``scoring`` calls it with values that were checked before.

    Args:
        network: logits [B, K]; its parameters require a gradient and are not changed.
        embed: images [B, C, H, W] -> features [B, D] of this network.
        images: real images [N, C, H, W].
        labels: int64 [N] in [0, num_classes); the labels of its training and the classes in L.
        synthetic: images [M, C, H, W] as the network sees them.
        synthetic_labels: int64 [M].
        target_gradient: grad_S M, mapped like the images where the network sees S expanded; same shape as
            ``synthetic``.
        num_classes: K.
        learning: rate and batch size of the network's training.
        weights: current weights [N] >= 0, with a positive sum in each class; None for 1.
        chunk_size: real images per pass.
        memory_budget: bytes for one chunk, see ``nn.derivatives.per_sample``.

    Returns:
        [N], detached. Negative = helpful.

    Raises:
        InvalidInputError, MemoryBudgetError, NonFiniteError: see :func:`unrolled_influence`.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = [torch.zeros_like(p) for p in parameters.values()]

    def add(term: Tensor) -> None:
        found = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
        for sum_, part in zip(total, found, strict=True):
            if part is not None:
                sum_ += part

    with torch.no_grad():
        rows = torch.cat([embed(part) for part in images.split(chunk_size)])
        w = torch.ones_like(rows[:, 0]) if weights is None else weights.detach().to(rows)
        share = w / torch.zeros(num_classes, dtype=w.dtype, device=w.device).index_add(0, labels, w)[labels]
        means = torch.zeros(num_classes, rows.shape[1], dtype=rows.dtype, device=rows.device)
        means.index_add_(0, labels, share[:, None] * rows)
    along = torch.zeros_like(means)
    with torch.enable_grad():
        for c, own in enumerate(class_members(synthetic_labels, num_classes)):
            if len(own):
                x, slope = synthetic[own].detach(), target_gradient[own].detach()
                v = pushed_forward(embed, (x,), (slope,)).mean(0)
                add(2 * (v * (means[c] - embed(x).mean(0))).sum())
                along[c] = v.detach()
        for x, y, s in zip(images.split(chunk_size), labels.split(chunk_size), share.split(chunk_size), strict=True):
            add(2 * (s * (embed(x) * along[y]).sum(1)).sum())
    step = SegmentStep(
        {name: p.detach() for name, p in network.named_parameters()}, learning.rate, divisor=float(learning.batch)
    )
    direction = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    direction |= dict(zip(parameters, total, strict=True))
    return unrolled_influence(network, [step], images, labels, direction, memory_budget=memory_budget)
