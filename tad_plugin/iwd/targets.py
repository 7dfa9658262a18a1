"""Targets of influence: how good a synthetic set is, on held-out real samples. [ours: README.md, 2]

A target M is a scalar that is differentiable in the synthetic set, lower = better. Networks are never changed:
parameters enter as arguments, running statistics as copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import InvalidInputError, NoHeldOutError, explain
from tad_plugin.nn.derivatives.vectors import require_finite
from tad_plugin.utils.arguments import finite_result, named_errors

__all__ = [
    "TARGETS",
    "Expand",
    "class_mean_distance",
    "hard_labels",
    "matching_target",
    "mean_target_gradient",
    "target_gradient",
    "validation_gradient",
    "validation_target",
]

TARGETS = ("validation", "matching")

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(synthetic images, labels) -> (images, labels) that a network sees."""

_WAY_OUT = "Hold out some real samples (a few % per class, trusted ones if possible) with cross_fit(...)"


@named_errors
@finite_result
def validation_target(
    network: nn.Module,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 0.01,
    steps: int = 1,
) -> Tensor:
    """Computes the target `validation`: the held-out loss of a network after it learned from the synthetic set.

    M(S) = CE of theta' on V, theta' = theta - alpha * grad_theta CE(S; theta), repeated ``steps`` times with full
    batches of S. Put a network with dropout into eval mode, because dropout draws from the global generator.

    Args:
        network: logits [B, K], with parameters theta; train or eval mode is kept.
        synthetic: S, images [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K] (then M is differentiable in them too).
        images: V, held-out real images [n, C, H, W].
        labels: int64 [n], or probabilities [n, K].
        alpha: inner step size > 0; a scalar tensor may require a gradient (a learned learning rate).
        steps: number of inner steps, at least 1.

    Returns:
        Scalar, the mean over V, with a graph to S (and to soft labels and alpha).

    Raises:
        NoHeldOutError: V is empty.
        InvalidInputError: lengths differ, alpha or steps out of range.
    """
    _check_samples(synthetic, synthetic_labels, images, labels)
    _check_inner_loop(alpha, steps)
    trained, buffers = _trained(network, synthetic, synthetic_labels, alpha, steps)
    return F.cross_entropy(torch.func.functional_call(network, {**trained, **buffers}, (images,)), labels)


@named_errors
def validation_gradient(
    network: nn.Module,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 0.01,
    steps: int = 1,
    chunk_size: int = 1024,
) -> tuple[float, Tensor]:
    """Computes value and gradient in S of :func:`validation_target`, with V in chunks.

    The gradient in theta' is summed over the chunks, then pulled back to S once. So memory does not grow with V.
    Arguments and errors are those of :func:`validation_target`. A batch norm in train mode sees one chunk at a time.

    Returns:
        (M(S), grad_S M in the shape of S).
    """
    _check_samples(synthetic, synthetic_labels, images, labels)
    _check_inner_loop(alpha, steps, chunk_size)
    rate = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return _validation_gradient(network, synthetic, synthetic_labels, images, labels, rate, steps, chunk_size)


def _validation_gradient(
    network: nn.Module,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    alpha: float | Tensor,
    steps: int,
    chunk_size: int,
) -> tuple[float, Tensor]:
    leaf = synthetic.detach().clone().requires_grad_()
    with torch.enable_grad():
        trained, buffers = _trained(network, leaf, synthetic_labels.detach(), alpha, steps)
        copies = {name: p.detach().requires_grad_() for name, p in trained.items()}
        value = 0.0
        slopes = [torch.zeros_like(p) for p in copies.values()]
        for start in range(0, len(images), chunk_size):
            x, y = images[start : start + chunk_size], labels[start : start + chunk_size]
            logits = torch.func.functional_call(network, {**copies, **buffers}, (x,))
            part = F.cross_entropy(logits, y, reduction="sum") / len(images)
            value += float(part.detach())
            found = torch.autograd.grad(part, list(copies.values()), allow_unused=True)
            for slope, gradient in zip(slopes, found, strict=True):
                if gradient is not None:
                    slope += gradient
        (gradient,) = torch.autograd.grad(list(trained.values()), leaf, slopes)
    return value, require_finite(
        gradient, "target gradient", "Lower alpha, or look for NaN in the images and the network"
    )


@named_errors
@finite_result
def class_mean_distance(
    network: nn.Module,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Computes the matching loss of DM: squared distances between the class means of real and synthetic embeddings.

    sum_c |sum_i w_i phi_i / sum_i w_i - mean_j phi(s_j)|^2, over the classes with synthetic images and positive weight.

    Args:
        network: has ``embed(x) -> [B, D]``.
        synthetic: images [M, C, H, W].
        synthetic_labels: int64 [M] in [0, num_classes).
        images: real images [n, C, H, W].
        labels: int64 [n] in [0, num_classes).
        num_classes: K.
        weights: real-sample weights [n] >= 0; None for 1.

    Returns:
        Scalar, summed over classes and features.

    Raises:
        NoHeldOutError: no class has both real and synthetic images.
        InvalidLabelsError: labels out of range or of another length.
    """
    real_labels = check_labels(labels, num_classes, len(images))
    own_labels = check_labels(synthetic_labels, num_classes, len(synthetic), "synthetic_labels")
    return _class_mean_distance(network, synthetic, own_labels, images, real_labels, num_classes, weights)


def _class_mean_distance(
    network: nn.Module,
    synthetic: Tensor,
    own_labels: Tensor,
    images: Tensor,
    real_labels: Tensor,
    num_classes: int,
    weights: Tensor | None = None,
) -> Tensor:
    embed: Callable[[Tensor], Tensor] = network.embed  # type: ignore[assignment]
    real, own = embed(images), embed(synthetic)
    w = torch.ones(len(images), dtype=real.dtype, device=real.device) if weights is None else weights.to(real.dtype)

    def means(features: Tensor, classes: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros(num_classes, features.shape[1], dtype=features.dtype, device=features.device)
        size = torch.zeros(num_classes, dtype=features.dtype, device=features.device).index_add(0, classes, w)
        # An absent class would give 0/0, whose gradient is NaN even where it is masked out afterwards.
        return total.index_add(0, classes, w[:, None] * features) / torch.where(size > 0, size, 1.0)[:, None]

    weighted = real_labels[w.detach() > 0]
    both = (torch.bincount(weighted, minlength=num_classes) > 0) & (
        torch.bincount(own_labels, minlength=num_classes) > 0
    )
    if not bool(both.any()):
        raise NoHeldOutError(explain("a class with real and synthetic images", "none", _WAY_OUT))
    gap = means(real, real_labels, w) - means(own, own_labels, torch.ones_like(own[:, 0]))
    return gap[both].square().sum()


@named_errors
@finite_result
def matching_target(
    networks: nn.Module | Sequence[nn.Module],
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    loss_fn: Callable[..., Tensor] = class_mean_distance,
) -> Tensor:
    """Computes the target `matching`: the unweighted matching loss against held-out samples, on fresh networks.

    Args:
        networks: one or several networks; the result is the mean over them. Do not pass the network that S was just
            matched on, because there the loss is small already.
        synthetic: S, images [M, C, H, W].
        synthetic_labels: int64 [M].
        images: V, held-out real images [n, C, H, W]. Classes without held-out samples are left out.
        labels: int64 [n].
        num_classes: K.
        loss_fn: (network, synthetic, synthetic_labels, images, labels, num_classes) -> scalar; DM's by default.

    Returns:
        Scalar with a graph to S.

    Raises:
        NoHeldOutError: V is empty.
        InvalidInputError: no network, or lengths differ.
    """
    several = [networks] if isinstance(networks, nn.Module) else list(networks)
    if not several:
        raise InvalidInputError(explain("at least one network", "none", "Draw one with make_network(...)"))
    _check_samples(synthetic, synthetic_labels, images, labels)
    losses = [loss_fn(net, synthetic, synthetic_labels, images, labels, num_classes) for net in several]
    return torch.stack(losses).mean()


@named_errors
def target_gradient(
    target: str,
    networks: list[nn.Module],
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    alpha: float = 0.01,
    steps: int = 1,
    chunk_size: int = 1024,
    expand: Expand | None = None,
) -> tuple[float, Tensor]:
    """Computes value and gradient in S of the target M, the mean over ``networks``.

    Args:
        target: "validation" or "matching".
        networks: networks on which M is measured; never changed.
        synthetic: S, [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K].
        images: V, [n, C, H, W].
        labels: int64 [n] in [0, num_classes).
        num_classes: K.
        alpha: inner step size of "validation".
        steps: inner steps of "validation".
        chunk_size: held-out images per pass of "validation".
        expand: maps S and its labels to what the networks see, see :class:`tad_plugin.core.events.Match`; None if
            they see S itself.

    Returns:
        (M(S), grad_S M in the shape of S).

    Raises:
        NoHeldOutError: V is empty.
        NonFiniteError: the gradient is NaN or infinite.
        InvalidInputError: unknown target, no network, or lengths, labels or sizes that do not fit.
    """
    if target not in TARGETS or not networks:
        raise InvalidInputError(
            explain(f"a target out of {TARGETS} and a network", f"{target!r}, {len(networks)} networks", "Correct them")
        )
    _check_samples(synthetic, synthetic_labels, images, labels)
    _check_inner_loop(alpha, steps, chunk_size)
    check_labels(labels, num_classes)
    if synthetic_labels.ndim == 1:
        check_labels(synthetic_labels, num_classes, name="synthetic_labels")
    return mean_target_gradient(
        target, networks, synthetic, synthetic_labels, images, labels, num_classes, alpha, steps, chunk_size, expand
    )


def mean_target_gradient(
    target: str,
    networks: list[nn.Module],
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    alpha: float,
    steps: int,
    chunk_size: int,
    expand: Expand | None,
) -> tuple[float, Tensor]:
    """:func:`target_gradient` for arguments that are checked already."""
    if expand is not None:
        # M of the expanded set, and its gradient pulled back to S.
        leaf = synthetic.detach().clone().requires_grad_()
        with torch.enable_grad():
            shown, shown_labels = expand(leaf, synthetic_labels)
        level, slope = mean_target_gradient(
            target, networks, shown.detach(), shown_labels, images, labels, num_classes, alpha, steps, chunk_size, None
        )
        return level, torch.autograd.grad(shown, leaf, slope)[0]
    if target == "validation":
        found = [
            _validation_gradient(net, synthetic, synthetic_labels, images, labels, alpha, steps, chunk_size)
            for net in networks
        ]
        return sum(v for v, _ in found) / len(found), torch.stack([g for _, g in found]).mean(0)
    leaf, own_labels = synthetic.detach().clone().requires_grad_(), hard_labels(synthetic_labels)
    with torch.enable_grad():
        losses = [_class_mean_distance(net, leaf, own_labels, images, labels, num_classes) for net in networks]
        value = torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
    way_out = "Look for NaN in the images and the network"
    return float(value.detach()), require_finite(gradient, "target gradient", way_out)


def hard_labels(labels: Tensor) -> Tensor:
    """int64 [M]: the labels themselves, or the likeliest class of soft labels [M, K]."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def _check_samples(synthetic: Tensor, synthetic_labels: Tensor, images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise NoHeldOutError(explain("at least one held-out real sample", "none", _WAY_OUT))
    if len(images) != len(labels) or len(synthetic) != len(synthetic_labels) or len(synthetic) == 0:
        got = f"{len(synthetic)} and {len(synthetic_labels)} synthetic, {len(images)} and {len(labels)} held out"
        raise InvalidInputError(explain("as many images as labels", got, "Pass one label per image"))


def _check_inner_loop(alpha: float | Tensor, steps: int, chunk_size: int = 1) -> None:
    rate = float(alpha.detach()) if isinstance(alpha, Tensor) else alpha
    if steps < 1 or not rate > 0 or chunk_size < 1:
        got = f"steps {steps}, alpha {rate}, chunk_size {chunk_size}"
        raise InvalidInputError(explain("steps >= 1, alpha > 0 and chunk_size >= 1", got, "Correct the inner loop"))


def _trained(
    network: nn.Module, synthetic: Tensor, synthetic_labels: Tensor, alpha: float | Tensor, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta' with its graph to S, and copies of the buffers."""
    buffers = {name: b.detach().clone() for name, b in network.named_buffers()}
    with torch.enable_grad():
        values = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        for _ in range(steps):
            logits = torch.func.functional_call(network, {**values, **buffers}, (synthetic,))
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, synthetic_labels), list(values.values()), create_graph=True, allow_unused=True
            )
            values = {
                name: p if g is None else p - alpha * g for (name, p), g in zip(values.items(), gradients, strict=True)
            }
    return values, buffers
