"""Runs experiments whole, and again with SIGKILL at several moments.

``python -m tests.experiments.killed_runs FOLDER ARM...`` does it.

Each attempt is a process of its own (a fork, so that packages are imported once). It kills itself where a kill does
most harm. One JSON line is printed per arm: the signal of the attempt of each planned kill, and the status of the last
attempt, which runs to its end. An arm is one of DM, or BASELINE/ARM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tad_plugin.core.hook.hook import Hook
from tad_plugin.experiments import run as experiment
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.run import run
from tad_plugin.utils import files

CONFIG = RunConfig(
    per_class=16,
    noise="symmetric:0.4",
    ipc=1,
    iterations=9,
    width=4,
    loop={"batch_real": 8},
    methods={
        "tad": {"warmup": 1, "history": 2},
        "scorer": {"epochs": 4, "width": 4, "batch_size": 32, "refresh_every": 4},
    },
    eval_epochs=2,
    eval_runs=3,
    candidates=3,
    device="cpu",
    checkpoint_seconds=0.0,
)


def _kill(*_args: Any, **_more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(owner: Any, name: str, number: int, before: bool = False) -> None:
    """Kills at the ``number``-th call of ``owner.name``: after it, or before it."""
    original: Callable[..., Any] = getattr(owner, name)
    count = [0]

    def wrapped(*args: Any, **more: Any) -> Any:
        count[0] += 1
        if before and count[0] == number:
            _kill()
        result = original(*args, **more)
        if count[0] == number:
            _kill()
        return result

    setattr(owner, name, wrapped)


def _log_of(event: str, number: int) -> None:
    """Kills right after the ``number``-th record of that event was logged."""
    original, count = RunFolder.log, [0]

    def log(self: RunFolder, record: Any) -> None:
        original(self, record)
        count[0] += record.get("event") == event
        if count[0] == number and record.get("event") == event:
            _kill()

    RunFolder.log = log  # type: ignore[method-assign]


#: settings of a baseline's loop under which every part of its state matters
LOOPS: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 8},
    "dc": {"batch_real": 8, "outer": 4, "inner": 2},
    "idm": {
        "batch_real": 8,
        "start_networks": 1,
        "max_networks": 3,
        "network_interval": 2,
        "train_steps": 2,
        "batch_train": 16,
        "accuracy_window": 4,
        "score_every": 3,
    },
}

#: each attempt gets further than the one before
PLAN: dict[str, Callable[[], None]] = {
    "scoring": lambda: _log_of("round", 3),
    "first iterations": lambda: _log_of("iteration", 2),
    "writing a checkpoint": lambda: _at(os, "replace", 4, before=True),
    "refreshing": lambda: _log_of("iteration", 4),
    "finishing": lambda: _at(Hook, "finish", 1),
    "choosing": lambda: _at(experiment, "evaluate", 2),
    "chosen": lambda: _log_of("chosen", 1),
    "testing": lambda: _at(experiment, "evaluate", 2),
    "writing the synthetic set": lambda: _at(files.os, "fsync", 7),
    "writing results": lambda: _at(RunFolder, "write_results", 1, before=True),
}


def moments(arm: str) -> list[str]:
    """Those at which an arm is killed. What comes after the last iteration is the same in all loops."""
    if "/" in arm:
        return ["first iterations", "writing a checkpoint", "refreshing", "finishing"]
    return [name for name in PLAN if arm == "tad" or name != "scoring"]


def start(arm: str, folder: Path) -> None:
    """Runs, or resumes, one arm."""
    baseline, _, name = arm.rpartition("/")
    baseline = baseline or "dm"
    run(dataclasses.replace(CONFIG, baseline=baseline, loop=LOOPS[baseline]), name, folder)


def attempt(
    arm: str, folder: Path, prepare: Callable[[], None] | None, start: Callable[[str, Path], None] = start
) -> int:
    """Status of a process that runs the arm, killed where ``prepare`` says."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if prepare is not None:
                prepare()
            start(arm, folder)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str]) -> None:
    """Runs the plan for each arm."""
    folder, arms = Path(arguments[0]), arguments[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for arm in arms:
        start(arm, folder / arm / "whole")
        plan = {name: PLAN[name] for name in moments(arm)}
        found = {name: attempt(arm, folder / arm / "killed", prepare) for name, prepare in plan.items()}
        found["last"] = attempt(arm, folder / arm / "killed", None)
        print(json.dumps({"arm": arm, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
