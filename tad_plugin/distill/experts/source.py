"""Which expert is matched next: the order of the public codebases, with a state that can be saved.

Files come in a random order and, inside a file, experts in a random order, each once before the next file; after the
last file all are shuffled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.distill.buffers import BufferInfo, Trajectory, buffer_files, check_buffer, read_buffer
from tad_plugin.errors import InvalidInputError, explain

__all__ = ["ExpertCycle", "Experts"]


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
        """Checks them before the first is matched; see :func:`tad_plugin.distill.buffers.check_buffer`."""
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
