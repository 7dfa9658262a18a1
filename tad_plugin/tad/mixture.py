"""A two-component Gaussian mixture per class on the sample losses, with all classes in one tensor computation.

[paper] TAD divides the real data by a class-wise dynamic Gaussian mixture on the losses.
[ours] The batched EM, its initialisation, and the test for one or two components.

Public functions check their arguments. The functions with an underscore trust theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import InvalidInputError, NonFiniteError, explain
from tad_plugin.utils.arguments import named_errors

__all__ = ["ClassMixture", "MixtureInit", "check_losses", "fit_class_mixture"]

# Free parameters of a mixture of two. Fewer samples than that cannot show two groups.
_PARAMETERS = 5
# EM iterations, tolerance of the mean log-likelihood and variance floor: those of scikit-learn's GaussianMixture.
_ITERATIONS, _TOLERANCE, _MIN_VARIANCE = 100, 1e-3, 1e-6
# Ashman's D below which two normal components do not separate cleanly (Ashman, Bird & Zepf, 1994).
_ASHMAN_BOUND = 2.0


class MixtureInit(NamedTuple):
    """Starting values of EM, each [K, 2], in the units of the result.

    They correspond to scikit-learn's ``means_init``, ``1 / precisions_init`` and ``weights_init``.
    """

    means: Tensor
    variances: Tensor
    proportions: Tensor


@dataclass(frozen=True)
class ClassMixture:
    """Two-component mixtures of the losses of K classes. Component 0 has the lower mean.

    Means and variances are in min-max normalised units, ``(loss - offset) / scale``. With ``normalise=False`` they are
    in raw units, offset is 0 and scale is 1. Per-class tensors are float64.

    A class cannot be fitted if it has no sample, one sample, or equal losses. Such a class has means 0 (normalised),
    variances ``min_variance``, proportions (1, 0) and separation 0. It is unimodal and converged after 0 iterations.
    Its samples have trust 1.

    Attributes:
        trust: float32 [N] in [0, 1], posterior of the low-mean component.
        means: [K, 2].
        variances: [K, 2], with the floor included.
        proportions: [K, 2], sum 1.
        separation: [K], Ashman's D = sqrt(2) |m1 - m0| / sqrt(v0 + v1); >= 0.
        unimodal: bool [K]: D < 2, or BIC prefers one component, or no more than 5 samples.
        counts: int64 [K], samples per class.
        offset: [K], subtracted from the losses.
        scale: [K], divisor of the losses after that.
        converged: bool [K], whether EM reached the tolerance.
        iterations: int64 [K], EM iterations taken.
    """

    trust: Tensor
    means: Tensor
    variances: Tensor
    proportions: Tensor
    separation: Tensor
    unimodal: Tensor
    counts: Tensor
    offset: Tensor
    scale: Tensor
    converged: Tensor
    iterations: Tensor

    @named_errors
    def density(self, index: int, grid: Tensor) -> Tensor:
        """Computes the densities of the two components of one class, weighted by their proportions.

        Their sum integrates to 1.

        Args:
            index: class index.
            grid: [G], in raw loss units.

        Returns:
            float64 [G, 2], per raw loss unit.

        Raises:
            InvalidInputError: ``index`` is not a class.
            NonFiniteError: ``grid`` holds a NaN.
        """
        if not 0 <= index < len(self.counts):
            raise InvalidInputError(explain(f"a class in [0, {len(self.counts)})", str(index), "Pass a class index"))
        if bool(torch.isnan(grid).any()):
            raise NonFiniteError(explain("a `grid` of numbers", "a NaN", "Pass the losses at which to compute it"))
        x = (grid.to(self.means).unsqueeze(1) - self.offset[index]) / self.scale[index]
        mean, variance = self.means[index], self.variances[index]
        bell = torch.exp(-(x - mean).square() / (2 * variance)) / (2 * math.pi * variance).sqrt()
        return self.proportions[index] * bell / self.scale[index]

    @named_errors
    def posterior(self, losses: Tensor, labels: Tensor, *, monotone: bool = False) -> Tensor:
        """Computes the posterior of the low-mean component for any losses.

        Two normals of unequal variance cross twice. Far below a narrow low component the wide one wins again, and the
        smallest losses would be distrusted. Far above a narrow high component the largest would be trusted.
        ``monotone`` holds the posterior constant beyond the turning point, so that it never rises with the loss [ours].

        Args:
            losses: float [M], raw units.
            labels: integers [M] in [0, K), the class of each loss.
            monotone: True flattens the tails.

        Returns:
            float32 [M] in [0, 1].

        Raises:
            InvalidInputError: losses of a wrong shape or type.
            InvalidLabelsError: labels out of range, of a wrong type or length.
            NonFiniteError: a NaN or infinite loss.
        """
        losses = check_losses(losses)
        return _posterior(self, losses, check_labels(labels, len(self.counts), len(losses)), monotone=monotone)


def _posterior(mixture: ClassMixture, losses: Tensor, labels: Tensor, *, monotone: bool) -> Tensor:
    means = mixture.means
    labels = labels.to(means.device)
    x = (losses.to(means) - mixture.offset[labels]) / mixture.scale[labels]
    gap = _coefficients(means, mixture.variances, mixture.proportions)
    square, linear, constant = (gap[:, 0] - gap[:, 1]).unbind(1)
    if monotone:
        turn = torch.where(square != 0, -linear / (2 * square), torch.zeros_like(linear))
        inf = torch.full_like(turn, math.inf)
        upper, lower = torch.where(square > 0, turn, inf), torch.where(square < 0, turn, -inf)
        x = torch.minimum(torch.maximum(x, lower[labels]), upper[labels])
    return torch.sigmoid((square[labels] * x + linear[labels]) * x + constant[labels]).float()


def check_losses(losses: Tensor) -> Tensor:
    """Checks losses and returns them detached, as float64 [N] on their device.

    Raises:
        InvalidInputError: not a 1-D floating-point tensor.
        NonFiniteError: NaN or infinite values. The message gives their number and the first position.
    """
    if losses.ndim != 1 or not losses.dtype.is_floating_point:
        got = f"shape {list(losses.shape)}, dtype {losses.dtype}"
        expected, do = "floating-point `losses` of shape [N]", "Pass one loss per sample (reduction='none')"
        raise InvalidInputError(explain(expected, got, do))
    bad = ~torch.isfinite(losses.detach())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        got = f"{int(bad.sum())} of {len(losses)} non-finite (first: {float(losses[first])} at position {first})"
        do = "Check the images for NaN; the scorer may also have diverged: lower its learning rate"
        raise NonFiniteError(explain("finite `losses`", got, do))
    return losses.detach().double()


@named_errors
def fit_class_mixture(
    losses: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
    normalise: bool = True,
    min_variance: float = _MIN_VARIANCE,
    init: MixtureInit | None = None,
) -> ClassMixture:
    """Fits two Gaussians to the losses of each class by EM, all classes at once.

    [paper] A class-wise Gaussian mixture on the losses. [ours] One padded K x N_max computation in float64 on the
    device of the losses. A class drops out of it when it has converged. The stopping rule and the variance floor are
    those of scikit-learn's ``GaussianMixture`` (``tol``, ``max_iter``, ``reg_covar``). The same start gives the same
    result up to rounding.

    The default start is deterministic: the exact two-means split of each class, with the proportions, means and
    variances of the halves. Losses are one-dimensional, so sorting and prefix sums find the best split.

    Args:
        losses: float [N], any unit.
        labels: integers [N] in [0, num_classes), the class of each loss.
        num_classes: K.
        iterations: largest number of EM iterations, >= 1.
        tolerance: EM stops when the mean log-likelihood changes by less; > 0.
        normalise: min-max normalise the losses of each class to [0, 1].
        min_variance: added to every variance, in the fitted units; > 0.
        init: starting values, in the fitted units. None starts from the two-means split.

    Raises:
        InvalidInputError: losses or an option of a wrong shape, type or range.
        InvalidLabelsError: labels out of range, of a wrong type or length.
        NonFiniteError: a NaN or infinite loss. The message gives their number and the first position.
    """
    values = check_losses(losses)
    labels = check_labels(labels, num_classes, len(values)).to(values.device)
    if iterations < 1 or not tolerance > 0 or not min_variance > 0:
        got = f"iterations={iterations}, tolerance={tolerance}, min_variance={min_variance}"
        expected = "iterations >= 1, tolerance > 0, min_variance > 0"
        raise InvalidInputError(explain(expected, got, "Leave them at their defaults"))
    if init is not None:
        init = _check_init(init, num_classes, values)
    return _fit_class_mixture(values, labels, num_classes, iterations, tolerance, normalise, min_variance, init)


def _fit_class_mixture(
    values: Tensor,
    labels: Tensor,
    num_classes: int,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
    normalise: bool = True,
    min_variance: float = _MIN_VARIANCE,
    init: MixtureInit | None = None,
) -> ClassMixture:
    """:func:`fit_class_mixture` for finite float64 losses and int64 labels."""
    counts = torch.bincount(labels, minlength=num_classes)
    order = torch.argsort(labels, stable=True)
    row, values = labels[order], values[order]
    column = torch.arange(len(values), device=values.device) - (counts.cumsum(0) - counts)[row]
    x = values.new_full((num_classes, int(counts.max())), math.inf)
    x[row, column] = values
    mask = x < math.inf
    low = torch.where(counts > 0, x.amin(1), 0.0)
    scale = torch.where(mask, x - low.unsqueeze(1), 0.0).amax(1)
    fitted = scale > 0
    scale = torch.where(fitted, scale, torch.ones_like(scale))

    # EM always runs in [0, 1], where float64 loses nothing. Raw units only rescale the variance floor.
    offset = low if normalise else torch.zeros_like(low)
    unit = scale if normalise else torch.ones_like(scale)
    shift, ratio = ((low - offset) / unit).unsqueeze(1), (scale / unit).unsqueeze(1)
    floor = min_variance / ratio.square()
    means, variances = torch.zeros_like(ratio).repeat(1, 2), floor.repeat(1, 2)
    proportions = torch.eye(2, dtype=values.dtype, device=values.device)[:1].repeat(num_classes, 1)
    converged, steps = ~fitted, torch.zeros_like(counts)
    separation, unimodal = torch.zeros_like(scale), torch.ones_like(fitted)
    trust = torch.ones_like(x)
    if bool(fitted.any()):
        x = torch.where(mask, (x - low.unsqueeze(1)) / scale.unsqueeze(1), 0.0)[fitted]
        mask = mask[fitted]
        powers = torch.stack([x.square(), x, mask.to(x)], dim=1)
        floor = floor[fitted]
        if init is None:
            start = _two_means(torch.where(mask, x, math.inf), counts[fitted], floor)
        else:
            start = (
                ((init.means - shift) / ratio)[fitted],
                (init.variances / ratio.square())[fitted],
                init.proportions[fitted],
            )
        parameters, converged[fitted], steps[fitted] = _em(powers, start, floor, iterations, tolerance)
        swap = torch.argsort(parameters[0], dim=1, stable=True)
        m, v, w = parameters.gather(2, swap.expand_as(parameters))
        odds, likelihood = _expectation(powers, powers.sum(2), _coefficients(m, v, w))
        d = math.sqrt(2) * (m[:, 1] - m[:, 0]) / v.sum(1).sqrt()
        single = (counts[fitted] <= _PARAMETERS) | (_bic_gain(powers, floor, likelihood) <= 0)
        means[fitted], variances[fitted], proportions[fitted] = m, v, w
        separation[fitted], unimodal[fitted] = d, (d < _ASHMAN_BOUND) | single
        trust[fitted] = torch.sigmoid(odds)
    result = torch.empty_like(values, dtype=torch.float32)
    result[order] = trust[row, column].float()
    return ClassMixture(
        trust=result,
        means=torch.where(fitted.unsqueeze(1), shift + ratio * means, shift.expand(-1, 2)),
        variances=ratio.square() * variances,
        proportions=proportions,
        separation=separation,
        unimodal=unimodal,
        counts=counts,
        offset=offset,
        scale=unit,
        converged=converged,
        iterations=steps,
    )


def _coefficients(means: Tensor, variances: Tensor, proportions: Tensor) -> Tensor:
    """Coefficients [R, 2, 3] of (x^2, x, 1) in the log joint density of each component."""
    constant = proportions.log() - 0.5 * (2 * math.pi * variances).log() - means.square() / (2 * variances)
    return torch.stack([-0.5 / variances, means / variances, constant], dim=2)


def _expectation(powers: Tensor, totals: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the log-odds of component 0 [R, N] and the log-likelihood [R].

    ``powers`` holds (x^2, x, 1) as [R, 3, N] with 0 in the padding. ``totals`` holds its sums [R, 3].
    """
    low, high = coefficients.unbind(1)
    odds = ((low - high).unsqueeze(1) @ powers).squeeze(1)
    # log(f0 + f1) = log f1 + softplus(log f0 - log f1): the log-sum-exp of two.
    soft = softplus(odds, threshold=40.0).unsqueeze(1) @ powers[:, 2].unsqueeze(2)
    return odds, (totals * high).sum(1) + soft.flatten()


def _em(
    powers: Tensor, start: tuple[Tensor, Tensor, Tensor], floor: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs EM on [R, 3, N]. Returns (means, variances, proportions) as [3, R, 2], converged [R] and iterations [R]."""
    m, v, w = start
    tiny = 10 * torch.finfo(powers.dtype).eps  # keeps a component without samples finite
    result = torch.stack(start)
    active = torch.arange(len(m), device=m.device)
    converged = torch.zeros_like(active, dtype=torch.bool)
    steps = torch.full_like(active, iterations)
    totals, before = powers.sum(2), torch.full_like(m[:, 0], -math.inf)
    for step in range(1, iterations + 1):
        odds, likelihood = _expectation(powers, totals, _coefficients(m, v, w))
        # Each responsibility comes from the odds: 1 - r would lose the digits of a dying component.
        moments = torch.stack([odds, -odds], dim=1).sigmoid_() @ powers.transpose(1, 2)
        square, linear, mass = moments.unbind(2)
        mass = mass + tiny
        m, w = linear / mass, mass / mass.sum(1, keepdim=True)
        v = (square / mass - m.square()).clamp_min(0) + floor
        mean = likelihood / totals[:, 2]
        go = (mean - before).abs() >= tolerance
        before = mean
        if step == iterations or not bool(go.all()):
            done = ~go
            result[:, active] = torch.stack([m, v, w])
            converged[active], steps[active[done]] = done, step
            if step == iterations or not bool(go.any()):
                break
            active, powers, totals, floor, before = active[go], powers[go], totals[go], floor[go], before[go]
            m, v, w = m[go], v[go], w[go]
    return result, converged, steps


def _two_means(x: Tensor, counts: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the best split in two of each row [R, N] (inf in the padding).

    Returns:
        (means, variances, proportions), each [R, 2].
    """
    x = x.sort(1).values
    x = torch.where(x < math.inf, x, 0.0)
    n = counts.to(x).unsqueeze(1)
    left = torch.arange(1, x.shape[1] + 1, device=x.device).to(x).unsqueeze(0)
    sums, squares = x.cumsum(1), x.square().cumsum(1)
    total, total_squares = sums[:, -1:], squares[:, -1:]
    valid = left < n
    between = sums.square() / left + (total - sums).square() / (n - left).clamp_min(1)
    cut = torch.where(valid, between, torch.full_like(between, -math.inf)).argmax(1, keepdim=True)
    size = torch.cat([cut + 1.0, n - cut - 1], dim=1)
    s, q = sums.gather(1, cut), squares.gather(1, cut)
    means = torch.cat([s, total - s], dim=1) / size
    variances = (torch.cat([q, total_squares - q], dim=1) / size - means.square()).clamp_min(0) + floor
    return means, variances, size / n


def _bic_gain(powers: Tensor, floor: Tensor, likelihood: Tensor) -> Tensor:
    """BIC of one Gaussian minus BIC of the mixture, [R]. Positive where two components are preferred."""
    square, linear, n = powers.sum(2).unbind(1)
    spread = (square / n - (linear / n).square()).clamp_min(0)
    variance = spread + floor.flatten()
    single = -0.5 * n * ((2 * math.pi * variance).log() + spread / variance)
    return 2 * (likelihood - single) - (_PARAMETERS - 2) * n.log()


def _check_init(init: MixtureInit, num_classes: int, like: Tensor) -> MixtureInit:
    parts = MixtureInit(*(torch.as_tensor(part).detach().to(like) for part in init))
    shapes = [list(part.shape) for part in parts]
    shaped = all(shape == [num_classes, 2] for shape in shapes)
    finite = all(bool(torch.isfinite(part).all()) for part in parts)
    if not shaped or not finite or bool((parts.variances <= 0).any()) or bool((parts.proportions <= 0).any()):
        expected = f"finite `init` of shape [{num_classes}, 2] with variances and proportions > 0"
        got = f"shapes {shapes}" if not shaped else "non-finite or non-positive values"
        raise InvalidInputError(explain(expected, got, "Omit init to start from the two-means split"))
    return parts
