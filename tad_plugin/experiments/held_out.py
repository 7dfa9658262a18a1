"""What is told of a run without test images: its accuracy on training images that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tad_plugin.experiments.loading import truth_known
from tad_plugin.experiments.plan import Plan

__all__ = ["NO_ACCURACY", "held_out", "held_out_labels"]

NO_ACCURACY = {"last": None, "best": None}
"""The accuracies of a run without test images."""


def held_out_labels(plan: Plan) -> str:
    """Which labels of the held-out images count, in words: "observed", which may be wrong, or "true"."""
    return "true" if plan.arm.true_labels and truth_known(plan) else "observed"


def held_out(accuracy: Mapping[str, Any], samples: int, plan: Plan) -> dict[str, Any] | None:
    """The field "heldout" of results.json; None if nothing was held out.

    Args:
        accuracy: accuracies in percent on the held-out images. That of the best iterate is too high by a little: the
            same images chose it.
        samples: number of held-out images.
        plan: the run's plan.
    """
    return {**accuracy, "samples": samples, "labels": held_out_labels(plan)} if samples else None
