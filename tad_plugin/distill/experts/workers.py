"""Experts side by side: each in a process of its own, which leaves what it has done in a folder.

An expert depends on the seed and its number alone, once methods have decided. So the processes share nothing but the
data; whoever owns the buffer takes the experts up in their order, finished or, after a stop, as far as they came.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock

from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import room_for
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.errors import TadPluginError, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.seeds import expert_generator

__all__ = ["Parts", "Share"]

FOLDER = "experts-under-way"


@dataclass
class Share:
    """What a process needs to train an expert.

    Attributes:
        config: settings.
        data: the real data.
        state: of the methods, which have decided; None without any.
        seed: of all experts.
        every: seconds between checkpoints.
    """

    config: ExpertConfig
    data: RealData
    state: SampleState | None
    seed: int
    every: float


class Parts:
    """The experts of a buffer that are not in it yet.

    Args:
        folder: of the buffer.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FOLDER
        self._futures: dict[int, Future[None]] = {}

    @contextmanager
    def training(self, share: Share, numbers: range, jobs: int) -> Iterator[None]:
        """Trains experts ``numbers`` in ``jobs`` processes while the body runs; :meth:`take` waits for one of them.

        On a CPU the processes share its cores. After an error inside the body they save and stop.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        # spawn, because a forked process inherits locked thread pools and cannot use CUDA
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        begin = (_packed(share), str(share.data.images.device), self.path, threads, stop)
        pool = ProcessPoolExecutor(min(jobs, len(numbers)), mp_context=context, initializer=_begin, initargs=begin)
        try:
            self._futures = {n: pool.submit(_train, n) for n in numbers}
            yield
        finally:
            stop.set()
            self._futures = {}
            pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> Mapping[str, Any] | None:
        """What was left of an expert, finished where a process trains it: "trainer", "seconds", "loss"; or None.

        Raises:
            What its process raised; TadPluginError: the process died.
        """
        if number in self._futures:
            try:
                self._futures[number].result()
            except BrokenProcessPool as error:
                do = (
                    "Run it again with fewer jobs if memory ran out: it goes on from the checkpoints. A script that "
                    'trains with several jobs must do so under if __name__ == "__main__":'
                )
                got = f"one that died ({error})"
                raise TadPluginError(explain(f"a process that trains expert {number}", got, do)) from error
        if not self.path.is_dir():
            return None
        with FileLock(_lock(self.path, number)):
            found = _slots(self.path, number).load()
        return None if found is None else found.tree

    def drop(self, number: int | None = None) -> None:
        """Removes what was left of one expert, or of all."""
        where = self.path if number is None else _slots(self.path, number).path
        shutil.rmtree(where, ignore_errors=True)


def _slots(path: Path, number: int) -> CheckpointSlots:
    return CheckpointSlots(path / f"expert-{number}")


def _lock(path: Path, number: int) -> Path:
    """Held by whoever writes these slots: the process of a killed owner may still be in its last epoch."""
    return path / f"expert-{number}.lock"


def _packed(share: Share) -> bytes:
    # As bytes, for tensors would go through shared memory, of which containers often have next to none.
    data, state, buffer = share.data, share.state, io.BytesIO()
    tree = {
        "config": vars(share.config),
        "images": data.images.cpu(),
        "labels": data.labels.cpu(),
        "num_classes": data.num_classes,
        "dataset": data.dataset,
        "state": None if state is None else state.state_dict(),
        "seed": share.seed,
        "every": share.every,
    }
    torch.save(tree, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: str) -> Share:
    tree = torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
    data = RealData(tree["images"], tree["labels"], tree["num_classes"], dataset=tree["dataset"])
    state = None
    if tree["state"] is not None:
        state = SampleState.of(data, allow_empty=True)
        state.load_state_dict(tree["state"])
    return Share(ExpertConfig(**tree["config"]), data, state, tree["seed"], tree["every"])


# -- inside a process --------------------------------------------------------------------------------

_HERE: tuple[Share, Path, Event] | None = None


def _begin(packed: bytes, device: str, path: Path, threads: int, stop: Event) -> None:
    global _HERE
    torch.set_num_threads(threads)
    _HERE = (_unpacked(packed, device), path, stop)


def _train(number: int) -> None:
    assert _HERE is not None
    share, path, stop = _HERE
    with FileLock(_lock(path, number)):
        _train_alone(share, _slots(path, number), number, stop)


def _train_alone(share: Share, slots: CheckpointSlots, number: int, stop: Event) -> None:
    trainer = ExpertTrainer(share.config, share.data, None, expert_generator(share.seed, number), state=share.state)
    seconds, loss = 0.0, float("nan")
    found = slots.load()
    if found is not None:
        trainer.load_state_dict(found.tree["trainer"])
        seconds, loss = found.tree["seconds"], found.tree["loss"]
    began = saved_at = perf_counter()
    while trainer.epoch < share.config.epochs and not stop.is_set():
        loss = trainer.run_epoch()
        owner = multiprocessing.parent_process()
        if owner is not None and not owner.is_alive():
            os._exit(1)  # killed: whoever goes on with the buffer trains this expert
        last = trainer.epoch == share.config.epochs or stop.is_set()
        if last or perf_counter() - saved_at > share.every:
            spent = seconds + perf_counter() - began
            with room_for(f"a checkpoint in {slots.path}"):
                slots.save({"trainer": trainer.state_dict(), "seconds": spent, "loss": loss}, trainer.epoch)
            saved_at = perf_counter()
