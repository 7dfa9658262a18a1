"""``suspects.csv`` and ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tad_plugin.experiments.audit.verdicts import WORDS, Verdicts, transition_matrix

__all__ = ["COLUMNS", "summary", "suspect_rows"]

COLUMNS = (
    "path", "index", "label", "class", "trust", "loss", "proposed", "proposed_class", "proposed_confidence", "verdict",
)  # fmt: skip


def suspect_rows(
    verdicts: Verdicts, observed: Tensor, index: Tensor, class_names: Sequence[str], paths: Sequence[str] | None
) -> list[dict[str, Any]]:
    """One row for every sample, the most doubtful first.

    Args:
        verdicts: the verdicts.
        observed: int64 [N].
        index: int64 [N], position of each sample in the dataset.
        class_names: K names.
        paths: N paths below the dataset's top, or None.
    """
    rows = []
    for i in verdicts.order.tolist():
        label, proposed = int(observed[i]), int(verdicts.proposed[i])
        values = (
            paths[i] if paths else "", int(index[i]), label, class_names[label], round(float(verdicts.trust[i]), 6),
            round(float(verdicts.loss[i]), 6), proposed, class_names[proposed],
            round(float(verdicts.confidence[i]), 6), WORDS[int(verdicts.verdict[i])],
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def summary(verdicts: Verdicts, observed: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Counts, estimated rates of wrong labels and the estimated transition matrix, as plain values."""
    k = len(class_names)
    counts = torch.bincount(observed, minlength=k)
    doubted = torch.zeros(k, dtype=torch.float64).index_add_(0, observed.cpu(), 1.0 - verdicts.trust.double().cpu())
    words = torch.bincount(verdicts.verdict, minlength=len(WORDS))
    return {
        "samples": len(observed),
        "verdicts": dict(zip(WORDS, words.tolist(), strict=True)),
        "noise_rate": float(1.0 - verdicts.trust.double().mean()),
        "classes": [
            {"class": name, "samples": int(counts[c]), "noise_rate": float(doubted[c] / counts[c].clamp_min(1).cpu())}
            for c, name in enumerate(class_names)
        ],
        "transition_matrix": transition_matrix(verdicts, observed, k).tolist(),
    }
