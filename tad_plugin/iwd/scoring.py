"""One refresh: every real sample scored on one network, against held-out samples that are not among the scored ones.

[ours: METHODS.md 2.1]. Scores are standardised inside each class, so that networks can be summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.events import Learning
from tad_plugin.core.scorer import features_and_logits
from tad_plugin.errors import InvalidInputError, NoHeldOutError, explain
from tad_plugin.iwd.explicit import dm_influence
from tad_plugin.iwd.explicit_gradients import GradientDistance, gradient_influence
from tad_plugin.iwd.implicit_networks import learned_influence
from tad_plugin.iwd.targets import Fold, cross_fit, matching_target, validation_gradient
from tad_plugin.iwd.weighting import standardise
from tad_plugin.nn.derivatives.vectors import require_finite

__all__ = ["TARGETS", "embedding_of", "held_out_folds", "score_on_network", "target_gradient"]

TARGETS = ("validation", "matching")
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def embedding_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """images -> features [B, D]: the network's ``embed``, or the input of its last linear layer."""
    embed: Any = getattr(network, "embed", None)
    return embed if callable(embed) else lambda images: features_and_logits(network, images)[0]


def held_out_folds(
    targets: Tensor,
    num_classes: int,
    held_out: float,
    usable: Tensor,
    *,
    vouched: Tensor | None = None,
    generator: torch.Generator,
) -> list[Fold]:
    """Folds for one refresh: V of each is a stratified draw, all other usable samples are scored.

    Args:
        targets: int64 [N] in [0, num_classes).
        num_classes: K.
        held_out: size of V: a share of the usable samples in (0, 0.5], or a whole number of samples per class >= 1.
            Where fewer may be held out, V is smaller: at most half of those, so that they are scored as well.
        usable: bool [N], the samples that are scored, and may be held out.
        vouched: bool [N], hold out only these of the usable samples; None for all.
        generator: a CPU generator; one permutation of N is drawn.

    Returns:
        At least two folds with disjoint V.

    Raises:
        NoHeldOutError: too few samples may be held out.
        InvalidInputError: ``held_out`` is out of range, or a mask does not fit.
    """
    if not (0 < held_out <= 0.5 or (held_out >= 1 and float(held_out).is_integer())):
        raise InvalidInputError(
            explain("held_out as a share in (0, 0.5] or a whole number per class", str(held_out), "Pass 0.1, say")
        )
    if vouched is not None and vouched.shape != usable.shape:
        got = f"shape {list(vouched.shape)}"
        raise InvalidInputError(explain(f"held_out candidates [{len(usable)}]", got, "Pass one entry per sample"))
    may = usable if vouched is None else usable & vouched
    size = torch.bincount(targets[usable], minlength=num_classes).max() if bool(usable.any()) else 0
    largest = int(torch.bincount(targets[may], minlength=num_classes).max()) if bool(may.any()) else 0
    if largest < 2:
        do = "Use more real data, vouch for more of it, or a method before IWD that trusts more of it"
        raise NoHeldOutError(explain("a class with at least two samples to hold out", f"at most {largest}", do))
    wanted = math.ceil(held_out * int(size)) if held_out < 1 else int(held_out)
    per_class = max(1, min(wanted, largest // 2))
    dealt = cross_fit(
        targets, num_classes, max(2, largest // per_class), generator=generator, mask=may, per_class=per_class
    )
    return [Fold(fold.held_out, fold.scored[usable[fold.scored]]) for fold in dealt]


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
    """Value and gradient of the target M with respect to S, the mean over ``networks``.

    Args:
        target: "validation" or "matching".
        networks: networks on which M is measured; never changed.
        synthetic: S, [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K].
        images: V, [n, C, H, W].
        labels: int64 [n].
        num_classes: K.
        alpha: inner step size of "validation".
        steps: inner steps of "validation".
        chunk_size: held-out images per pass of "validation".
        expand: what becomes of S before a network sees it, see :class:`tad_plugin.core.events.Match`; None for nothing.

    Returns:
        (M(S), grad_S M in the shape of S).

    Raises:
        NoHeldOutError: V is empty.
        NonFiniteError: the gradient is NaN or infinite.
        InvalidInputError: unknown target or no network.
    """
    if target not in TARGETS or not networks:
        raise InvalidInputError(
            explain(f"a target out of {TARGETS} and a network", f"{target!r}, {len(networks)} networks", "Correct them")
        )
    if expand is not None:
        # M of the expanded set, and its gradient pulled back to S.
        leaf = synthetic.detach().clone().requires_grad_()
        with torch.enable_grad():
            shown, shown_labels = expand(leaf, synthetic_labels)
        level, slope = target_gradient(
            target,
            networks,
            shown.detach(),
            shown_labels,
            images,
            labels,
            num_classes,
            alpha=alpha,
            steps=steps,
            chunk_size=chunk_size,
        )
        return level, torch.autograd.grad(shown, leaf, slope)[0]
    if target == "validation":
        found = [
            validation_gradient(
                net, synthetic, synthetic_labels, images, labels, alpha=alpha, steps=steps, chunk_size=chunk_size
            )
            for net in networks
        ]
        return sum(v for v, _ in found) / len(found), torch.stack([g for _, g in found]).mean(0)
    leaf = synthetic.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = matching_target(networks, leaf, hard_labels(synthetic_labels), images, labels, num_classes)
        (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), require_finite(
        gradient, "target gradient", "Look for NaN in the images and the network"
    )


def hard_labels(labels: Tensor) -> Tensor:
    """int64 [M]: the labels, or the likeliest class of soft ones [M, K]."""
    return labels if labels.ndim == 1 else labels.argmax(1)


@dataclass(frozen=True)
class NetworkScores:
    """What :func:`score_on_network` found.

    Attributes:
        indices: int64 [B], the scored samples.
        influence: float [B], dM/dw per unit step of S on this network. Negative = helpful.
        standardised: float64 [B], the same as z-scores inside each class.
        target: M(S) on the held-out samples.
    """

    indices: Tensor
    influence: Tensor
    standardised: Tensor
    target: float


def score_on_network(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    fold: Fold,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    num_classes: int,
    *,
    target: str = "validation",
    weights: Tensor | None = None,
    alpha: float = 0.01,
    steps: int = 1,
    chunk_size: int = 1024,
    expand: Expand | None = None,
    distance: GradientDistance | None = None,
    explicit: bool = True,
    learning: Learning | None = None,
) -> NetworkScores:
    """Influence of all samples of ``fold.scored`` through a match of class means or gradients, on one network.

    Args:
        network: the network on which both the statistic and M are taken.
        images: all real images [N, C, H, W].
        targets: int64 [N].
        fold: held-out and scored positions.
        synthetic: S, [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K].
        num_classes: K.
        target: "validation" or "matching".
        weights: current weights [N]; None for 1. They move no ranking inside a class.
        alpha: inner step size of "validation".
        steps: inner steps of "validation".
        chunk_size: images per forward pass.
        expand: what becomes of S before the network sees it; linear in the images, as are partition and enlargement.
        distance: between class gradients (DC, DSA); None for class means of embeddings (DM, IDM).
        explicit: whether the path through the matched statistic counts.
        learning: adds the path through the training of this network (class means only); None leaves it out.

    Raises:
        NonFiniteError: an image, a gradient or an influence is NaN or infinite.
    """
    value, slope = target_gradient(
        target,
        [network],
        synthetic,
        synthetic_labels,
        images[fold.held_out],
        targets[fold.held_out],
        num_classes,
        alpha=alpha,
        steps=steps,
        chunk_size=chunk_size,
        expand=expand,
    )
    if expand is not None:
        # The descent step is one of S; a linear map moves its images the way it moves the set itself.
        slope, _ = expand(slope, synthetic_labels)
        synthetic, synthetic_labels = expand(synthetic.detach(), synthetic_labels)
    own = targets[fold.scored]
    matched = (images[fold.scored], own, synthetic.detach(), hard_labels(synthetic_labels), slope, num_classes)
    current = None if weights is None else weights[fold.scored]
    embed = embedding_of(network)
    if distance is not None:
        found = gradient_influence(network, *matched, distance, weights=current, chunk_size=chunk_size)
    elif explicit:
        found = dm_influence(embed, *matched, weights=current, chunk_size=chunk_size)
    else:
        found = torch.zeros(len(own), dtype=images.dtype, device=images.device)
    if learning is not None:
        found = found + learned_influence(network, embed, *matched, learning, weights=current, chunk_size=chunk_size)
    return NetworkScores(fold.scored, found, standardise(found, own, num_classes), value)
