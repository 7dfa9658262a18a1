"""The model of the trusted features: class anchors and one covariance, after a projection that is computed once.

[ours] Both definitions, and the projection of wide features.

Public functions check their arguments. The functions with an underscore trust theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, NonFiniteError, explain
from tad_plugin.tad.geometry import (
    CHUNK,
    MAX_DIM,
    _class_anchors,
    _ledoit_wolf,
    _principal_axes,
    _whitened_measures,
    check_samples,
    rows_at_once,
)
from tad_plugin.utils.arguments import named_errors

__all__ = ["FeatureModel", "Projected", "check_projection", "fit_features"]

# Fewest trusted samples of an anchor. A single sample is its own anchor, and its distance says nothing.
_MIN_ANCHOR = 2


class Projected(NamedTuple):
    """Features and their projection. Several models of the same features share it.

    Attributes:
        features: float [N, D].
        axes: float64 [D, d], the projection; None without one.
        rows: float [N, d], the projected features; ``features`` itself without a projection.
    """

    features: Tensor
    axes: Tensor | None
    rows: Tensor

    @classmethod
    def of(cls, features: Tensor, axes: Tensor | None) -> Projected:
        """Projects checked features."""
        return cls(features, axes, _project(features, axes))

    @classmethod
    def on_leading_axes(cls, features: Tensor, inside: Tensor, max_dim: int) -> Projected:
        """Projects features wider than ``max_dim`` to the principal axes of the samples ``inside``, bool [N]."""
        axes = None
        if features.shape[1] > max_dim:
            index = inside.nonzero().flatten()
            axes = _principal_axes(features, max_dim, index) if len(index) > 1 else None
        return cls.of(features, axes)


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
    def measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the distance and the whitened cosine to each anchor.

        Args:
            features: float [M, D].

        Returns:
            Distance float32 [M, K], inf for a class without an anchor, and cosine float32 [M, K], -1 there.

        Raises:
            NonFiniteError: a measure is NaN.
        """
        index = torch.arange(len(features), device=features.device)
        parts = list(self._measured(_project(features, self.axes), index))
        if not parts:
            empty = torch.empty(0, len(self.counts), dtype=torch.float32, device=features.device)
            return empty, empty.clone()
        return torch.cat([distance for _, distance, _ in parts]), torch.cat([similar for _, _, similar in parts])

    def _measured(self, rows: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields chunk by chunk positions int64 [M] of ``index``, and :meth:`measure` of these projected ``rows``.

        The distances of a million samples to a thousand anchors never exist at once.
        """
        use = self.available
        anchors = None if self.cholesky is None else _project(self.anchors[use], self.axes)
        everywhere = anchors is not None and len(anchors) == len(use)
        bad = torch.zeros((), dtype=torch.bool, device=rows.device)
        for at in index.split(rows_at_once(len(use))):
            shape = (len(at), len(use))
            far = torch.full(shape, torch.inf, dtype=torch.float32, device=rows.device)
            close = torch.full(shape, -1.0, dtype=torch.float32, device=rows.device)
            if anchors is not None and self.cholesky is not None:
                distance, similar = _whitened_measures(rows[at], anchors, self.cholesky)
                if everywhere:
                    far, close = distance.float(), similar.float()
                else:
                    far[:, use], close[:, use] = distance.float(), similar.float()
            bad |= torch.isnan(far).any() | torch.isnan(close).any()
            yield at, far, close
        if bool(bad):
            do = "Look for NaN and very large values in the features"
            raise NonFiniteError(explain("finite distances to the class anchors", "NaN", do))


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
    seen = _seen(features, targets, trusted, num_classes, max_dim, axes)
    return _fit_features(seen, targets, trusted, num_classes)


def _anchored(targets: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """Bool [N]: trusted samples of classes that have an anchor."""
    return trusted & (torch.bincount(targets[trusted], minlength=num_classes) >= _MIN_ANCHOR)[targets]


def _seen(
    features: Tensor, targets: Tensor, trusted: Tensor, num_classes: int, max_dim: int, axes: Tensor | None
) -> Projected:
    """The features on the given axes, or on the leading axes of the samples behind the anchors."""
    if axes is not None:
        return Projected.of(features, axes)
    return Projected.on_leading_axes(features, _anchored(targets, trusted, num_classes), max_dim)


def _fit_features(seen: Projected, targets: Tensor, trusted: Tensor, num_classes: int) -> FeatureModel:
    anchors, counts = _class_anchors(seen.features, targets, trusted, num_classes)
    index = (trusted & (counts >= _MIN_ANCHOR)[targets]).nonzero().flatten()
    if len(index) == 0:
        return FeatureModel(anchors, counts, seen.axes, None)
    means = _project(anchors, seen.axes)
    residuals = (seen.rows[at].double() - means[targets[at]] for at in index.split(CHUNK))
    covariance, _ = _ledoit_wolf(residuals, len(index), means)
    scale = covariance.diagonal().mean()
    if not float(scale) > 0:
        expected, got = "trusted features that vary within a class", "one point per class"
        do = "The scorer's features have collapsed: lower its learning rate or train it again"
        raise InvalidInputError(explain(expected, got, do))
    # A feature that is always 0 (a dead unit) can make the estimate singular up to rounding.
    jitter = 1e-9 * scale * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return FeatureModel(anchors, counts, seen.axes, torch.linalg.cholesky(covariance + jitter))


def _project(features: Tensor, axes: Tensor | None) -> Tensor:
    return features if axes is None else features @ axes.to(features.dtype)
