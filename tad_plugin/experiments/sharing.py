"""What several runs share and make only once: decisions of the methods, and experts.

A decision (which samples are trusted, with which target) depends on the data, the labels, the seed and the methods that
decide before the first update. It does not depend on the images per class, on the loop, or on methods that decide
later. Experts also depend on their own settings. So a comparison of several arms, sizes and loops scores the data once
for each method and seed, and trains the experts of arms that differ only in late methods once.
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
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig
from tad_plugin.experiments.expert_run import NOT_FOR_EXPERTS, experts_record, plan_experts, train_planned
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import Plan, settings_of

__all__ = ["LEAST_IPC", "deciding_arm", "shared_decisions", "shared_experts"]

LEAST_IPC = 10
"""Usable samples per class that shared decisions leave at least, so that runs of any smaller IPC can share them."""


def deciding_arm(arm: str) -> str:
    """``arm`` without the methods at its end that change nothing before the first update (``decides_late``).

    "tad+iwd" -> "tad"; "iwd" -> "noisy"; "clean" -> "clean".

    Raises:
        UnknownNameError: no such arm or method.
    """
    chosen = parse_arm(arm)
    names = method_names(chosen.method)
    kept = list(names)
    while kept and load_method(kept[-1]).decides_late:
        kept.pop()
    if kept:
        return arm if kept == names else "+".join(kept)
    return "clean" if chosen.true_labels else "noisy"


def shared_experts(plan: Plan, experts: ExpertConfig, root: str | Path, *, progress: bool = False) -> Path:
    """Trains the experts of a run, resumes their training, or finds them finished. Other processes wait meanwhile.

    Args:
        plan: the plan of the run that needs them.
        experts: settings of the experts.
        root: folder of everything that is shared; the experts go to ``root/experts-ARM-seedN-HASH``.
        progress: show a progress bar.

    Returns:
        The folder of the buffer, which is a run folder of :mod:`tad_plugin.experiments.expert_run`.

    Raises:
        See :func:`tad_plugin.experiments.expert_run.run_experts`.
    """
    arm, own = _common(plan)
    given = {k: v for k, v in plan.record.items() if k != "arm"}
    of_experts = plan_experts(RunConfig(**{**given, **own}), arm)
    folder = _place(root, "experts", experts_record(of_experts, experts))
    with FileLock(f"{folder}.lock"):
        train_planned(of_experts, experts, folder, progress=progress)
    return folder


def shared_decisions(
    plan: Plan, splits: DataSplits, noisy: NoisyLabels, root: str | Path, *, progress: bool = False
) -> Path | None:
    """Lets the methods of a run decide on the plugin's own scorer, or finds their decisions. Other processes wait.

    Args:
        plan: the plan of the run that needs them.
        splits: its data.
        noisy: its observed labels.
        root: folder of everything that is shared; the decisions go to ``root/state-ARM-seedN-HASH``.
        progress: show a progress bar.

    Returns:
        A run folder with ``state.safetensors``. None if nothing is decided before the first update, or if the scorer
        keeps learning beside the loop (``scorer.refresh_every``).
    """
    arm, own = _common(plan)
    if parse_arm(arm).method == "none" or own["methods"].get("scorer", {}).get("refresh_every"):
        return None
    kept = {k: v for k, v in plan.record.items() if k not in NOT_FOR_EXPERTS | {"width"}}
    record = {**kept, "arm": arm, **own}
    path = _place(root, "state", record)
    with FileLock(f"{path}.lock"):
        folder = RunFolder(path)
        folder.write_config(record, ignore=MAY_DIFFER)
        if not folder.is_done():
            deciding = dataclasses.replace(plan, name=arm, arm=parse_arm(arm), methods=own["methods"])
            _decide(deciding, own["ipc"], splits, noisy, folder, progress)
    return path


def _decide(plan: Plan, ipc: int, splits: DataSplits, noisy: NoisyLabels, folder: RunFolder, progress: bool) -> None:
    hook = arm_hook(plan, splits, noisy, ipc=ipc, log=folder.log)
    saved = folder.load_checkpoint()
    if saved is not None:
        hook.load_state_dict(saved[0])
    saved_at = perf_counter()

    def checkpoint() -> None:
        nonlocal saved_at
        if perf_counter() - saved_at > plan.checkpoint_seconds:
            folder.save_checkpoint(hook.state_dict(), 0)
            saved_at = perf_counter()

    hook.start(progress=progress, checkpoint=checkpoint)
    hook.save_state(folder.path / STATE_FILE)
    folder.write_results({"arm": plan.name, "scoring_seconds": hook.scoring_seconds, "state": hook.state.summary()})


def _common(plan: Plan) -> tuple[str, dict[str, Any]]:
    """The deciding arm, and the settings "ipc" and "methods" without what only other arms, sizes and loops use."""
    arm = deciding_arm(plan.name)
    method = parse_arm(arm).method
    if method == "none":
        return arm, {"ipc": LEAST_IPC, "methods": {}}
    return arm, {"ipc": max(plan.loop.ipc, LEAST_IPC), "methods": settings_of(plan.methods, method)}


def _place(root: str | Path, kind: str, settings: Mapping[str, Any]) -> Path:
    text = json.dumps({k: v for k, v in settings.items() if k not in MAY_DIFFER})
    name = f"{kind}-{settings['arm']}-seed{settings['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    Path(root).mkdir(parents=True, exist_ok=True)
    return Path(root) / name
