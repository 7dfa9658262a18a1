"""Trains experts in parallel: each in a process of its own, which saves its checkpoints in a folder.

Once the methods have decided, an expert depends only on the seed and its number. So the processes share only the data.
The owner of the buffer collects the experts in order: finished ones, or after a stop partly trained ones.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock

from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import room_for
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.errors import TadPluginError, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.precision import current_precision, network_precision
from tad_plugin.utils.seeds import expert_generator
from tad_plugin.utils.workers import SPAWN, threads_each, worker_pool

__all__ = ["ExpertTask", "UnfinishedExperts"]

FOLDER = "experts-under-way"

PATIENCE = 2.0
"""Seconds that processes get to finish an epoch and save it when the training is stopped."""


@dataclass
class ExpertTask:
    """Everything that a process needs to train an expert.

    Attributes:
        config: the settings.
        data: the real data.
        state: targets, weights and trust, as the methods decided.
        seed: seed of all experts.
        every: seconds between checkpoints.
    """

    config: ExpertConfig
    data: RealData
    state: SampleState
    seed: int
    every: float


class UnfinishedExperts:
    """Experts that are not in the buffer yet: in training, or partly trained by a process that was stopped.

    Args:
        folder: folder of the buffer.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FOLDER
        self._futures: dict[int, Future[None]] = {}

    @contextmanager
    def training(self, task: ExpertTask, numbers: range, jobs: int) -> Iterator[None]:
        """Trains experts ``numbers`` in ``jobs`` processes while the body runs; :meth:`take` waits for one of them.

        The processes share the cores. After an error in the body they save a checkpoint and stop; one that takes longer
        than :data:`PATIENCE` seconds is ended, and its expert goes on from an earlier checkpoint.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        stop = SPAWN.Event()
        begin = (_packed(task), str(task.data.images.device), self.path, threads_each(jobs), stop, current_precision())
        with worker_pool(min(jobs, len(numbers)), _begin, begin, patience=PATIENCE) as pool:
            try:
                self._futures = {n: pool.submit(_train, n) for n in numbers}
                yield
            finally:
                stop.set()
                self._futures = {}

    def take(self, number: int) -> Mapping[str, Any] | None:
        """The checkpoint of an expert ("trainer", "seconds", "loss"), or None. Waits if a process trains it.

        Raises:
            TadPluginError: the process died. Any error that the process raised is raised here too.
        """
        if number in self._futures:
            try:
                self._futures[number].result()
            except BrokenProcessPool as error:
                do = (
                    "If memory ran out, run it again with fewer jobs; it resumes from the checkpoints. A script that "
                    'uses several jobs needs if __name__ == "__main__":'
                )
                got = f"a process that died ({error})"
                raise TadPluginError(explain(f"expert {number} from a process", got, do)) from error
        if not self.path.is_dir():
            return None
        with FileLock(_lock(self.path, number)):
            found = _slots(self.path, number).load()
        return None if found is None else found.tree

    def drop(self, number: int | None = None) -> None:
        """Removes the checkpoints of one expert, or of all."""
        where = self.path if number is None else _slots(self.path, number).path
        shutil.rmtree(where, ignore_errors=True)


def _slots(path: Path, number: int) -> CheckpointSlots:
    return CheckpointSlots(path / f"expert-{number}")


def _lock(path: Path, number: int) -> Path:
    """Lock of the slots of an expert. The process of a killed owner may still be writing them."""
    return path / f"expert-{number}.lock"


def _packed(task: ExpertTask) -> bytes:
    # As bytes: tensors would go through shared memory, which is small in many containers.
    data, buffer = task.data, io.BytesIO()
    tree = {
        "config": vars(task.config),
        "images": data.images.cpu(),
        "labels": data.labels.cpu(),
        "num_classes": data.num_classes,
        "dataset": data.dataset,
        "state": task.state.state_dict(),
        "seed": task.seed,
        "every": task.every,
    }
    torch.save(tree, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: str) -> ExpertTask:
    tree = torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
    data = RealData(tree["images"], tree["labels"], tree["num_classes"], dataset=tree["dataset"])
    state = SampleState.of(data, allow_empty=True)
    state.load_state_dict(tree["state"])
    return ExpertTask(ExpertConfig(**tree["config"]), data, state, tree["seed"], tree["every"])


# -- inside a process --------------------------------------------------------------------------------

#: task, folder and stop signal of this process
_HERE: tuple[ExpertTask, Path, Event, str] | None = None


def _begin(packed: bytes, device: str, path: Path, threads: int, stop: Event, precision: str) -> None:
    global _HERE
    torch.set_num_threads(threads)
    _HERE = (_unpacked(packed, device), path, stop, precision)


def _train(number: int) -> None:
    assert _HERE is not None
    task, path, stop, precision = _HERE
    with FileLock(_lock(path, number)), network_precision(precision, task.data.images.device):
        _train_alone(task, _slots(path, number), number, stop)


def _train_alone(task: ExpertTask, slots: CheckpointSlots, number: int, stop: Event) -> None:
    hook = Hook(task.state, task.data, ())  # no methods: they have decided
    trainer = ExpertTrainer(task.config, task.data, hook, expert_generator(task.seed, number))
    seconds, loss = 0.0, float("nan")
    found = slots.load()
    if found is not None:
        trainer.load_state_dict(found.tree["trainer"])
        seconds, loss = found.tree["seconds"], found.tree["loss"]
    began = saved_at = perf_counter()
    while trainer.epoch < task.config.epochs and not stop.is_set():
        loss = trainer.run_epoch()
        last = trainer.epoch == task.config.epochs or stop.is_set()
        if last or perf_counter() - saved_at > task.every:
            spent = seconds + perf_counter() - began
            with room_for(f"a checkpoint in {slots.path}"):
                slots.save({"trainer": trainer.state_dict(), "seconds": spent, "loss": loss}, trainer.epoch)
            saved_at = perf_counter()
