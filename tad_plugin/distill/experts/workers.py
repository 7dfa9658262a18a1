"""Trains experts in parallel: each in a process of its own, which saves its checkpoints in a folder.

Once the methods have decided, an expert depends only on the seed and its number. So the processes share only the data:
they lie in one file that all processes map into memory, so that each image is there once.
The owner of the buffer collects the experts in order: finished ones, or after a stop partly trained ones.
"""

from __future__ import annotations

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
from torch import Tensor

from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import room_for
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.errors import TadPluginError, explain
from tad_plugin.nn.passes import given_budget, set_memory_budget
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import atomic_save
from tad_plugin.utils.image_store import Images, ImageStore, PixelSource
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
        stop, packed = SPAWN.Event(), self.path / "task.pt"
        with room_for(f"the data of the experts in {packed}"):
            source = _pack(task, packed)
        device, threads = str(task.data.images.device), threads_each(jobs)
        begin = (packed, source, device, self.path, threads, stop, current_precision())
        try:
            with worker_pool(min(jobs, len(numbers)), _begin, begin, patience=PATIENCE) as pool:
                try:
                    self._futures = {n: pool.submit(_train, n) for n in numbers}
                    yield
                finally:
                    stop.set()
                    self._futures = {}
        finally:
            packed.unlink(missing_ok=True)

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


def _pack(task: ExpertTask, path: Path) -> PixelSource | None:
    """Writes a task to a file, without images that are read from elsewhere. Returns their source."""
    # A file: shared memory is small in many containers.
    data, images, source = task.data, task.data.images, None
    store: dict[str, Any] | None = None
    if isinstance(images, ImageStore):
        store = {name: getattr(images, name) for name in ("mean", "std", "scale", "size", "rows")}
        source = images.source
    pixels = images if store is None else source
    tree = {
        "config": vars(task.config),
        "pixels": pixels.cpu() if isinstance(pixels, Tensor) else None,
        "store": store,
        "budget": given_budget(),
        "labels": data.labels.cpu(),
        "num_classes": data.num_classes,
        "dataset": data.dataset,
        "state": task.state.state_dict(),
        "seed": task.seed,
        "every": task.every,
    }
    atomic_save(path, lambda temporary: torch.save(tree, temporary))
    return None if isinstance(source, Tensor) else source


def _unpacked(path: Path, source: PixelSource | None, device: str) -> ExpertTask:
    # Mapped: the processes share the pages of the file.
    tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    set_memory_budget(tree["budget"])
    pixels, store = tree["pixels"], tree["store"]
    if store is None:
        images: Images = pixels.to(device)
    else:
        images = ImageStore(pixels if source is None else source, **store, device=device)
    data = RealData(images, tree["labels"].to(device), tree["num_classes"], dataset=tree["dataset"])
    state = SampleState.of(data, allow_empty=True)
    state.load_state_dict(tree["state"])
    return ExpertTask(ExpertConfig(**tree["config"]), data, state, tree["seed"], tree["every"])


# -- inside a process --------------------------------------------------------------------------------

#: task, folder and stop signal of this process
_HERE: tuple[ExpertTask, Path, Event, str] | None = None


def _begin(
    packed: Path, source: PixelSource | None, device: str, path: Path, threads: int, stop: Event, precision: str
) -> None:
    global _HERE
    torch.set_num_threads(threads)
    _HERE = (_unpacked(packed, source, device), path, stop, precision)


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
