"""Attaches the methods of an arm to loaded data: the same way for runs, experts and shared decisions."""

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
from tad_plugin.data.origin import Origin
from tad_plugin.distill.experts.buffer import BufferInfo
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.experiments.loading import truth_known
from tad_plugin.experiments.plan import Plan, settings_of
from tad_plugin.utils.seeds import derived_seed

__all__ = ["PILOT_ROUNDS", "arm_hook", "buffer_settings", "nominal_rate", "pilot_settings"]

PILOT_ROUNDS = 3
"""Rounds that a method decides in at the end of a pilot, if the user does not set its warm-up."""


def nominal_rate(noisy: NoisyLabels) -> float | None:
    """Share of wrong labels that the noise was set to, in [0, 1]; None if it was not set (no noise, human labels)."""
    return noisy.spec.rate if noisy.spec.kind not in ("none", "human", "matrix") else None


def pilot_settings(methods: Mapping[str, Any], method: str, experts: ExpertConfig) -> dict[str, Any]:
    """Settings of the methods when they decide on a pilot: by default the warm-up takes most of it.

    A method that decides early trains the rest of the pilot on its own choice and agrees with it more and more. On
    CIFAR-10 TAD then keeps 54% of the right labels instead of 82%.

    Args:
        methods: settings by method.
        method: as in :func:`tad_plugin.attach`.
        experts: settings of the experts.

    Returns:
        ``methods``, with a warm-up for each method that has one and whose warm-up is not set.
    """
    found = dict(methods)
    rounds = experts.pilot_epochs or experts.epochs
    for name in method_names(method) if experts.pilots else ():
        cls = load_method(name)
        if cls.needs_scorer and cls.Config is not None and "warmup" in {f.name for f in dataclasses.fields(cls.Config)}:
            found[name] = {"warmup": max(1, rounds - PILOT_ROUNDS), **found.get(name, {})}
    return found


def buffer_settings(methods: Mapping[str, Any], method: str, folder: str | Path) -> dict[str, Any]:
    """Method settings stored with the replay buffer in ``folder``, overridden by ``methods``.

    Raises:
        FileFormatError: a damaged description or state.
    """
    info = BufferInfo.read(folder)
    if info is None or not info.state_file:
        return dict(methods)
    theirs = SampleState.read_header(Path(folder) / info.state_file)["configs"]
    return {**methods, **{n: {**theirs[n], **methods.get(n, {})} for n in method_names(method) if n in theirs}}


def arm_hook(
    plan: Plan,
    splits: DataSplits,
    noisy: NoisyLabels,
    *,
    experts: ExpertConfig | None = None,
    ipc: int | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Hook:
    """The hook of a run, not yet started.

    Args:
        plan: the run's plan.
        splits: its data.
        noisy: observed labels of the training part.
        experts: experts on which the methods decide (trajectory matching); no effect with a given buffer.
        ipc: usable samples per class that the methods must leave; the run's IPC by default.
        log: receives log records.

    Raises:
        See :func:`tad_plugin.attach`.
    """
    method, methods = plan.arm.method, plan.methods
    if plan.buffer:
        methods = buffer_settings(methods, method, plan.buffer)
    elif experts is not None:
        methods = pilot_settings(methods, method, experts)
    return attach(
        method,
        labels=splits.train_labels if plan.arm.true_labels else noisy.labels,
        data=splits.train_images,
        num_classes=splits.num_classes,
        seed=derived_seed(plan.seed, "hook") % 2**31,
        config=settings_of(methods, method),
        true_labels=splits.train_labels if truth_known(plan) else None,
        dataset=splits.name,
        ipc=plan.loop.ipc if ipc is None else ipc,
        noise_rate=nominal_rate(noisy),
        origin=Origin(
            splits.source_index, splits.holdout_source_index, splits.source_paths, splits.class_names or None
        ),
        trains_on_real=plan.baseline.trains_on_real,
        log=log,
        start=False,
        iterations=plan.loop.iterations or None,  # the arm "random" makes no update
        announce=False,
    )
