"""What influence is measured on: how good a synthetic set is, on held-out real samples. [ours: METHODS.md 2.1]

A target M is a scalar that is differentiable in the synthetic set, lower = better. The networks
are never changed: parameters enter as arguments, running statistics as copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import shuffled_groups
from tad_plugin.errors import InvalidInputError, NoHeldOutError, explain
from tad_plugin.nn.derivatives.vectors import require_finite

__all__ = ["Fold", "class_mean_distance", "cross_fit", "matching_target", "validation_gradient", "validation_target"]

HELD_OUT_WAY_OUT = "Hold out some real samples (a few % per class, trusted ones if possible) with cross_fit(...)"


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
    """Target `validation`: the held-out loss of a network after it learned from the synthetic set.

    M(S) = CE of theta' on V, theta' = theta - alpha * grad_theta CE(S; theta), repeated ``steps`` times with full
    batches of S. Dropout would draw from the global generator: put such a network into eval mode.

    Args:
        network: f with its parameters theta, logits [B, K]; its train or eval mode is kept.
        synthetic: S, images [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K] (then M is differentiable in them too).
        images: V, held-out real images [n, C, H, W].
        labels: int64 [n], or probabilities [n, K].
        alpha: inner step size > 0; a scalar tensor may require a gradient (a learned learning rate).
        steps: number of inner steps, at least 1.

    Returns:
        Scalar with a graph to S (and to soft labels and alpha); mean over V.

    Raises:
        NoHeldOutError: V is empty.
        InvalidInputError: lengths differ, alpha or steps out of range.
    """
    trained, buffers = _trained(network, synthetic, synthetic_labels, images, labels, alpha, steps)
    return F.cross_entropy(torch.func.functional_call(network, {**trained, **buffers}, (images,)), labels)


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
    """Value and gradient (with respect to S) of :func:`validation_target`, with V in chunks.

    The gradient with respect to theta' is summed over chunks first and pulled back to S once, so the memory
    does not grow with V. Same arguments and errors; a network whose norm takes statistics of its batch (batch norm
    in train mode) sees chunks instead of all of V.

    Returns:
        (M(S), grad_S M in the shape of S).
    """
    if chunk_size < 1:
        raise InvalidInputError(explain("chunk_size of at least 1", str(chunk_size), "Pass a positive number"))
    leaf = synthetic.detach().clone().requires_grad_()
    rate = alpha.detach() if isinstance(alpha, Tensor) else alpha
    with torch.enable_grad():
        trained, buffers = _trained(network, leaf, synthetic_labels.detach(), images, labels, rate, steps)
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
    """The matching loss of DM: squared distance of the class means of real and synthetic embeddings.

    sum_c |sum_i w_i phi_i / sum_i w_i - mean_j phi(s_j)|^2 over the classes that both sides have (with some weight).

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
        raise NoHeldOutError(explain("a class with real and synthetic images", "none", HELD_OUT_WAY_OUT))
    gap = means(real, real_labels, w) - means(own, own_labels, torch.ones_like(own[:, 0]))
    return gap[both].square().sum()


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
    """Target `matching`: the unweighted matching loss against held-out samples, on fresh networks.

    Args:
        networks: one or several networks that the loop did not just match on; the mean over them is taken.
        synthetic: S, images [M, C, H, W].
        synthetic_labels: int64 [M].
        images: V, held-out real images [n, C, H, W]. A class without held-out samples takes no part.
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
    _check_held_out(synthetic, synthetic_labels, images, labels)
    losses = [loss_fn(net, synthetic, synthetic_labels, images, labels, num_classes) for net in several]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Fold:
    """One fold of :func:`cross_fit`; both are ascending int64 positions in the dataset and never share one.

    Attributes:
        held_out: V of this fold, for the target.
        scored: the samples that may be scored by (and weighted for) that target.
    """

    held_out: Tensor
    scored: Tensor


def cross_fit(
    labels: Tensor,
    num_classes: int,
    folds: int,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    per_class: int | None = None,
) -> list[Fold]:
    """Held-out folds, so that no sample is ever scored by a target that contains it, and yet all are scored.

    Every class is dealt out over the folds evenly. With F folds a sample is held out in at most one and scored
    in the others. The draw is made on the CPU, so every device gets the same folds.

    Args:
        labels: int64 [N] in [0, num_classes); the fold's V is stratified by them.
        num_classes: K.
        folds: F >= 2.
        generator: a CPU generator; one permutation of N is drawn.
        mask: bool [N], the samples that may be held out (trusted ones); all are scored. None for all.
        per_class: at most that many held-out samples of a class in a fold; None for no limit.

    Returns:
        F folds.

    Raises:
        NoHeldOutError: a fold would be without held-out samples.
        InvalidInputError: folds, per_class or the mask do not fit.
    """
    labels = check_labels(labels, num_classes)
    if folds < 2 or (per_class is not None and per_class < 1):
        got = f"folds {folds}, per_class {per_class}"
        raise InvalidInputError(explain("folds >= 2 and per_class >= 1 (or None)", got, "Pass larger numbers"))
    if mask is not None and (mask.shape != labels.shape or mask.dtype != torch.bool):
        got = f"{mask.dtype} of shape {list(mask.shape)}"
        raise InvalidInputError(explain(f"a bool mask of shape [{len(labels)}]", got, "Pass one entry per sample"))
    order = shuffled_groups(labels, generator, mask)
    # A sample's rank in its class is its position
    # minus the class's first position. Rank modulo F deals the class out; the offset keeps small classes from
    # all landing in fold 0.
    classes = labels[order]
    counts = torch.bincount(classes, minlength=num_classes)
    rank = torch.arange(len(order), device=labels.device) - (counts.cumsum(0) - counts)[classes]
    fold_of = (rank + classes) % folds
    keep = torch.ones_like(rank, dtype=torch.bool) if per_class is None else rank // folds < per_class
    found = []
    for fold in range(folds):
        held_out = order[keep & (fold_of == fold)].sort().values
        if len(held_out) == 0:
            got = f"{len(order)} candidates for {folds} folds"
            raise NoHeldOutError(
                explain("at least one held-out sample in each fold", got, "Use fewer folds, or a wider mask")
            )
        scored = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        scored[held_out] = False
        found.append(Fold(held_out, scored.nonzero().flatten()))
    return found


def _check_held_out(synthetic: Tensor, synthetic_labels: Tensor, images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise NoHeldOutError(explain("at least one held-out real sample", "none", HELD_OUT_WAY_OUT))
    if len(images) != len(labels) or len(synthetic) != len(synthetic_labels) or len(synthetic) == 0:
        got = f"{len(synthetic)} and {len(synthetic_labels)} synthetic, {len(images)} and {len(labels)} held out"
        raise InvalidInputError(explain("as many images as labels", got, "Pass one label per image"))


def _trained(
    network: nn.Module,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    alpha: float | Tensor,
    steps: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta' with its graph to S, and copies of the buffers."""
    _check_held_out(synthetic, synthetic_labels, images, labels)
    rate = float(alpha.detach()) if isinstance(alpha, Tensor) else alpha
    if steps < 1 or not rate > 0:
        got = f"steps {steps}, alpha {rate}"
        raise InvalidInputError(explain("steps of at least 1 and alpha > 0", got, "Pass the inner loop's settings"))
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
