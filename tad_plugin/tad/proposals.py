"""New labels for untrusted samples: anchors, proposals, and how far each can be relied on.

[paper] Untrusted samples are recalibrated by a reliability measure from the Mahalanobis distance to class anchors and
cosine similarity. [ours] The agreement rule and how the two are combined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.tad.geometry import (
    Anchors,
    check_features,
    class_anchors,
    ledoit_wolf,
    mahalanobis,
    principal_axes,
    whitened_measures,
)

__all__ = [
    "Anchors",
    "FeatureModel",
    "Reliability",
    "class_anchors",
    "fit_features",
    "fit_temperature",
    "ledoit_wolf",
    "mahalanobis",
    "predicted_labels",
    "principal_axes",
    "propose",
    "reliability",
    "reliability_score",
    "whitened_measures",
]

# One sample is its own anchor: its distance says nothing about the class.
MIN_ANCHOR = 2
# Samples that a temperature is fitted on at most, evenly spaced: one number needs no more.
_TEMPERATURE_SAMPLES = 5000


@dataclass(frozen=True)
class Reliability:
    """Proposals for untrusted samples.

    Attributes:
        score: float32 [N] in [0, 1], the reliability r of the proposal; 0 without one.
        proposal: int64 [N], the proposed label; -1 for a trusted sample and where the measures disagree.
        distance: float32 [N, K], Mahalanobis distance (not squared) to each anchor; inf for a class without one.
        cosine: float32 [N, K] in [-1, 1], cosine with each anchor; -1 for a class without one.
        temperature: what the softmax of the score was tempered by.
    """

    score: Tensor
    proposal: Tensor
    distance: Tensor
    cosine: Tensor
    temperature: float


@dataclass(frozen=True)
class FeatureModel:
    """Anchors and shared covariance of trusted samples; ``measure`` applies them to any features.

    Attributes:
        anchors: float64 [K, D].
        counts: int64 [K], trusted samples behind each anchor.
        axes: float64 [D, d], the projection for the distance, or None.
        cholesky: float64 [d, d], factor of the shrunken covariance of the projected residuals, or None with no anchor.
    """

    anchors: Tensor
    counts: Tensor
    axes: Tensor | None
    cholesky: Tensor | None

    @property
    def available(self) -> Tensor:
        """Bool [K]: classes with an anchor, that is with at least 2 trusted samples."""
        return self.counts >= MIN_ANCHOR

    def measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Distance [N, K] (inf without an anchor) and cosine [N, K] (-1 without), float32.

        The cosine is that of :func:`~tad_plugin.tad.geometry.whitened_measures`.
        """
        shape = (len(features), len(self.counts))
        far = torch.full(shape, torch.inf, dtype=torch.float32, device=features.device)
        close = torch.full(shape, -1.0, dtype=torch.float32, device=features.device)
        if self.cholesky is not None:
            use = self.available
            rows, anchors = _project(features, self.axes), _project(self.anchors[use], self.axes)
            distance, similar = whitened_measures(rows, anchors, self.cholesky)
            far[:, use], close[:, use] = distance.float(), similar.float()
        return far, close


def fit_features(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    num_classes: int,
    *,
    max_dim: int = 128,
    axes: Tensor | None = None,
) -> FeatureModel:
    """Anchors and covariance from the trusted samples of classes that have at least two [ours].

    Args:
        features: float [N, D].
        targets: integers [N] in [0, num_classes).
        trusted: bool [N].
        num_classes: K.
        max_dim: wider features are projected to this many principal axes of the trusted samples for the distance.
        axes: a projection [D, d] to use instead.

    Raises:
        InvalidInputError: a wrong shape, type or option; or trusted features that do not vary within any class.
        InvalidLabelsError: targets out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    if max_dim < 1:
        raise InvalidInputError(explain("max_dim >= 1", str(max_dim), "Leave it at 128"))
    features = check_features(features)
    if axes is not None and (axes.ndim != 2 or len(axes) != features.shape[1]):
        expected = f"`axes` of shape [{features.shape[1]}, d]"
        raise InvalidInputError(explain(expected, f"shape {list(axes.shape)}", "Compute them from the same features"))
    anchors, counts = class_anchors(features, targets, trusted, num_classes)
    targets, trusted = targets.to(features.device), trusted.to(features.device)
    index = (trusted & (counts >= MIN_ANCHOR)[targets]).nonzero().flatten()
    if len(index) == 0:
        return FeatureModel(anchors, counts, axes, None)
    inside = features[index]
    if axes is None and features.shape[1] > max_dim:
        axes = principal_axes(inside, max_dim)
    residuals = _project(inside, axes).double() - _project(anchors, axes)[targets[index]]
    covariance, _ = ledoit_wolf(residuals)
    scale = covariance.diagonal().mean()
    if not float(scale) > 0:
        raise InvalidInputError(
            explain(
                "trusted features that vary within a class",
                "one point per class",
                "The scorer's features have collapsed: lower its learning rate or train it anew",
            )
        )
    # A feature that is always 0 (a dead unit) can leave the estimate singular to rounding.
    jitter = 1e-9 * scale * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return FeatureModel(anchors, counts, axes, torch.linalg.cholesky(covariance + jitter))


def propose(distance: Tensor, cosine: Tensor, predictions: Tensor) -> Tensor:
    """The label on which three judges agree: nearest anchor, most similar anchor, the scorer's prediction [ours].

    Args:
        distance: float [N, K], inf where a class has no anchor.
        cosine: float [N, K].
        predictions: int64 [N], the scorer's labels, or float [N, K], its logits.

    Returns:
        int64 [N], -1 where they disagree or no class has an anchor.

    Raises:
        InvalidInputError: shapes that do not fit together.
        InvalidLabelsError: predicted labels out of range.
    """
    if distance.ndim != 2 or cosine.shape != distance.shape:
        got = f"{list(distance.shape)} and {list(cosine.shape)}"
        raise InvalidInputError(
            explain("`distance` and `cosine` of one shape [N, K]", got, "Pass both for the same anchors")
        )
    predicted = predicted_labels(predictions, *distance.shape).to(distance.device)
    nearest = distance.argmin(1)
    agreed = (nearest == _masked(cosine, distance).argmax(1)) & (nearest == predicted)
    agreed &= torch.isfinite(distance).any(1)
    return torch.where(agreed, nearest, -1)


def reliability_score(distance: Tensor, cosine: Tensor, proposal: Tensor, temperature: float) -> Tensor:
    """r = softmax_k(-d^2 / (2 T)) at the proposal, times (1 + cosine) / 2 [ours].

    Args:
        distance: float [N, K], inf where a class has no anchor.
        cosine: float [N, K].
        proposal: int64 [N], -1 for none.
        temperature: T > 0. 1 is the posterior under the Gaussian model with equal priors.

    Returns:
        float32 [N] in [0, 1]; 0 without a proposal.

    Raises:
        InvalidInputError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise InvalidInputError(explain("a temperature > 0", str(temperature), "Leave it None to have it fitted"))
    at = proposal.clamp_min(0).unsqueeze(1)
    logits = -distance.double().square() / (2 * temperature)
    # Not softmax(): a row of -inf (no anchor anywhere) is NaN there, and is masked below anyway.
    share = (logits.gather(1, at).flatten() - logits.logsumexp(1)).exp()
    score = share * (1 + cosine.gather(1, at).flatten().double()) / 2
    return torch.where(proposal >= 0, score, 0.0).float().clamp(0, 1)


def fit_temperature(distance: Tensor, targets: Tensor) -> float:
    """The T >= 1 whose softmax(-d^2 / (2 T)) gives the targets the greatest likelihood [ours].

    In D dimensions squared distances differ by amounts of order D and the plain softmax saturates at 0 and 1. The
    likelihood has one optimum in 1/T, found by bisection. T is never below 1, where the softmax is the exact posterior
    of the Gaussian model: samples that were selected for being easy would ask for a sharper one.

    Args:
        distance: float [M, K], inf where a class has no anchor; M = 0 gives 1.
        targets: int64 [M]; samples whose target has no anchor are left out.

    Returns:
        T in [1, 1e6].
    """
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


def reliability(
    features: Tensor,
    targets: Tensor,
    trusted: Tensor,
    predictions: Tensor,
    num_classes: int,
    *,
    temperature: float | None = None,
    max_dim: int = 128,
    axes: Tensor | None = None,
) -> Reliability:
    """Proposes labels for untrusted samples and scores how far each can be relied on.

    [paper] Mahalanobis distance to class anchors and cosine similarity. [ours] The proposal is the nearest anchor, if
    the most similar anchor and the scorer's prediction agree with it (:func:`propose`); the score is
    :func:`reliability_score`. Both measures are taken after the projection, the cosine between whitened vectors.

    A class with fewer than 2 trusted samples has no anchor and is never proposed. A proposal may equal the sample's
    own label: then the evidence speaks for the label although its loss is high.

    Args:
        features: float [N, D], the scorer's input to its last layer.
        targets: integers [N] in [0, num_classes); only those of trusted samples are used.
        trusted: bool [N].
        predictions: integers [N], the scorer's labels, or float [N, K], its logits.
        num_classes: K.
        temperature: of the softmax; None fits it (:func:`fit_temperature`) on the trusted samples, each measured
            against its own anchor with itself left out. For the threshold to fit the scores, take it from
            :class:`~tad_plugin.tad.calibration.Calibration`, or give this result's to the calibration.
        max_dim: wider features are projected to this many principal axes for the distance.
        axes: a projection [D, d] to use instead, such as :func:`principal_axes` gave for the calibration.

    Raises:
        InvalidInputError: a wrong shape, type or option; or trusted features that do not vary within any class.
        InvalidLabelsError: labels out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    features = check_features(features)
    targets = check_labels(targets, num_classes, len(features), "targets").to(features.device)
    predicted = predicted_labels(predictions, len(features), num_classes).to(features.device)
    model = fit_features(features, targets, trusted, num_classes, max_dim=max_dim, axes=axes)
    trusted = trusted.to(features.device)
    distance, similar = model.measure(features)
    if temperature is None:
        temperature = fit_temperature(
            _leave_one_out(distance[trusted], targets[trusted], model.counts), targets[trusted]
        )
    proposal = torch.where(trusted, -1, propose(distance, similar, predicted))
    score = reliability_score(distance, similar, proposal, temperature)
    return Reliability(score, proposal, distance, similar, temperature)


def _leave_one_out(distance: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Distances of trusted samples as if each were not in its own anchor.

    Without z the anchor is (n mu - z) / (n - 1), so z - anchor = (z - mu) n / (n - 1): a factor on the own distance.
    """
    n = counts[targets].double()
    own = distance.gather(1, targets.unsqueeze(1)) * (n / (n - 1).clamp_min(1)).unsqueeze(1).float()
    return distance.scatter(1, targets.unsqueeze(1), own)


def predicted_labels(predictions: Tensor, length: int, num_classes: int) -> Tensor:
    """int64 [N] from labels [N] or logits [N, K]; raises InvalidInputError or InvalidLabelsError for anything else."""
    if predictions.ndim == 2 and predictions.dtype.is_floating_point:
        if list(predictions.shape) != [length, num_classes]:
            expected = f"logits of shape [{length}, {num_classes}]"
            raise InvalidInputError(explain(expected, f"shape {list(predictions.shape)}", "Pass one row per sample"))
        return predictions.detach().argmax(1)
    return check_labels(predictions, num_classes, length, "predictions")


def _project(features: Tensor, axes: Tensor | None) -> Tensor:
    return features if axes is None else features @ axes.to(features.dtype)


def _masked(cosine: Tensor, distance: Tensor) -> Tensor:
    return torch.where(torch.isfinite(distance), cosine, -torch.inf)
