"""Which expert is matched next: the order of the public codebases, with a state that can be saved.

Files come in a random order and, inside a file, experts in a random order, each once before the next file; after the
last file all are shuffled again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.distill.baseline import Place
from tad_plugin.distill.experts.buffer import BufferInfo, Trajectory, buffer_files, check_buffer, read_buffer
from tad_plugin.distill.experts.train import train_experts
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, InvalidInputError, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.settings import build_config

__all__ = ["PHASES", "ExpertCycle", "Experts", "expert_config", "expert_phase"]


@dataclass
class Experts:
    """The experts of a run.

    Attributes:
        files: files of a buffer, or lists of trajectories in memory in their place.
        info: the buffer's description; None where there is none.
        again: trains as many experts anew, under the targets and weights as they are then; None where nobody can.
        seconds: spent in training them, so far as is known.
    """

    files: Sequence[Path | list[Trajectory]]
    info: BufferInfo | None = None
    again: Callable[[], Experts] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, folder: str | Path, **more: Any) -> Experts:
        """Those of a buffer on disk. Raises FileFormatError: no buffer, or a damaged description."""
        return cls(buffer_files(folder), BufferInfo.read(folder), **more)

    def read(self, file: int) -> list[Trajectory]:
        """The trajectories in one file. Raises FileFormatError."""
        found = self.files[file]
        return read_buffer(found) if isinstance(found, Path) else found

    def check(
        self,
        network: nn.Module,
        need_epochs: int,
        labels: torch.Tensor | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Checks them before the first is matched; see :func:`tad_plugin.distill.experts.buffer.check_buffer`."""
        if not self.files:
            raise InvalidInputError(explain("at least one file of experts", "none", "Train experts first"))
        if self.info is not None:
            check_buffer(self.info, network, labels, need_epochs, preprocessing=preprocessing)
        for trajectory in self.read(0):
            check_buffer(trajectory, network, need_epochs=need_epochs, info=self.info)


class ExpertCycle:
    """Hands out trajectories; one file is in memory at a time.

    Args:
        experts: where they are.
        max_files: read only the first so many files; 0 reads all.
        max_experts: use only the first so many experts of each file; 0 uses all.
    """

    def __init__(self, experts: Experts, *, max_files: int = 0, max_experts: int = 0) -> None:
        self.experts = experts
        self.count = min(max_files or len(experts.files), len(experts.files))
        self.max_experts = max_experts
        self._files: list[int] = []  # still to come, the next one last
        self._order: list[int] = []  # of the file in memory, likewise
        self._file = -1
        self._loaded: list[Trajectory] = []
        self._per_file = 0

    def next(self, generator: torch.Generator) -> tuple[int, Trajectory]:
        """(number, trajectory) of the next expert.

        Args:
            generator: CPU generator of the orders; drawn from at the beginning of a file only.

        Raises:
            FileFormatError: a file is missing or damaged.
        """
        if not self._order:
            if not self._files:
                self._files = torch.randperm(self.count, generator=generator).tolist()
            self._load(self._files.pop())
            self._order = torch.randperm(len(self._loaded), generator=generator).tolist()
        place = self._order.pop()
        return self._file * self._per_file + place, self._loaded[place]

    def _load(self, file: int) -> None:
        if file != self._file:
            found = self.experts.read(file)
            self._file, self._loaded = file, found[: self.max_experts or len(found)]
            info = self.experts.info
            self._per_file = info.experts_per_file if info is not None else len(found)

    def state_dict(self) -> dict[str, Any]:
        """Where the cycle stands."""
        return {"files": list(self._files), "order": list(self._order), "file": self._file}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; reads the file that was in memory."""
        self._files, self._order = [int(v) for v in state["files"]], [int(v) for v in state["order"]]
        if state["file"] >= 0:
            self._load(int(state["file"]))


PHASES = ("experts", "experts-again")
"""Folders of the two phases inside a run folder."""


def expert_config(config: Any) -> ExpertConfig:
    """The settings of a run's own experts: those of the loop's network, and as long as its segments need them.

    Args:
        config: an :class:`tad_plugin.distill.mtt.MTTConfig`; its ``experts`` mapping wins over what follows from it.

    Raises:
        ConfigError: an unknown setting, another network than the loop's, or too few epochs.
    """
    own = {"width": config.width, "depth": config.depth, "norm": config.norm}
    fixed = sorted(set(config.experts) & {*own, "network"})
    if fixed:
        do = "Set width, depth and norm of the loop (--width, --loop.depth, --loop.norm)"
        raise ConfigError(explain("experts of the network that is matched on", f"own {', '.join(fixed)} for them", do))
    needed = config.max_start_epoch + config.expert_epochs
    values = {"epochs": needed, "augment": config.augment, **config.expert_defaults, **config.experts, **own}
    found: ExpertConfig = build_config(ExpertConfig, values, "the experts")
    if found.epochs < needed:
        do = "Lower max_start_epoch or expert_epochs, or train the experts for more epochs"
        raise ConfigError(
            explain(f"experts of max_start_epoch + expert_epochs = {needed} epochs", str(found.epochs), do)
        )
    return found


def expert_phase(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    """The experts of a run, trained into its folder (resumed, or found finished), or read from a buffer.

    Args:
        config: an :class:`tad_plugin.distill.mtt.MTTConfig`.
        data: the real data.
        hook: the seam to the methods, started; None for none. Afterwards the methods that score have decided.
        place: the run's folder and seed.

    Raises:
        ConfigError: settings that do not fit, or a method that scores and a buffer without its decisions.
        StateMismatchError: a buffer of other labels or another network, or a state of other methods.
        InvalidInputError: too few epochs. FileFormatError: a missing or damaged file.
    """
    if config.buffer or place.experts is not None:
        return _given(config, data, hook, place)
    return _trained(config, data, hook, place, PHASES[0], expert_config(config))


def _trained(config: Any, data: RealData, hook: Hook | None, place: Place, name: str, experts: ExpertConfig) -> Experts:
    folder = place.folder / name
    train_experts(
        data,
        experts,
        folder,
        hook=hook,
        seed=place.seed,
        preprocessing=place.preprocessing,
        every=place.every,
        progress=place.progress,
        log=place.log,
    )
    return Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=_seconds(folder))


def _again(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    """The second phase: the same seeds, so that the experts start alike and differ by the weights alone."""
    experts = expert_config(config)
    count = config.second_experts or experts.experts
    return _trained(config, data, hook, place, PHASES[1], dataclasses.replace(experts, experts=count))


def _given(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    shared = place.experts
    folder, seconds = (Path(config.buffer), 0.0) if shared is None else (shared, _seconds(shared))
    found = Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=seconds)
    if hook is not None and hook.enabled and not hook.decided:
        _adopt(hook, folder, found.info)
    return found


def _adopt(hook: Hook, folder: Path, info: BufferInfo | None) -> None:
    """Takes over what the methods decided while the experts of a buffer were trained."""
    if info is not None and info.state_file:
        hook.adopt(folder / info.state_file)
    elif scoring := [c.name for c in hook.callbacks if c.needs_scorer]:
        got = f"{folder} without one"
        do = f"Train the experts with the method (tad-plugin experts --arm {hook.method}), or leave --loop.buffer out"
        raise ConfigError(explain(f"a buffer with the state that {', '.join(scoring)} decided on", got, do))
    hook.settle()


def _seconds(folder: Path) -> float:
    saved = CheckpointSlots(folder / "checkpoint").load()
    return float(saved.tree["seconds"]) if saved is not None else 0.0
