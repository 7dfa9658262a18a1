"""Divides the samples into a trusted and an untrusted space by their posteriors.

[paper] A dynamic division into a trusted and an untrusted space. [ours] The threshold, the rule for classes whose
losses show no two groups, and the smallest size of a class.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import rank_in_class
from tad_plugin.errors import InvalidInputError, UnimodalClassWarning, explain
from tad_plugin.tad.mixture import ClassMixture, _posterior, check_losses
from tad_plugin.utils.arguments import named_errors

__all__ = ["THRESHOLD", "Division", "divide"]

# Posterior above which a sample is trusted.
THRESHOLD = 0.5
# Classes named in one warning. The rest is counted, so that 1,000 classes do not fill the screen.
_NAMED = 10


@dataclass(frozen=True)
class Division:
    """Which samples are trusted.

    Attributes:
        trusted: bool [N].
        kept_share: float32 [K], trusted share of each class after the fill-up; 0 for an empty class.
        replaced: bool [K], classes that did not use ``threshold`` because their losses are unimodal.
    """

    trusted: Tensor
    kept_share: Tensor
    replaced: Tensor


@named_errors
def divide(
    losses: Tensor,
    labels: Tensor,
    mixture: ClassMixture,
    num_classes: int,
    *,
    threshold: float = THRESHOLD,
    min_per_class: int = 1,
    monotone: bool = True,
) -> Division:
    """Divides samples by the posterior of the low-loss component of their class [ours].

    - A class with two groups trusts the samples whose posterior exceeds ``threshold``.
    - A unimodal class keeps its lowest losses. Its share is the median share of the classes with two groups, before
      their fill-up. If no class has two groups, there is no evidence of noise and every sample is trusted.
      A :class:`~tad_plugin.errors.UnimodalClassWarning` names the classes and their separation.
    - A class with fewer than ``min_per_class`` trusted samples is filled up by lowest loss, as far as it reaches.

    Args:
        losses: float [N], the losses that ``mixture`` was fitted on.
        labels: integers [N] in [0, num_classes), the labels of the fit.
        mixture: the fit.
        num_classes: K.
        threshold: in [0, 1); a sample at exactly the threshold is not trusted.
        min_per_class: fewest trusted samples per class, >= 0.
        monotone: True never trusts a lower loss less than a higher one of the same class
            (:meth:`ClassMixture.posterior` with ``monotone``). False compares ``mixture.trust`` as it is.

    Raises:
        InvalidInputError: an option out of range, or a mixture of other data.
        InvalidLabelsError: labels out of range, of a wrong type or length.
        NonFiniteError: a NaN or infinite loss.
    """
    values = check_losses(losses)
    labels = check_labels(labels, num_classes, len(values)).to(values.device)
    if not 0 <= threshold < 1 or min_per_class < 0:
        got = f"threshold={threshold}, min_per_class={min_per_class}"
        expected = "threshold in [0, 1) and min_per_class >= 0"
        raise InvalidInputError(explain(expected, got, "Leave them at their defaults"))
    counts = torch.bincount(labels, minlength=num_classes)
    if mixture.trust.shape != values.shape or not torch.equal(mixture.counts.to(counts.device), counts):
        got = f"{len(values)} losses for a mixture of {len(mixture.trust)} samples, or other labels"
        expected = "the losses and labels that the mixture was fitted on"
        raise InvalidInputError(explain(expected, got, "Fit the mixture again"))
    posterior = _posterior(mixture, values, labels, monotone=True) if monotone else mixture.trust
    return _divide(values, labels, mixture, posterior.to(values.device), threshold, min_per_class)


def _divide(
    values: Tensor, labels: Tensor, mixture: ClassMixture, posterior: Tensor, threshold: float, min_per_class: int
) -> Division:
    """:func:`divide` for float64 losses ``values``, with the posterior [N] of the low component given."""
    counts = mixture.counts.to(values.device)
    trusted = posterior > threshold
    rank = rank_in_class(values, labels, len(counts))

    present = counts > 0
    replaced = mixture.unimodal.to(counts.device) & present
    bimodal = present & ~replaced
    if bool(replaced.any()):
        kept = _shares(trusted, labels, counts)[bimodal]
        # torch.median would return the lower of the middle two values.
        share = float(torch.quantile(kept, 0.5)) if len(kept) else 1.0
        quota = (share * counts.double()).round().long()
        trusted = torch.where(replaced[labels], rank < quota[labels], trusted)
        _warn(replaced, mixture.separation, share, everything=not len(kept))

    num_classes = len(counts)
    missing = min_per_class - torch.bincount(labels[trusted], minlength=num_classes)
    # Trusted samples form a group of their own, which is never filled up.
    left_out = torch.where(trusted, num_classes, labels)
    position = rank_in_class(values, left_out, num_classes + 1)
    trusted = trusted | (position < missing[labels]) & ~trusted
    return Division(trusted, _shares(trusted, labels, counts).float(), replaced)


def _shares(trusted: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return torch.bincount(labels[trusted], minlength=len(counts)).double() / counts.clamp_min(1)


def _warn(replaced: Tensor, separation: Tensor, share: float, *, everything: bool) -> None:
    classes = replaced.nonzero().flatten().tolist()
    named = ", ".join(f"class {c} (D = {float(separation[c]):.2f})" for c in classes[:_NAMED])
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    if everything:
        do = "No class shows two groups, so all samples are trusted; train the scorer longer if you expect noise"
    else:
        do = f"These classes keep {share:.0%} of their samples, the median of the other classes, by lowest loss"
    got = f"one group in {named}{more}"
    expected = "two groups of losses in every class (D of at least 2, and a better fit than one group by BIC)"
    message = explain(expected, got, do)
    # Shown at the line that called `divide`.
    warnings.warn(message, UnimodalClassWarning, stacklevel=5)
