"""Experts: networks trained on the real data and written as a replay buffer (``buffers.py``).

With methods on, all networks share one SampleState. The first ``pilots`` networks are trained for the methods alone:
what these decide there is known when the first expert takes its first step, for trajectory matching uses its early
epochs most. Whether the methods go on deciding after the epochs of the experts is the setting ``rounds``.

A process that is killed goes on from its last checkpoint to the same bits. Finished experts are on the disk.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
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
from tad_plugin.distill.experts.workers import Parts, Share
from tad_plugin.errors import ConfigError, ResumeError, StateMismatchError, TadPluginWarning, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.machine import versions
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import expert_generator

__all__ = ["STATE_FILE", "CheckpointStore", "ExpertConfig", "buffer_info", "train_experts"]

STATE_FILE = "state.safetensors"
"""The SampleState that the methods left after the last expert, beside the buffer."""


class CheckpointStore(Protocol):
    """Where checkpoints go: a run folder, or the slots in the buffer's own folder."""

    def save_checkpoint(self, tree: Any, step: int) -> None:
        """Writes one; what was there before stays whole until it is done."""

    def load_checkpoint(self) -> tuple[Any, int] | None:
        """The newest (tree, step), or None."""


class _Slots:
    """The slots of the buffer's own folder as a :class:`CheckpointStore`."""

    def __init__(self, folder: Path) -> None:
        self.slots = CheckpointSlots(folder / "checkpoint")

    def save_checkpoint(self, tree: Any, step: int) -> None:
        self.slots.save(tree, step)

    def load_checkpoint(self) -> tuple[Any, int] | None:
        found = self.slots.load()
        return None if found is None else (found.tree, found.step)


def buffer_info(
    config: ExpertConfig, data: RealData, hook: Hook | None = None, preprocessing: Preprocessing | None = None
) -> BufferInfo:
    """What the side file of a buffer of these experts says."""
    c, h, w = (int(v) for v in data.images.shape[1:])
    enabled = hook is not None and hook.enabled
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
        method=hook.method if hook is not None else "none",
        state_file=STATE_FILE if enabled else "",
        versions=versions(data.images.device),
    )


def train_experts(
    data: RealData,
    config: ExpertConfig,
    folder: str | Path,
    *,
    hook: Hook | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    every: float = 20.0,
    store: CheckpointStore | None = None,
    progress: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
    watch: Callable[[int, nn.Module], Mapping[str, Any]] | None = None,
    jobs: int = 1,
) -> BufferInfo:
    """Trains the experts into ``folder``, or goes on where an earlier process stopped, or returns a finished buffer.

    With a method on, ``hook`` holds afterwards what was decided (also where the buffer was finished before, unless the
    hook was restored by its owner already), and decides no more: see :meth:`Hook.settle`.

    Args:
        data: the real data, with the observed labels.
        config: the settings.
        folder: of the buffer.
        hook: the seam to the methods, started or not; None for the plain loop without any.
        seed: of all experts; expert ``i`` depends on the seed and ``i`` alone, where no method is on.
        preprocessing: of the images, whose fingerprint is written beside the buffer.
        every: seconds between checkpoints; one is written after each expert in any case.
        store: where checkpoints go; by default into ``checkpoint/`` of the folder.
        progress: show a progress bar over epochs.
        log: receives a record for each network: its number, seconds, loss, and what ``watch`` says.
        watch: looks at each finished network; what it returns is logged. It must not draw from global generators.
        jobs: experts trained side by side, each in a process of its own with its share of the cores. A script that
            asks for more than 1 needs its ``if __name__ == "__main__":``. The experts are the same to the bit with as
            many threads in each process; a stopped run may go on with another number.

    Returns:
        The description of the buffer, which is also in its ``buffer.json``.

    Raises:
        DiskSpaceError: the disk has no room for the buffer, or a write failed.
        ConfigError: several jobs, and methods that go on deciding from expert to expert (``rounds="all"``).
        ResumeError: the folder holds another buffer, or one that was begun with other settings or labels.
        FileFormatError: a file of the folder is damaged.
        NonFiniteError: an expert's loss is NaN or infinite.
        StateMismatchError: the hook was attached to other labels than the data's.
    """
    experts = _Experts(data, config, Path(folder), hook, seed, preprocessing, store, jobs)
    return experts.run(every, progress, log, watch)


class _Experts:
    def __init__(
        self,
        data: RealData,
        config: ExpertConfig,
        folder: Path,
        hook: Hook | None,
        seed: int,
        preprocessing: Preprocessing | None,
        store: CheckpointStore | None,
        jobs: int,
    ) -> None:
        self.data, self.config, self.folder, self.seed, self.jobs = data, config, folder, seed, jobs
        self.hook = hook if hook is not None and hook.enabled else None
        self.info = buffer_info(config, data, hook, preprocessing)
        if hook is not None and hook.state.digest != self.info.labels:
            got = f"labels of hash {self.info.labels[:16]} in the data"
            do = "Pass hook.data, or attach() to the labels of this data"
            raise StateMismatchError(explain(f"the labels of the hook (hash {hook.state.digest[:16]})", got, do))
        self.store: CheckpointStore = _Slots(folder) if store is None else store
        #: methods will decide by these networks
        self.deciding = self.hook is not None and not self.hook.decided and _any_scores(self.hook)
        self._check_jobs()
        self.number = -config.pilots if self.deciding else 0
        self.trainer: ExpertTrainer | None = None
        self.parts = Parts(folder)
        self.seconds = 0.0
        self.done = False

    # -- the whole -----------------------------------------------------------------------------------
    def run(
        self,
        every: float,
        progress: bool,
        log: Callable[[dict[str, Any]], None] | None,
        watch: Callable[[int, nn.Module], Mapping[str, Any]] | None,
    ) -> BufferInfo:
        fresh = not self._resume()
        if self.hook is not None:
            began = perf_counter()
            self.hook.start(progress=progress)
            self.seconds += perf_counter() - began
        if not self.done:
            self._check_disk()
            if fresh:  # files without a checkpoint are somebody else's, so one must be there before the first file
                self.parts.drop()
                self._save()
            self.saved_at = perf_counter()
            total = sum(self._epochs(number) for number in range(self.number, self.config.experts))
            first = 0 if self.trainer is None else self.trainer.epoch
            with_bar = iter(bar(range(total - first), "experts", progress, total, first))
            while self.number < 0:
                self._train_one(every, with_bar, log, watch)
            with self._side_by_side(every):
                while self.number < self.config.experts:
                    self._train_one(every, with_bar, log, watch)
            for _ in with_bar:
                pass
            self._finish()
        return self.info

    def _train_one(
        self,
        every: float,
        steps: Any,
        log: Callable[[dict[str, Any]], None] | None,
        watch: Callable[[int, nn.Module], Mapping[str, Any]] | None,
    ) -> None:
        """Trains network ``number`` to its end, or waits for the process that does, and moves on to the next."""
        loss = float("nan")
        if self.trainer is None:
            self.trainer = self._fresh_trainer()
            if self.hook is not None:
                self.hook.begin_expert()
            part = self.parts.take(self.number) if self.number >= 0 else None
            if part is not None:
                self.trainer.load_state_dict(part["trainer"])
                loss, self.seconds = part["loss"], self.seconds + part["seconds"] / self.jobs
                for _ in range(self.trainer.epoch):
                    next(steps, None)
        trainer = self.trainer
        if self.hook is not None:
            self.hook.events.position(expert=self.number)
        while trainer.epoch < self._epochs(self.number):
            began = perf_counter()
            loss = trainer.run_epoch()
            if self.hook is not None:
                self.hook.events.position(expert_epoch=trainer.epoch)
                self.hook.epoch_end(trainer.network)
            self.seconds += perf_counter() - began
            next(steps, None)
            if perf_counter() - self.saved_at > every and trainer.epoch < self._epochs(self.number):
                self._save()
        if log is not None:
            seen = {} if watch is None else watch(self.number, trainer.network)
            log({"event": "expert", "expert": self.number, "loss": loss, "seconds": self.seconds, **seen})
        self._keep()

    def _side_by_side(self, every: float) -> AbstractContextManager[None]:
        """The processes that train the experts left, where there are to be any."""
        first = self.number if self.trainer is None else self.number + 1
        numbers = range(first, self.config.experts)
        if self.jobs == 1 or len(numbers) < 2:
            return nullcontext()
        state = None if self.hook is None else self.hook.state
        return self.parts.training(Share(self.config, self.data, state, self.seed, every), numbers, self.jobs)

    def _check_jobs(self) -> None:
        if self.jobs < 1:
            raise ConfigError(explain("jobs of at least 1", str(self.jobs), "Correct the setting"))
        hook = self.hook
        if self.jobs == 1 or hook is None or hook.decided or (self.deciding and self.config.rounds == "pilots"):
            return
        if _follows_training(hook):
            got = f"{hook.method}, which looks at each of them in turn"
            do = 'Train them one after another (jobs 1), or let the pilots alone decide (rounds "pilots")'
            raise ConfigError(explain("experts that do not depend on one another, for several jobs", got, do))

    def _epochs(self, number: int) -> int:
        return (number < 0 and self.config.pilot_epochs) or self.config.epochs

    def _fresh_trainer(self) -> ExpertTrainer:
        return ExpertTrainer(self.config, self.data, self.hook, expert_generator(self.seed, self.number))

    def _changed(self) -> bool:
        state = self.hook.state if self.hook is not None else None
        return state is None or not state.untouched()

    # -- files ---------------------------------------------------------------------------------------
    def _keep(self) -> None:
        """Adds the finished network to the buffer, and moves on to the next."""
        if self.trainer is not None and self.number >= 0:
            file, place = divmod(self.number, self.config.experts_per_file)
            # What a killed process wrote after its last checkpoint is written again.
            before: list[Trajectory] = read_buffer(buffer_path(self.folder, file))[:place] if place else []
            write_buffer(self.folder, file, [*before, self.trainer.trajectory], half=self.config.half)
        done, self.number, self.trainer = self.number, self.number + 1, None
        if self.hook is not None and self.deciding and self.number == 0 and self.config.rounds == "pilots":
            self.hook.settle()
        self._save()
        self.parts.drop(done)

    def _finish(self) -> None:
        if self.hook is not None:
            if self.deciding and not self._changed():
                do = (
                    "Where labels are wrong, give the pilots more epochs (pilot_epochs) than the method's warm-up takes"
                )
                got = f"none in {self._epochs(-1 if self.config.pilots else 0)} epochs a network"
                warnings.warn(explain(f"decisions of {self.hook.method}", got, do), TadPluginWarning, stacklevel=4)
            self.hook.settle()
            self.hook.save_state(self.folder / STATE_FILE)
        self.done = True
        self._save()
        self.parts.drop()
        self.info.write(self.folder)

    def _save(self) -> None:
        tree = {
            "info": _comparable(self.info, self.config, self.seed),
            "number": self.number,
            "done": self.done,
            "seconds": self.seconds,
            "trainer": None if self.trainer is None else self.trainer.state_dict(),
            "hook": None if self.hook is None else self.hook.state_dict(),
        }
        with room_for(f"a checkpoint beside {self.folder}"):
            self.store.save_checkpoint(tree, max(0, self.number) * self.config.epochs)
        self.saved_at = perf_counter()

    def _resume(self) -> bool:
        """Whether there was something to go on with."""
        found = self.store.load_checkpoint()
        if found is None:
            there = sorted(p.name for p in self.folder.glob("replay_buffer_*.pt")) if self.folder.is_dir() else []
            if there or BufferInfo.read(self.folder) is not None:
                got = f"{there[0] if there else 'buffer.json'} there, and no checkpoint of its training"
                do = "Choose another folder: this package does not write over a buffer that it cannot continue"
                raise ResumeError(explain(f"an empty folder {self.folder}", got, do))
            return False
        tree = found[0]
        mine, theirs = _comparable(self.info, self.config, self.seed), tree["info"]
        differing = [k for k in mine if theirs.get(k) != mine[k]]
        if differing:
            got = "; ".join(f"{k}: there {theirs.get(k)!r}, now {mine[k]!r}" for k in differing)
            do = "Choose another folder, or repeat the settings that it was begun with"
            raise ResumeError(explain(f"the settings that the experts in {self.folder} were begun with", got, do))
        self.number, self.done, self.seconds = int(tree["number"]), bool(tree["done"]), float(tree["seconds"])
        # Where the owner restored a later moment (a distillation under way), that one counts.
        if self.hook is not None and not (self.done and self.hook.decided):
            self.hook.load_state_dict(tree["hook"])
        if tree["trainer"] is not None:
            self.trainer = self._fresh_trainer()
            self.trainer.load_state_dict(tree["trainer"])
        if self.done:
            self.info.write(self.folder)  # the kill may have come between the last checkpoint and this
        return True

    def _check_disk(self) -> None:
        config, network = self.config, expert_network(self.config, self.data, torch.Generator())
        left = config.experts - max(0, self.number)
        # A file is written anew beside the old one, and so is a checkpoint with the trajectory under way.
        spare = min(config.experts, config.experts_per_file) - 1
        needed = predicted_bytes(network, config.epochs, left + max(0, spare), config.half)
        under_way = 2 if self.jobs == 1 else 2 * (min(self.jobs, left) + 1)
        check_free_disk(self.folder, needed + predicted_bytes(network, config.epochs, under_way))


def _any_scores(hook: Hook) -> bool:
    return any(c.needs_scorer for c in hook.callbacks)


def _follows_training(hook: Hook) -> bool:
    """Whether anything attached looks at networks in training."""
    names = [n for n in vars(Callback) if n.startswith("on_scorer_")]
    asked = any(getattr(type(c), n) is not getattr(Callback, n) for c in hook.callbacks for n in names)
    return asked or bool(hook.events.observers)


def _comparable(info: BufferInfo, config: ExpertConfig, seed: int) -> dict[str, Any]:
    """What must be the same on resume, as plain values."""
    described = {k: v for k, v in dataclasses.asdict(info).items() if k not in ("versions", "image_size")}
    return {**described, **dataclasses.asdict(config), "image_size": list(info.image_size), "seed": seed}
