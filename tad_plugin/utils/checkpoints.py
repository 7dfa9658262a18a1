"""Two checkpoint slots, written in turn, so that one whole checkpoint exists at any moment.

Each slot is a data file (``A.pt``) and its side information (``A.json``: step, length, sha256). The side information is
removed before the data is replaced and written after it: a slot without it is unfinished and is passed over in
silence, one whose data does not fit it was damaged from outside and is reported.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import FileFormatError, InvalidInputError, TadPluginWarning, explain
from tad_plugin.utils.files import atomic_save, atomic_write, file_digest, read_json, remove_temporaries

__all__ = ["Checkpoint", "CheckpointSlots"]

VERSION = 1
_SLOTS = ("A", "B")
_FIELDS = {"version": int, "serial": int, "step": int, "bytes": int, "sha256": str, "log_bytes": int}
# what torch.load(weights_only=True) reads back in every version from 2.2 on
_LEAVES = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """What one slot held.

    Attributes:
        tree: what was saved.
        step: how many iterations it has seen.
        log_bytes: the log's length in bytes when it was taken.
    """

    tree: Any
    step: int
    log_bytes: int


class CheckpointSlots:
    """The two slots in one folder. One process at a time may write to it.

    Args:
        path: the folder; it is made with the first checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._newest: str | None = None  # the slot of the newest valid checkpoint
        self._serial = 0
        self._known = False  # whether the two above were read from the disk yet

    def save(self, tree: Any, step: int, *, log_bytes: int = 0) -> None:
        """Writes a checkpoint into the slot that does not hold the newest valid one.

        Args:
            tree: nested dicts, lists and tuples of tensors, numbers, strings and None.
            step: how many iterations it has seen.
            log_bytes: the log's length in bytes at this moment.

        Raises:
            InvalidInputError: something in the tree could not be read back; its place and type are named.
        """
        _check_tree(tree, "tree")
        self._survey()
        slot = _SLOTS[1] if self._newest == _SLOTS[0] else _SLOTS[0]
        data, side = self._files(slot)
        side.unlink(missing_ok=True)
        atomic_save(data, lambda temporary: torch.save(tree, temporary))
        information = {
            "version": VERSION,
            "serial": self._serial + 1,
            "step": int(step),
            "bytes": data.stat().st_size,
            "sha256": file_digest(data),
            "log_bytes": int(log_bytes),
        }
        atomic_write(side, json.dumps(information, indent=1))
        self._newest, self._serial = slot, self._serial + 1

    def load(self, *, map_location: str | torch.device = "cpu") -> Checkpoint | None:
        """The newest valid checkpoint, or None where none was ever completed.

        A damaged newer one is reported by a TadPluginWarning.

        Args:
            map_location: where the tensors shall be. Generator states must stay on the CPU.

        Raises:
            FileFormatError: there are checkpoints, but none of them is whole.
        """
        remove_temporaries(self.path)
        damaged: list[str] = []
        for slot, information in self._completed():
            data, side = self._files(slot)
            try:
                _verify(data, side, information)
                tree = _load(data, map_location)
            except FileFormatError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"Resuming from step {information['step']}. {damaged[0]}", TadPluginWarning, stacklevel=3)
            self._newest, self._serial, self._known = slot, max(self._serial, information["serial"]), True
            return Checkpoint(tree, information["step"], information["log_bytes"])
        if damaged:
            raise FileFormatError(
                explain(
                    f"a whole checkpoint in {self.path}",
                    f"only damaged ones ({' '.join(damaged)})",
                    "Restore the folder from a copy, or start the run over with --overwrite",
                )
            )
        self._newest, self._known = None, True
        return None

    def clear(self) -> None:
        """Removes both slots, side information first."""
        for slot in _SLOTS:
            data, side = self._files(slot)
            side.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        remove_temporaries(self.path)
        self._newest, self._serial, self._known = None, 0, True

    def _files(self, slot: str) -> tuple[Path, Path]:
        return self.path / f"{slot}.pt", self.path / f"{slot}.json"

    def _completed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The completed slots, newest first, with their side information.

        Where that is damaged it is {}, and the slot comes first: it may have been the newest, so it must be reported.
        """
        found = [(slot, _read_side(side)) for slot in _SLOTS if (side := self._files(slot)[1]).exists()]
        yield from sorted(found, key=lambda item: item[1].get("serial", math.inf), reverse=True)

    def _survey(self) -> None:
        """Finds the newest valid slot once, for a caller that saves without having loaded."""
        if self._known:
            return
        for slot, information in self._completed():
            self._serial = max(self._serial, information.get("serial", 0))
            try:
                _verify(*self._files(slot), information)
            except FileFormatError:
                continue
            self._newest = self._newest or slot
        self._known = True


def _check_tree(tree: Any, place: str) -> None:
    if type(tree) in _LEAVES:
        return
    if type(tree) in (dict, OrderedDict):
        for key, value in tree.items():
            _check_tree(key, f"a key of {place}")
            _check_tree(value, f"{place}[{key!r}]")
    elif type(tree) in (list, tuple):
        for index, value in enumerate(tree):
            _check_tree(value, f"{place}[{index}]")
    else:
        name = f"{type(tree).__module__}.{type(tree).__qualname__}"
        raise InvalidInputError(
            explain(
                "a checkpoint of tensors, numbers, strings, dicts, lists and tuples",
                f"{name} at {place}",
                "Convert it, for example with .item(), torch.as_tensor or a state_dict()",
            )
        )


def _read_side(side: Path) -> dict[str, Any]:
    try:
        information = read_json(side)
    except FileFormatError:
        return {}
    if not isinstance(information, dict) or any(not isinstance(information.get(k), t) for k, t in _FIELDS.items()):
        return {}
    return information


def _verify(data: Path, side: Path, information: Mapping[str, Any]) -> None:
    advice = "Restore the file from a copy if this checkpoint is needed"
    if not information:
        raise FileFormatError(explain(f"{side} to describe a checkpoint", "contents that do not", advice))
    if information["version"] != VERSION:
        raise FileFormatError(explain(f"version {VERSION} in {side}", f"version {information['version']}", advice))
    size = data.stat().st_size if data.exists() else 0
    if size != information["bytes"]:
        raise FileFormatError(explain(f"{information['bytes']} bytes in {data}", f"{size}", advice))
    if file_digest(data) != information["sha256"]:
        raise FileFormatError(explain(f"{data} as it was written", "other contents of the same length", advice))


def _load(data: Path, map_location: str | torch.device) -> Any:
    try:
        return torch.load(data, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for what it cannot read
        advice = "Use the version of torch that wrote it"
        got = f"one that torch cannot load ({error})"
        raise FileFormatError(explain(f"a checkpoint in {data}", got, advice)) from error
