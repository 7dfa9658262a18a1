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
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.experiments.arm_hook import arm_hook
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig
from tad_plugin.experiments.expert_run import NOT_FOR_EXPERTS, experts_record, plan_experts, train_planned
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import Plan, settings_of
from tad_plugin.utils.write_errors import writing_to

__all__ = ["ANY_IPC", "deciding_arm", "shared_decisions", "shared_experts", "shared_state"]

ANY_IPC = 10
"""Stands for the images per class in the settings of what does not depend on them."""


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
        with folder.claimed():
            folder.write_config(record, ignore=MAY_DIFFER)
            if folder.is_done():
                _check_shared(folder, {"arm": arm})
            else:
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
    results = {"arm": plan.name, "scoring_seconds": hook.scoring_seconds, "state": hook.state.summary()}
    folder.write_results(results, [STATE_FILE])


def _check_shared(folder: RunFolder, expected: Mapping[str, Any]) -> None:
    found, reason = folder.finished(expected)
    if found is None:
        do = f"Put the file back, or remove the folder {folder.path}: the next run makes it again"
        raise FileFormatError(explain(f"whole shared decisions in {folder.path}", reason, do))


def _common(plan: Plan) -> tuple[str, dict[str, Any]]:
    """The deciding arm, and the settings "ipc" and "methods" without what only other arms, sizes and loops use.

    "ipc" is the fewest samples per class that the methods leave in this run, as they do where nothing is shared.
    """
    arm = deciding_arm(plan.name)
    method = parse_arm(arm).method
    if method == "none":
        return arm, {"ipc": ANY_IPC, "methods": {}}
    methods = settings_of(plan.methods, method)
    names = [name for name in method_names(method) if load_method(name).uses_ipc]
    if not names:
        return arm, {"ipc": ANY_IPC, "methods": methods}
    # A method with a minimum of its own takes the larger of the two. Only where all do, is the larger one the same.
    own = [methods.get(name, {}).get("min_per_class", 1) for name in names]
    return arm, {"ipc": max(plan.loop.ipc, min(own)), "methods": methods}


def shared_state(plan: Plan, folder: Path) -> Path | None:
    """The state file in a folder of :func:`shared_decisions` or :func:`shared_experts`.

    None if no method decides before the first update.

    Raises:
        FileFormatError: the file is gone.
    """
    if parse_arm(deciding_arm(plan.name)).method == "none":
        return None
    if not (folder / STATE_FILE).is_file():
        do = f"Put it back, or remove the folder {folder}: the next run makes it again"
        raise FileFormatError(explain(f"the shared decisions in {folder / STATE_FILE}", "no file", do))
    return folder / STATE_FILE


def _place(root: str | Path, kind: str, settings: Mapping[str, Any]) -> Path:
    text = json.dumps({k: v for k, v in settings.items() if k not in MAY_DIFFER})
    name = f"{kind}-{settings['arm']}-seed{settings['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    with writing_to(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    return Path(root) / name
