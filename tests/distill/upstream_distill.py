"""Runs the distillation of a public trajectory-matching codebase on a small problem and records the results.

Its own main() runs, from the buffer on disk to the updates. Only data set, logging and evaluation are replaced. Its
random numbers are recorded, so that our code can take the same steps.
"""

from __future__ import annotations

import math
import random
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tad_plugin.distill.experts.buffer import Trajectory, write_buffer
from tad_plugin.distill.student import StudentStep
from tad_plugin.nn.augment import Augmentation
from tests.checkouts import import_upstream, upstream_draw

CLASSES, SIDE, WIDTH = 3, 32, 8
MODULES = {"mtt": "distill.py", "datm": "distill/DATM.py"}
MISSING = ("wandb", "yacs", "yacs.config", "yaml", "kornia", "tqdm")


@dataclass
class Update:
    """One iteration of the public code: values before it ("images", "rate", "logits"), gradients, steps and loss."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    steps: list[StudentStep]
    loss: float = math.nan


@dataclass
class Record:
    """A run of the public code."""

    updates: list[Update] = field(default_factory=list)
    start_ranges: list[tuple[int, int]] = field(default_factory=list)
    pools: list[Tensor] = field(default_factory=list)  # in the order in which samples of a class were looked at


def run_upstream(
    name: str,
    folder: Path,
    images: Tensor,
    labels: Tensor,
    experts: list[Trajectory],
    strategy: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    seed: int = 0,
) -> Record:
    """Runs the checkout ``name`` on a buffer of ours and records its updates."""
    buffer = folder / "CIFAR10_NO_ZCA" / "ConvNet"
    write_buffer(buffer, 0, experts)
    module = import_upstream(name, MODULES[name], missing=MISSING)
    record, noted = Record(), _Noted()
    values = {
        "dataset": "CIFAR10", "model": "ConvNet", "data_path": "", "buffer_path": str(folder), "subset": "", "ipc": 2,
        "batch_real": 4, "batch_train": 4, "eval_mode": "S", "eval_it": 10**6, "skip_first_eva": True, "num_eval": 0,
        "dsa": "True", "dsa_strategy": strategy, "no_aug": not strategy, "zca": False, "texture": False,
        "max_files": None, "max_experts": None, "load_all": False, "max_start_epoch": 1, "min_start_epoch": 0,
        "Sequential_Generation": False, "Label_Model_Timestamp": -1, "parall_eva": True, "project": "", "device": [],
        "lr_y": 1.0, "Momentum_y": 0.9, "threshold": 1e9, "pix_init": "real", "Iteration": 1, **settings,
    }  # fmt: skip
    _replace_surroundings(module, images, labels, monkeypatch)
    _note_numbers(module, record, noted, len(labels.unique()) * values["ipc"], monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # it is set there, and must be what it was afterwards
    before = (random.getstate(), np.random.get_state())  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            module.main(types.SimpleNamespace(**values))
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
    augmentation = Augmentation(strategy or "none", align_corners=True)
    _fill_steps(record, noted, augmentation, values)
    return record


@dataclass
class _Noted:
    orders: list[Tensor] = field(default_factory=list)
    seeds: list[tuple[int, int]] = field(default_factory=list)


def _replace_surroundings(
    module: types.ModuleType, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(c) for c in range(CLASSES)]
    same = {c: c for c in range(CLASSES)}
    train = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    dataset = (3, (SIDE, SIDE), CLASSES, names, None, None, train, train, None, None, same, same)
    networks = import_upstream("mtt" if module.__name__.endswith("_distill") else "datm", "networks.py")
    config = types.SimpleNamespace(_items={})
    wandb = types.SimpleNamespace(
        config=config, init=lambda config, **_: wandb.config._items.update(vars(config)), finish=lambda: None
    )
    numpy = types.SimpleNamespace(**vars(np))
    numpy.arange = lambda *_: np.zeros(0)  # no iteration at which it would evaluate
    replaced = {
        "get_dataset": lambda *_a, **_k: dataset,
        "get_eval_pool": lambda *_: [],
        "get_network": lambda *_a, **_k: networks.ConvNet(
            3, CLASSES, WIDTH, 3, "relu", "instancenorm", "avgpooling", (SIDE, SIDE)
        ),
        "wandb": wandb,
        "np": numpy,
        "tqdm": lambda iterable: iterable,
        "print": lambda *_: None,
        "cfg": types.SimpleNamespace(Initialize_Label_With_Another_Model=False),
    }
    for key, value in replaced.items():
        monkeypatch.setattr(module, key, value, raising=False)


def _note_numbers(
    module: types.ModuleType, record: Record, noted: _Noted, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    permute, randint, permutation, augment = (
        torch.randperm,
        np.random.randint,
        np.random.permutation,
        module.DiffAugment,
    )

    def randperm(n: int, *args: Any, **more: Any) -> Tensor:
        found: Tensor = permute(n, *args, **more)
        if n == count:
            noted.orders.append(found)
        return found

    def start_epoch(low: int, high: int) -> int:
        record.start_ranges.append((low, high))
        return int(randint(low, high))

    def look(pool: list[int]) -> Any:
        found = permutation(pool)
        record.pools.append(torch.as_tensor(found))
        return found

    def augmented(x: Tensor, strategy: str, *, param: Any) -> Tensor:
        noted.seeds.append((len(noted.seeds) + 1, len(x)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noted.seeds[-1][0])
            found: Tensor = augment(x, strategy, param=param)
        return found

    class Noting(torch.optim.SGD):
        """Records the step of each of the three optimisers. They are told apart by the shape of their tensor."""

        def step(self, *args: Any, **more: Any) -> Any:
            p = self.param_groups[0]["params"][0]
            key = {0: "rate", 2: "logits", 4: "images"}[p.ndim]
            if not record.updates or key in record.updates[-1].values:
                record.updates.append(Update({}, {}, []))
            record.updates[-1].values[key] = p.detach().clone()
            record.updates[-1].gradients[key] = p.grad.clone()
            return super().step(*args, **more)

    losses: list[float] = []

    def log(values: dict[str, Any], **_: Any) -> None:
        if "Grand_Loss" in values:
            losses.append(float(values["Grand_Loss"]))
            if len(record.updates) == len(losses):
                record.updates[-1].loss = losses[-1]

    module.wandb.log = log
    monkeypatch.setattr(torch, "randperm", randperm)
    monkeypatch.setattr(np.random, "randint", start_epoch)
    monkeypatch.setattr(np.random, "permutation", look)
    monkeypatch.setattr(module, "DiffAugment", augmented)
    monkeypatch.setattr(torch.optim, "SGD", Noting)


def _fill_steps(record: Record, noted: _Noted, augmentation: Augmentation, values: dict[str, Any]) -> None:
    """Turns the recorded numbers into steps of our student, in order."""
    batch = values["batch_syn"]
    orders, seeds = iter(noted.orders), iter(noted.seeds)
    for update in record.updates:
        chunks: list[Tensor] = []
        for _ in range(values["syn_steps"]):
            chunks = chunks or list(next(orders).split(batch))
            indices, draw = chunks.pop(), None
            if augmentation.strategies:
                seed, n = next(seeds)
                draw = upstream_draw(augmentation, (SIDE, SIDE), seed=seed, n=n, siamese=False)
            update.steps.append(StudentStep(indices, draw))
    assert next(orders, None) is None and next(seeds, None) is None
