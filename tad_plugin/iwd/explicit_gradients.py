"""Explicit influence through the matching of class gradients (DC, DSA). [ours: README.md, 2]

The loss is L = sum_c D(G_c(S), g_c), with g_c = sum w_i grad l_i / sum w_i over the real samples of class c. Then

    I_i = -eta < u_c, grad l_i - g_c > / sum w_i,    u_c = d/dg_c < grad M, grad_S D(G_c(S), g_c) >.

u_c has the shape of the parameters. It costs one third-order derivative in the few synthetic images. One forward-mode
pass along u_c then gives < u_c, grad l_i > for every real sample of the class. No per-sample gradient is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import class_members
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.nn.derivatives.mean_gradient import mean_gradient
from tad_plugin.nn.derivatives.per_sample import per_sample_directional
from tad_plugin.nn.derivatives.vectors import require_finite
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images, image_rows

__all__ = ["GradientDistance", "class_gradient_influence", "gradient_influence"]

GradientDistance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(synthetic gradients, real gradients), one tensor per parameter each -> scalar, differentiable in both."""


@named_errors
def gradient_influence(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    target_gradient: Tensor,
    num_classes: int,
    distance: GradientDistance,
    *,
    weights: Tensor | None = None,
    eta: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Computes dM/dw of every real sample for a loss of class gradients. Equals ``explicit_influence`` on that loss.

    Args:
        network: logits [B, K]; must treat samples independently. Its parameters are not changed.
        images: real images [N, C, H, W].
        labels: classes in the loss, int64 [N] in [0, num_classes).
        synthetic: images [M, C, H, W].
        synthetic_labels: int64 [M]. A real sample of a class without synthetic images has influence 0.
        target_gradient: grad_S M, same shape as ``synthetic``.
        num_classes: K.
        distance: D; receives the gradients of all parameters and may ignore some.
        weights: current weights [N] >= 0, with a positive sum in each class; None for 1.
        eta: step size of S > 0.
        chunk_size: real images per pass.

    Returns:
        [N], detached, in the images' dtype. Negative = helpful.

    Raises:
        InvalidLabelsError: labels out of range or of another length.
        InvalidInputError: shapes, weights or sizes do not fit, or the network mixes samples (batch norm in train mode).
        NonFiniteError: an influence is NaN or infinite.
    """
    labels = check_labels(labels, num_classes, len(images)).to(images.device)
    own_labels = check_labels(synthetic_labels, num_classes, len(synthetic), "synthetic_labels")
    if target_gradient.shape != synthetic.shape or not eta > 0 or chunk_size < 1:
        got = f"{list(target_gradient.shape)} for {list(synthetic.shape)}, eta {eta}, chunk_size {chunk_size}"
        expected = "target_gradient in the shape of synthetic, eta > 0 and chunk_size >= 1"
        raise InvalidInputError(explain(expected, got, "Correct the argument"))
    if weights is not None:
        weights = weights.detach().to(images.device)
        good = weights.shape == labels.shape and not bool((weights < 0).any())
        if not good or not bool((weights.new_zeros(num_classes).index_add_(0, labels, weights)[labels] > 0).all()):
            expected = f"weights >= 0 of shape [{len(labels)}] with a positive sum in each class"
            got = f"shape {list(weights.shape)}"
            raise InvalidInputError(explain(expected, got, "Pass one weight for each real image"))
    return class_gradient_influence(
        network, images, labels, synthetic, own_labels, target_gradient, num_classes, distance, weights=weights,
        eta=eta, chunk_size=chunk_size,
    )  # fmt: skip


def class_gradient_influence(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    target_gradient: Tensor,
    num_classes: int,
    distance: GradientDistance,
    *,
    weights: Tensor | None = None,
    eta: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """:func:`gradient_influence` for arguments that are checked already."""
    w = torch.ones(len(images), device=images.device) if weights is None else weights.detach()
    influence = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    values = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    parameters = list(values.values())

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(network, values, (x,))
        return logits

    groups = class_members(labels, num_classes), class_members(synthetic_labels, num_classes)
    for rows, own in zip(*groups, strict=True):
        if not len(rows) or not len(own):
            continue
        share = w[rows] / w[rows].sum()
        own_weights = share * len(rows)
        members = image_rows(images, rows)
        real = mean_gradient(forward, parameters, members, labels[rows], own_weights, chunk_size=chunk_size)
        direction = _direction(
            network, values, synthetic[own], synthetic_labels[own], target_gradient[own], real, distance
        )
        parts = zip(members.split(chunk_size), labels[rows].split(chunk_size), strict=True)
        along = torch.cat([per_sample_directional(network, x, y, direction, parameters=values) for x, y in parts])
        influence[rows] = -eta * (along - (share * along).sum()) / w[rows].sum()
    return require_finite(influence, "influences", "Check the images, the weights and the network")


def _direction(
    network: nn.Module,
    values: dict[str, Tensor],
    synthetic: Tensor,
    labels: Tensor,
    target_gradient: Tensor,
    real: list[Tensor],
    distance: GradientDistance,
) -> dict[str, Tensor]:
    """u_c by parameter name; 0 for parameters that the distance ignores."""
    leaf, held = synthetic.detach().requires_grad_(), [g.requires_grad_() for g in real]
    with torch.enable_grad():
        loss = F.cross_entropy(torch.func.functional_call(network, values, (leaf,)), labels)
        fake = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        (slope,) = torch.autograd.grad(distance(fake, held), leaf, create_graph=True)
        found = torch.autograd.grad((slope * target_gradient).sum(), held, allow_unused=True)
    return {n: torch.zeros_like(v) if u is None else u for (n, v), u in zip(values.items(), found, strict=True)}
