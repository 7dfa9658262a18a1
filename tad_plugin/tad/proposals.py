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
from tad_plugin.tad.geometry import (
    MAX_DIM,
    _class_anchors,
    _ledoit_wolf,
    _principal_axes,
    _whitened_measures,
    check_samples,
)
from tad_plugin.utils.arguments import finite_result, named_errors

__all__ = [
    "FeatureModel",
    "Reliability",
    "check_projection",
    "fit_features",
    "fit_temperature",
    "predicted_labels",
    "propose",
    "reliability",
    "reliability_score",
]

# Fewest trusted samples of an anchor. A single sample is its own anchor, and its distance says nothing.
_MIN_ANCHOR = 2
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


@dataclass(frozen=True)
class FeatureModel:
    """Anchors and shared covariance of the trusted samples. Build it with :func:`fit_features`.

    Attributes:
        anchors: float64 [K, D].
        counts: int64 [K], trusted samples behind each anchor.
        axes: float64 [D, d], the projection; None without one.
        cholesky: float64 [d, d], factor of the shrunken covariance of the projected residuals; None without an anchor.
    """

    anchors: Tensor
    counts: Tensor
    axes: Tensor | None
    cholesky: Tensor | None

    @property
    def available(self) -> Tensor:
        """Bool [K]: classes with an anchor, that is with at least 2 trusted samples."""
        return self.counts >= _MIN_ANCHOR

    @named_errors
    @finite_result
    def measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the distance and the whitened cosine to each anchor.

        Args:
            features: float [M, D].

        Returns:
            Distance float32 [M, K], inf for a class without an anchor, and cosine float32 [M, K], -1 there.
        """
        shape = (len(features), len(self.counts))
        far = torch.full(shape, torch.inf, dtype=torch.float32, device=features.device)
        close = torch.full(shape, -1.0, dtype=torch.float32, device=features.device)
        if self.cholesky is not None:
            use = self.available
            rows, anchors = _project(features, self.axes), _project(self.anchors[use], self.axes)
            distance, similar = _whitened_measures(rows, anchors, self.cholesky)
            far[:, use], close[:, use] = distance.float(), similar.float()
        return far, close


def check_projection(max_dim: int, axes: Tensor | None, dimensions: int) -> None:
    """Checks the projection options of features with ``dimensions`` columns.

    Raises:
        InvalidInputError: ``max_dim`` below 1, or ``axes`` that are not [dimensions, d].
    """
    if max_dim < 1:
        raise InvalidInputError(explain("max_dim >= 1", str(max_dim), f"Leave it at {MAX_DIM}"))
    if axes is not None and (axes.ndim != 2 or len(axes) != dimensions):
        expected = f"`axes` of shape [{dimensions}, d]"
        raise InvalidInputError(explain(expected, f"shape {list(axes.shape)}", "Compute them from the same features"))


@named_errors
def fit_features(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    num_classes: int,
    *,
    max_dim: int = MAX_DIM,
    axes: Tensor | None = None,
) -> FeatureModel:
    """Fits anchors and one shared covariance to the trusted samples [ours].

    Classes with fewer than 2 trusted samples are left out.

    Args:
        features: float [N, D].
        targets: integers [N] in [0, num_classes).
        trusted: bool [N].
        num_classes: K.
        max_dim: wider features are projected to this many principal axes of the trusted samples.
        axes: a projection [D, d] to use instead.

    Raises:
        InvalidInputError: a wrong shape, type or option; or trusted features that do not vary within any class.
        InvalidLabelsError: targets out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    features, targets, trusted = check_samples(features, targets, trusted, num_classes)
    check_projection(max_dim, axes, features.shape[1])
    return _fit_features(features, targets, trusted, num_classes, max_dim, axes)


def _fit_features(
    features: Tensor, targets: Tensor, trusted: Tensor, num_classes: int, max_dim: int, axes: Tensor | None
) -> FeatureModel:
    anchors, counts = _class_anchors(features, targets, trusted, num_classes)
    index = (trusted & (counts >= _MIN_ANCHOR)[targets]).nonzero().flatten()
    if len(index) == 0:
        return FeatureModel(anchors, counts, axes, None)
    inside = features[index]
    if axes is None and features.shape[1] > max_dim:
        axes = _principal_axes(inside, max_dim)
    residuals = _project(inside, axes).double() - _project(anchors, axes)[targets[index]]
    covariance, _ = _ledoit_wolf(residuals)
    scale = covariance.diagonal().mean()
    if not float(scale) > 0:
        expected, got = "trusted features that vary within a class", "one point per class"
        do = "The scorer's features have collapsed: lower its learning rate or train it again"
        raise InvalidInputError(explain(expected, got, do))
    # A feature that is always 0 (a dead unit) can make the estimate singular up to rounding.
    jitter = 1e-9 * scale * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return FeatureModel(anchors, counts, axes, torch.linalg.cholesky(covariance + jitter))


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
    at = proposal.clamp_min(0).unsqueeze(1)
    logits = -distance.double().square() / (2 * temperature)
    # softmax() would give NaN for a row of -inf (no anchor at all). Such a row is masked below.
    share = (logits.gather(1, at).flatten() - logits.logsumexp(1)).exp()
    score = share * (1 + cosine.gather(1, at).flatten().double()) / 2
    return torch.where(proposal >= 0, score, 0.0).float().clamp(0, 1)


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
    return _fit_temperature(distance, targets)


def _fit_temperature(distance: Tensor, targets: Tensor) -> float:
    usable = torch.isfinite(distance.gather(1, targets.unsqueeze(1)).flatten()).nonzero().flatten()
    if len(usable) == 0:
        return 1.0
    step = -(-len(usable) // _TEMPERATURE_SAMPLES)
    distance, targets = distance[usable[::step]].double(), targets[usable[::step]]
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
    return _reliability(features, targets, trusted, predicted, num_classes, temperature, max_dim, axes)


def _reliability(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    predicted: Tensor,
    num_classes: int,
    temperature: float | None,
    max_dim: int,
    axes: Tensor | None,
) -> Reliability:
    model = _fit_features(features, targets, trusted, num_classes, max_dim, axes)
    distance, similar = model.measure(features)
    if temperature is None:
        own = targets[trusted]
        temperature = _fit_temperature(_leave_one_out(distance[trusted], own, model.counts), own)
    proposal = torch.where(trusted, -1, _propose(distance, similar, predicted))
    score = _reliability_score(distance, similar, proposal, temperature)
    return Reliability(score, proposal, distance, similar, temperature)


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


def _project(features: Tensor, axes: Tensor | None) -> Tensor:
    return features if axes is None else features @ axes.to(features.dtype)
