"""The hook of one arm on loaded data: the same for a run, its experts and what runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.registry import load_method, method_names
from tad_plugin.core.state import SampleState
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.distill.experts.buffer import BufferInfo
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.experiments.config import RunConfig, settings_of
from tad_plugin.utils.seeds import derived_seed

__all__ = ["PILOT_ROUNDS", "arm_hook", "buffer_settings", "nominal_rate", "pilot_settings"]

PILOT_ROUNDS = 3
"""Rounds at the end of a pilot in which a method decides, where its warm-up is not set."""


def nominal_rate(noisy: NoisyLabels) -> float | None:
    """The share of wrong labels that the noise was set to; None where it was not set (no noise, human labels)."""
    return noisy.spec.rate if noisy.spec.kind not in ("none", "human", "matrix") else None


def pilot_settings(methods: Mapping[str, Any], method: str, experts: ExpertConfig) -> dict[str, Any]:
    """Settings of the methods for experts of these settings: a warm-up that is not set takes most of a pilot.

    A method that decides early trains the rest of the pilot on its own choice and agrees with it more and more: on
    CIFAR-10 TAD then keeps 54% of the right labels instead of 82%.

    Args:
        methods: settings by method.
        method: as in :func:`tad_plugin.attach`.
        experts: the experts' settings.
    """
    found = dict(methods)
    rounds = experts.pilot_epochs or experts.epochs
    for name in method_names(method) if experts.pilots else ():
        cls = load_method(name)
        if cls.needs_scorer and cls.Config is not None and "warmup" in {f.name for f in dataclasses.fields(cls.Config)}:
            found[name] = {"warmup": max(1, rounds - PILOT_ROUNDS), **found.get(name, {})}
    return found


def buffer_settings(methods: Mapping[str, Any], method: str, folder: str | Path) -> dict[str, Any]:
    """Settings of the methods that decided while a buffer was trained: what is not set here is as it was there.

    Raises:
        FileFormatError: a damaged description or state.
    """
    info = BufferInfo.read(folder)
    if info is None or not info.state_file:
        return dict(methods)
    theirs = SampleState.read_header(Path(folder) / info.state_file)["configs"]
    return {**methods, **{n: {**theirs[n], **methods.get(n, {})} for n in method_names(method) if n in theirs}}


def arm_hook(
    config: RunConfig,
    arm: str,
    splits: DataSplits,
    noisy: NoisyLabels,
    *,
    experts: ExpertConfig | None = None,
    buffer: str | Path = "",
    trains_on_real: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Hook:
    """The hook, not yet started.

    Args:
        config: resolved settings.
        arm: a name of ``ARMS`` or a method.
        splits: the data.
        noisy: the observed labels of its training part.
        experts: the experts on which the methods decide, in trajectory matching.
        buffer: folder of a replay buffer on which they decided before.
        trains_on_real: see :func:`tad_plugin.attach`.
        log: receives log records.

    Raises:
        See :func:`tad_plugin.attach`.
    """
    chosen = parse_arm(arm)
    methods = config.methods
    if buffer:
        methods = buffer_settings(methods, chosen.method, buffer)
    elif experts is not None:
        methods = pilot_settings(methods, chosen.method, experts)
    return attach(
        chosen.method,
        labels=splits.train_labels if chosen.true_labels else noisy.labels,
        data=splits.train_images,
        num_classes=splits.num_classes,
        seed=derived_seed(config.seed, "hook") % 2**31,
        config=settings_of(methods, chosen.method),
        true_labels=splits.train_labels,
        dataset=splits.name,
        ipc=config.ipc,
        noise_rate=nominal_rate(noisy),
        trains_on_real=trains_on_real,
        log=log,
        start=False,
    )
