"""Class anchors, the shrunken covariance, and two measures of closeness in feature space.

[paper] A reliability measure from the Mahalanobis distance to class anchors and the cosine similarity.
[ours] The definition of the anchors, one covariance for all classes with Ledoit-Wolf shrinkage, the whitened cosine,
and the projection of wide features.

Public functions check their arguments. The functions with an underscore trust theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import InvalidInputError, NonFiniteError, NotEnoughSamplesError, explain
from tad_plugin.utils.arguments import finite_result, named_errors

__all__ = [
    "CHUNK",
    "MAX_DIM",
    "Anchors",
    "check_features",
    "check_samples",
    "class_anchors",
    "cosine",
    "ledoit_wolf",
    "mahalanobis",
    "principal_axes",
    "rows_at_once",
    "whitened_measures",
]

# Features with more dimensions than this are projected before distances are measured.
MAX_DIM = 128
# Rows that are converted to float64 or measured at a time. Keeps what is temporary small for a million samples.
CHUNK = 8192
# Numbers of a chunk of rows x classes. With more than 256 classes a chunk has fewer rows.
_CHUNK_NUMBERS = 2**21
# Rows that principal axes are computed from. More rows hardly change the axes of wide features.
_MAX_ROWS = 4096
# From this many dimensions on, a CPU finds a few leading axes by Lanczos iterations: the same digits, 4 times faster.
_LANCZOS_DIM = 1024


class Anchors(NamedTuple):
    """Mean feature of each class.

    Attributes:
        means: float64 [K, D]; zeros for a class without samples.
        counts: int64 [K], samples behind each mean.
    """

    means: Tensor
    counts: Tensor


def rows_at_once(num_classes: int) -> int:
    """Rows whose distances to all classes are computed at a time."""
    return max(1, min(CHUNK, _CHUNK_NUMBERS // num_classes))


def check_features(features: Tensor, name: str = "features") -> Tensor:
    """Checks features and returns them detached.

    Raises:
        InvalidInputError: not a floating-point [N, D] with N, D >= 1.
        NonFiniteError: NaN or infinite values. The message gives the number of rows and the first one.
    """
    if features.ndim != 2 or not features.dtype.is_floating_point or 0 in features.shape:
        got = f"shape {list(features.shape)}, dtype {features.dtype}"
        expected = f"floating-point `{name}` of shape [N, D]"
        raise InvalidInputError(explain(expected, got, "Flatten each sample to one row"))
    features = features.detach()
    # A NaN or an infinity never leaves a sum. An infinite sum of finite values is possible, so the rows decide then.
    if bool(torch.isfinite(features.sum())):
        return features
    bad = ~torch.isfinite(features).all(1)
    if bool(bad.any()):
        got = f"{int(bad.sum())} of {len(features)} non-finite rows (first: row {int(bad.nonzero()[0])})"
        do = "The scorer may have diverged: lower its learning rate"
        raise NonFiniteError(explain(f"finite `{name}`", got, do))
    return features


def check_samples(
    features: Tensor, targets: Tensor, trusted: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks features [N, D], targets [N] and trusted flags [N]; returns them on the features' device.

    Raises:
        InvalidInputError: features or flags of a wrong shape or type.
        InvalidLabelsError: targets out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    features = check_features(features)
    targets = check_labels(targets, num_classes, len(features), "targets").to(features.device)
    if trusted.shape != targets.shape or trusted.dtype != torch.bool:
        got = f"shape {list(trusted.shape)}, dtype {trusted.dtype}"
        expected = f"boolean `trusted` of shape [{len(targets)}]"
        raise InvalidInputError(explain(expected, got, "Pass one flag per sample"))
    return features, targets, trusted.to(features.device)


@named_errors
def class_anchors(features: Tensor, targets: Tensor, trusted: Tensor, num_classes: int) -> Anchors:
    """Computes the mean feature of the trusted samples of each class [ours].

    Args:
        features: float [N, D].
        targets: integers [N] in [0, num_classes).
        trusted: bool [N].
        num_classes: K.

    Returns:
        Anchors. A class without a trusted sample has a row of zeros and count 0.

    Raises:
        InvalidInputError: a wrong shape or type.
        InvalidLabelsError: targets out of range, of a wrong type or length.
        NonFiniteError: NaN or infinite features.
    """
    return _class_anchors(*check_samples(features, targets, trusted, num_classes), num_classes)


def _class_anchors(features: Tensor, targets: Tensor, trusted: Tensor, num_classes: int) -> Anchors:
    index = trusted.nonzero().flatten()
    counts = torch.bincount(targets[index], minlength=num_classes)
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    for rows in index.split(CHUNK):
        sums.index_add_(0, targets[rows], features[rows].double())
    return Anchors(sums / counts.clamp_min(1).unsqueeze(1), counts)


@named_errors
@finite_result
def ledoit_wolf(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Computes a covariance shrunk toward a multiple of the identity (Ledoit & Wolf, JMVA 2004).

    covariance = (1 - s) R'R/M + s mu I, with mu = tr(R'R/M)/D. The shrinkage s in [0, 1] minimises the expected
    squared error. Equals scikit-learn's ``ledoit_wolf(R, assume_centered=True)``.

    Args:
        residuals: float [M, D], already centred; TAD centres each row on the anchor of its class.

    Returns:
        The covariance, float64 [D, D], and the shrinkage, a float64 scalar.

    Raises:
        InvalidInputError: a wrong shape or type.
        NonFiniteError: NaN or infinite residuals.
    """
    residuals = check_features(residuals, "residuals")
    return _ledoit_wolf(residuals.split(CHUNK), len(residuals), residuals)


def _ledoit_wolf(residuals: Iterable[Tensor], m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ledoit_wolf` of M rows that come in parts [m, D]. ``like`` [any, D] shows D and the device."""
    d = like.shape[1]
    second = torch.zeros(d, d, dtype=torch.float64, device=like.device)
    fourth = second.new_zeros(())
    for rows in residuals:
        part = rows.double()
        second += part.T @ part
        fourth += part.square().sum(1).square().sum()
    empirical = second / m
    mu = empirical.diagonal().mean()
    squared = empirical.square().sum()
    distance = (squared - d * mu.square()) / d
    noise = torch.minimum((fourth / m - squared) / (d * m), distance)
    shrinkage = torch.where(distance > 0, noise / distance.clamp_min(1e-300), 0.0).clamp(0, 1)
    target = mu * torch.eye(d, dtype=torch.float64, device=like.device)
    return (1 - shrinkage) * empirical + shrinkage * target, shrinkage


@named_errors
def mahalanobis(features: Tensor, anchors: Tensor, cholesky: Tensor) -> Tensor:
    """Computes the Mahalanobis distance, **not** squared, of each row to each anchor.

    d_ik = sqrt((z_i - mu_k)' Sigma^-1 (z_i - mu_k)), by a triangular solve with the factor of Sigma.

    Args:
        features: float [N, D].
        anchors: float [K, D].
        cholesky: float [D, D], lower triangular, Sigma = L L'.

    Returns:
        [N, K], >= 0, in the dtype of the features (computed in float64).

    Raises:
        InvalidInputError: shapes that do not match.
    """
    return whitened_measures(features, anchors, cholesky)[0]


@named_errors
@finite_result
def cosine(features: Tensor, anchors: Tensor) -> Tensor:
    """Computes the plain cosine of each row and each anchor.

    Args:
        features: float [N, D].
        anchors: float [K, D].

    Returns:
        [N, K] in [-1, 1], in the dtype of the features; 0 where a row or an anchor is zero.

    Raises:
        InvalidInputError: shapes that do not match.
    """
    if features.ndim != 2 or anchors.ndim != 2 or anchors.shape[1] != features.shape[1]:
        got = f"{list(features.shape)} and {list(anchors.shape)}"
        raise InvalidInputError(explain("features [N, D] and anchors [K, D]", got, "Pass matching shapes"))
    return _cosine(features, anchors)


def _cosine(features: Tensor, anchors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(anchors.double(), dim=1, eps=1e-300)
    parts = []
    for rows in features.split(CHUNK):
        value = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300) @ unit.T
        parts.append(value.clamp_(-1, 1).to(features.dtype))
    return torch.cat(parts)


@named_errors
@finite_result
def whitened_measures(features: Tensor, anchors: Tensor, cholesky: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the Mahalanobis distance and the whitened cosine of each row and each anchor [ours].

    Whitening makes the Mahalanobis distance Euclidean. The cosine is taken between whitened vectors, seen from the mean
    of the anchors. Plain cosines of features behind a ReLU are all near 1 and hardly tell classes apart: README.md,
    section "What was tried".

    Args:
        features: float [N, D].
        anchors: float [K, D].
        cholesky: float [D, D], lower triangular, Sigma = L L'.

    Returns:
        Distance [N, K], >= 0, and cosine [N, K] in [-1, 1], in the dtype of the features (computed in float64).

    Raises:
        InvalidInputError: shapes that do not match.
    """
    d = features.shape[-1]
    if features.ndim != 2 or anchors.ndim != 2 or anchors.shape[1] != d or list(cholesky.shape) != [d, d]:
        got = f"{list(features.shape)}, {list(anchors.shape)} and {list(cholesky.shape)}"
        expected = "features [N, D], anchors [K, D] and a factor [D, D]"
        raise InvalidInputError(explain(expected, got, "Pass matching shapes"))
    check_features(features)
    return _whitened_measures(features, anchors, cholesky)


def _whitened_measures(features: Tensor, anchors: Tensor, cholesky: Tensor) -> tuple[Tensor, Tensor]:
    # Centring comes first: the expanded square below would lose digits far from the origin.
    centre = anchors.double().mean(0)
    white = _whiten(anchors, centre, cholesky)
    distances, cosines = [], []
    for rows in features.split(CHUNK):
        z = _whiten(rows, centre, cholesky)
        squared = z.square().sum(1, keepdim=True) + white.square().sum(1)
        squared -= 2 * z @ white.T
        distances.append(squared.clamp_min_(0).sqrt_().to(features.dtype))
        cosines.append(_cosine(z, white).to(features.dtype))
    return torch.cat(distances), torch.cat(cosines)


def _whiten(features: Tensor, centre: Tensor, cholesky: Tensor) -> Tensor:
    """L^-1 (z - centre) of each row, float64 [N, D]."""
    return torch.linalg.solve_triangular(cholesky.double(), (features.double() - centre.double()).T, upper=False).T


@named_errors
def principal_axes(features: Tensor, dimensions: int, *, limit: int = _MAX_ROWS) -> Tensor:
    """Computes the leading principal axes of the rows, by falling variance.

    Args:
        features: float [M, D].
        dimensions: number of axes, in [1, D].
        limit: largest number of rows used, >= 2; they are evenly spaced over all rows. Bounds the D x D products.

    Returns:
        float64 [D, dimensions], orthonormal columns (each up to its sign).

    Raises:
        InvalidInputError: a wrong shape, ``dimensions`` out of range or ``limit`` below 2.
        NotEnoughSamplesError: fewer than two rows.
        NonFiniteError: NaN or infinite features.
    """
    features = check_features(features)
    m, d = features.shape
    if not 1 <= dimensions <= d or limit < 2:
        got, do = f"{dimensions} and {limit}", f"Lower max_dim, or leave it at {MAX_DIM}"
        raise InvalidInputError(explain(f"dimensions in [1, {d}] and limit >= 2", got, do))
    if m < 2:
        raise NotEnoughSamplesError(explain("at least two rows", str(m), "Trust more samples, or load more data"))
    return _principal_axes(features, dimensions, torch.arange(m, device=features.device), limit)


def _principal_axes(features: Tensor, dimensions: int, index: Tensor, limit: int = _MAX_ROWS) -> Tensor:
    """:func:`principal_axes` of the rows ``index``, int64 [M]. No more rows than needed are copied."""
    m, d = len(index), features.shape[1]
    if m > limit:
        index = index[torch.linspace(0, m - 1, limit, dtype=torch.float64, device=features.device).long()]
    features = features[index]
    centred = features.double() - features.double().mean(0)
    if len(centred) >= d:
        # The product dominates the cost of wide features. The precision of the features is enough for the axes.
        working = centred.to(features.dtype) if features.dtype == torch.float32 else centred
        return _leading_vectors((working.T @ working).double(), dimensions)
    # Fewer rows than dimensions: the row space holds all variance, so a thin decomposition is enough. The full one
    # would compute a D x D matrix of directions without any.
    axes = torch.linalg.svd(centred, full_matrices=False).Vh.T
    if dimensions <= axes.shape[1]:
        return axes[:, :dimensions]
    # Any completion of the basis will do: along it the rows do not vary.
    start = torch.eye(d, dimensions - axes.shape[1], dtype=axes.dtype, device=axes.device)
    return torch.linalg.qr(torch.cat([axes, start], dim=1)).Q


def _leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors float64 [D, count] of a symmetric float64 matrix [D, D], by falling eigenvalue."""
    d = len(matrix)
    if matrix.device.type == "cpu" and d >= _LANCZOS_DIM and 4 * count <= d:
        # SciPy takes a while to import, and most runs do not come here.
        from scipy.sparse.linalg import ArpackError, eigsh

        try:
            # A fixed start: SciPy would draw one from NumPy's global generator.
            values, vectors = eigsh(matrix.numpy(), k=count, v0=np.ones(d))
            return torch.from_numpy(vectors[:, np.argsort(values)[::-1]].copy())
        except ArpackError:
            pass  # an eigenvalue of high multiplicity: the full decomposition has no trouble with it
    return torch.linalg.eigh(matrix).eigenvectors[:, -count:].flip(1)
