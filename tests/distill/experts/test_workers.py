"""Experts side by side: the same experts, through stops, and what is refused."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin import attach
from tad_plugin.core.state import SampleState
from tad_plugin.distill.experts.buffer import buffer_files
from tad_plugin.distill.experts.train import train_experts
from tad_plugin.distill.experts.trainer import ExpertTrainer
from tad_plugin.distill.experts.workers import (
    FOLDER,
    ExpertTask,
    UnfinishedExperts,
    _pack,
    _slots,
    _train_alone,
    _unpacked,
)
from tad_plugin.errors import ConfigError, NonFiniteError, TadPluginError
from tad_plugin.utils.seeds import expert_generator
from tests.distill.experts.training import Even, Term, config, data, hook_of, plain, same


def test_side_by_side_they_are_the_same_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread in each process, as here
    real = data()

    def once(folder: Path, jobs: int) -> tuple[SampleState, list[Any]]:
        settings = {"tad": {"warmup": 1, "history": 2}}
        hook = attach("tad", labels=real.labels, data=real.images, trains_on_real=True, config=settings)
        records: list[Any] = []
        train_experts(real, config(momentum=0.5), folder, hook=hook, log=records.append, jobs=jobs)
        return hook.state, records

    (alone, one), (together, several) = once(tmp_path / "one", 1), once(tmp_path / "two", 2)
    assert bool((~alone.trusted).any())
    for path in buffer_files(tmp_path / "one"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for field in SampleState.FIELDS:
        assert torch.equal(getattr(alone, field), getattr(together, field))
    losses = [[(r["expert"], r["loss"]) for r in records if r.get("event") == "expert"] for records in (one, several)]
    assert losses[0] == losses[1] and [n for n, _ in losses[0]] == [-1, 0, 1, 2]
    assert not (tmp_path / "two" / FOLDER).exists()


class After:
    """An event that is set when it is asked for the n-th time."""

    def __init__(self, number: int) -> None:
        self.left = number

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("decided", [False, True])
def test_an_expert_that_was_stopped_goes_on_in_another_process(tmp_path: Path, decided: bool) -> None:
    real = data()
    hook = hook_of(real, Even())
    if decided:
        assert real.true_labels is not None
        hook.state.update(trusted=real.labels == real.true_labels)
        hook.settle()
    task = ExpertTask(config(momentum=0.5), real, hook.state, 4, 1e9)
    task = _unpacked(tmp_path / "task.pt", _pack(task, tmp_path / "task.pt"), "cpu")
    never: Any = threading.Event()
    stopped: Any = After(2)
    _train_alone(task, _slots(tmp_path, 1), 1, stopped)
    unfinished = UnfinishedExperts(tmp_path.parent)
    unfinished.path = tmp_path
    part = unfinished.take(1)
    assert part is not None and part["trainer"]["epoch"] == 1
    _train_alone(task, _slots(tmp_path, 1), 1, never)
    part = unfinished.take(1)
    assert part is not None and part["trainer"]["epoch"] == 3 and part["seconds"] > 0
    trainer = ExpertTrainer(config(momentum=0.5), real, hook, expert_generator(4, 1))
    loss = [trainer.run_epoch() for _ in range(3)][-1]
    assert same(part["trainer"]["trajectory"], trainer.trajectory) and part["loss"] == loss
    unfinished.drop(1)
    assert unfinished.take(1) is None


def test_what_goes_wrong_in_a_process_is_told(tmp_path: Path, workers_as_forks: None) -> None:
    with pytest.raises(NonFiniteError, match="nan"):
        train_experts(data(), config(lr=1e30, epochs=1), tmp_path / "a", plain(data()), jobs=2)
    unfinished, dead = UnfinishedExperts(tmp_path), Future[None]()
    dead.set_exception(BrokenProcessPool("a child was terminated abruptly"))
    unfinished._futures = {3: dead}
    with pytest.raises(TadPluginError, match="expert 3.*terminated"):
        unfinished.take(3)


def test_methods_that_follow_every_expert_need_them_one_after_another(tmp_path: Path) -> None:
    real = data()
    with pytest.raises(ConfigError, match="test"):
        train_experts(real, config(), tmp_path, hook=hook_of(real, Term()), jobs=2)
    with pytest.raises(ConfigError, match="jobs.* 0"):
        train_experts(real, config(), tmp_path, plain(real), jobs=0)
    assert not list(tmp_path.iterdir())
    train_experts(real, config(experts=1), tmp_path, hook=hook_of(real, Even()), jobs=2)
