"""One run that trains experts: data, noise, an arm, and a replay buffer. It resumes after a kill.

The run folder is the buffer: ``replay_buffer_*.pt``, ``buffer.json`` and ``state.safetensors`` lie beside the run's
``config.yaml``, ``log.jsonl`` and ``results.json``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tad_plugin.core.diagnostics import split_quality
from tad_plugin.core.scorer import score_all
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import SIDE_FILE, BufferInfo, buffer_path, clear_buffer
from tad_plugin.distill.experts.train import STATE_FILE, train_experts
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.experiments.arm_hook import arm_hook, pilot_settings
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.held_out import held_out
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import Plan, resolve
from tad_plugin.nn.passes import memory_budget
from tad_plugin.utils.machine import command_line, peak_memory_bytes, reset_peak_memory, versions
from tad_plugin.utils.precision import network_precision
from tad_plugin.utils.seeds import derived_seed

__all__ = ["NOT_FOR_EXPERTS", "experts_record", "plan_experts", "run_experts", "train_planned"]

NOT_FOR_EXPERTS = {"baseline", "iterations", "lr_img", "loop", "candidates", "compile"} | {
    f.name for f in dataclasses.fields(RunConfig) if f.name.startswith("eval_")
}
"""Settings of :class:`RunConfig` that only a distillation uses."""


def plan_experts(config: RunConfig, arm: str) -> Plan:
    """The plan of a run that trains experts. Raises UnknownNameError, ConfigError."""
    # As in trajectory matching, where presets made for the plugin's own scorer are not used.
    return resolve(dataclasses.replace(config, baseline="mtt", loop={}), arm)


def experts_record(plan: Plan, experts: ExpertConfig) -> dict[str, Any]:
    """Everything that the experts of one arm and seed depend on, as plain values: the run's config.yaml."""
    kept = {k: v for k, v in plan.record.items() if k not in NOT_FOR_EXPERTS}
    methods = pilot_settings(plan.methods, plan.arm.method, experts)
    return {**kept, "methods": methods, "expert": dataclasses.asdict(_experts_of(plan, experts))}


def _experts_of(plan: Plan, experts: ExpertConfig) -> ExpertConfig:
    return dataclasses.replace(experts, width=plan.record["width"])


def run_experts(
    config: RunConfig, experts: ExpertConfig, arm: str, folder: str | Path, **options: Any
) -> dict[str, Any]:
    """Trains the experts of one arm and seed, resumes their training, or returns their results.

    Args:
        config: data, noise, methods and seed. ``NOT_FOR_EXPERTS`` are not used; ``width`` is that of the experts.
        experts: the other settings of the experts.
        arm: a name of ``ARMS`` or a method.
        folder: run folder, which becomes the replay buffer.
        options: ``progress``, ``overwrite`` and ``jobs`` of :func:`train_planned`.

    Returns:
        The contents of results.json: test accuracy in percent of each expert, seconds, quality of the division.

    Raises:
        UnknownNameError, ConfigError: a wrong setting.
        ResumeError: the folder holds a run with other settings.
        DiskSpaceError: the disk has no room.
        NonFiniteError: an expert diverged.
    """
    return train_planned(plan_experts(config, arm), experts, folder, **options)


def train_planned(
    plan: Plan,
    experts: ExpertConfig,
    folder: str | Path,
    *,
    progress: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
) -> dict[str, Any]:
    """:func:`run_experts` with a plan of :func:`plan_experts`.

    Args:
        plan: what to run.
        experts: settings of the experts; their width comes from the plan.
        folder: run folder, which becomes the replay buffer.
        progress: show a progress bar.
        overwrite: start over and remove what an earlier run left in the folder, its buffer included.
        jobs: experts trained side by side; see :func:`tad_plugin.distill.experts.train.train_experts`.
    """
    written, experts = experts_record(plan, experts), _experts_of(plan, experts)
    place = RunFolder(folder)
    with place.claimed():
        if overwrite:
            place.clear()
            clear_buffer(place.path)
            (place.path / STATE_FILE).unlink(missing_ok=True)
        identity = {"arm": plan.name, "seed": plan.seed, "experts": experts.experts, "epochs": experts.epochs}
        found = place.check_config(written, identity, ignore=MAY_DIFFER, repair=False)
        if found is not None:
            _check_buffer(place.path)
            return found
        with memory_budget(plan.memory_budget), network_precision(plan.precision, plan.device):
            return _train(plan, experts, place, written, progress, jobs)


def _judges(plan: Plan, splits: DataSplits, held: NoisyLabels | None) -> RealData | None:
    """The images that experts are tested on: the test images, or else those held out; None if there are neither."""
    if splits.tested:
        return RealData(splits.test_images, splits.test_labels, splits.num_classes)
    if held is None:
        return None
    labels = splits.holdout_labels if plan.arm.true_labels else held.labels
    return RealData(splits.holdout_images, labels, splits.num_classes)


def _check_buffer(folder: Path) -> None:
    """Whether all files of a finished buffer are there. Raises FileFormatError."""
    info = BufferInfo.read(folder)
    count = 1 if info is None else math.ceil(info.experts / info.experts_per_file)
    lost = [path.name for path in (buffer_path(folder, n) for n in range(count)) if not path.is_file()]
    if info is None or lost:
        do = "Put them back, or train again with --overwrite, or in another folder"
        raise FileFormatError(explain(f"a whole replay buffer in {folder}", f"no {lost[0] if lost else SIDE_FILE}", do))


def _train(
    plan: Plan, experts: ExpertConfig, place: RunFolder, written: Mapping[str, Any], progress: bool, jobs: int
) -> dict[str, Any]:
    reset_peak_memory(plan.device)
    splits, noisy, held = load_noisy(plan)
    place.write_config(written, ignore=MAY_DIFFER)
    hook = arm_hook(plan, splits, noisy, experts=experts, log=place.log)
    assert hook.data is not None  # arm_hook attaches with data
    test = _judges(plan, splits, held)

    def accuracy(_number: int, network: nn.Module) -> Mapping[str, Any]:
        if test is None:
            return {"accuracy": None}
        right = score_all(network, test).logits.argmax(1) == test.labels
        return {"accuracy": 100.0 * float(right.float().mean())}

    info = train_experts(
        hook.data,
        experts,
        place.path,
        hook=hook,
        seed=derived_seed(plan.seed, "experts"),
        preprocessing=splits.preprocessing,
        every=plan.checkpoint_seconds,
        store=place,
        progress=progress,
        log=place.log,
        watch=accuracy,
        jobs=jobs,
    )
    records = [r for r in place.records() if r.get("event") == "expert" and r["expert"] >= 0]
    accuracies = [r["accuracy"] for r in records]
    s, known = hook.state, truth_known(plan)
    place.write_results(
        {
            "arm": plan.name,
            "dataset": splits.name,
            "per_class": plan.per_class,
            "noise": {"text": plan.record["noise"], "realised_rate": noisy.realised_rate if known else None},
            "seed": plan.seed,
            "accuracy": {"experts": accuracies if splits.tested else None},
            **({} if splits.tested else {"heldout": held_out({"experts": accuracies}, len(test or ()), plan)}),
            "experts": info.experts,
            "epochs": info.epochs,
            "seconds": records[-1]["seconds"] if records else 0.0,
            "scoring_seconds": hook.scoring_seconds,
            "peak_memory_bytes": peak_memory_bytes(plan.device),
            "split": split_quality(s.observed, s.target, s.trusted, s.trust, splits.train_labels)
            if hook.enabled and known
            else None,
            "state": s.summary(),
            "versions": versions(plan.device),
            "command": command_line(),
            "config_sha256": place.config_digest(written, ignore=MAY_DIFFER),
        },
        [name for name in (STATE_FILE, SIDE_FILE) if (place.path / name).exists()],
    )
    return place.results()
