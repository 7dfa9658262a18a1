"""Loads the dataset of a run, with its noisy labels."""

from __future__ import annotations

from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.experiments.plan import Plan

__all__ = ["load_noisy", "load_splits"]


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
        preprocessing=preprocessing,
    )


def load_noisy(plan: Plan) -> tuple[DataSplits, NoisyLabels, NoisyLabels | None]:
    """The dataset, the noisy labels of its training part, and those of its held-out part (None if that is empty).

    Held-out labels are as noisy as the rest, because a user has no cleaner ones to choose the best iterate with.
    """
    splits = load_splits(plan)
    return splits, *splits.apply_noise(plan.noise)
