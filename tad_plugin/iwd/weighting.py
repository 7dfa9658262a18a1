"""From influence to weights: standardised running scores and a softmax inside each class. [ours: METHODS.md 2.2]

[paper] names a softmax with a temperature. How the temperature is found, from the effective sample size that
is to be left in each class, is ours: a fixed one was seen to hurt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import ConfigError, ConvergenceWarning, InvalidInputError, StateMismatchError, explain
from tad_plugin.nn.derivatives.vectors import require_finite

__all__ = [
    "RunningScore",
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


def standardise(scores: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Scores as z-scores inside each class: mean 0, population standard deviation 1.

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
    labels, inside = _checked(scores, labels, num_classes, mask)
    values = require_finite(
        torch.where(inside, scores.detach().double(), 0.0), "scores", "Mask out samples without a score"
    )
    # Two refinements: the largest magnitude is divided out first, so that squares neither overflow nor vanish.
    count = _per_class(inside.double(), labels, num_classes).clamp_min(1.0)
    centred = torch.where(inside, values - (_per_class(values, labels, num_classes) / count)[labels], 0.0)
    largest = torch.zeros_like(count).scatter_reduce(0, labels, centred.abs(), "amax")
    magnitude = torch.zeros_like(count).scatter_reduce(0, labels, values.abs(), "amax")
    # Equal scores leave rounding noise, which must not be blown up to z-scores.
    real = largest > 1e-12 * magnitude
    centred = torch.where(real[labels], centred / largest.clamp_min(torch.finfo(torch.float64).tiny)[labels], 0.0)
    spread = (_per_class(centred.square(), labels, num_classes) / count).sqrt()
    return torch.where(real[labels] & inside, centred / torch.where(real, spread, 1.0)[labels], 0.0)


def saturate(scores: Tensor, labels: Tensor, num_classes: int, share: float, mask: Tensor | None = None) -> Tensor:
    """Raises the best scores of each class to one common value, so that all weights above it are the same.

    A softmax over the rest then lowers the harmful samples without living off a few of the most helpful ones, whose
    mean is far from their class's.

    Args:
        scores: [N], lower = better.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        share: of each class's samples that get the common value, in [0, 1); 0 changes nothing.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] like ``scores``.

    Raises:
        InvalidInputError: share outside [0, 1), or shapes that do not fit.
    """
    if not 0.0 <= share < 1.0:
        raise InvalidInputError(explain("share in [0, 1)", str(share), "Pass the share of a class that counts fully"))
    labels, inside = _checked(scores, labels, num_classes, mask)
    raised = scores.clone()
    for c in range(num_classes if share > 0 else 0):
        rows = (inside & (labels == c)).nonzero().flatten()
        if len(rows):
            raised[rows] = scores[rows].clamp_min(float(scores[rows].double().quantile(share)))
    return raised


@dataclass(frozen=True)
class Temperature:
    """The temperatures that :func:`fit_temperature` found, one entry per class, float64 [K].

    Attributes:
        temperature: of the softmax over z-scores; infinite where all weights are 1.
        ess: effective sample size it gives, a share in (0, 1]; 0 for a class without samples.
        reached: bool, whether ``ess`` is the wanted one (within 0.001). Not so where tied best scores are more
            numerous than it allows; a class with one sample or with equal scores counts as reached.
    """

    temperature: Tensor
    ess: Tensor
    reached: Tensor


def fit_temperature(
    scores: Tensor, labels: Tensor, num_classes: int, ess: float | Tensor = 0.5, mask: Tensor | None = None
) -> Temperature:
    """Finds for each class the softmax temperature that leaves a wanted effective sample size, by bisection.

    The effective sample size falls monotonically from 1 (infinite temperature) to the share of ties of the best
    score (temperature 0), so bisection cannot miss. All classes are searched at once.

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
    labels, inside = _checked(scores, labels, num_classes, mask)
    wanted = torch.as_tensor(ess, dtype=torch.float64, device=labels.device)
    if wanted.shape not in ((), (num_classes,)) or not bool(((wanted > 0) & (wanted <= 1)).all()):
        raise InvalidInputError(
            explain("ess in (0, 1]", str(ess), "Pass the share of a class that is to keep its weight")
        )
    wanted = wanted.expand(num_classes)
    z = standardise(scores, labels, num_classes, inside)
    count = _per_class(inside.double(), labels, num_classes)
    flat = ~(_per_class(z.abs(), labels, num_classes) > 0)
    low = torch.full_like(count, math.log(_FLATTEST))
    high = torch.full_like(count, math.log(_SHARPEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_even = _share(z, labels, count, inside, middle.exp()) > wanted
        low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
    inverse = torch.where(flat | (wanted == 1.0), 0.0, high.exp())
    found = _share(z, labels, count, inside, inverse)
    return Temperature(1.0 / inverse, found, flat | ((found - wanted).abs() <= 1e-3))


def softmax_weights(
    scores: Tensor, labels: Tensor, num_classes: int, temperature: Tensor, mask: Tensor | None = None
) -> Tensor:
    """w = n_c * softmax(-z / temperature) inside each class, z the scores standardised inside the class.

    Args:
        scores: [N], lower = better.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        temperature: > 0, [K] or a scalar tensor; infinite gives 1.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] in the scores' dtype (at least float32): mean 1 over each class's masked-in samples, 0 outside the mask.
    """
    labels, inside = _checked(scores, labels, num_classes, mask)
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=labels.device).expand(num_classes)
    if not bool((temperature > 0).all()):
        raise InvalidInputError(explain("temperatures > 0", f"{float(temperature.min())}", "Use fit_temperature(...)"))
    z = standardise(scores, labels, num_classes, inside)
    count = _per_class(inside.double(), labels, num_classes)
    even = torch.isinf(temperature)
    raw = _unnormalised(z, labels, inside, torch.where(even, 0.0, 1.0 / temperature))
    weights = raw * (count / _per_class(raw, labels, num_classes).clamp_min(torch.finfo(torch.float64).tiny))[labels]
    weights = torch.where(even[labels] & inside, 1.0, weights)  # exactly 1, so that no weighting costs no bit
    return weights.to(torch.promote_types(scores.dtype, torch.float32))


def weights_from_scores(
    scores: Tensor, labels: Tensor, num_classes: int, ess: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Weights from influences: a softmax inside each class with the temperature that leaves ``ess`` of the class.

    Args:
        scores: influences [N], negative = helpful.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        ess: wanted effective sample size of each class as a share of it, in (0, 1]; 1 gives weights of exactly 1.
        mask: bool [N], the samples that take part; None for all.

    Returns:
        [N] in the scores' dtype (at least float32): mean 1 over the masked-in samples of each class, 0 outside the
        mask, and exactly 1 in a class with one sample or with equal scores. Where ties of the best score make ``ess``
        unreachable, the nearest that can be reached is given, and a
        :class:`~tad_plugin.errors.ConvergenceWarning` says which.

    Raises:
        NonFiniteError: a score that takes part is NaN or infinite.
        InvalidInputError: ess outside (0, 1], or shapes that do not fit.
    """
    fitted = fit_temperature(scores, labels, num_classes, ess, mask)
    missed = (~fitted.reached & (fitted.ess > 0)).nonzero().flatten().tolist()
    if missed:
        shown = ", ".join(f"class {c}: {float(fitted.ess[c]):.3g}" for c in missed[:5])
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        do = "The nearest is used. Raise ess, or score more samples so that fewer are tied or alone at the best"
        warnings.warn(
            explain(f"an effective sample size of {ess:.3g}", shown + more, do), ConvergenceWarning, stacklevel=2
        )
    return softmax_weights(scores, labels, num_classes, fitted.temperature, mask)


def effective_sample_size(weights: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """(sum w)^2 / (n_c sum w^2) of each class: 1 for even weights, 1/n_c where one sample has all.

    Args:
        weights: [N] >= 0.
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        mask: bool [N], the samples that count for n_c; None for all.

    Returns:
        float64 [K]; 0 for a class without positive weight.
    """
    labels, inside = _checked(weights, labels, num_classes, mask)
    w = torch.where(inside, weights.detach().double(), 0.0)
    count = _per_class(inside.double(), labels, num_classes)
    return _even_share(w, labels, count)


class RunningScore:
    """A sum, or an exponential moving average, of each sample's scores over batches, networks and refreshes.

    Add *standardised* influences (:func:`standardise`), so that a network with large gradients does not outvote others.

    Attributes:
        counts: int64 [N], how often a sample was scored.

    Args:
        num_samples: N.
        decay: None for a plain sum; else the share in (0, 1) of the old value that stays at each score.
        device: where the tensors live.
    """

    def __init__(self, num_samples: int, *, decay: float | None = None, device: torch.device | str = "cpu") -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ConfigError(explain("decay in (0, 1), or None for a sum", str(decay), "Pass 0.9, for instance"))
        self.decay = decay
        self._total = torch.zeros(num_samples, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_samples, dtype=torch.int64, device=device)

    @property
    def seen(self) -> Tensor:
        """Bool [N]: scored at least once."""
        return self.counts > 0

    @property
    def value(self) -> Tensor:
        """float32 [N]: the sum, or the bias-corrected average; 0 for a sample that was never scored."""
        if self.decay is None:
            return self._total.clone()
        return torch.where(self.seen, self._total / (1.0 - self.decay ** self.counts.double()).float(), 0.0)

    @property
    def estimate(self) -> Tensor:
        """float32 [N]: the mean score, shrunk by one pseudo-score of 0.

        Comparable between samples that were scored unequally often: the plain mean of few scores is the more extreme.
        """
        mean = self.value if self.decay is not None else self._total / self.counts.clamp_min(1)
        return mean * (self.counts / (self.counts + 1.0))

    def forget(self, mask: Tensor) -> None:
        """Drops the scores of the samples in ``mask`` (bool [N]), as if they had never been scored."""
        self._total[mask] = 0
        self.counts[mask] = 0

    def restore(self, estimate: Tensor, counts: Tensor) -> None:
        """Takes up scores of which only :attr:`estimate` (float [N]) and counts (int64 [N]) were kept."""
        self.counts.copy_(counts)
        mean = estimate.double() * (counts + 1.0) / counts.clamp_min(1)
        factor = counts.double() if self.decay is None else 1.0 - self.decay ** counts.double()
        self._total.copy_(mean * factor)

    def add(self, indices: Tensor | None, scores: Tensor) -> None:
        """Adds one score for each of ``indices`` (int64 [B], no index twice; None for all N).

        Raises:
            NonFiniteError: a score is NaN or infinite; nothing is added then.
            InvalidInputError: lengths differ or an index comes twice.
        """
        where = torch.arange(len(self.counts), device=self.counts.device) if indices is None else indices
        if scores.shape != where.shape or where.ndim != 1:
            got = f"{list(where.shape)} indices and {list(scores.shape)} scores"
            raise InvalidInputError(explain("one score per index", got, "Pass tensors of one length"))
        if indices is not None and len(indices.unique()) != len(indices):
            raise InvalidInputError(
                explain("each index at most once", "a repeated one", "Add the scores in several calls")
            )
        scores = require_finite(scores.detach().to(self._total), "scores", "Check the influences that were computed")
        old = self._total[where]
        self._total[where] = old + scores if self.decay is None else self.decay * old + (1.0 - self.decay) * scores
        self.counts[where] += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore this object bit for bit."""
        return {"decay": self.decay, "total": self._total.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            StateMismatchError: it was written for another number of samples or another decay.
        """
        if state["total"].shape != self._total.shape or state["decay"] != self.decay:
            raise StateMismatchError(
                explain(
                    f"scores of {len(self.counts)} samples with decay {self.decay}",
                    f"{len(state['total'])} samples with decay {state['decay']}",
                    "Resume with the same data and settings, or start without the saved scores",
                )
            )
        self._total.copy_(state["total"])
        self.counts.copy_(state["counts"])


def _checked(values: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    labels = check_labels(labels, num_classes, len(values))
    if values.ndim != 1 or (mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool)):
        got = f"values {list(values.shape)}" + ("" if mask is None else f", mask {list(mask.shape)} {mask.dtype}")
        raise InvalidInputError(explain("values [N] and a bool mask [N]", got, "Pass one entry per sample"))
    return labels, torch.ones_like(labels, dtype=torch.bool) if mask is None else mask


def _per_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(num_classes, dtype=torch.float64, device=values.device).index_add_(0, labels, values)


def _unnormalised(z: Tensor, labels: Tensor, inside: Tensor, inverse: Tensor) -> Tensor:
    """exp(-(z - smallest z of the class) / temperature): the best sample has 1, so nothing overflows."""
    best = torch.full_like(inverse, math.inf).scatter_reduce(0, labels, torch.where(inside, z, math.inf), "amin")
    gap = torch.where(inside, z - torch.where(torch.isinf(best), 0.0, best)[labels], 0.0)
    return torch.where(inside, torch.exp(-inverse[labels] * gap), 0.0)


def _share(z: Tensor, labels: Tensor, count: Tensor, inside: Tensor, inverse: Tensor) -> Tensor:
    raw = _unnormalised(z, labels, inside, inverse)
    return _even_share(raw, labels, count)


def _even_share(w: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    squares = count * _per_class(w.square(), labels, len(count))
    share = _per_class(w, labels, len(count)).square() / torch.where(squares > 0, squares, 1.0)
    return torch.where(squares > 0, share, 0.0)
