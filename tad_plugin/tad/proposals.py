"""New labels for untrusted samples, and how reliable each one is.

[paper] Untrusted samples are recalibrated by a reliability measure from the Mahalanobis distance to class anchors and
the cosine similarity. [ours] The rule of agreement, and how the two measures become one score.

Public functions check their arguments. The functions with an underscore trust theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.tad.feature_model import Projected, _fit_features, _seen, check_projection
from tad_plugin.tad.geometry import MAX_DIM, check_samples, rows_at_once
from tad_plugin.utils.arguments import finite_result, named_errors

__all__ = [
    "Reliability",
    "fit_temperature",
    "predicted_labels",
    "propose",
    "reliability",
    "reliability_score",
]

# Most samples that a temperature is fitted on, evenly spaced. One number needs no more.
_TEMPERATURE_SAMPLES = 5000


@dataclass(frozen=True)
class Reliability:
    """Proposals for untrusted samples.

    Attributes:
        score: float32 [N] in [0, 1], the reliability of each proposal; 0 without a proposal.
        proposal: int64 [N], the proposed label; -1 for a trusted sample and where the judges disagree.
        distance: float32 [N, K], Mahalanobis distance (not squared) to each anchor; inf for a class without an anchor.
        cosine: float32 [N, K] in [-1, 1], whitened cosine with each anchor; -1 for a class without an anchor.
        temperature: T of the score's softmax.
    """

    score: Tensor
    proposal: Tensor
    distance: Tensor
    cosine: Tensor
    temperature: float


@named_errors
def propose(distance: Tensor, cosine: Tensor, predictions: Tensor) -> Tensor:
    """Proposes the label on which three judges agree [ours].

    The judges are the nearest anchor, the most similar anchor and the scorer's prediction.

    Args:
        distance: float [N, K], inf where a class has no anchor.
        cosine: float [N, K].
        predictions: integers [N], the scorer's labels, or float [N, K], its logits.

    Returns:
        int64 [N], -1 where the judges disagree or no class has an anchor.

    Raises:
        InvalidInputError: shapes that do not match.
        InvalidLabelsError: predicted labels out of range.
    """
    if distance.ndim != 2 or cosine.shape != distance.shape:
        got = f"{list(distance.shape)} and {list(cosine.shape)}"
        expected = "`distance` and `cosine` of one shape [N, K]"
        raise InvalidInputError(explain(expected, got, "Pass both for the same anchors"))
    return _propose(distance, cosine, predicted_labels(predictions, *distance.shape).to(distance.device))


def _propose(distance: Tensor, cosine: Tensor, predicted: Tensor) -> Tensor:
    nearest = distance.argmin(1)
    reachable = torch.isfinite(distance)
    similar = torch.where(reachable, cosine, -torch.inf).argmax(1)
    agreed = (nearest == similar) & (nearest == predicted) & reachable.any(1)
    return torch.where(agreed, nearest, -1)


@named_errors
@finite_result
def reliability_score(distance: Tensor, cosine: Tensor, proposal: Tensor, temperature: float) -> Tensor:
    """Computes r = softmax_k(-d^2 / (2 T)) at the proposal, times (1 + cosine) / 2 [ours].

    Args:
        distance: float [N, K], inf where a class has no anchor.
        cosine: float [N, K].
        proposal: int64 [N], -1 for none.
        temperature: T > 0. T = 1 gives the posterior of the Gaussian model with equal priors.

    Returns:
        float32 [N] in [0, 1]; 0 without a proposal.

    Raises:
        InvalidInputError: shapes that do not match, or a temperature that is not positive.
    """
    if distance.ndim != 2 or cosine.shape != distance.shape or proposal.shape != distance.shape[:1]:
        got = f"{list(distance.shape)}, {list(cosine.shape)} and {list(proposal.shape)}"
        expected = "`distance` and `cosine` of one shape [N, K] and `proposal` [N]"
        raise InvalidInputError(explain(expected, got, "Pass all three for the same samples"))
    if not temperature > 0:
        raise InvalidInputError(explain("a temperature > 0", str(temperature), "Fit it with fit_temperature"))
    return _reliability_score(distance, cosine, proposal, temperature)


def _reliability_score(distance: Tensor, cosine: Tensor, proposal: Tensor, temperature: float) -> Tensor:
    return _score_of(distance, _at(cosine, proposal), proposal, temperature)


def _at(cosine: Tensor, proposal: Tensor) -> Tensor:
    """The cosine [N] with the proposed class; any value without a proposal."""
    return cosine.gather(1, proposal.clamp_min(0).unsqueeze(1)).flatten()


def _score_of(distance: Tensor, similar: Tensor, proposal: Tensor, temperature: float) -> Tensor:
    """:func:`reliability_score` with the cosine [N] at the proposal, chunk by chunk and only where there is one."""
    score = torch.zeros(len(proposal), dtype=torch.float32, device=distance.device)
    for rows in (proposal >= 0).nonzero().flatten().split(rows_at_once(distance.shape[1])):
        logits = -distance[rows].double().square() / (2 * temperature)
        share = (logits.gather(1, proposal[rows].unsqueeze(1)).flatten() - logits.logsumexp(1)).exp()
        score[rows] = (share * (1 + similar[rows].double()) / 2).float().clamp(0, 1)
    return score


@named_errors
def fit_temperature(distance: Tensor, targets: Tensor) -> float:
    """Finds the T >= 1 that gives the targets the greatest likelihood under softmax(-d^2 / (2 T)) [ours].

    Squared distances in D dimensions differ by amounts of order D, so the plain softmax saturates at 0 and 1. The
    likelihood has one optimum in 1/T, which is found by bisection. At T = 1 the softmax is the exact posterior of the
    Gaussian model. A sharper one is not allowed: trusted samples were selected for being easy and would ask for it.

    Args:
        distance: float [M, K], inf where a class has no anchor; M = 0 gives 1.
        targets: integers [M] in [0, K); samples whose target has no anchor are left out.

    Returns:
        T in [1, 1e6].

    Raises:
        InvalidInputError: ``distance`` of a wrong shape.
        InvalidLabelsError: targets out of range, of a wrong type or length.
    """
    if distance.ndim != 2:
        got = f"shape {list(distance.shape)}"
        raise InvalidInputError(explain("`distance` of shape [M, K]", got, "Pass one row per sample"))
    if len(distance) == 0 and len(targets) == 0:
        return 1.0
    targets = check_labels(targets, distance.shape[1], len(distance), "targets").to(distance.device)
    return _fit_temperature(distance, targets, torch.arange(len(distance), device=distance.device))


def _fit_temperature(distance: Tensor, targets: Tensor, index: Tensor) -> float:
    """:func:`fit_temperature` on the samples ``index``, int64 [M]. No more rows than needed are copied."""
    usable = index[torch.isfinite(distance[index, targets[index]])]
    if len(usable) == 0:
        return 1.0
    step = -(-len(usable) // _TEMPERATURE_SAMPLES)
    # On the CPU: there are few rows, and each step of the search reads a number.
    distance, targets = distance[usable[::step]].double().cpu(), targets[usable[::step]].cpu()
    logits = -distance.square() / 2
    held = logits.gather(1, targets.unsqueeze(1)).mean()
    finite = torch.where(torch.isfinite(logits), logits, 0.0)

    def slope(inverse: float) -> float:
        return float(held - ((inverse * logits).softmax(1) * finite).sum(1).mean())

    low, high = 1e-6, 1.0
    if slope(high) >= 0:
        return 1.0
    if slope(low) <= 0:
        return 1 / low
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / (low * high) ** 0.5


@named_errors
def reliability(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    predictions: Tensor,
    num_classes: int,
    *,
    temperature: float | None = None,
    max_dim: int = MAX_DIM,
    axes: Tensor | None = None,
) -> Reliability:
    """Proposes labels for untrusted samples and scores each proposal.

    [paper] The Mahalanobis distance to class anchors and the cosine similarity. [ours] The label comes from
    :func:`propose` and the score from :func:`reliability_score`. Both measures are taken after the projection.

    A class with fewer than 2 trusted samples has no anchor and is never proposed. A proposal may repeat the label of
    its sample: the evidence then supports the label although its loss is high.

    Args:
        features: float [N, D], the input of the scorer's last layer.
        targets: integers [N] in [0, num_classes); only those of trusted samples are used.
        trusted: bool [N].
        predictions: integers [N], the scorer's labels, or float [N, K], its logits.
        num_classes: K.
        temperature: T of the score, > 0. None fits it with :func:`fit_temperature` on the trusted samples; each is
            left out of its own anchor. Pass that of :class:`~tad_plugin.tad.calibration.Calibration`, so that its
            threshold fits the scores.
        max_dim: wider features are projected to this many principal axes.
        axes: a projection [D, d] to use instead, from :func:`~tad_plugin.tad.geometry.principal_axes`.

    Raises:
        InvalidInputError: a wrong shape, type or option; or trusted features that do not vary within any class.
        InvalidLabelsError: labels out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    features, targets, trusted = check_samples(features, targets, trusted, num_classes)
    check_projection(max_dim, axes, features.shape[1])
    if temperature is not None and not temperature > 0:
        raise InvalidInputError(explain("a temperature > 0", str(temperature), "Leave it None to have it fitted"))
    predicted = predicted_labels(predictions, len(features), num_classes).to(features.device)
    seen = _seen(features, targets, trusted, num_classes, max_dim, axes)
    model = _fit_features(seen, targets, trusted, num_classes)
    distance, similar = model.measure(features)
    if temperature is None:
        own = targets[trusted]
        left_out = _leave_one_out(distance[trusted], own, model.counts)
        temperature = _fit_temperature(left_out, own, torch.arange(len(own), device=own.device))
    proposal = torch.where(trusted, -1, _propose(distance, similar, predicted))
    score = _reliability_score(distance, similar, proposal, temperature)
    return Reliability(score, proposal, distance, similar, temperature)


def _propose_untrusted(
    seen: Projected, targets: Tensor, trusted: Tensor, predicted: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Score float32 [N] and proposal int64 [N] as of :func:`reliability`, chunk by chunk: no [N, K] tensor is made."""
    model = _fit_features(seen, targets, trusted, num_classes)
    proposal = torch.full_like(targets, -1)
    score = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    for at, distance, similar in model._measured(seen.rows, torch.arange(len(targets), device=targets.device)):
        proposal[at] = torch.where(trusted[at], -1, _propose(distance, similar, predicted[at]))
        score[at] = _reliability_score(distance, similar, proposal[at], temperature)
    return score, proposal


def _leave_one_out(distance: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Distances of trusted samples as if each were left out of its own anchor.

    Without z the anchor is (n mu - z) / (n - 1), so z - anchor = (z - mu) n / (n - 1): a factor on the own distance.
    """
    n = counts[targets].double()
    own = distance.gather(1, targets.unsqueeze(1)) * (n / (n - 1).clamp_min(1)).unsqueeze(1).float()
    return distance.scatter(1, targets.unsqueeze(1), own)


def predicted_labels(predictions: Tensor, length: int, num_classes: int) -> Tensor:
    """Checks predictions and returns labels, int64 [N].

    Args:
        predictions: integers [N], or logits, float [N, K].
        length: N.
        num_classes: K.

    Raises:
        InvalidInputError: logits of a wrong shape.
        InvalidLabelsError: labels out of range, of a wrong type or length.
    """
    if predictions.ndim == 2 and predictions.dtype.is_floating_point:
        if list(predictions.shape) != [length, num_classes]:
            expected = f"logits of shape [{length}, {num_classes}]"
            raise InvalidInputError(explain(expected, f"shape {list(predictions.shape)}", "Pass one row per sample"))
        return predictions.detach().argmax(1)
    return check_labels(predictions, num_classes, length, "predictions")
