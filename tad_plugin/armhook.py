"""The hook of one arm on loaded data: the same for a run, its experts and what runs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tad_plugin.arms import parse_arm
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise import NoisyLabels
from tad_plugin.hook import Hook, attach
from tad_plugin.runconfig import RunConfig, derived_seed, settings_of

__all__ = ["arm_hook", "nominal_rate"]


def nominal_rate(noisy: NoisyLabels) -> float | None:
    """The share of wrong labels that the noise was set to; None where it was not set (no noise, human labels)."""
    return noisy.spec.rate if noisy.spec.kind not in ("none", "human", "matrix") else None


def arm_hook(
    config: RunConfig,
    arm: str,
    splits: DataSplits,
    noisy: NoisyLabels,
    *,
    trains_on_real: bool,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Hook:
    """The hook, not yet started.

    Args:
        config: resolved settings.
        arm: a name of ``ARMS`` or a method.
        splits: the data.
        noisy: the observed labels of its training part.
        trains_on_real: see :func:`tad_plugin.attach`.
        log: receives log records.

    Raises:
        See :func:`tad_plugin.attach`.
    """
    chosen = parse_arm(arm)
    return attach(
        chosen.method,
        labels=splits.train_labels if chosen.true_labels else noisy.labels,
        data=splits.train_images,
        num_classes=splits.num_classes,
        seed=derived_seed(config.seed, "hook") % 2**31,
        config=settings_of(config.methods, chosen.method),
        true_labels=splits.train_labels,
        dataset=splits.name,
        ipc=config.ipc,
        noise_rate=nominal_rate(noisy),
        trains_on_real=trains_on_real,
        log=log,
        start=False,
    )
