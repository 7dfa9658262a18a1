"""One refresh: which samples are held out, and the influence of all others on one network. [ours: README.md, 2 and 3]

Scores are standardised inside each class, so that scores of several networks can be averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.distributed import Ranks, gather_rows, ranks
from tad_plugin.core.events import Learning
from tad_plugin.core.scorer import features_and_logits
from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import shuffled_groups
from tad_plugin.errors import InvalidInputError, NoHeldOutError, explain
from tad_plugin.iwd.explicit import class_mean_influence
from tad_plugin.iwd.explicit_gradients import GradientDistance, class_gradient_influence
from tad_plugin.iwd.implicit_networks import learned_influence
from tad_plugin.iwd.targets import TARGETS, Expand, hard_labels, mean_target_gradient
from tad_plugin.iwd.weighting import Classes
from tad_plugin.nn.passes import halved
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images, image_rows
from tad_plugin.utils.transfers import download, upload

__all__ = [
    "Fold",
    "NetworkScores",
    "Refresh",
    "cross_fit",
    "draw_folds",
    "embedding_of",
    "gather_scores",
    "held_out_folds",
    "score_on_network",
    "valid_size",
]


# held-out samples


@dataclass(frozen=True)
class Fold:
    """Held-out and scored samples: ascending int64 positions in the dataset, disjoint.

    Attributes:
        held_out: V of this fold, on which the target is measured.
        scored: the samples that this V may score.
    """

    held_out: Tensor
    scored: Tensor


def valid_size(held_out: float) -> bool:
    """True for a size of V: a share in (0, 0.5], or a whole number of samples per class >= 1."""
    return 0 < held_out <= 0.5 or (held_out >= 1 and float(held_out).is_integer())


@named_errors
def held_out_folds(
    targets: Tensor,
    num_classes: int,
    held_out: float,
    usable: Tensor,
    *,
    vouched: Tensor | None = None,
    generator: torch.Generator,
) -> list[Fold]:
    """Draws the folds of one refresh. Each V is stratified by class; all other usable samples are scored.

    Args:
        targets: int64 [N] in [0, num_classes).
        num_classes: K.
        held_out: size of V: a share of the usable samples in (0, 0.5], or a whole number of samples per class >= 1.
            V takes at most half of the samples that may be held out, so that these are scored too.
        usable: bool [N], the samples that are scored and may be held out.
        vouched: bool [N], hold out only these of the usable samples; None for all.
        generator: a CPU generator; one permutation of N is drawn.

    Returns:
        At least two folds with disjoint V.

    Raises:
        NoHeldOutError: too few samples may be held out.
        InvalidInputError: ``held_out`` is out of range, or a mask does not fit.
    """
    targets = check_labels(targets, num_classes, name="targets")
    if not valid_size(held_out):
        expected = "held_out as a share in (0, 0.5] or a whole number per class"
        raise InvalidInputError(explain(expected, str(held_out), "Pass 0.1, for example"))
    for name, mask in (("usable", usable), ("vouched", vouched)):
        if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
            got = f"{mask.dtype} of shape {list(mask.shape)}"
            raise InvalidInputError(explain(f"`{name}` as bool [{len(targets)}]", got, "Pass one entry per sample"))
    return draw_folds(targets, num_classes, held_out, usable, vouched, generator)


def draw_folds(
    targets: Tensor,
    num_classes: int,
    held_out: float,
    usable: Tensor,
    vouched: Tensor | None,
    generator: torch.Generator,
) -> list[Fold]:
    """:func:`held_out_folds` for arguments that are checked already. Raises NoHeldOutError."""
    # On the CPU, where the draw is made: a choice by a mask makes an accelerator wait.
    device, (targets, usable) = targets.device, download([targets, usable])
    may = usable if vouched is None else usable & vouched.cpu()
    size = torch.bincount(targets[usable], minlength=num_classes).max() if bool(usable.any()) else 0
    largest = int(torch.bincount(targets[may], minlength=num_classes).max()) if bool(may.any()) else 0
    if largest < 2:
        do = "Use more real data, vouch for more of it, or use a method before IWD that trusts more of it"
        raise NoHeldOutError(explain("a class with at least two samples to hold out", f"at most {largest}", do))
    wanted = math.ceil(held_out * int(size)) if held_out < 1 else int(held_out)
    per_class = max(1, min(wanted, largest // 2))
    dealt = _deal(targets, num_classes, max(2, largest // per_class), generator, may, per_class)
    parts = [part for fold in dealt for part in (fold.held_out, fold.scored[usable[fold.scored]])]
    there = iter(upload(parts, device))
    return [Fold(held_out, scored) for held_out, scored in zip(there, there, strict=True)]


@named_errors
def cross_fit(
    labels: Tensor,
    num_classes: int,
    folds: int,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    per_class: int | None = None,
) -> list[Fold]:
    """Draws held-out folds so that all samples are scored, but none by a target that contains it.

    Every class is dealt out evenly. With F folds, a sample is held out in at most one and scored in the others. The
    draw is made on the CPU, so every device gets the same folds.

    Args:
        labels: int64 [N] in [0, num_classes); each V is stratified by them.
        num_classes: K.
        folds: F >= 2.
        generator: a CPU generator; one permutation of N is drawn.
        mask: bool [N], the samples that may be held out (trusted ones); all are scored. None for all.
        per_class: largest number of held-out samples per class and fold; None for no limit.

    Returns:
        F folds.

    Raises:
        NoHeldOutError: a fold would have no held-out samples.
        InvalidInputError: folds, per_class or the mask do not fit.
    """
    labels = check_labels(labels, num_classes)
    if folds < 2 or (per_class is not None and per_class < 1):
        got = f"folds {folds}, per_class {per_class}"
        raise InvalidInputError(explain("folds >= 2 and per_class >= 1 (or None)", got, "Pass larger numbers"))
    if mask is not None and (mask.shape != labels.shape or mask.dtype != torch.bool):
        got = f"{mask.dtype} of shape {list(mask.shape)}"
        raise InvalidInputError(explain(f"a bool mask of shape [{len(labels)}]", got, "Pass one entry per sample"))
    return _deal(labels, num_classes, folds, generator, mask, per_class)


def _deal(
    labels: Tensor,
    num_classes: int,
    folds: int,
    generator: torch.Generator,
    mask: Tensor | None,
    per_class: int | None,
) -> list[Fold]:
    order = shuffled_groups(labels, generator, mask)
    # A sample's rank in its class is its position minus the first position of the class. Rank modulo F deals the class
    # out; adding the class keeps small classes from all landing in fold 0.
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


# scores


def embedding_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """images -> features [B, D]: the network's ``embed``, or the input of its last linear layer."""
    embed: Any = getattr(network, "embed", None)
    return embed if callable(embed) else lambda images: features_and_logits(network, images)[0]


@dataclass(frozen=True)
class NetworkScores:
    """Result of :func:`score_on_network`.

    Attributes:
        indices: int64 [B], the scored samples.
        influence: float [B], dM/dw per unit step of S on this network. Negative = helpful.
        standardised: float64 [B], the influence as z-scores inside each class.
        target: M(S) on the held-out samples.
    """

    indices: Tensor
    influence: Tensor
    standardised: Tensor
    target: float


@dataclass(frozen=True)
class Refresh:
    """What the networks of one refresh share. Values are trusted; :func:`score_on_network` checks and explains them."""

    images: Images
    targets: Tensor
    synthetic: Tensor
    synthetic_labels: Tensor
    num_classes: int
    target: str = "validation"
    weights: Tensor | None = None
    alpha: float = 0.01
    steps: int = 1
    chunk_size: int = 1024
    expand: Expand | None = None
    distance: GradientDistance | None = None
    explicit: bool = True
    learning: Learning | None = None

    def target_gradient(self, network: nn.Module, fold: Fold, size: int | None = None) -> tuple[float, Tensor]:
        """M(S) and grad_S M on the held-out samples of the fold, with ``size`` images per pass."""
        return mean_target_gradient(
            self.target,
            [network],
            self.synthetic,
            self.synthetic_labels,
            self.images[fold.held_out],
            self.targets[fold.held_out],
            self.num_classes,
            self.alpha,
            self.steps,
            self.chunk_size if size is None else size,
            self.expand,
        )

    def score(self, network: nn.Module, fold: Fold) -> NetworkScores:
        """Scores the samples of ``fold.scored``: first grad_S M, then the paths that count, then z-scores.

        Passes get smaller if memory runs out.
        """
        return halved(lambda size: self._score(network, fold, size), self.chunk_size)

    def _score(self, network: nn.Module, fold: Fold, size: int) -> NetworkScores:
        value, slope = self.target_gradient(network, fold, size)
        synthetic, synthetic_labels = self.synthetic.detach(), self.synthetic_labels
        if self.expand is not None:
            # The descent step is one of S. A linear map moves its images the way it moves the set itself.
            slope, _ = self.expand(slope, synthetic_labels)
            synthetic, synthetic_labels = self.expand(synthetic, synthetic_labels)
        images, own = image_rows(self.images, fold.scored), self.targets[fold.scored]
        weights = None if self.weights is None else self.weights[fold.scored]
        matched = (images, own, synthetic.detach(), hard_labels(synthetic_labels), slope)
        embed, k = embedding_of(network), self.num_classes
        if self.distance is not None:
            found = class_gradient_influence(network, *matched, k, self.distance, weights=weights, chunk_size=size)
        elif self.explicit:
            found = class_mean_influence(embed, *matched, k, weights=weights, chunk_size=size)
        else:
            found = torch.zeros(len(own), dtype=images.dtype, device=images.device)
        if self.learning is not None:
            given = (*matched, k, self.learning)
            found = found + learned_influence(network, embed, *given, weights=weights, chunk_size=size)
        every = torch.ones_like(own, dtype=torch.bool)
        return NetworkScores(fold.scored, found, Classes(own, k, every).z_scores(found), value)

    def score_shared(self, network: nn.Module, fold: Fold, of: Ranks) -> NetworkScores:
        """:meth:`score` with the classes divided among processes (torchrun); each gets the scores of all.

        A class is scored by one process: a sample's influence depends on the mean of its class and on no other class.
        The path through the training of a network is a sum over all classes, so each process computes it.
        """
        if of.size == 1 or self.learning is not None:
            return self.score(network, fold)
        own = fold.scored[self.targets[fold.scored] % of.size == of.rank]
        if len(own):
            found = self.score(network, Fold(fold.held_out, own))
        else:
            none = torch.zeros(0, dtype=self.images.dtype, device=own.device)
            found = NetworkScores(own, none, none.double(), self.target_gradient(network, fold)[0])
        influence, standardised = gather_rows(found.influence), gather_rows(found.standardised)
        return NetworkScores(gather_rows(found.indices), influence, standardised, found.target)


def gather_scores(indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices int64 [B] and scores float64 [B] of all processes; the mean where several scored a sample."""
    if ranks().size == 1:
        return indices, scores
    every, place, copies = gather_rows(indices).unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(every), dtype=scores.dtype, device=scores.device)
    return every, total.index_add_(0, place, gather_rows(scores)) / copies


@named_errors
def score_on_network(
    network: nn.Module,
    images: Images,
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
    """Computes the influence of all samples of ``fold.scored`` through class means or gradients, on one network.

    Args:
        network: the network on which both the statistic and M are taken.
        images: all real images [N, C, H, W].
        targets: int64 [N] in [0, num_classes).
        fold: held-out and scored positions, both not empty.
        synthetic: S, [M, C, H, W].
        synthetic_labels: int64 [M], or probabilities [M, K].
        num_classes: K.
        target: "validation" or "matching".
        weights: current weights [N] >= 0, with a positive sum in each class; None for 1. The ranking inside a class
            does not depend on their scale.
        alpha: inner step size of "validation".
        steps: inner steps of "validation".
        chunk_size: images per forward pass.
        expand: maps S and its labels to what the network sees; must be linear in the images, as partition and
            enlargement are. None if the network sees S itself.
        distance: distance between class gradients (DC, DSA); None for class means of embeddings (DM, IDM).
        explicit: count the path through the matched statistic.
        learning: add the path through the training of this network (class means only); None leaves it out.

    Raises:
        InvalidLabelsError: labels out of range or of another length.
        InvalidInputError: lengths, weights or sizes do not fit, or an unknown target.
        NoHeldOutError: V is empty.
        NonFiniteError: an image, a gradient or an influence is NaN or infinite.
    """
    targets = check_labels(targets, num_classes, len(images), "targets")
    if synthetic_labels.ndim == 1:
        check_labels(synthetic_labels, num_classes, len(synthetic), "synthetic_labels")
    if target not in TARGETS or len(synthetic_labels) != len(synthetic):
        got = f"{target!r}, {len(synthetic)} images, {len(synthetic_labels)} labels"
        raise InvalidInputError(explain(f"a target out of {TARGETS} and a label for each of S", got, "Correct them"))
    if steps < 1 or not alpha > 0 or chunk_size < 1:
        got = f"steps {steps}, alpha {alpha}, chunk_size {chunk_size}"
        raise InvalidInputError(explain("steps >= 1, alpha > 0 and chunk_size >= 1", got, "Correct them"))
    if weights is not None and (weights.shape != targets.shape or bool((weights < 0).any())):
        got = f"shape {list(weights.shape)}"
        raise InvalidInputError(explain(f"weights >= 0 of shape [{len(targets)}]", got, "Pass one per real image"))
    if not len(fold.held_out) or not len(fold.scored):
        got = f"{len(fold.held_out)} held out, {len(fold.scored)} scored"
        raise NoHeldOutError(explain("held-out samples and samples to score", got, "Draw them with held_out_folds"))
    return Refresh(
        images, targets, synthetic, synthetic_labels, num_classes, target, weights, alpha, steps, chunk_size, expand,
        distance, explicit, learning,
    ).score(network, fold)  # fmt: skip
