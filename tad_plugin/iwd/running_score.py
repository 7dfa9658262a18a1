"""The running score of each sample over batches, networks and refreshes. [ours: README.md, 3]"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.indices import check_indices
from tad_plugin.errors import ConfigError, InvalidInputError, StateMismatchError, explain
from tad_plugin.nn.derivatives.vectors import require_finite
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["RunningScore"]


class RunningScore:
    """Sum, or exponential moving average, of each sample's scores over batches, networks and refreshes.

    Add *standardised* influences (:func:`standardise`), so that networks with large gradients do not dominate.

    Attributes:
        counts: int64 [N], number of scores of each sample.

    Args:
        num_samples: N.
        decay: share of the old value that is kept at each score, in (0, 1); None for a plain sum.
        device: device of the tensors.
    """

    @named_errors
    def __init__(self, num_samples: int, *, decay: float | None = None, device: torch.device | str = "cpu") -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ConfigError(explain("decay in (0, 1), or None for a sum", str(decay), "Pass 0.9, for instance"))
        num_samples = check_whole("num_samples", num_samples, 1, 2**28)
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

        The plain mean of few scores is more extreme. Shrinking makes samples with different counts comparable.
        """
        mean = self.value if self.decay is not None else self._total / self.counts.clamp_min(1)
        return mean * (self.counts / (self.counts + 1.0))

    @named_errors
    def forget(self, mask: Tensor) -> None:
        """Drops the scores of the samples in ``mask`` (bool [N])."""
        if mask.dtype != torch.bool or mask.shape != self.counts.shape:
            got = f"{mask.dtype} {list(mask.shape)}"
            raise InvalidInputError(explain(f"a bool mask {list(self.counts.shape)}", got, "Pass one flag per sample"))
        self._total.masked_fill_(mask, 0)
        self.counts.masked_fill_(mask, 0)

    @named_errors
    def restore(self, estimate: Tensor, counts: Tensor) -> None:
        """Restores the scores from :attr:`estimate` (float [N]) and counts (int64 [N])."""
        if estimate.shape != self.counts.shape or counts.shape != self.counts.shape or bool((counts < 0).any()):
            got = f"{list(estimate.shape)} estimates and {list(counts.shape)} counts"
            do = "Pass the estimate and the counts of a running score of the same data"
            raise InvalidInputError(explain(f"{list(self.counts.shape)} of both, counts of at least 0", got, do))
        estimate = require_finite(estimate, "estimates", "Start without the saved scores")
        self.counts.copy_(counts)
        mean = estimate.double() * (counts + 1.0) / counts.clamp_min(1)
        factor = counts.double() if self.decay is None else 1.0 - self.decay ** counts.double()
        self._total.copy_(mean * factor)

    @named_errors
    def add(self, indices: Tensor | None, scores: Tensor) -> None:
        """Adds one score [B] for each of ``indices`` (int64 [B], each at most once; None for all N).

        Raises:
            NonFiniteError: a score is NaN or infinite; nothing is added then.
            InvalidInputError: lengths differ, or an index is out of range or comes twice.
        """
        where = torch.arange(len(self.counts), device=self.counts.device) if indices is None else indices
        if scores.shape != where.shape or where.ndim != 1:
            got = f"{list(where.shape)} indices and {list(scores.shape)} scores"
            raise InvalidInputError(explain("one score per index", got, "Pass tensors of one length"))
        if len(where):
            where = check_indices(where, len(self.counts), self.counts.device)
        if len(where.unique()) != len(where):
            raise InvalidInputError(
                explain("each index at most once", "a repeated one", "Add the scores in several calls")
            )
        self._add(where, scores)

    def _add(self, where: Tensor, scores: Tensor) -> None:
        """:meth:`add` for indices that were checked before."""
        scores = require_finite(scores.detach().to(self._total), "scores", "Check the influences that were computed")
        old = self._total[where]
        self._total[where] = old + scores if self.decay is None else self.decay * old + (1.0 - self.decay) * scores
        self.counts[where] += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that restores this object bit for bit: tensors and plain values."""
        return {"decay": self.decay, "total": self._total.clone(), "counts": self.counts.clone()}

    @named_errors
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            StateMismatchError: the saved scores have another number of samples or another decay.
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
