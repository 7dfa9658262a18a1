"""Loads the dataset of a run, with its noisy labels."""

from __future__ import annotations

import os
from pathlib import Path

from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.named_labels import read_named_labels
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.experiments.plan import Plan

__all__ = ["load_noisy", "load_splits", "truth_known"]


def load_splits(plan: Plan, preprocessing: Preprocessing | None = None) -> DataSplits:
    """The dataset of a run; a given ``preprocessing`` replaces the dataset's own. Errors: see ``load_dataset``."""
    return load_dataset(
        plan.dataset,
        plan.root,
        per_class=plan.per_class or None,
        holdout=plan.holdout,
        seed=plan.seed,
        device=plan.device,
        zca=plan.zca and preprocessing is None,
        image_size=plan.image_size,
        preprocessing=preprocessing,
    )


def load_noisy(plan: Plan) -> tuple[DataSplits, NoisyLabels, NoisyLabels | None]:
    """The dataset, the noisy labels of its training part, and those of its held-out part (None if that is empty).

    Held-out labels are as noisy as the rest, because a user has no cleaner ones to choose the best iterate with.
    """
    splits = load_splits(plan)
    return splits, *splits.apply_noise(plan.noise)


def truth_known(plan: Plan) -> bool:
    """Whether the dataset's own labels are known to be true, so that a division can be judged by them.

    Those of the named datasets are. Those of an image folder are if the run puts noise on them, or if the label file
    has clean labels, which were compared with them. Otherwise the folder's labels may be wrong themselves.
    """
    if not plan.dataset.startswith("folder:"):
        return True
    if plan.noise.kind != "human":
        return plan.noise.kind != "none"
    path = Path(os.path.expanduser(str(plan.noise.path)))
    return path.suffix.lower() not in (".csv", ".json") or "clean" in read_named_labels(path).sets
