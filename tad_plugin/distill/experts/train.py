"""Trains several experts into a replay buffer.

If methods are attached, all networks share one SampleState. The first ``pilots`` networks are trained for the methods
only: trajectory matching uses the early epochs of an expert most, so the methods should have decided before expert 0
takes its first step. The setting ``rounds`` says whether the methods also decide after the epochs of the experts.

A killed process continues from its last checkpoint and ends with the same bits. Finished experts are on disk.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.labels import label_digest
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import (
    BufferInfo,
    Trajectory,
    buffer_path,
    check_free_disk,
    predicted_bytes,
    read_buffer,
    room_for,
    write_buffer,
)
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer, expert_network
from tad_plugin.distill.experts.workers import ExpertTask, UnfinishedExperts
from tad_plugin.errors import ConfigError, ResumeError, StateMismatchError, TadPluginWarning, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.machine import versions
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import expert_generator

__all__ = ["STATE_FILE", "BufferStore", "CheckpointStore", "buffer_info", "buffer_slots", "train_experts"]

STATE_FILE = "state.safetensors"
"""File of the SampleState after the last expert, in the folder of the buffer."""

Log = Callable[[dict[str, Any]], None]
Watch = Callable[[int, nn.Module], Mapping[str, Any]]


class CheckpointStore(Protocol):
    """A place for checkpoints: a run folder, or the slots in the buffer's own folder."""

    def save_checkpoint(self, tree: Any, step: int) -> None:
        """Writes a checkpoint. The previous one stays valid until this one is complete."""

    def load_checkpoint(self) -> tuple[Any, int] | None:
        """The newest (tree, step), or None."""


def buffer_slots(folder: Path) -> CheckpointSlots:
    """The slots in the folder of a buffer."""
    return CheckpointSlots(folder / "checkpoint")


class BufferStore:
    """The slots in the folder of a buffer as a :class:`CheckpointStore`.

    Args:
        folder: folder of the buffer.
        begin: called when there is no checkpoint yet.
        log_bytes: gives the length of the log, which every checkpoint holds.
    """

    def __init__(
        self, folder: Path, begin: Callable[[], None] | None = None, log_bytes: Callable[[], int] | None = None
    ) -> None:
        self.slots, self._begin, self._log_bytes = buffer_slots(folder), begin, log_bytes

    def save_checkpoint(self, tree: Any, step: int) -> None:
        """See :class:`CheckpointStore`."""
        self.slots.save(tree, step, log_bytes=0 if self._log_bytes is None else self._log_bytes())

    def load_checkpoint(self) -> tuple[Any, int] | None:
        """See :class:`CheckpointStore`."""
        found = self.slots.load()
        if found is None and self._begin is not None:
            self._begin()
        return None if found is None else (found.tree, found.step)


def buffer_info(
    config: ExpertConfig, data: RealData, hook: Hook, preprocessing: Preprocessing | None = None
) -> BufferInfo:
    """Describes the buffer that these settings give; see :func:`train_experts` for the arguments."""
    c, h, w = (int(v) for v in data.images.shape[1:])
    return BufferInfo(
        architecture=config.network,
        width=config.width,
        depth=config.resolved_depth(h, w),
        norm=config.norm,
        in_channels=c,
        image_size=(h, w),
        num_classes=data.num_classes,
        dataset=data.dataset,
        labels=label_digest(data.labels),
        preprocessing="" if preprocessing is None else preprocessing.fingerprint(),
        epochs=config.epochs,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        sharpness_aware=config.rho > 0,
        experts=config.experts,
        experts_per_file=config.experts_per_file,
        half=config.half,
        method=hook.method,
        state_file=STATE_FILE if hook.enabled else "",
        versions=versions(data.images.device),
    )


def train_experts(
    data: RealData,
    config: ExpertConfig,
    folder: str | Path,
    hook: Hook,
    *,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    every: float = 20.0,
    store: CheckpointStore | None = None,
    progress: bool = False,
    log: Log | None = None,
    watch: Watch | None = None,
    jobs: int = 1,
) -> BufferInfo:
    """Trains experts into ``folder``; resumes if an earlier process was stopped; returns a finished buffer unchanged.

    Afterwards the methods have decided (see :meth:`Hook.settle`) and ``hook`` holds the result. If the buffer was
    already finished, the hook is restored from its checkpoint, unless its owner restored it before.

    Args:
        data: the real data, with the observed labels.
        config: the settings.
        folder: folder of the buffer.
        hook: the hook, started or not; ``attach("none", ...)`` for plain experts.
        seed: seed of all experts. Expert ``i`` depends only on the seed, on ``i`` and on the decisions of the methods.
        preprocessing: preprocessing of the images; its fingerprint is stored with the buffer.
        every: seconds between checkpoints; one is always written after each expert.
        store: place for checkpoints; by default ``checkpoint/`` in the folder.
        progress: show a progress bar over epochs.
        log: receives one record per network: number, seconds, loss and the result of ``watch``.
        watch: called with the number and the network after each training; its result is logged. It must not draw from
            global generators.
        jobs: experts trained at the same time, each in a process of its own with its share of the cores. Above 1, a
            script needs ``if __name__ == "__main__":``. The bits of the experts do not depend on it, as long as the
            number of threads per process is the same. A stopped run may continue with another value.

    Returns:
        The description of the buffer, which is also in its ``buffer.json``.

    Raises:
        DiskSpaceError: the disk has no room for the buffer, or a write failed.
        ConfigError: ``jobs`` below 1; or several jobs with methods that decide after each expert (``rounds="all"``).
        ResumeError: the folder holds another buffer, or one with other settings or labels.
        FileFormatError: a file in the folder is damaged.
        NonFiniteError: the loss of an expert is NaN or infinite.
        StateMismatchError: the hook was attached to other labels.
    """
    info = buffer_info(config, data, hook, preprocessing)
    if hook.state.digest != info.labels:
        got = f"labels of hash {info.labels[:16]} in the data"
        do = "Pass hook.data, or attach() to the labels of this data"
        raise StateMismatchError(explain(f"the labels of the hook (hash {hook.state.digest[:16]})", got, do))
    if jobs < 1:
        raise ConfigError(explain("jobs of at least 1", str(jobs), "Correct the setting"))
    if jobs > 1 and _decides_after_experts(hook, config):
        do = 'Train one expert at a time (jobs 1), or let only the pilots decide (rounds "pilots")'
        got = f"{hook.method}, which decides after each of them"
        raise ConfigError(explain("experts that do not depend on one another, for several jobs", got, do))
    folder = Path(folder)
    store = BufferStore(folder) if store is None else store
    return _Training(data, config, folder, hook, seed, info, store, jobs, every, log, watch).run(progress)


class _Training:
    """The work of :func:`train_experts`, network by network."""

    def __init__(
        self,
        data: RealData,
        config: ExpertConfig,
        folder: Path,
        hook: Hook,
        seed: int,
        info: BufferInfo,
        store: CheckpointStore,
        jobs: int,
        every: float,
        log: Log | None,
        watch: Watch | None,
    ) -> None:
        self.data, self.config, self.folder, self.hook, self.seed = data, config, folder, hook, seed
        self.info, self.store, self.jobs, self.every = info, store, jobs, every
        self.log, self.watch = log, watch
        #: these networks serve methods that have not decided yet
        self.deciding = _deciding(hook)
        self.number = -config.pilots if self.deciding else 0
        self.trainer: ExpertTrainer | None = None
        self.unfinished = UnfinishedExperts(folder)
        self.seconds = 0.0
        self.done = False
        self.saved_at = 0.0

    def run(self, progress: bool) -> BufferInfo:
        """Trains all networks that are missing."""
        fresh = not self._resume()
        began = perf_counter()
        self.hook.start(progress=progress)
        self.seconds += perf_counter() - began
        if self.done:
            return self.info
        self._check_disk()
        if fresh:  # files without a checkpoint count as foreign, so the first checkpoint comes before the first file
            self.unfinished.drop()
            self._save()
        self.saved_at = perf_counter()
        total = sum(self._epochs(number) for number in range(self.number, self.config.experts))
        first = 0 if self.trainer is None else self.trainer.epoch
        steps = iter(bar(range(total - first), "experts", progress, total, first))
        while self.number < 0:
            self._train_one(steps)
        with self._side_by_side():
            while self.number < self.config.experts:
                self._train_one(steps)
        for _ in steps:  # closes the bar
            pass
        self._finish()
        return self.info

    def _train_one(self, steps: Iterator[int]) -> None:
        """Trains network ``number``, or waits for the process that does; then moves on to the next."""
        loss = float("nan")
        if self.trainer is None:
            self.trainer = self._fresh_trainer()
            self.hook.begin_expert()
            found = self.unfinished.take(self.number) if self.number >= 0 else None
            if found is not None:
                self.trainer.load_state_dict(found["trainer"])
                loss, self.seconds = found["loss"], self.seconds + found["seconds"] / self.jobs
                for _ in range(self.trainer.epoch):
                    next(steps, None)
        trainer = self.trainer
        self.hook.events.position(expert=self.number)
        while trainer.epoch < self._epochs(self.number):
            began = perf_counter()
            loss = trainer.run_epoch()
            self.hook.events.position(expert_epoch=trainer.epoch)
            self.hook.epoch_end(trainer.network)
            self.seconds += perf_counter() - began
            next(steps, None)
            if perf_counter() - self.saved_at > self.every and trainer.epoch < self._epochs(self.number):
                self._save()
        if self.log is not None:
            seen = {} if self.watch is None else self.watch(self.number, trainer.network)
            self.log({"event": "expert", "expert": self.number, "loss": loss, "seconds": self.seconds, **seen})
        self._keep(trainer)

    def _side_by_side(self) -> AbstractContextManager[None]:
        """Processes for the remaining experts, if there are several jobs and several experts left."""
        first = self.number if self.trainer is None else self.number + 1
        numbers = range(first, self.config.experts)
        if self.jobs == 1 or len(numbers) < 2:
            return nullcontext()
        task = ExpertTask(self.config, self.data, self.hook.state, self.seed, self.every)
        return self.unfinished.training(task, numbers, self.jobs)

    def _epochs(self, number: int) -> int:
        return (number < 0 and self.config.pilot_epochs) or self.config.epochs

    def _fresh_trainer(self) -> ExpertTrainer:
        return ExpertTrainer(self.config, self.data, self.hook, expert_generator(self.seed, self.number))

    # -- files ---------------------------------------------------------------------------------------
    def _keep(self, trainer: ExpertTrainer) -> None:
        """Adds the trained network to the buffer if it is an expert, and moves on to the next."""
        if self.number >= 0:
            file, place = divmod(self.number, self.config.experts_per_file)
            # Entries that a killed process wrote after its last checkpoint are written again.
            before: list[Trajectory] = read_buffer(buffer_path(self.folder, file))[:place] if place else []
            write_buffer(self.folder, file, [*before, trainer.trajectory], half=self.config.half)
        done, self.number, self.trainer = self.number, self.number + 1, None
        if self.deciding and self.number == 0 and self.config.rounds == "pilots":
            self.hook.settle()
        self._save()
        self.unfinished.drop(done)

    def _finish(self) -> None:
        if self.deciding and self.hook.state.untouched():
            do = "If labels are wrong, give the pilots more epochs (pilot_epochs) than the warm-up of the method"
            got = f"none in {self._epochs(-1 if self.config.pilots else 0)} epochs per network"
            warnings.warn(explain(f"decisions of {self.hook.method}", got, do), TadPluginWarning, stacklevel=4)
        self.hook.settle()
        if self.hook.enabled:
            self.hook.save_state(self.folder / STATE_FILE)
        self.done = True
        self._save()
        self.unfinished.drop()
        self.info.write(self.folder)

    def _save(self) -> None:
        tree = {
            "info": _comparable(self.info, self.config, self.seed),
            "number": self.number,
            "done": self.done,
            "seconds": self.seconds,
            "trainer": None if self.trainer is None else self.trainer.state_dict(),
            "hook": self.hook.state_dict() if self.hook.enabled else None,
        }
        with room_for(f"a checkpoint beside {self.folder}"):
            self.store.save_checkpoint(tree, max(0, self.number) * self.config.epochs)
        self.saved_at = perf_counter()

    def _resume(self) -> bool:
        """Restores the last checkpoint; False if there is none."""
        found = self.store.load_checkpoint()
        if found is None:
            there = sorted(p.name for p in self.folder.glob("replay_buffer_*.pt")) if self.folder.is_dir() else []
            if there or BufferInfo.read(self.folder) is not None:
                got = f"one with {there[0] if there else 'buffer.json'} and without a checkpoint"
                do = "Choose another folder. A buffer that cannot be resumed is not overwritten"
                raise ResumeError(explain(f"an empty folder {self.folder}", got, do))
            return False
        tree = found[0]
        mine, theirs = _comparable(self.info, self.config, self.seed), tree["info"]
        differing = [k for k in mine if theirs.get(k) != mine[k]]
        if differing:
            got = "; ".join(f"{k}: there {theirs.get(k)!r}, now {mine[k]!r}" for k in differing)
            do = "Choose another folder, or use the settings of that buffer"
            raise ResumeError(explain(f"the settings of the experts in {self.folder}", got, do))
        self.number, self.done, self.seconds = int(tree["number"]), bool(tree["done"]), float(tree["seconds"])
        # If the owner restored the hook to a later moment (during distillation), that moment counts.
        if self.hook.enabled and not (self.done and self.hook.decided):
            self.hook.load_state_dict(tree["hook"])
        if tree["trainer"] is not None:
            self.trainer = self._fresh_trainer()
            self.trainer.load_state_dict(tree["trainer"])
        if self.done:
            self.info.write(self.folder)  # the kill may have come between the last checkpoint and this file
        return True

    def _check_disk(self) -> None:
        config, network = self.config, expert_network(self.config, self.data, torch.Generator())
        left = config.experts - max(0, self.number)
        # A file is rewritten beside the old one, and so is a checkpoint, which holds a trajectory.
        spare = min(config.experts, config.experts_per_file) - 1
        needed = predicted_bytes(network, config.epochs, left + max(0, spare), config.half)
        in_checkpoints = 2 if self.jobs == 1 else 2 * (min(self.jobs, left) + 1)
        check_free_disk(self.folder, needed + predicted_bytes(network, config.epochs, in_checkpoints))


def _deciding(hook: Hook) -> bool:
    """Whether a method needs these networks for its decisions."""
    return not hook.decided and any(c.needs_scorer for c in hook.callbacks)


def _decides_after_experts(hook: Hook, config: ExpertConfig) -> bool:
    """Whether a method or an observer looks at the experts in training."""
    if not hook.enabled or hook.decided or (_deciding(hook) and config.rounds == "pilots"):
        return False
    names = [n for n in vars(Callback) if n.startswith("on_scorer_")]
    asked = any(getattr(type(c), n) is not getattr(Callback, n) for c in hook.callbacks for n in names)
    return asked or bool(hook.events.observers)


def _comparable(info: BufferInfo, config: ExpertConfig, seed: int) -> dict[str, Any]:
    """Values that must be the same when the training is resumed."""
    described = {k: v for k, v in dataclasses.asdict(info).items() if k not in ("versions", "image_size")}
    return {**described, **dataclasses.asdict(config), "image_size": list(info.image_size), "seed": seed}
