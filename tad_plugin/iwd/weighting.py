"""From influence to weights: running scores, and a softmax inside each class. [ours: README.md, 3]

[paper] uses a softmax with a temperature. [ours]: the temperature is found from the effective sample size that each
class shall keep. A fixed temperature was seen to hurt.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.data.splits import class_members, sorted_in_class
from tad_plugin.errors import ConvergenceWarning, InvalidInputError, explain
from tad_plugin.nn.derivatives.vectors import require_finite
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.transfers import upload

__all__ = [
    "Classes",
    "Temperature",
    "effective_sample_size",
    "fit_temperature",
    "saturate",
    "softmax_weights",
    "standardise",
    "weights_from_scores",
]

# 1/temperature is searched in this range of z-score units. Beyond its upper end only ties of the best score count.
_SHARPEST, _FLATTEST, _HALVINGS = 1e6, 1e-6, 70


@dataclass(frozen=True)
class Temperature:
    """Result of :func:`fit_temperature`, one entry per class, float64 [K].

    Attributes:
        temperature: of the softmax over z-scores; infinite if all weights are 1.
        ess: effective sample size at this temperature, a share in (0, 1]; 0 for a class without samples.
        reached: bool, True if ``ess`` is within 0.001 of the wanted one. False if more best scores are tied than the
            wanted size allows. True for a class with one sample or with equal scores.
    """

    temperature: Tensor
    ess: Tensor
    reached: Tensor


@dataclass(frozen=True)
class Classes:
    """N samples by class. Its methods trust their arguments; the functions below check them first.

    Attributes:
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        inside: bool [N], the samples that take part.
    """

    labels: Tensor
    num_classes: int
    inside: Tensor

    @classmethod
    def checked(cls, values: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None) -> Classes:
        """Checks labels and mask against ``values`` [N]. Raises InvalidLabelsError or InvalidInputError."""
        labels = check_labels(labels, num_classes, len(values))
        if values.ndim != 1 or (mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool)):
            got = f"values {list(values.shape)}" + ("" if mask is None else f", mask {list(mask.shape)} {mask.dtype}")
            raise InvalidInputError(explain("values [N] and a bool mask [N]", got, "Pass one entry per sample"))
        return cls(labels, num_classes, torch.ones_like(labels, dtype=torch.bool) if mask is None else mask)

    @property
    def count(self) -> Tensor:
        """Samples that take part, per class, float64 [K]."""
        return self.sum(self.inside.double())

    def sum(self, values: Tensor) -> Tensor:
        """Sum of float64 values [N] per class, [K]."""
        return torch.zeros(self.num_classes, dtype=torch.float64, device=values.device).index_add_(
            0, self.labels, values
        )

    def finite(self, scores: Tensor) -> Tensor:
        """Returns the scores. Raises NonFiniteError if one that takes part is NaN or infinite."""
        require_finite(torch.where(self.inside, scores.detach(), 0.0), "scores", "Mask out samples without a score")
        return scores

    def z_scores(self, values: Tensor) -> Tensor:
        """See :func:`standardise`; ``values`` [N] are finite where they take part."""
        labels, inside = self.labels, self.inside
        values = torch.where(inside, values.detach().double(), 0.0)
        # Two refinements: the largest magnitude is divided out first, so that squares neither overflow nor vanish.
        count = self.count.clamp_min(1.0)
        centred = torch.where(inside, values - (self.sum(values) / count)[labels], 0.0)
        largest = torch.zeros_like(count).scatter_reduce(0, labels, centred.abs(), "amax")
        magnitude = torch.zeros_like(count).scatter_reduce(0, labels, values.abs(), "amax")
        # Equal scores leave rounding noise, which must not be blown up to z-scores.
        real = largest > 1e-12 * magnitude
        centred = torch.where(real[labels], centred / largest.clamp_min(torch.finfo(torch.float64).tiny)[labels], 0.0)
        spread = (self.sum(centred.square()) / count).sqrt()
        return torch.where(real[labels] & inside, centred / torch.where(real, spread, 1.0)[labels], 0.0)

    def saturated(self, scores: Tensor, share: float) -> Tensor:
        """See :func:`saturate`."""
        if share == 0:
            return scores.clone()
        own = torch.where(self.inside, self.labels, self.num_classes)
        count = torch.bincount(own, minlength=self.num_classes + 1)
        end = count.cumsum(0)
        rising = scores[sorted_in_class(scores, own, self.num_classes + 1)].double()
        # The linear quantile, as torch.quantile defines it. NaN is sorted last and makes the quantile NaN.
        place = (count - 1).clamp_min(0) * torch.tensor(share, dtype=torch.float64, device=count.device)
        first, last = (end - count).clamp_max(len(own) - 1), (end - 1).clamp_min(0)
        place = torch.where(rising[last].isnan(), (count - 1).double(), place)
        low, high = rising[first + place.long()], rising[first + place.ceil().long()]
        bound = low.lerp(high, place - place.floor()).to(scores.dtype)
        return torch.where(self.inside, torch.maximum(scores, bound[own]), scores)

    def fit(self, z: Tensor, wanted: Tensor) -> Temperature:
        """See :func:`fit_temperature`; ``z`` are :meth:`z_scores`, ``wanted`` float64 [K]."""
        count = self.count
        flat = ~(self.sum(z.abs()) > 0)
        # Class after class, each in the order of its samples: so the sums keep their bits, and the table of
        # temperatures is read in order.
        members = class_members(self.labels, self.num_classes, self.inside)
        order = torch.cat(members)
        (sizes,) = upload([torch.tensor([len(m) for m in members])], order.device)
        inner = Classes(self.labels[order], self.num_classes, torch.ones_like(order, dtype=torch.bool))
        gap = inner.gap(z[order])

        def size_at(inverse: Tensor) -> Tensor:
            w = torch.exp(-inverse.repeat_interleave(sizes, output_size=len(order)) * gap)
            return inner.effective_size(w, count)

        low = torch.full_like(count, math.log(_FLATTEST))
        high = torch.full_like(count, math.log(_SHARPEST))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_even = size_at(middle.exp()) > wanted
            low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
        inverse = torch.where(flat | (wanted == 1.0), 0.0, high.exp())
        found = size_at(inverse)
        return Temperature(1.0 / inverse, found, flat | ((found - wanted).abs() <= 1e-3))

    def softmax(self, z: Tensor, temperature: Tensor) -> Tensor:
        """See :func:`softmax_weights`; float64 [N]. ``z`` are :meth:`z_scores`, ``temperature`` float64 [K]."""
        even = torch.isinf(temperature)
        raw = self._unnormalised(z, torch.where(even, 0.0, 1.0 / temperature))
        factor = self.count / self.sum(raw).clamp_min(torch.finfo(torch.float64).tiny)
        # Exactly 1 where nothing is weighted, so that no bit changes there.
        return torch.where(even[self.labels] & self.inside, 1.0, raw * factor[self.labels])

    def gap(self, z: Tensor) -> Tensor:
        """``z`` minus the smallest z of the class, float64 [N]; 0 for a sample that takes no part."""
        best = z.new_full((self.num_classes,), math.inf)
        best = best.scatter_reduce(0, self.labels, torch.where(self.inside, z, math.inf), "amin")
        return torch.where(self.inside, z - torch.where(torch.isinf(best), 0.0, best)[self.labels], 0.0)

    def effective_size(self, w: Tensor, count: Tensor) -> Tensor:
        """See :func:`effective_sample_size`; ``w`` float64 [N], ``count`` [K]."""
        squares = count * self.sum(w.square())
        share = self.sum(w).square() / torch.where(squares > 0, squares, 1.0)
        return torch.where(squares > 0, share, 0.0)

    def _unnormalised(self, z: Tensor, inverse: Tensor) -> Tensor:
        """exp(-(z - smallest z of the class) / temperature): the best sample has 1, so nothing overflows."""
        return torch.where(self.inside, torch.exp(-inverse[self.labels] * self.gap(z)), 0.0)


@named_errors
def standardise(scores: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Computes z-scores inside each class: mean 0, population standard deviation 1.

    Args:
        scores: [N], finite where masked in.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        float64 [N]; 0 outside the mask and in a class whose scores are all equal.

    Raises:
        NonFiniteError: a score that takes part is NaN or infinite.
        InvalidInputError: shapes that do not fit.
    """
    classes = Classes.checked(scores, labels, num_classes, mask)
    return classes.z_scores(classes.finite(scores))


@named_errors
def saturate(scores: Tensor, labels: Tensor, num_classes: int, share: float, mask: Tensor | None = None) -> Tensor:
    """Raises the best scores of each class to one common value, so that these samples get the same weight.

    A softmax then lowers the harmful samples without favouring a few of the most helpful ones. Their mean is far from
    the mean of their class.

    Args:
        scores: [N], lower = better.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        share: share of each class's samples that get the common value, in [0, 1); 0 changes nothing.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] like ``scores``.

    Raises:
        InvalidInputError: share outside [0, 1), or shapes that do not fit.
    """
    if not 0.0 <= share < 1.0:
        raise InvalidInputError(explain("share in [0, 1)", str(share), "Pass the share of a class that counts fully"))
    return Classes.checked(scores, labels, num_classes, mask).saturated(scores, share)


@named_errors
def fit_temperature(
    scores: Tensor, labels: Tensor, num_classes: int, ess: float | Tensor = 0.5, mask: Tensor | None = None
) -> Temperature:
    """Finds for each class the softmax temperature that leaves a wanted effective sample size, by bisection.

    The effective sample size falls monotonically, from 1 (infinite temperature) to the share of samples tied at the
    best score (temperature 0). So bisection finds it. All classes are searched at once.

    Args:
        scores: [N], lower = better (influence); standardised inside each class first.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        ess: wanted (sum w)^2 / (n_c sum w^2), in (0, 1]; one number, or one for each class [K].
        mask: bool [N], the samples that take part; None for all.

    Raises:
        NonFiniteError: a score that takes part is NaN or infinite.
        InvalidInputError: ess outside (0, 1], or shapes that do not fit.
    """
    classes = Classes.checked(scores, labels, num_classes, mask)
    return classes.fit(classes.z_scores(classes.finite(scores)), _wanted(ess, classes))


@named_errors
def softmax_weights(
    scores: Tensor, labels: Tensor, num_classes: int, temperature: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Computes w = n_c * softmax(-z / temperature) inside each class, z being the scores standardised in the class.

    Args:
        scores: [N], lower = better.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        temperature: > 0, [K] or a scalar tensor; infinite gives 1.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] in the scores' dtype (at least float32): mean 1 over each class's masked-in samples, 0 outside the mask.

    Raises:
        NonFiniteError: a score that takes part is NaN or infinite.
        InvalidInputError: a temperature of 0 or below, or shapes that do not fit.
    """
    classes = Classes.checked(scores, labels, num_classes, mask)
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=labels.device).expand(num_classes)
    if not bool((temperature > 0).all()):
        raise InvalidInputError(explain("temperature > 0", f"{float(temperature.min())}", "Use fit_temperature(...)"))
    z = classes.z_scores(classes.finite(scores))
    return classes.softmax(z, temperature).to(torch.promote_types(scores.dtype, torch.float32))


@named_errors
def weights_from_scores(
    scores: Tensor, labels: Tensor, num_classes: int, ess: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Computes weights from influences: a softmax in each class whose temperature leaves the wanted sample size.

    Args:
        scores: influences [N], negative = helpful.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        ess: wanted effective sample size as a share of the class, in (0, 1]; 1 gives weights of exactly 1.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] in the scores' dtype (at least float32): mean 1 over the masked-in samples of each class, 0 outside the
        mask, and exactly 1 in a class with one sample or with equal scores. If ties of the best score make ``ess``
        unreachable, the nearest reachable size is used, with a :class:`~tad_plugin.errors.ConvergenceWarning`.

    Raises:
        NonFiniteError: a score that takes part is NaN or infinite.
        InvalidInputError: ess outside (0, 1], or shapes that do not fit.
    """
    classes = Classes.checked(scores, labels, num_classes, mask)
    z = classes.z_scores(classes.finite(scores))
    fitted = classes.fit(z, _wanted(ess, classes))
    missed = (~fitted.reached & (fitted.ess > 0)).nonzero().flatten().tolist()
    if missed:
        shown = ", ".join(f"class {c}: {float(fitted.ess[c]):.3g}" for c in missed[:5])
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        do = "The nearest is used. Raise ess, or score more samples, so that fewer are tied at the best score"
        warnings.warn(
            explain(f"an effective sample size of {ess:.3g}", shown + more, do), ConvergenceWarning, stacklevel=3
        )
    return classes.softmax(z, fitted.temperature).to(torch.promote_types(scores.dtype, torch.float32))


@named_errors
def effective_sample_size(weights: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Computes (sum w)^2 / (n_c sum w^2) of each class: 1 for even weights, 1/n_c if one sample has all the weight.

    Args:
        weights: [N] >= 0.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        mask: bool [N], the samples that count for n_c; None for all.

    Returns:
        float64 [K]; 0 for a class without positive weight.
    """
    classes = Classes.checked(weights, labels, num_classes, mask)
    return classes.effective_size(torch.where(classes.inside, weights.detach().double(), 0.0), classes.count)


def _wanted(ess: float | Tensor, classes: Classes) -> Tensor:
    wanted = torch.as_tensor(ess, dtype=torch.float64, device=classes.labels.device)
    if wanted.shape not in ((), (classes.num_classes,)) or not bool(((wanted > 0) & (wanted <= 1)).all()):
        raise InvalidInputError(
            explain("ess in (0, 1]", str(ess), "Pass the share of a class that is to keep its weight")
        )
    return wanted.expand(classes.num_classes)
