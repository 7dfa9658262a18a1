"""Random label flips as pure functions; :class:`tad_plugin.data.noise.spec.NoiseSpec` chooses among them.

Every function takes true labels (int64 [N] on the CPU) and a CPU generator, and returns new labels (int64 [N]).
Numbers are drawn for every sample, flipped or not. So at one seed the flips at a lower rate are a subset of those at a
higher rate. The instance kind is the exception, because its rates are drawn as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tad_plugin.data.splits import class_members
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.utils.image_store import Images, in_parts

__all__ = ["by_map", "by_matrix", "instance_dependent", "symmetric"]


def symmetric(
    labels: Tensor, rate: float, num_classes: int, *, include_self: bool, generator: torch.Generator
) -> Tensor:
    """Flips each label with probability ``rate`` to a class drawn uniformly.

    Args:
        labels: int64 [N] in [0, K).
        rate: in [0, 1].
        num_classes: K, at least 2.
        include_self: False draws from the other K-1 classes, so ``rate`` of the labels are wrong; True draws from all
            K, so ``rate * (K-1)/K`` are.
        generator: a CPU generator.
    """
    flip = torch.rand(len(labels), generator=generator, dtype=torch.float64) < rate
    shift = torch.randint(0 if include_self else 1, num_classes, (len(labels),), generator=generator)
    return torch.where(flip, (labels + shift) % num_classes, labels)


def by_map(labels: Tensor, rate: float, class_map: Mapping[int, int], *, generator: torch.Generator) -> Tensor:
    """Flips each label that is a key of ``class_map`` to its value, with probability ``rate`` in [0, 1]."""
    flip = torch.rand(len(labels), generator=generator, dtype=torch.float64) < rate
    flipped = labels.clone()
    for source, target in class_map.items():
        flipped[flip & (labels == source)] = target
    return flipped


def by_matrix(labels: Tensor, matrix: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draws each label from the row of its true class.

    Args:
        labels: int64 [N] in [0, K).
        matrix: float64 [K, K], row-stochastic: ``matrix[true, noisy]``.
        generator: a CPU generator.
    """
    u = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return _invert(matrix[labels], u)


def instance_dependent(
    labels: Tensor, images: Images, rate: float, num_classes: int, *, spread: float, generator: torch.Generator
) -> Tensor:
    """Flips that depend on the image: Xia et al., NeurIPS 2020, algorithm 2 [paper], images standardised [ours].

    Each sample has a flip probability q_i, drawn from a normal distribution around ``rate`` truncated to [0, 1]. For
    each class c a projection W_c (D x K) is drawn. A softmax of the scores x_i W_{y_i}, without the true class, shares
    q_i among the other classes. Each image is first brought to mean 0 and variance 1 over its own values, so its label
    does not depend on other images, on brightness or on contrast [ours]. As in the source, the scores grow with the
    square root of D, so the direction of a flip is nearly a function of the image.

    Args:
        labels: int64 [N] in [0, K).
        images: float [N, ...], finite, D values per image; or a store of them.
        rate: mean flip probability before truncation, in [0, 1].
        num_classes: K, at least 2.
        spread: standard deviation of the flip probability, > 0 (0.1 in the source).
        generator: a CPU generator.

    Raises:
        InvalidInputError: images of another length, or not finite.
    """
    if len(images) != len(labels):
        got = f"{len(images)} images for {len(labels)} labels"
        raise InvalidInputError(explain("one image per label", got, "Pass the images of the same samples, in order"))
    if not all(bool(torch.isfinite(part).all()) for part in in_parts(images)):
        raise InvalidInputError(explain("finite images", "NaN or infinite pixels", "Check how the images were decoded"))

    # Truncated normal by inversion: one number per sample, without rejection, so the stream's length is fixed.
    low, high = torch.special.ndtr(torch.tensor([-rate / spread, (1.0 - rate) / spread], dtype=torch.float64))
    u = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    flip_rate = (rate + spread * torch.special.ndtri(low + u * (high - low))).clamp(0.0, 1.0)

    u = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    flipped = labels.clone()
    for c, members in enumerate(class_members(labels, num_classes)):
        # One projection at a time: all K of them would be K x D x K numbers (4 GB for Tiny ImageNet).
        projection = torch.randn(math.prod(images.shape[1:]), num_classes, generator=generator, dtype=torch.float64)
        if len(members) == 0:
            continue
        x = images[members].detach().cpu().flatten(1).double()
        x = x - x.mean(1, keepdim=True)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
        scores = x @ projection
        scores[:, c] = -torch.inf
        probabilities = flip_rate[members, None] * scores.softmax(1)
        probabilities[:, c] = 1.0 - flip_rate[members]
        flipped[members] = _invert(probabilities, u[members])
    return flipped


def _invert(probabilities: Tensor, u: Tensor) -> Tensor:
    """The first class (int64 [N]) whose cumulative probability, in the rows of [N, K], exceeds u [N] in [0, 1)."""
    edges = probabilities.cumsum(1)
    # Rounding may leave the last edge below 1. Classes after the last non-zero entry must stay unreachable.
    edges = torch.where(edges >= edges[:, -1:], torch.ones_like(edges), edges)
    return torch.searchsorted(edges, u.unsqueeze(1), right=True).squeeze(1)
