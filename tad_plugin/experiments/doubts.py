"""What a user should know of a result before trusting it: images out of range, accuracies at chance."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.datasets import DataSplits
from tad_plugin.distill.image_range import out_of_range, spread_of
from tad_plugin.errors import explain
from tad_plugin.experiments.plan import Plan

__all__ = ["at_chance", "doubt_lines", "doubts"]


def at_chance(network: str, accuracies: Iterable[float], test_labels: Tensor) -> str | None:
    """A message if the mean of accuracies (percent) is at most that of always naming the largest test class."""
    mean, most = statistics.fmean(accuracies), 100.0 * float(torch.bincount(test_labels).max()) / len(test_labels)
    if mean > most + 1e-9:
        return None
    do = "Look at the synthetic images; lower lr_img, or train the evaluation networks longer"
    return explain(f"an accuracy above {most:.1f}%, which is chance", f"{mean:.1f}% with {network}", do)


def doubts(
    images: Tensor,
    splits: DataSplits,
    accuracy: Mapping[str, Any],
    labels: Tensor,
    plan: Plan,
    of_loop: str | None = None,
) -> list[str]:
    """Messages on the result of a run, whatever its loop; empty if nothing is odd.

    Args:
        images: the synthetic images, float [M,C,H,W].
        splits: the run's data.
        accuracy: as in results.json; empty if nothing could be evaluated.
        labels: int64 [M], those that the accuracies were counted against.
        plan: the run's plan.
        of_loop: the loop's own (:meth:`tad_plugin.distill.baseline.Baseline.doubt`).
    """
    found = [of_loop, out_of_range(images, spread_of(splits.train_images), plan.loop.lr_img, "at the end")]
    tables = {plan.evaluation.networks[0]: accuracy, **accuracy.get("networks", {})}
    if "last" in accuracy:
        found += [at_chance(name, table["last"], labels) for name, table in tables.items()]
    else:
        do = "Add test/<class>/ to the folder, or hold out a part of the training images with --holdout"
        found.append(explain("test images, or held-out ones", "neither, so no accuracy is known", do))
    return [message for message in found if message is not None]


def doubt_lines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each doubt in results, with the run that it is about."""
    return [
        f"doubtful: arm {r['arm']}, IPC {r['ipc']}, seed {r['seed']}: {message}"
        for r in results
        for message in r.get("doubts", ())
    ]
