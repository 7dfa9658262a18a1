"""The experts of a run: where they come from, and the order in which they are matched.

A run trains experts of its own into its folder, reads a buffer, or uses trajectories in memory. After a share of the
iterations it may train its experts again, under the weights that methods have decided on since (the second phase).
:class:`Experts` holds the result, :func:`expert_phase` makes it, and :class:`ExpertCycle` hands out one trajectory
after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.distill.baseline import Place
from tad_plugin.distill.experts.buffer import BufferInfo, Trajectory, buffer_files, check_buffer, read_buffer
from tad_plugin.distill.experts.train import BufferStore, buffer_slots, train_experts
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, InvalidInputError, explain
from tad_plugin.utils.settings import build_config

__all__ = ["PHASES", "ExpertCycle", "Experts", "expert_config", "expert_phase"]

PHASES = ("experts", "experts-again")
"""Folders of the two phases in a run folder."""


@dataclass
class Experts:
    """The experts of a run.

    Attributes:
        files: the files of a buffer, or lists of trajectories in memory.
        info: description of the buffer; None if there is none.
        again: trains new experts under the current targets and weights; None if the run cannot train any.
        seconds: training time, as far as it is known.
    """

    files: Sequence[Path | list[Trajectory]]
    info: BufferInfo | None = None
    again: Callable[[], Experts] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, folder: str | Path, **more: Any) -> Experts:
        """The experts of a buffer on disk.

        Raises:
            FileFormatError: there is no buffer, or its description is damaged.
        """
        return cls(buffer_files(folder), BufferInfo.read(folder), **more)

    def read(self, file: int) -> list[Trajectory]:
        """The trajectories of one file. Raises FileFormatError if it is missing or damaged."""
        found = self.files[file]
        return read_buffer(found) if isinstance(found, Path) else found

    def check(
        self,
        network: nn.Module,
        need_epochs: int,
        labels: Tensor | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Checks the experts before they are matched; see :func:`tad_plugin.distill.experts.buffer.check_buffer`."""
        if not self.files:
            raise InvalidInputError(explain("at least one file of experts", "none", "Train experts first"))
        if self.info is not None:
            check_buffer(self.info, network, labels, need_epochs, preprocessing=preprocessing)
        for trajectory in self.read(0):
            check_buffer(trajectory, network, need_epochs=need_epochs, info=self.info)


# -- trained by the run, or read from a buffer ---------------------------------------------------------


def expert_config(config: Any) -> ExpertConfig:
    """The settings of a run's own experts.

    The network is that of the loop. Defaults: the augmentation of the loop, and as many epochs as the segments need.

    Args:
        config: a :class:`tad_plugin.distill.mtt.MTTConfig`. Its ``experts`` mapping overrides the defaults.

    Raises:
        ConfigError: an unknown setting, another network than the loop's, or too few epochs.
    """
    own = {"width": config.width, "depth": config.depth, "norm": config.norm}
    fixed = sorted(set(config.experts) & {*own, "network"})
    if fixed:
        do = "Set width, depth and norm of the loop (--width, --loop.depth, --loop.norm)"
        raise ConfigError(explain("experts with the network of the loop", f"{', '.join(fixed)} for the experts", do))
    needed = config.max_start_epoch + config.expert_epochs
    values = {"epochs": needed, "augment": config.augment, **config.expert_defaults, **config.experts, **own}
    found: ExpertConfig = build_config(ExpertConfig, values, "the experts")
    expected = f"experts of max_start_epoch + expert_epochs = {needed} epochs"
    do = "Lower max_start_epoch or expert_epochs, or train the experts for more epochs"
    found.require(found.epochs >= needed, expected, found.epochs, do)
    return found


def expert_phase(config: Any, data: RealData, hook: Hook, place: Place) -> Experts:
    """Trains the experts of a run into its folder, or reads them from a buffer. Resumes an interrupted training.

    Afterwards the methods that need a scorer have decided.

    Args:
        config: a :class:`tad_plugin.distill.mtt.MTTConfig`.
        data: the real data.
        hook: the hook, started.
        place: folder and seed of the run.

    Raises:
        ConfigError: settings that do not fit, or a buffer without the decisions of a method that needs a scorer.
        StateMismatchError: the stored state belongs to other labels or other methods.
        FileFormatError: a file is missing or damaged.
    """
    if place.experts is not None:
        return _from_buffer(place.experts, _seconds(place.experts), config, data, hook, place)
    if config.buffer:
        return _from_buffer(Path(config.buffer), 0.0, config, data, hook, place)
    return _trained(PHASES[0], expert_config(config), config, data, hook, place)


def _trained(name: str, experts: ExpertConfig, config: Any, data: RealData, hook: Hook, place: Place) -> Experts:
    folder = place.folder / name
    train_experts(
        data,
        experts,
        folder,
        hook,
        seed=place.seed,
        preprocessing=place.preprocessing,
        every=place.every,
        store=BufferStore(folder, place.begin, place.log_bytes),
        progress=place.progress,
        log=place.log,
    )
    return Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=_seconds(folder))


def _from_buffer(folder: Path, seconds: float, config: Any, data: RealData, hook: Hook, place: Place) -> Experts:
    found = Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=seconds)
    if hook.enabled and not hook.decided:
        _adopt_state(hook, folder, found.info)
    return found


def _again(config: Any, data: RealData, hook: Hook, place: Place) -> Experts:
    """The second phase. The seeds are those of the first, so that only the weights make a difference."""
    experts = expert_config(config)
    count = config.second_experts or experts.experts
    return _trained(PHASES[1], dataclasses.replace(experts, experts=count), config, data, hook, place)


def _adopt_state(hook: Hook, folder: Path, info: BufferInfo | None) -> None:
    """Loads what the methods decided when the experts of a buffer were trained."""
    if info is not None and info.state_file:
        hook.adopt(folder / info.state_file)
    elif scoring := [c.name for c in hook.callbacks if c.needs_scorer]:
        do = f"Train the experts with the method (tad-plugin experts --arm {hook.method}), or leave --loop.buffer out"
        raise ConfigError(explain(f"a buffer with the decisions of {', '.join(scoring)}", f"{folder} without them", do))
    hook.settle()


def _seconds(folder: Path) -> float:
    saved = buffer_slots(folder).load()
    return float(saved.tree["seconds"]) if saved is not None else 0.0


# -- the order of matching -----------------------------------------------------------------------------


class ExpertCycle:
    """Hands out trajectories in the order of the public codebases. One file is in memory at a time.

    Files come in a random order, and the experts of a file in a random order, each once. After the last file all are
    shuffled again.

    Args:
        experts: the experts.
        max_files: use only the first ``max_files`` files; 0 uses all.
        max_experts: use only the first ``max_experts`` experts of each file; 0 uses all.
    """

    def __init__(self, experts: Experts, *, max_files: int = 0, max_experts: int = 0) -> None:
        self.experts = experts
        self.count = min(max_files or len(experts.files), len(experts.files))
        self.max_experts = max_experts
        self._files: list[int] = []  # still to come, the next one last
        self._order: list[int] = []  # places in the file in memory, likewise
        self._file = -1
        self._loaded: list[Trajectory] = []
        self._per_file = 0

    def next(self, generator: torch.Generator) -> tuple[int, Trajectory]:
        """The next expert: (number, trajectory).

        Args:
            generator: CPU generator of the orders; used only at the beginning of a file.

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
        """The position in the cycle."""
        return {"files": list(self._files), "order": list(self._order), "file": self._file}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; reads the file that was in memory."""
        self._files, self._order = [int(v) for v in state["files"]], [int(v) for v in state["order"]]
        if state["file"] >= 0:
            self._load(int(state["file"]))
