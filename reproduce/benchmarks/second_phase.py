#!/usr/bin/env python3
"""Compares ways to use IWD's weights in trajectory matching, where the experts are trained already.

    python reproduce/benchmarks/second_phase.py cifar10-jpeg.zip --seeds 100,101 --out second_phase.json

MTT, IPC 10, the setting of ``trajectories_cifar10.sh`` with two experts. In the first half of the updates, experts of
the noisy labels are matched and IWD scores. Then three copies of the run continue:

none       with the same experts
again      with experts trained anew under the weights, from the same seeds
finetuned  with one segment per checkpoint of the old experts: it starts there and ends after one further epoch under
           the weights. As many epochs of training as ``again``; errors of a start are not carried on.

Accuracy is measured on 5,000 further training images that neither the experts nor the synthetic set have seen. Test
images are not used.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from time import process_time
from typing import Any

import torch

from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.experts.buffer import Trajectory
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.experts.train import buffer_info
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.distill.mtt import MTT, MTTConfig
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tad_plugin.experiments.arm_hook import arm_hook
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.loading import load_noisy
from tad_plugin.experiments.plan import resolve
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions
from tad_plugin.utils.seeds import expert_generator, generator_of, seeded_generator

EXPERT = ExpertConfig(width=16, epochs=13, batch_train=64, lr=0.1, experts=2)
LOOP = MTTConfig(
    ipc=10, iterations=40, width=16, lr_img=3000.0, syn_steps=30, batch_syn=20, lr_teacher=0.05, lr_lr=1e-6,
    expert_epochs=1, max_start_epoch=12, second_phase=1.0,
    experts={"epochs": 13, "batch_train": 64, "lr": 0.1, "experts": 2},
)  # fmt: skip
WAYS = ("none", "again", "finetuned")


def trained(data: RealData, hook: Hook, seed: int) -> list[Trajectory]:
    found = []
    for number in range(EXPERT.experts):
        trainer = ExpertTrainer(EXPERT, data, hook, expert_generator(seed, number))
        while trainer.epoch < EXPERT.epochs:
            trainer.run_epoch()
        found.append(trainer.trajectory)
    return found


def finetuned(data: RealData, hook: Hook, seed: int, old: list[Trajectory]) -> list[Trajectory]:
    """Trajectories with one segment each, started at the checkpoints of the old ones."""
    found = []
    for number, trajectory in enumerate(old):
        trainer = ExpertTrainer(EXPERT, data, hook, expert_generator(seed, 1000 + number))
        for start in trajectory[: LOOP.max_start_epoch]:
            with torch.no_grad():
                for parameter, value in zip(trainer.parameters, start, strict=True):
                    parameter.copy_(value)
            trainer.trajectory.clear()
            trainer.run_epoch()
            end = trainer.trajectory[-1]
            found.append([[v.clone() for v in start], end, end])  # MTT needs a last entry; it is never matched
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder or zip of CIFAR-10's images")
    parser.add_argument("--seeds", default="100,101")
    parser.add_argument("--out", type=Path, default=Path("second_phase.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = f"folder:{Path(args.images).resolve()}"
    more = load_dataset(name, per_class=1500, holdout=0.0, seed=0)
    unseen = torch.cat([(more.train_labels == c).nonzero().flatten()[1000:] for c in range(10)])
    pixels, labels = more.preprocessing.inverse(more.train_images[unseen]), more.train_labels[unseen]
    rows: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        config = RunConfig(
            baseline="mtt", dataset=name, per_class=1000, noise="symmetric:0.4", seed=seed, width=16,
            methods={"iwd": {"ess": 0.5}}, device="cpu",
        )  # fmt: skip
        plan = resolve(config, "iwd")
        splits, noisy, _ = load_noisy(plan)
        hook = arm_hook(plan, splits, noisy)
        hook.start()
        hook.settle()
        data = hook.data
        assert data is not None
        plain = attach("none", labels=data.labels, data=data.images, num_classes=data.num_classes)
        first = trained(data, plain, seed)
        info = buffer_info(EXPERT, data, plain, splits.preprocessing)
        generator = generator_of(seed, "loop")
        images, classes = MTT.initial_images(LOOP, data, hook, generator)
        start = SyntheticSet(images, classes, 10, splits.preprocessing, splits.name)
        loop = MTT(LOOP, data, hook, start, generator, Experts([first], info))
        half = LOOP.iterations // 2
        for iteration in range(half):
            loop.step(iteration)
        weights = hook.state.weight
        share = float(weights[hook.state.observed == splits.train_labels].sum() / weights.sum())
        saved = copy.deepcopy(loop.state_dict())
        for way in WAYS:
            began = process_time()
            settings = LOOP
            if way == "none":
                experts = Experts([first], info)
            elif way == "again":
                experts = Experts([trained(data, hook, seed)], info)
            else:
                settings = dataclasses.replace(LOOP, max_start_epoch=1)
                experts = Experts([finetuned(data, hook, seed, first)], None)
            training = process_time() - began
            # Without the method: only the experts differ from here on.
            again = MTT(settings, data, plain, copy.deepcopy(start), generator_of(seed, "second"), experts)
            again.load_state_dict(
                {**saved, "cycle": {"files": [], "order": [], "file": -1}, "generator": saved["generator"]}
            )
            for iteration in range(half, LOOP.iterations):
                again.step(iteration)
            found = evaluate(
                again.result(), (splits.preprocessing(pixels), labels), EvaluateConfig(width=16, runs=2, epochs=300),
                preprocessing=splits.preprocessing, generator=seeded_generator(3),
            )  # fmt: skip
            rows.append(
                {"seed": seed, "way": way, "accuracy": found.mean, "training_seconds": training, "clean_weight": share}
            )
            print(json.dumps(rows[-1]), flush=True)
            result = {"rows": rows, "versions": versions("cpu"), "command": command_line()}
            atomic_write(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
