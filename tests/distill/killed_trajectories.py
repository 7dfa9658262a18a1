"""Runs MTT and DATM whole, and again killed at several moments: ``python -m tests.distill.killed_trajectories FOLDER``.

Uses the functions of ``tests.experiments.killed_runs``, at the moments that trajectory matching adds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tad_plugin.distill.experts import train as experts
from tad_plugin.distill.experts.trainer import ExpertTrainer
from tad_plugin.distill.mtt import MTT
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.run import run
from tests.experiments import killed_runs

CONFIG = RunConfig(
    baseline="mtt",
    per_class=12,
    noise="symmetric:0.4",
    ipc=1,
    iterations=8,
    lr_img=10.0,
    width=4,
    loop={
        "syn_steps": 2,
        "expert_epochs": 1,
        "max_start_epoch": 3,
        "lr_teacher": 0.02,
        "lr_lr": 1e-5,
        "experts": {"experts": 2, "batch_train": 16, "lr": 0.1, "momentum": 0.5},
    },
    methods={
        "tad": {"warmup": 1, "history": 2},
        "iwd": {"every": 2, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2},
    },
    eval_epochs=2,
    eval_runs=1,
    candidates=2,
    device="cpu",
    checkpoint_seconds=0.0,
)

#: moments of the kills; each attempt gets further than the one before
PLAN: dict[str, Callable[[], None]] = {
    "in an expert": lambda: killed_runs._at(ExpertTrainer, "run_epoch", 6),
    "between experts": lambda: killed_runs._at(experts, "write_buffer", 1),
    "in the distillation": lambda: killed_runs._at(MTT, "step", 3, before=True),
    "in the second phase": lambda: killed_runs._at(ExpertTrainer, "run_epoch", 3),
    "after it": lambda: killed_runs._at(MTT, "step", 3),
}


def start(arm: str, folder: Path) -> None:
    """Runs, or resumes, one arm."""
    baseline, _, name = arm.partition("/")
    loop = dict(CONFIG.loop)
    if baseline == "datm":
        loop |= {"init": "real", "threshold": 10.0, "lr_y": 0.1, "ema_decay": 0.9}
    run(dataclasses.replace(CONFIG, baseline=baseline, loop=loop), name, folder)


def main(arguments: list[str]) -> None:
    """Runs the plan for two arms with a second phase."""
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for arm in ("mtt/tad+iwd", "datm/iwd"):
        start(arm, folder / arm / "whole")
        found = {name: killed_runs.attempt(arm, folder / arm / "killed", p, start) for name, p in PLAN.items()}
        found["last"] = killed_runs.attempt(arm, folder / arm / "killed", None, start)
        print(json.dumps({"arm": arm, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
