"""Loads the dataset of a run, with its noisy labels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.named_labels import read_named_labels
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.sources import dataset_name
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import InvalidInputError, PreprocessingMismatchError, explain
from tad_plugin.experiments.plan import Plan
from tad_plugin.utils.image_store import in_parts

__all__ = ["load_noisy", "load_splits", "load_test", "truth_known"]


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
        storage=plan.storage,
        preprocessing=preprocessing,
    )


def load_test(plan: Plan, synthetic: SyntheticSet, path: str | Path) -> DataSplits:
    """The dataset on which a synthetic set is evaluated, with the normalisation of the set.

    Args:
        plan: names the dataset.
        synthetic: the set.
        path: its file, for messages.

    Raises:
        InvalidInputError: another dataset than the one that was distilled: another name, other classes, images of
            another shape.
        PreprocessingMismatchError: a folder whose training images give another normalisation.
    """
    wanted = dataset_name(plan.dataset)
    if synthetic.dataset and wanted != synthetic.dataset:
        hint = "folder:PATH with the folder that was distilled" if synthetic.dataset.startswith("folder:") else ""
        expected = f"the dataset {synthetic.dataset!r}, which {path} was distilled from"
        raise InvalidInputError(explain(expected, repr(wanted), f"Pass --dataset {hint or synthetic.dataset}"))
    plan = dataclasses.replace(plan, holdout=0.0)
    own = load_splits(plan)
    if not own.tested:
        do = "Add test/<class>/; the run's results.json has its accuracy on held-out images under 'heldout'"
        raise InvalidInputError(explain(f"test images in {plan.dataset}", "none", do))
    names, do = tuple(synthetic.class_names), "Pass --dataset with the data that were distilled"
    if own.num_classes != synthetic.num_classes or (names and names != tuple(own.class_names)):
        expected = f"the {synthetic.num_classes} classes of {path} ({_listed(names)})"
        raise InvalidInputError(explain(expected, f"{own.num_classes} ({_listed(own.class_names)})", do))
    shape = tuple(synthetic.images.shape[1:])
    if shape != own.shape:
        do = "Pass --image_size as in the run, and --dataset with the data that were distilled"
        raise InvalidInputError(explain(f"images {list(shape)}, as in {path}", str(list(own.shape)), do))
    theirs = synthetic.preprocessing
    if theirs.fingerprint() == own.preprocessing.fingerprint():
        return own
    if plan.dataset.startswith("folder:") and not _fitted_on(theirs, own):
        expected, got = f"training images with the normalisation of {path}: {theirs}", str(own.preprocessing)
        do = "Pass --dataset with the folder that was distilled, and --per_class and --image_size as in the run"
        raise PreprocessingMismatchError(explain(expected, got, do))
    return load_splits(plan, theirs)


def _fitted_on(preprocessing: Preprocessing, splits: DataSplits) -> bool:
    """Whether a whitening was fitted on these training images. Normalisations are compared by their fingerprints."""
    zca = preprocessing.zca
    if zca is None:
        return False
    parts = [splits.preprocessing.inverse(part).sum(0) for part in in_parts(splits.train_images)]
    mean = torch.stack(parts).sum(0).flatten().cpu() / len(splits.train_labels)
    return torch.allclose(mean, zca.mean.cpu(), atol=1e-3)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


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
