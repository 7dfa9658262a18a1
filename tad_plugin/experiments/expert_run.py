"""One run of experts: dataset, noise, an arm, and a replay buffer; resumable, in a run folder.

The folder is the buffer: ``replay_buffer_*.pt``, ``buffer.json`` and ``state.safetensors`` stand beside the run's
``config.yaml``, ``log.jsonl`` and ``results.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tad_plugin.core.diagnostics import split_quality
from tad_plugin.core.scorer import score_all
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import clear_buffer
from tad_plugin.distill.experts.train import STATE_FILE, train_experts
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, explain
from tad_plugin.experiments.arm_hook import arm_hook, pilot_settings
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig, check_config, load_noisy
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.utils.machine import command_line, peak_memory_bytes, reset_peak_memory, versions
from tad_plugin.utils.seeds import derived_seed

__all__ = ["NOT_FOR_EXPERTS", "experts_settings", "run_experts"]

NOT_FOR_EXPERTS = {"baseline", "iterations", "lr_img", "loop", "candidates"} | {
    f.name for f in dataclasses.fields(RunConfig) if f.name.startswith("eval_")
}
"""Settings of :class:`RunConfig` that only a distillation reads."""


def experts_settings(config: RunConfig, experts: ExpertConfig, arm: str) -> dict[str, Any]:
    """Everything that the experts of one arm and seed depend on, as plain values: the run's config.yaml."""
    # As the expert phase of a distillation, where a preset made for the plugin's own scorer is not taken.
    config = dataclasses.replace(config, baseline="mtt", loop={}).resolved()
    config = dataclasses.replace(config, methods=pilot_settings(config.methods, parse_arm(arm).method, experts))
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_FOR_EXPERTS}
    return {"arm": arm, **kept, "expert": dataclasses.asdict(dataclasses.replace(experts, width=config.width))}


def run_experts(
    config: RunConfig,
    experts: ExpertConfig,
    arm: str,
    folder: str | Path,
    *,
    progress: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains (or goes on with, or returns) the experts of one arm and seed in one folder.

    Args:
        config: data, noise, methods and seed; ``NOT_FOR_EXPERTS`` are not read, ``width`` is the experts'.
        experts: the experts' own settings.
        arm: a name of ``ARMS`` or a method.
        folder: run folder, and the buffer.
        progress: show a progress bar.
        overwrite: start over, removing what an earlier run left there, its buffer included.
        jobs: experts trained side by side; see :func:`tad_plugin.distill.experts.train.train_experts`.

    Returns:
        What results.json says: each expert's test accuracy in percent, seconds, and the quality of the division.

    Raises:
        UnknownNameError, ConfigError: a wrong setting.
        ResumeError: the folder holds a run with other settings.
        DiskSpaceError: the disk has no room.
        NonFiniteError: an expert diverged.
    """
    written = experts_settings(config, experts, arm)
    config = dataclasses.replace(config, baseline="mtt", loop={}).resolved()
    check_config(config, arm)
    experts = dataclasses.replace(experts, width=config.width)
    place = RunFolder(folder, overwrite=overwrite)
    if overwrite:
        clear_buffer(place.path)
        (place.path / STATE_FILE).unlink(missing_ok=True)

    def write_config() -> None:
        place.write_config(written, ignore=MAY_DIFFER)

    if place.config_path.exists():
        write_config()
    if place.is_done():
        return place.results()
    reset_peak_memory(config.device)
    splits, noisy, _ = load_noisy(config)
    write_config()
    hook = arm_hook(config, arm, splits, noisy, experts=experts, trains_on_real=True, log=place.log)
    if hook.data is None:
        raise ConfigError(explain("a hook with data", "none", "Attach with data=images"))
    test = RealData(splits.test_images, splits.test_labels, splits.num_classes)

    def accuracy(_number: int, network: nn.Module) -> Mapping[str, Any]:
        right = score_all(network, test).logits.argmax(1) == test.labels
        return {"accuracy": 100.0 * float(right.float().mean())}

    info = train_experts(
        hook.data,
        experts,
        place.path,
        hook=hook,
        seed=derived_seed(config.seed, "experts"),
        preprocessing=splits.preprocessing,
        every=config.checkpoint_seconds,
        store=place,
        progress=progress,
        log=place.log,
        watch=accuracy,
        jobs=jobs,
    )
    records = [r for r in place.records() if r.get("event") == "expert" and r["expert"] >= 0]
    s = hook.state
    place.write_results(
        {
            "arm": arm,
            "dataset": splits.name,
            "per_class": config.per_class,
            "noise": {"text": config.noise, "realised_rate": noisy.realised_rate},
            "seed": config.seed,
            "accuracy": {"experts": [r["accuracy"] for r in records]},
            "experts": info.experts,
            "epochs": info.epochs,
            "seconds": records[-1]["seconds"] if records else 0.0,
            "scoring_seconds": hook.scoring_seconds,
            "peak_memory_bytes": peak_memory_bytes(config.device),
            "split": split_quality(s.observed, s.target, s.trusted, s.trust, splits.train_labels)
            if hook.enabled
            else None,
            "state": s.summary(),
            "versions": versions(config.device),
            "command": command_line(),
        }
    )
    return place.results()
