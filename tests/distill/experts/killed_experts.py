"""Trains small experts once whole and once killed again and again, each time by SIGKILL at another moment.

``python -m tests.distill.experts.killed_experts FOLDER`` prints the statuses of the attempts in a process of its own,
because it forks; the folders "whole" and "killed" are left for the test to compare.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tad_plugin.distill.experts import train as module
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.expert_run import run_experts
from tad_plugin.experiments.folder import RunFolder

CONFIG = RunConfig(
    per_class=16,
    noise="symmetric:0.4",
    ipc=1,
    width=4,
    methods={"tad": {"warmup": 1, "history": 2}},
    device="cpu",
    checkpoint_seconds=0.0,
)
EXPERTS = ExpertConfig(experts=3, epochs=3, batch_train=16, lr=0.1, momentum=0.5, experts_per_file=2, rounds="all")


def _kill_at(owner: Any, name: str, number: int, before: bool = False) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    count = [0]

    def wrapped(*args: Any, **more: Any) -> Any:
        count[0] += 1
        if before and count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **more)
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


#: each attempt gets further than the one before
PLAN: dict[str, Callable[[], None]] = {
    "in the first expert": lambda: _kill_at(ExpertTrainer, "step", 42),
    "writing a file": lambda: _kill_at(module, "write_buffer", 2),
    "in the last expert": lambda: _kill_at(ExpertTrainer, "step", 24),
    "the end": lambda: _kill_at(RunFolder, "write_results", 1, before=True),
}


def attempt(folder: Path, prepare: Callable[[], None] | None) -> int:
    """Status of a process that trains the experts, killed where ``prepare`` says."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if prepare is not None:
                prepare()
            run_experts(CONFIG, EXPERTS, "tad", folder)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str]) -> None:
    """Runs the plan."""
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    run_experts(CONFIG, EXPERTS, "tad", folder / "whole")
    found = {name: attempt(folder / "killed", prepare) for name, prepare in PLAN.items()}
    found["last"] = attempt(folder / "killed", None)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
