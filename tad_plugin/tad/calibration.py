"""From which reliability on a proposed label is taken over.

[ours] The paper's threshold is not public. Two measures of a proposal's precision stand beside each other:

- *on trusted samples* the label is known, and the same proposal can be scored there. That is biased upward: trusted
  samples were selected because the scorer agrees with their label, so a rule that asks for the scorer's agreement
  is nearly always right on them. It is also measured against labels some of which are still wrong, a small bias
  downward.
- *on untrusted samples* the label is unknown, but the noise is a yardstick. If a share e of all labels is wrong,
  spread evenly over the other classes, proposals with precision q agree with the observed label at the rate
  a = q (1 - e) + (1 - q) e / (K - 1), and selection plays no part as long as *all* samples are counted. So
  q = (a - e / (K - 1)) / (1 - e - e / (K - 1)), and of the proposals that contradict the observed label the share
  q e / (1 - a) is right: those are what recall is about. e is read from how often even the most reliable tenth of
  the proposals contradicts the observed labels, and is never above the untrusted share.

What the second leans on: a scorer that has memorised the observed labels agrees with them too often, which makes e and
the estimate too low (fewer recalled); top proposals that are often wrong make e and the estimate too high; noise
between few classes breaks "spread evenly".

Precision of what was recalled when 0.9 was asked for, in the simulation of tests/tad/test_calibration.py (10 classes of
400, symmetric noise, 10 draws that were not used to choose anything):

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
from tad_plugin.tad.geometry import check_features, principal_axes
from tad_plugin.tad.proposals import fit_features, fit_temperature, predicted_labels, propose, reliability_score

__all__ = ["Calibration", "calibrate_threshold"]

# Share of all proposals, the most reliable ones, that the noise rate is read from. In simulations
# (tests/tad/test_calibration.py) a twentieth was too noisy, and a fifth already held too many wrong proposals.
_TOP_SHARE = 0.1


@dataclass(frozen=True)
class Calibration:
    """The threshold rho and the curve that it was read from (M distinct scores, falling).

    Attributes:
        threshold: rho: recall a proposal that contradicts the observed label with score >= rho. inf where the wanted
            precision is not reached.
        threshold_agree: the same for a proposal that repeats the observed label; at most ``threshold``.
        temperature: that the scores were computed with; pass it to ``reliability``.
        noise_rate: e, the share of wrong observed labels that the corrected curve assumes.
        scores: float32 [M], falling.
        precision: float32 [M], of proposals with at least that score on trusted samples, against their targets; 0
            before the first.
        corrected: float32 [M], estimate of the same on untrusted samples; 0 before the first.
        support: int64 [M], trusted samples with a proposal of at least that score.
        candidates: int64 [M], the same for untrusted ones.
    """

    threshold: float
    threshold_agree: float
    temperature: float
    noise_rate: float
    scores: Tensor
    precision: Tensor
    corrected: Tensor
    support: Tensor
    candidates: Tensor


def calibrate_threshold(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    predictions: Tensor,
    num_classes: int,
    *,
    generator: torch.Generator,
    recall_precision: float = 0.9,
    observed: Tensor | None = None,
    corrected: bool = True,
    noise_rate: float | None = None,
    temperature: float | None = None,
    max_dim: int = 128,
    axes: Tensor | None = None,
    min_support: int = 20,
) -> Calibration:
    """The smallest reliability from which on proposals are right with the wanted precision [ours].

    All samples are split in two halves, class by class at random, and each is measured against anchors and covariance
    of the trusted samples of the *other* half, so that no sample helps to place its own anchor. rho is the smallest
    score at which the precision on trusted samples, and with ``corrected`` also the estimate for untrusted ones (see
    the module's text), is at least ``recall_precision``, with at least ``min_support`` trusted proposals behind it.

    Args:
        features: float [N, D].
        targets: integers [N] in [0, num_classes).
        trusted: bool [N].
        predictions: integers [N], the scorer's labels, or float [N, K], its logits.
        num_classes: K.
        generator: a CPU generator; draws the split (one permutation of N).
        recall_precision: wanted precision, in (0, 1].
        observed: integers [N], labels as given; None takes ``targets``. Differs for samples recalled before.
        corrected: whether the estimate for untrusted samples must reach the precision too. False asks the trusted
            samples alone, which lets far too much pass (see the module's text).
        noise_rate: e in [0, 1), if known; None estimates it.
        temperature: of the score; None fits it on the cross-fitted trusted samples.
        max_dim: wider features are projected to this many principal axes for the distance.
        axes: a projection [D, d] to use instead; wide features are cheaper if ``reliability`` gets the same one.
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
    features = check_features(features)
    where = features.device
    targets = check_labels(targets, num_classes, len(features), "targets").to(where)
    labels = targets if observed is None else check_labels(observed, num_classes, len(features), "observed").to(where)
    predicted = predicted_labels(predictions, len(features), num_classes).to(where)
    trusted = trusted.to(where)

    half = _halves(targets, trusted, generator)
    if axes is None and features.shape[1] > max_dim and int(trusted.sum()) > 1:
        # The projection sees no label, so both halves may share it.
        axes = principal_axes(features[trusted], max_dim)
    distance = torch.empty(len(features), num_classes, dtype=torch.float32, device=where)
    similar = torch.empty_like(distance)
    for side in (True, False):
        rows = half == side
        model = fit_features(features, targets, trusted & ~rows, num_classes, max_dim=max_dim, axes=axes)
        distance[rows], similar[rows] = model.measure(features[rows])
    if temperature is None:
        temperature = fit_temperature(distance[trusted], targets[trusted])
    proposal = propose(distance, similar, predicted)
    score = reliability_score(distance, similar, proposal, temperature)

    made = proposal >= 0
    order = torch.argsort(score[made], descending=True, stable=True)
    score, proposal, sure = score[made][order], proposal[made][order], trusted[made][order]
    right = proposal == targets[made][order]
    agree = proposal == labels[made][order]
    # A threshold takes in all samples with its score: only the last of equal ones is a point of the curve.
    last = torch.ones_like(sure)
    if len(score) > 1:
        last[:-1] = score[:-1] != score[1:]
    support = sure.cumsum(0)
    precision = (sure & right).cumsum(0).double() / support.clamp_min(1)
    proposals = torch.arange(1, len(score) + 1, device=where)
    agreement = agree.cumsum(0).double() / proposals
    if noise_rate is None:
        # A sample that was recalled under another label counts as wrong, else every recall would lower the estimate.
        noise_rate = _noise_rate(agreement, trusted & (targets == labels), min_support)
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
        noise_rate=noise_rate,
        scores=score[last],
        precision=precision[last].float(),
        corrected=estimate[last].float(),
        support=support[last],
        candidates=(kept + changed)[last].long(),
    )


def _halves(targets: Tensor, trusted: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [N]: a random half of each class's trusted and of each class's untrusted samples (by target)."""
    order = shuffled_groups(2 * targets + trusted.long(), generator)
    # Alternating along the groups splits each of them evenly, whatever its start.
    half = torch.empty_like(trusted)
    half[order] = torch.arange(len(order), device=order.device) % 2 == 0
    return half


def _noise_rate(agreement: Tensor, trusted: Tensor, min_support: int) -> float:
    """The share of contradicted labels among the most reliable proposals, at most the untrusted share."""
    untrusted = 1 - float(trusted.double().mean())
    if len(agreement) == 0:
        return untrusted
    top = min(max(min_support, int(_TOP_SHARE * len(agreement))), len(agreement))
    return min(untrusted, 1 - float(agreement[top - 1]))


def _lowest(score: Tensor, enough: Tensor) -> float:
    return float(score[enough][-1]) if bool(enough.any()) else math.inf


def _right_shares(agreement: Tensor, noise: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Estimated share of right proposals in each prefix: of those repeating and those contradicting the label."""
    chance = noise / max(num_classes - 1, 1)
    informative = 1 - noise - chance
    if informative <= 0:  # the labels are no better than random, so agreement says nothing
        return torch.zeros_like(agreement), torch.zeros_like(agreement)
    q = ((agreement - chance) / informative).clamp(0, 1)
    right_kept = (q * (1 - noise) / agreement.clamp_min(1e-12)).clamp_max(1)
    right_changed = (q * noise / (1 - agreement).clamp_min(1e-12)).clamp_max(1)
    return right_kept, right_changed
