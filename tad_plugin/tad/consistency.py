"""The consistency term: keeps predictions close to their own running mean.

[paper] A consistency regularisation term steadies the training of the scorer. [ours] Its form, since the formula is not
public: temporal ensembling (Laine & Aila, ICLR 2017). It needs only logits and sample indices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.distributed import merge_rows
from tad_plugin.data.labels import check_num_classes
from tad_plugin.errors import InvalidInputError, NonFiniteError, StateMismatchError, explain
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["TemporalEnsemble", "consistency_loss", "ramp_up"]


class TemporalEnsemble:
    """Running, bias-corrected mean of the class probabilities of each sample.

    Stores the corrected mean itself: p <- p + (1 - beta) / (1 - beta^t) (new - p) at the t-th visit of a sample. This
    equals the exponential mean divided by 1 - beta^t, and keeps small early values in the range of half precision.

    Args:
        num_samples: N.
        num_classes: K.
        beta: decay in [0, 1); 0 keeps only the last prediction.
        dtype: storage type; float16 takes 2 N K bytes.
        device: device of the storage. Batches on another device are moved.

    Raises:
        InvalidInputError: an argument out of range.
    """

    @named_errors
    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        beta: float = 0.6,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_samples < 1 or num_classes < 1 or not 0 <= beta < 1 or not dtype.is_floating_point:
            got = f"num_samples={num_samples}, num_classes={num_classes}, beta={beta}, dtype={dtype}"
            expected = "positive sizes, beta in [0, 1), a floating-point dtype"
            raise InvalidInputError(explain(expected, got, "Pass the sizes of the data, and leave beta at its default"))
        check_whole("num_samples", num_samples, 1, 2**28)
        check_num_classes(num_classes)
        self.beta = beta
        self.num_classes = num_classes
        self.mean = torch.zeros(num_samples, num_classes, dtype=dtype, device=device)
        self.count = torch.zeros(num_samples, dtype=torch.int32, device=device)

    @named_errors
    def update(self, indices: Tensor, probabilities: Tensor) -> None:
        """Adds one visit of each sample. A sample twice in the batch counts once, with its mean prediction.

        Args:
            indices: integers [B], positions in the dataset.
            probabilities: float [B, K], rows that sum to 1.

        Raises:
            InvalidInputError: a wrong shape or an index out of range.
            NonFiniteError: a NaN or infinite probability.
        """
        indices = self._checked(indices)
        if probabilities.shape != (len(indices), self.num_classes):
            expected = f"`probabilities` of shape [{len(indices)}, {self.num_classes}]"
            raise InvalidInputError(explain(expected, f"shape {list(probabilities.shape)}", "Pass one row per index"))
        _require_finite(probabilities)
        self._update(indices, probabilities)

    def _update(self, indices: Tensor, probabilities: Tensor) -> None:
        """:meth:`update` for indices that were checked before."""
        indices = indices.to(self.mean.device, torch.int64)
        new = probabilities.detach().to(self.mean.device, torch.float32)
        # An accelerator is not asked, because the answer would wait. The loss of such a batch is NaN as well, and
        # whoever trains the network reports that at the end of the epoch.
        if new.device.type == "cpu":
            _require_finite(new)
        # Copies of a sample stand side by side, and each row gets the mean over its copies. No size depends on values.
        indices, order = indices.sort(stable=True)
        first = torch.ones_like(indices, dtype=torch.bool)
        first[1:] = indices[1:] != indices[:-1]
        group = first.cumsum(0) - 1
        total = torch.zeros_like(new).index_add_(0, group, new[order])[group]
        copies = torch.zeros_like(group).index_add_(0, group, torch.ones_like(group))[group]
        count = self.count[indices] + 1
        # expm1 keeps 1 - beta^t exact for a beta close to 1.
        decay = (
            -torch.expm1(count.double() * math.log(self.beta))
            if self.beta > 0
            else torch.ones_like(count, dtype=torch.float64)
        )
        rate = ((1 - self.beta) / decay).float().unsqueeze(1)
        old = self._ensemble(indices)
        self._store(indices, torch.lerp(old, total / copies.unsqueeze(1), rate))
        self.count[indices] = count

    @named_errors
    def ensemble(self, indices: Tensor) -> Tensor:
        """Returns the mean probabilities, float32 [B, K] on the device of ``indices``.

        A sample that was never visited has a row of zeros.

        Raises:
            InvalidInputError: a wrong shape or an index out of range.
        """
        return self._ensemble(self._checked(indices)).to(indices.device)

    def _ensemble(self, indices: Tensor) -> Tensor:
        """:meth:`ensemble` for int64 indices that were checked before, on the device of the storage."""
        return self.mean[indices].float()

    def _store(self, indices: Tensor, rows: Tensor) -> None:
        """Replaces the means of some samples by these rows, float32 [B, K]."""
        self.mean[indices] = rows.to(self.mean.dtype)

    def merge(self) -> None:
        """Takes over what other processes of the run have seen (torchrun); nothing in a single process."""
        merge_rows(self.mean, self.count)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that restores this ensemble bit for bit."""
        return {"beta": self.beta, "mean": self.mean.clone(), "count": self.count.clone()}

    @named_errors
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of :meth:`state_dict`.

        Raises:
            StateMismatchError: another beta, size or storage type.
        """
        mine = (self.beta, list(self.mean.shape), self.mean.dtype)
        theirs = (float(state["beta"]), list(state["mean"].shape), state["mean"].dtype)
        if mine != theirs:
            do = "Build the ensemble with the saved settings, or start without this state"
            raise StateMismatchError(explain(f"beta, size and dtype {mine}", f"{theirs}", do))
        self.mean.copy_(state["mean"])
        self.count.copy_(state["count"])

    def _checked(self, indices: Tensor) -> Tensor:
        if indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
            got = f"shape {list(indices.shape)}, dtype {indices.dtype}"
            raise InvalidInputError(explain("integer `indices` of shape [B]", got, "Pass positions in the dataset"))
        indices = indices.to(self.mean.device, torch.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self.mean):
            got = f"{int(indices.min())} to {int(indices.max())}"
            raise InvalidInputError(explain(f"indices in [0, {len(self.mean)})", got, "Pass positions in the dataset"))
        return indices


def _require_finite(values: Tensor) -> None:
    """Raises NonFiniteError if a probability is NaN or infinite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        do = "The scorer may have diverged: lower its learning rate"
        raise NonFiniteError(explain("finite `probabilities`", f"{int((~finite).sum())} non-finite values", do))


@named_errors
def consistency_loss(logits: Tensor, targets_probs: Tensor) -> Tensor:
    """Computes mean_i ||softmax(logits_i) - p_i||^2, a scalar [ours].

    The mean is over the whole batch. A row of zeros in ``targets_probs`` marks a sample without a history (its first
    visit). It contributes zero and no gradient.

    Args:
        logits: float [B, K], with a graph.
        targets_probs: float [B, K], from :meth:`TemporalEnsemble.ensemble`; treated as constant.

    Raises:
        InvalidInputError: shapes that differ, or an empty batch.
    """
    if logits.ndim != 2 or logits.shape != targets_probs.shape or len(logits) == 0:
        got = f"shapes {list(logits.shape)} and {list(targets_probs.shape)}"
        expected = "`logits` and `targets_probs` of one shape [B, K]"
        raise InvalidInputError(explain(expected, got, "Pass one row per sample"))
    target = targets_probs.detach()
    seen = target.sum(1) > 0
    distance = (logits.softmax(1) - target).square().sum(1)
    return torch.where(seen, distance, 0.0).mean()


@named_errors
def ramp_up(epoch: float, length: float, maximum: float) -> float:
    """Computes the weight of the consistency term: maximum * exp(-5 (1 - t)^2), t = epoch / length within [0, 1].

    This is Laine & Aila's "sigmoid" ramp-up: 0.7% of the maximum at epoch 0, all of it from ``length`` on. A length of
    0 gives the maximum at once.

    Args:
        epoch: epochs done, >= 0; fractions allowed.
        length: epochs of the ramp, >= 0.
        maximum: the final weight, >= 0.

    Raises:
        InvalidInputError: a negative argument.
    """
    if min(epoch, length, maximum) < 0:
        got = f"epoch={epoch}, length={length}, maximum={maximum}"
        raise InvalidInputError(explain("epoch, length and maximum >= 0", got, "Pass the epochs done so far"))
    t = min(epoch / length, 1.0) if length > 0 else 1.0
    return maximum * math.exp(-5.0 * (1.0 - t) ** 2)
