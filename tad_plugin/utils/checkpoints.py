"""Two checkpoint slots, written in turn, so that a complete checkpoint exists at any moment.

A slot is a data file (``A.pt``) and a sealed side file (``A.json``: step, length, sha256). The side file is
removed before the data is replaced, and written afterwards. A slot without a side file is unfinished and is skipped
without a message. A slot whose data does not match its side file is damaged and is reported.
"""

from __future__ import annotations

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
from tad_plugin.utils.seals import sealed_json

__all__ = ["Checkpoint", "CheckpointSlots", "moved"]

VERSION = 1
_SLOTS = ("A", "B")
_FIELDS = {"version": int, "serial": int, "step": int, "bytes": int, "sha256": str, "log_bytes": int}
# Types that torch.load(weights_only=True) reads back in every version from 2.2 on.
_LEAVES = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of one slot.

    Attributes:
        tree: the saved tree.
        step: iterations done.
        log_bytes: length of the log in bytes at that moment.
    """

    tree: Any
    step: int
    log_bytes: int


class CheckpointSlots:
    """The two slots of one folder. Only one process at a time may write to it.

    Args:
        path: the folder; created with the first checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._newest: str | None = None  # the slot of the newest valid checkpoint
        self._serial = 0
        self._known = False  # whether the two above were read from the disk

    def save(self, tree: Any, step: int, *, log_bytes: int = 0) -> None:
        """Writes a checkpoint. The slot with the newest valid one is left alone.

        Args:
            tree: nested dicts, lists and tuples of tensors, numbers, strings and None.
            step: iterations done.
            log_bytes: length of the log in bytes at this moment.

        Raises:
            InvalidInputError: a value in the tree could not be read back; the message names its place and type.
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
        atomic_write(side, sealed_json(information))
        self._newest, self._serial = slot, self._serial + 1

    def load(self, *, map_location: str | torch.device = "cpu") -> Checkpoint | None:
        """Reads the newest valid checkpoint; None if none was ever completed.

        Warns with TadPluginWarning if a newer one is damaged.

        Args:
            map_location: device of the tensors. Generator states must stay on the CPU.

        Raises:
            FileFormatError: there are checkpoints, and all are damaged.
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

    def log_bytes(self) -> int:
        """Length of the log at the newest valid checkpoint, which is not loaded; 0 if there is none."""
        for slot, information in self._completed():
            try:
                _verify(*self._files(slot), information)
            except FileFormatError:
                continue
            return int(information["log_bytes"])
        return 0

    def clear(self) -> None:
        """Removes both slots, side files first."""
        for slot in _SLOTS:
            data, side = self._files(slot)
            side.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        remove_temporaries(self.path)
        self._newest, self._serial, self._known = None, 0, True

    def _files(self, slot: str) -> tuple[Path, Path]:
        return self.path / f"{slot}.pt", self.path / f"{slot}.json"

    def _completed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The completed slots, newest first, with the contents of their side files.

        A damaged side file gives {}. Its slot comes first: it may have been the newest, so it must be reported.
        """
        found = [(slot, _read_side(side)) for slot in _SLOTS if (side := self._files(slot)[1]).exists()]
        yield from sorted(found, key=lambda item: item[1].get("serial", math.inf), reverse=True)

    def _survey(self) -> None:
        """Finds the newest valid slot, once, for callers that save without loading first."""
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


def moved(tree: Any, device: torch.device | str) -> Any:
    """The same tree of dicts, lists and tuples, with every tensor on ``device``. Other values stay as they are."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: moved(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(moved(value, device) for value in tree)
    return tree


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
        raise FileFormatError(explain(f"{side} to describe a checkpoint", "other contents", advice))
    if information["version"] != VERSION:
        raise FileFormatError(explain(f"version {VERSION} in {side}", f"version {information['version']}", advice))
    size = data.stat().st_size if data.exists() else 0
    if size != information["bytes"]:
        raise FileFormatError(explain(f"{information['bytes']} bytes in {data}", f"{size}", advice))
    if file_digest(data) != information["sha256"]:
        raise FileFormatError(
            explain(f"{data} unchanged since it was written", "other contents of the same length", advice)
        )


def _load(data: Path, map_location: str | torch.device) -> Any:
    try:
        return torch.load(data, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more
        advice = "Use the version of torch that wrote it"
        got = f"one that torch cannot load ({error})"
        raise FileFormatError(explain(f"a checkpoint in {data}", got, advice)) from error
