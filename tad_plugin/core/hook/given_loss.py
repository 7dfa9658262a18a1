"""GivenLoss: the weighted loss of a batch whose indices came with it, on the labels that it is given.

Labels may be hard, soft, smoothed, or mixed of two samples (CutMix, MixUp). Each part of a mixed label weighs what the
sample weighs from which it comes::

    loss = sum_r [ s_r w_i(r) l(q_i(r)) + (1 - s_r) w_j(r) l(q_j(r)) ] / sum_r [ s_r w_i(r) + (1 - s_r) w_j(r) ]

with i the sample of a row, j its partner, s the share of i, w the training weights and l the criterion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.indices import check_indices
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, InvalidLabelsError, explain

__all__ = ["GivenLoss", "losses_of", "mixed_parts"]

Criterion = Callable[[Tensor, Tensor], Tensor]
# What a soft label may differ from a mixture of two samples' labels: rounding in half precision.
_TOLERANCE = 5e-3


def losses_of(criterion: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """The criterion's loss of each row, [B]. Raises InvalidInputError for a criterion that gives none.

    Args:
        criterion: ``F.cross_entropy``, or a loss module with a ``reduction``.
        logits: [B,K].
        labels: what the criterion takes.
    """
    if criterion is F.cross_entropy:
        rows: Tensor = F.cross_entropy(logits, labels, reduction="none")
    elif getattr(criterion, "reduction", None) in ("mean", "sum", "none"):
        single = copy.copy(criterion)
        single.reduction = "none"
        rows = single(logits, labels)
    else:
        expected = 'a criterion with a `reduction` of "mean", "sum" or "none"'
        do = "Pass nn.CrossEntropyLoss() or another loss module that can leave its batch unreduced"
        raise InvalidInputError(explain(expected, repr(criterion), do))
    if rows.shape != logits.shape[:1]:
        do = "Pass a criterion that gives one loss per sample with reduction='none'"
        raise InvalidInputError(explain(f"losses of shape {list(logits.shape[:1])}", f"{list(rows.shape)}", do))
    return rows


def mixed_parts(
    labels: Tensor, own: Tensor, other: Tensor, share: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes mixed soft labels apart into those of two samples.

    Args:
        labels: float [B,K], each row a mixture of two (smoothed) one-hot labels.
        own: int64 [B], label of the row's sample.
        other: int64 [B], label of its partner.
        share: share of the row's sample in [0, 1], a number or [B]. None reads it from the labels. A row whose samples
            have one label tells none. It takes the mean of the other rows, or half if no row tells one.

    Returns:
        (share [B], labels of the sample [B,K], labels of its partner [B,K], what is left over of each row [B]).
    """
    floor = labels.min(1, keepdim=True).values
    smoothing = floor * labels.shape[1]
    first, second = F.one_hot(own, labels.shape[1]), F.one_hot(other, labels.shape[1])
    mass = (labels - floor) / (1 - smoothing).clamp_min(torch.finfo(labels.dtype).eps)
    left = 1 - (mass * (first | second)).sum(1)
    if share is None:
        tells = (own != other) & (left.abs() < _TOLERANCE)
        told = (mass * first).sum(1).clamp(0, 1)
        usual = (told * tells).sum() / tells.sum() if bool(tells.any()) else told.new_tensor(0.5)
        share = torch.where(tells, told, usual)
    shares = torch.as_tensor(share, dtype=labels.dtype, device=labels.device).expand(len(labels))
    return shares, first * (1 - smoothing) + floor, second * (1 - smoothing) + floor, left


class GivenLoss:
    """Weights the loss of batches that come with their indices, and checks each of them.

    Args:
        state: the sample state.
        enabled: whether a method is on, or labels were corrupted.
        drawn: samples are drawn by their weights, so that losses are not weighted once more.
        usage: counts.
    """

    def __init__(self, state: SampleState, enabled: bool, drawn: bool, usage: Usage) -> None:
        self.state = state
        self.enabled = enabled
        self.drawn = drawn
        self.usage = usage
        self._version = state.version
        self._now = self._before = state.target.clone() if enabled else state.target

    def weights(self, index: Tensor) -> Tensor:
        """Training weights float32 [B] of checked indices: 1 or 0 where the draw has weighted already."""
        return self.state.trusted[index].float() if self.drawn else self.state.training_weights(index)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        indices: Any,
        partner: Any = None,
        share: Tensor | float | None = None,
        criterion: Any = F.cross_entropy,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`tad_plugin.Hook.loss`. Returns the loss and the checked indices int64 [B]."""
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidInputError(explain("logits [B,K]", got, "Flatten other dimensions into the batch"))
        index = check_indices(indices, len(self.state), self.state.device, count=len(logits))
        pair = None if partner is None else self._partner(partner, len(logits))
        if not isinstance(labels, Tensor):
            do = "Pass the labels of the batch as a tensor"
            raise InvalidLabelsError(explain("labels as a tensor", type(labels).__name__, do))
        if share is not None:
            part = torch.as_tensor(share)
            if part.numel() not in (1, len(logits)) or not bool(((part >= 0) & (part <= 1)).all()):
                do = "Pass lam, the share of each row's own sample"
                raise InvalidInputError(explain("`share` in [0, 1], one or one per row", f"{share!r}"[:60], do))
        if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
            raise InvalidLabelsError(explain("finite soft labels", "a NaN or infinite value", "Check what mixed them"))
        self.usage.note("loss", len(logits))
        if share is None and not labels.is_floating_point():
            pair = None  # hard labels: nothing was mixed into this batch
        if not self.enabled:
            return self._plain(logits, labels, pair, share, criterion), index
        self.follow()
        if labels.is_floating_point():
            return self._soft(logits, labels, index, pair, share, criterion), index
        return self._hard(logits, labels, index, pair, share, criterion), index

    def _partner(self, partner: Any, rows: int) -> Tensor:
        return check_indices(partner, len(self.state), self.state.device, count=rows, name="partner")

    def _plain(self, logits: Tensor, labels: Tensor, pair: Tensor | None, share: Any, criterion: Any) -> Tensor:
        """The script's own loss."""
        loss: Tensor = criterion(logits, labels)
        if pair is None or labels.is_floating_point():
            return loss
        other: Tensor = criterion(logits, self.state.observed[pair].to(labels.device))
        return share * loss + (1 - share) * other

    def _one(self, weight: Tensor, more: Tensor | None = None) -> bool:
        """Whether all weights are 1. Then the script's own loss keeps its bits; another reduction rounds otherwise."""
        return bool((weight == 1).all() if more is None else ((weight == 1) & (more == 1)).all())

    def follow(self) -> None:
        """Notes the targets before the last change, which batches that were read ahead still have."""
        if self.enabled and self._version != self.state.version:
            self._version = self.state.version
            if not torch.equal(self._now, self.state.target):
                self._before, self._now = self._now, self.state.target.clone()

    def _changed(self, index: Tensor) -> Tensor:
        """Whether a label that was read earlier may differ from today's, bool [B]."""
        return (self._before[index] != self._now[index]) | (self._now[index] != self.state.observed[index])

    def _hard(
        self, logits: Tensor, labels: Tensor, index: Tensor, pair: Tensor | None, share: Any, criterion: Any
    ) -> Tensor:
        target = self._now[index]
        if labels.shape != target.shape:
            got = f"shape {list(labels.shape)}"
            raise InvalidLabelsError(explain(f"labels [{len(index)}] or [{len(index)},K]", got, "Pass one per row"))
        given = labels.detach().to(target.device)
        # A row that was read before its sample was relabelled is trained on the label of today.
        known = (given == target) | (given == self._before[index]) | (given == self.state.observed[index])
        self._refuse(~known & ~(self._before[index] != target), given, target, index)
        target = target.to(logits.device)
        weight = self.weights(index).to(logits.device)
        rows, scale = losses_of(criterion, logits, target), _class_weights(criterion, target)
        if pair is None:
            if self._one(weight):
                loss: Tensor = criterion(logits, target)
                return loss
            return _reduced(criterion, weight * rows, weight * scale)
        s = torch.as_tensor(share, device=logits.device).expand(len(rows))
        other = self._now[pair].to(logits.device)
        more = self.weights(pair).to(logits.device) * (1 - s)
        total = s * weight * scale + more * _class_weights(criterion, other)
        return _reduced(criterion, s * weight * rows + more * losses_of(criterion, logits, other), total)

    def _soft(
        self, logits: Tensor, labels: Tensor, index: Tensor, pair: Tensor | None, share: Any, criterion: Any
    ) -> Tensor:
        if labels.shape != logits.shape:
            got = f"{list(labels.shape)}"
            raise InvalidLabelsError(explain(f"soft labels of shape {list(logits.shape)}", got, "Pass one row each"))
        labels, weight = labels.to(logits.device), self.weights(index).to(logits.device)
        if pair is None:
            if share is None:
                _refuse_mixed(labels)
            if self._one(weight):
                loss: Tensor = criterion(logits, labels)
                return loss
            return _reduced(criterion, weight * losses_of(criterion, logits, labels), weight)
        own, other = self._now[index], self._now[pair]
        s, first, second, left = mixed_parts(labels, own.to(labels.device), other.to(labels.device), share)
        stale = (self._changed(index) | self._changed(pair)).to(labels.device)
        wrong = (left.abs() > _TOLERANCE) & ~stale
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            got = f"{float(left[row]):.3g} of row {row} on other classes"
            do = "Pass the indices of the samples that were mixed in as partner: idx.roll(1, 0) for torchvision"
            expected = f"labels mixed of samples {int(index[row])} and {int(pair[row])}"
            raise InvalidLabelsError(explain(expected, got, do))
        more = self.weights(pair).to(logits.device)
        if self._one(weight, more):
            loss = criterion(logits, labels)
            return loss
        more = more * (1 - s)
        rows = s * weight * losses_of(criterion, logits, first) + more * losses_of(criterion, logits, second)
        return _reduced(criterion, rows, s * weight + more)

    def _refuse(self, wrong: Tensor, given: Tensor, target: Tensor, index: Tensor) -> None:
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            expected = f"label {int(target[row])} in row {row}, the label of sample {int(index[row])}"
            do = "Pass the indices that came with these rows, in their order; labels of your own as one-hot rows [B,K]"
            raise InvalidLabelsError(explain(expected, str(int(given[row])), do))


def _refuse_mixed(labels: Tensor) -> None:
    """Refuses rows mixed of two one-hot labels: two classes stand out, and all others have the same share."""
    ordered, k = labels.float().sort(1, descending=True).values, labels.shape[1]
    if k < 3:  # every row of two classes looks so
        return
    others = ordered[:, 2:]
    flat = (others[:, 0] - others[:, -1] < 1e-6) & ((others[:, 0] < 1e-6) | (k > 3))
    two = flat & (ordered[:, 1] > others[:, 0] + 1e-6)
    if bool(two.any()):
        got = f"two classes in row {int(two.nonzero()[0])}, and no partner"
        do = (
            "Pass partner=, the indices of the samples that were mixed in: idx.roll(1, 0) for torchvision's CutMix and"
            " MixUp. If nothing was mixed in, pass share=1"
        )
        raise InvalidLabelsError(explain("soft labels of one sample each", got, do))


def _class_weights(criterion: Any, target: Tensor) -> Tensor:
    """Weight of each row's class in torch's mean, [B]."""
    weight = getattr(criterion, "weight", None)
    return torch.ones_like(target, dtype=torch.float32) if weight is None else weight[target]


def _reduced(criterion: Any, rows: Tensor, weights: Tensor) -> Tensor:
    reduction = getattr(criterion, "reduction", "mean")
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / weights.sum().clamp_min(torch.finfo(rows.dtype).tiny)
