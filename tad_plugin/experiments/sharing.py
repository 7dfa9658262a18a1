"""What several runs of a comparison have in common, made once: how a method divides the data, and experts.

A division depends on the data, the labels, the seed and the methods that decide before the first update; not on the
images per class, on the loop, or on a method that decides later (IWD). Experts depend on their own settings besides.
So a comparison of several arms, sizes and loops scores the data once for each method and seed, and trains the experts
of "noisy" and "iwd", or of "tad" and "tad+iwd", once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import FileLock

from tad_plugin.core.registry import load_method, method_names
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.distill.experts.train import STATE_FILE
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.experiments.arm_hook import arm_hook
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig, settings_of
from tad_plugin.experiments.expert_run import NOT_FOR_EXPERTS, experts_settings, run_experts
from tad_plugin.experiments.folder import RunFolder

__all__ = ["LEAST_IPC", "deciding_arm", "shared_decisions", "shared_experts"]

LEAST_IPC = 10
"""Methods leave at least so many samples per class in what is shared, so that smaller sets can share it."""


def deciding_arm(arm: str) -> str:
    """``arm`` without the methods at its end that decide during distillation only.

    "tad+iwd" -> "tad"; "iwd" -> "noisy"; "clean" -> "clean". Raises UnknownNameError.
    """
    chosen = parse_arm(arm)
    names = method_names(chosen.method)
    kept = list(names)
    while kept and load_method(kept[-1]).decides_late:
        kept.pop()
    if kept:
        return arm if kept == names else "+".join(kept)
    return "clean" if chosen.true_labels else "noisy"


def shared_experts(
    config: RunConfig, experts: ExpertConfig, arm: str, root: str | Path, *, progress: bool = False
) -> Path:
    """Trains the experts of a run, or goes on with them, or finds them finished; other processes wait meanwhile.

    Args:
        config: the run's resolved settings.
        experts: the experts' settings.
        arm: the run's arm.
        root: folder of all that is shared; these go into ``root/experts-ARM-seedN-HASH``.
        progress: show a progress bar.

    Returns:
        The buffer's folder, which is a run folder of :func:`tad_plugin.experiments.expert_run.run_experts`.

    Raises:
        See :func:`tad_plugin.experiments.expert_run.run_experts`.
    """
    arm, config = _common(config, arm)
    folder = _place(root, "experts", experts_settings(config, experts, arm))
    with FileLock(f"{folder}.lock"):
        run_experts(config, experts, arm, folder, progress=progress)
    return folder


def shared_decisions(
    config: RunConfig, arm: str, splits: DataSplits, noisy: NoisyLabels, root: str | Path, *, progress: bool = False
) -> Path | None:
    """Has the methods of ``arm`` decide with the plugin's own scorer, or finds that they have; others wait meanwhile.

    Args:
        config: the run's resolved settings.
        arm: the run's arm.
        splits: its data.
        noisy: the observed labels.
        root: folder of all that is shared; this goes into ``root/state-ARM-seedN-HASH``.
        progress: show a progress bar.

    Returns:
        A run folder with ``state.safetensors``; None where nothing is decided before the first update, or where the
        scorer goes on learning beside the loop (``scorer.refresh_every``).
    """
    arm, config = _common(config, arm)
    if parse_arm(arm).method == "none" or config.methods.get("scorer", {}).get("refresh_every"):
        return None
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_FOR_EXPERTS | {"width"}}
    path = _place(root, "state", {"arm": arm, **kept})
    with FileLock(f"{path}.lock"):
        folder = RunFolder(path)
        folder.write_config({"arm": arm, **kept}, ignore=MAY_DIFFER)
        if not folder.is_done():
            _decide(config, arm, splits, noisy, folder, progress)
    return path


def _decide(
    config: RunConfig, arm: str, splits: DataSplits, noisy: NoisyLabels, folder: RunFolder, progress: bool
) -> None:
    hook = arm_hook(config, arm, splits, noisy, trains_on_real=False, log=folder.log)
    saved = folder.load_checkpoint()
    if saved is not None:
        hook.load_state_dict(saved[0])
    saved_at = perf_counter()

    def checkpoint() -> None:
        nonlocal saved_at
        if perf_counter() - saved_at > config.checkpoint_seconds:
            folder.save_checkpoint(hook.state_dict(), 0)
            saved_at = perf_counter()

    hook.start(progress=progress, checkpoint=checkpoint)
    hook.save_state(folder.path / STATE_FILE)
    folder.write_results({"arm": arm, "scoring_seconds": hook.scoring_seconds, "state": hook.state.summary()})


def _common(config: RunConfig, arm: str) -> tuple[str, RunConfig]:
    """The deciding arm, and the settings without what only other arms, sizes and loops look at."""
    arm = deciding_arm(arm)
    method = parse_arm(arm).method
    ipc = LEAST_IPC if method == "none" else max(config.ipc, LEAST_IPC)
    methods = settings_of(config.methods, method) if method != "none" else {}
    return arm, dataclasses.replace(config, ipc=ipc, methods=methods)


def _place(root: str | Path, kind: str, settings: Mapping[str, Any]) -> Path:
    text = json.dumps({k: v for k, v in settings.items() if k not in MAY_DIFFER})
    name = f"{kind}-{settings['arm']}-seed{settings['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    Path(root).mkdir(parents=True, exist_ok=True)
    return Path(root) / name
