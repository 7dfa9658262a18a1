"""Calibrates the reliability from which a proposed label is recalled.

[ours] The threshold of the paper is not public. The precision of proposals is estimated in two ways:

- *On trusted samples* the label is known, and the same proposal can be scored there. This estimate is too high:
  trusted samples were selected because the scorer agrees with their label, and a rule that asks for the scorer's
  agreement is nearly always right on them. Some of their labels are still wrong, which lowers it a little.
- *On untrusted samples* the label is unknown, but the noise can be used as a measure. Let a share e of all labels be
  wrong, spread evenly over the other classes. Proposals with precision q then agree with the observed label at the rate
  a = q (1 - e) + (1 - q) e / (K - 1). Selection does not matter as long as *all* samples are counted. So
  q = (a - e / (K - 1)) / (1 - e - e / (K - 1)). Of the proposals that contradict the observed label, the share
  q e / (1 - a) is right, and recall is about those. e is read from the most reliable tenth of the proposals: it is the
  rate at which they contradict the observed labels, and at most the untrusted share.

Limits of the second estimate: A scorer that has memorised the observed labels agrees with them too often. That makes e
and the estimate too low, and fewer samples are recalled. Top proposals that are often wrong make e and the estimate too
high. Noise between few classes is not spread evenly.

Precision of the recalled labels when 0.9 was asked for, in the simulation of tests/tad/test_calibration.py (10 classes
of 400, symmetric noise, 10 draws that were not used to choose anything):

| noise rate, gap between classes | trusted samples alone | with the correction |
|---|---|---|
| 0.2, 2.0 | 0.50 | 0.88 |
| 0.4, 1.5 (scorer right on 56%) | 0.77 | 0.80 |
| 0.4, 2.0 | 0.75 | 0.89 |
| 0.4, 3.0 | 0.86 | 0.91 |
| 0.6, 2.0 | 0.87 | 0.92 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import shuffled_groups
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.tad.feature_model import Projected, _fit_features, check_projection
from tad_plugin.tad.geometry import MAX_DIM, check_samples
from tad_plugin.tad.proposals import _at, _fit_temperature, _propose, _score_of, predicted_labels
from tad_plugin.utils.arguments import named_errors

__all__ = ["RECALL_PRECISION", "Calibration", "calibrate_threshold"]

# Precision that recalled labels must reach.
RECALL_PRECISION = 0.9
# Fewest trusted proposals that a precision may rest on.
_MIN_SUPPORT = 20
# Share of all proposals, the most reliable ones, that the noise rate is read from. In simulations
# (tests/tad/test_calibration.py) a twentieth was too noisy, and a fifth already held too many wrong proposals.
_TOP_SHARE = 0.1


@dataclass(frozen=True)
class Calibration:
    """Two thresholds and the curve that they were read from (M distinct scores, falling).

    Attributes:
        threshold: rho, for a proposal that contradicts the observed label: recall it with score >= rho. inf where the
            wanted precision is not reached.
        threshold_agree: the same for a proposal that repeats the observed label; at most ``threshold``.
        temperature: T of the scores; pass it to ``reliability``.
        axes: float64 [D, d], the projection of the scores, None without one; pass it to ``reliability``.
        noise_rate: e, the share of wrong observed labels that the corrected curve assumes.
        scores: float32 [M], falling.
        precision: float32 [M], precision on trusted samples of proposals with at least that score, against the
            targets; 0 before the first.
        corrected: float32 [M], estimate of the precision on untrusted samples; 0 before the first.
        support: int64 [M], trusted samples with a proposal of at least that score.
        candidates: int64 [M], untrusted samples with a proposal of at least that score.
    """

    threshold: float
    threshold_agree: float
    temperature: float
    axes: Tensor | None
    noise_rate: float
    scores: Tensor
    precision: Tensor
    corrected: Tensor
    support: Tensor
    candidates: Tensor


@named_errors
def calibrate_threshold(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    predictions: Tensor,
    num_classes: int,
    *,
    generator: torch.Generator,
    recall_precision: float = RECALL_PRECISION,
    observed: Tensor | None = None,
    corrected: bool = True,
    noise_rate: float | None = None,
    temperature: float | None = None,
    max_dim: int = MAX_DIM,
    axes: Tensor | None = None,
    min_support: int = _MIN_SUPPORT,
) -> Calibration:
    """Finds the smallest reliability at which proposals reach the wanted precision [ours].

    All samples are split in two random halves, class by class. Each half is measured against the anchors and the
    covariance of the trusted samples of the *other* half, so that no sample helps to place its own anchor. rho is the
    smallest score at which the precision on trusted samples is at least ``recall_precision``, with at least
    ``min_support`` trusted proposals behind it. With ``corrected`` the estimate for untrusted samples (see the text of
    this module) must reach that precision too.

    Args:
        features: float [N, D].
        targets: integers [N] in [0, num_classes).
        trusted: bool [N].
        predictions: integers [N], the scorer's labels, or float [N, K], its logits.
        num_classes: K.
        generator: a CPU generator; draws the split (one permutation of N).
        recall_precision: wanted precision, in (0, 1].
        observed: integers [N], the labels as given; None takes ``targets``. Differs for samples recalled before.
        corrected: False relies on the trusted samples alone, which recalls too many wrong labels.
        noise_rate: e in [0, 1), if known; None estimates it.
        temperature: T of the score, > 0; None fits it on the cross-fitted trusted samples.
        max_dim: wider features are projected to this many principal axes.
        axes: a projection [D, d] to use instead.
        min_support: fewest trusted proposals that a precision may rest on, >= 1.

    Raises:
        InvalidInputError: a wrong shape, type or option; or trusted features that do not vary within any class.
        InvalidLabelsError: labels out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    if not 0 < recall_precision <= 1 or min_support < 1 or not (noise_rate is None or 0 <= noise_rate < 1):
        got = f"{recall_precision}, {min_support} and {noise_rate}"
        expected = "recall_precision in (0, 1], min_support >= 1 and noise_rate in [0, 1)"
        raise InvalidInputError(explain(expected, got, "Leave them at their defaults"))
    if temperature is not None and not temperature > 0:
        raise InvalidInputError(explain("a temperature > 0", str(temperature), "Leave it None to have it fitted"))
    features, targets, trusted = check_samples(features, targets, trusted, num_classes)
    check_projection(max_dim, axes, features.shape[1])
    n, where = len(features), features.device
    # The projection sees no label, so both halves may share it.
    seen = Projected.of(features, axes) if axes is not None else Projected.on_leading_axes(features, trusted, max_dim)
    return _calibrate_threshold(
        seen,
        targets,
        trusted,
        predicted_labels(predictions, n, num_classes).to(where),
        targets if observed is None else check_labels(observed, num_classes, n, "observed").to(where),
        num_classes,
        generator=generator,
        recall_precision=recall_precision,
        corrected=corrected,
        noise_rate=noise_rate,
        temperature=temperature,
        min_support=min_support,
    )


def _calibrate_threshold(
    seen: Projected,
    targets: Tensor,
    trusted: Tensor,
    predicted: Tensor,
    observed: Tensor,
    num_classes: int,
    *,
    generator: torch.Generator,
    recall_precision: float,
    corrected: bool = True,
    noise_rate: float | None = None,
    temperature: float | None = None,
    min_support: int = _MIN_SUPPORT,
) -> Calibration:
    half, where = _halves(targets, trusted, generator), targets.device
    # The temperature is fitted on distances to the anchors of both halves. They are kept, and no other [N, K] tensor.
    distance = torch.empty(len(targets), num_classes, dtype=torch.float32, device=where)
    proposal, similar = torch.empty_like(targets), torch.empty_like(distance[:, 0])
    for side in (True, False):
        rows = half == side
        model = _fit_features(seen, targets, trusted & ~rows, num_classes)
        for at, distances, cosines in model._measured(seen.rows, rows.nonzero().flatten()):
            chosen = _propose(distances, cosines, predicted[at])
            distance[at], proposal[at], similar[at] = distances, chosen, _at(cosines, chosen)
    if temperature is None:
        temperature = _fit_temperature(distance, targets, trusted.nonzero().flatten())
    score = _score_of(distance, similar, proposal, temperature)
    del distance

    made = proposal >= 0
    order = torch.argsort(score[made], descending=True, stable=True)
    score, proposal, sure = score[made][order], proposal[made][order], trusted[made][order]
    right = proposal == targets[made][order]
    agree = proposal == observed[made][order]
    # A threshold admits all samples with its score, so only the last of equal scores is a point of the curve.
    last = torch.ones_like(sure)
    if len(score) > 1:
        last[:-1] = score[:-1] != score[1:]
    support = sure.cumsum(0)
    precision = (sure & right).cumsum(0).double() / support.clamp_min(1)
    proposals = torch.arange(1, len(score) + 1, device=where)
    agreement = agree.cumsum(0).double() / proposals
    if noise_rate is None:
        # A sample recalled under another label counts as wrong. Otherwise every recall would lower the estimate.
        noise_rate = _noise_rate(agreement, trusted & (targets == observed), min_support)
    kept, changed = ((~sure) & agree).cumsum(0).double(), ((~sure) & ~agree).cumsum(0).double()
    right_kept, right_changed = _right_shares(agreement, noise_rate, num_classes)
    estimate = (right_kept * kept + right_changed * changed) / (kept + changed).clamp_min(1)

    enough = last & (support >= min_support) & (precision >= recall_precision)
    contradicting = enough & (right_changed >= recall_precision) if corrected else enough
    confirming = enough & (right_kept >= recall_precision) if corrected else enough
    return Calibration(
        threshold=_lowest(score, contradicting),
        threshold_agree=_lowest(score, confirming | contradicting),
        temperature=temperature,
        axes=seen.axes,
        noise_rate=noise_rate,
        scores=score[last],
        precision=precision[last].float(),
        corrected=estimate[last].float(),
        support=support[last],
        candidates=(kept + changed)[last].long(),
    )


def _halves(targets: Tensor, trusted: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [N]: a random half of the trusted and of the untrusted samples of each class (by target)."""
    order = shuffled_groups(2 * targets + trusted.long(), generator)
    # Alternating along the sorted groups splits each of them evenly, wherever it starts.
    half = torch.empty_like(trusted)
    half[order] = torch.arange(len(order), device=order.device) % 2 == 0
    return half


def _noise_rate(agreement: Tensor, unchanged: Tensor, min_support: int) -> float:
    """Share of contradicted labels among the most reliable proposals, at most the share outside ``unchanged`` [N]."""
    untrusted = 1 - float(unchanged.double().mean())
    if len(agreement) == 0:
        return untrusted
    top = min(max(min_support, int(_TOP_SHARE * len(agreement))), len(agreement))
    return min(untrusted, 1 - float(agreement[top - 1]))


def _lowest(score: Tensor, enough: Tensor) -> float:
    return float(score[enough][-1]) if bool(enough.any()) else math.inf


def _right_shares(agreement: Tensor, noise: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Estimates the share of right proposals in each prefix, for those that repeat and those that contradict."""
    chance = noise / max(num_classes - 1, 1)
    informative = 1 - noise - chance
    if informative <= 0:  # the labels are no better than random, so agreement carries no information
        return torch.zeros_like(agreement), torch.zeros_like(agreement)
    q = ((agreement - chance) / informative).clamp(0, 1)
    right_kept = (q * (1 - noise) / agreement.clamp_min(1e-12)).clamp_max(1)
    right_changed = (q * noise / (1 - agreement).clamp_min(1e-12)).clamp_max(1)
    return right_kept, right_changed
