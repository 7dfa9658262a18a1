"""Flips single random bits in every kind of file that the package writes, and reads it or resumes from it.

``python -m tests.bit_flips --flips 4000 --resumes 200`` prints how many flips were found (a named error or warning),
had no effect, changed a value silently, or ended in an internal error, for each kind of file. The last two must be 0.

The files come from a tiny run of DM with tad+iwd and one of MTT with experts of its own, both stopped in the middle and
finished, from a noise spec, and from foreign files of torch. Every flip is made in one file, which is read by the
function that a run uses. Those of ``--resumes`` are made in a stopped run, which is then continued to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tad_plugin.core.state_file import read_state_file
from tad_plugin.data.noise.label_files import read_label_file
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import baseline_class
from tad_plugin.distill.experts.buffer import BufferInfo, read_buffer
from tad_plugin.errors import TadPluginError, TadPluginWarning
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.run import run
from tad_plugin.utils.checkpoints import CheckpointSlots
from tests.distill import killed_trajectories
from tests.experiments import killed_runs

SMALL: dict[str, Any] = {"per_class": 12, "ipc": 1, "iterations": 4, "eval_runs": 1, "eval_epochs": 1, "candidates": 1}
CONFIGS: dict[str, RunConfig] = {
    "dm": dataclasses.replace(killed_runs.CONFIG, **SMALL),
    "mtt": dataclasses.replace(
        killed_trajectories.CONFIG,
        **SMALL,
        loop=killed_trajectories.CONFIG.loop | {"second_phase": 1.0, "max_start_epoch": 2},
    ),
}
ARMS = {"dm": "tad+iwd", "mtt": "tad"}
OUTCOMES = ("found", "no effect", "silent", "internal error")


class Stopped(Exception):
    """Ends a run in the middle."""


def stopped_run(name: str, folder: Path) -> None:
    """A run that ends after its second iteration, with checkpoints."""
    cls = baseline_class(name)
    original = cls.step

    def step(self: Any, iteration: int) -> Any:
        if iteration == 2:
            raise Stopped
        return original(self, iteration)

    with mock.patch.object(cls, "step", step):
        try:
            run(CONFIGS[name], ARMS[name], folder)
        except Stopped:
            return
    raise AssertionError("the run was not stopped")


def results_of(folder: Path) -> Any:
    """What must not change: images, state, accuracies and the log, without times."""
    place = RunFolder(folder)
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    log = [{k: v for k, v in record.items() if "seconds" not in k} for record in place.records()]
    results = {k: place.results()[k] for k in ("accuracy", "best_iteration", "state", "split")}
    state = read_state_file(folder / "state.safetensors")[1]
    return [synthetic.images, synthetic.labels, synthetic.learning_rate, state, results, log]


def digest(value: Any) -> str:
    """Hash of nested values; tensors count with dtype, shape and bytes."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode())
            found.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key, part in item.items():
                found.update(f"{key!r}:".encode())
                add(part)
        elif isinstance(item, (list, tuple)):
            found.update(f"{len(item)}[".encode())
            for part in item:
                add(part)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            add({f.name: getattr(item, f.name) for f in dataclasses.fields(item)})
        else:
            found.update(f"{item!r};".encode())

    add(value)
    return found.hexdigest()


def reader(path: Path) -> Callable[[], Any] | None:
    """The function by which a run reads a file; None for files that are not read back."""
    folder = path.parent
    if folder.name == "checkpoint" and path.suffix in (".pt", ".json"):
        return lambda: CheckpointSlots(folder).load()
    if path.name.startswith("replay_buffer") or path.name == "foreign_buffer.pt":
        return lambda: read_buffer(path)
    readers: dict[str, Callable[[], Any]] = {
        "buffer.json": lambda: BufferInfo.read(folder),
        "results.json": lambda: RunFolder(folder).results(),
        "config.yaml": lambda: RunFolder(folder).config(),
        "log.jsonl": lambda: RunFolder(folder).records(),
        "state.safetensors": lambda: read_state_file(path),
        "synthetic.safetensors": lambda: SyntheticSet.load(path),
        "noise.json": lambda: NoiseSpec.load(path),
        "labels.pt": lambda: read_label_file(path),
    }
    return readers.get(path.name)


def flip(path: Path, generator: torch.Generator) -> Callable[[], None]:
    """Flips one random bit of a file; returns the function that undoes it."""
    whole = path.read_bytes()
    bit = int(torch.randint(8 * len(whole), (1,), generator=generator))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return lambda: [path.write_bytes(whole), None][1]  # type: ignore[return-value]


def outcome(read: Callable[[], Any], expected: str) -> str:
    """One of ``OUTCOMES``. A warning counts as found only if the value is right, or an older checkpoint was taken."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            same = digest(read()) == expected
        except TadPluginError:
            return "found"
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return "internal error"
    warned = any(issubclass(w.category, TadPluginWarning) and "Resuming from" in str(w.message) for w in caught)
    return "found" if warned else "no effect" if same else "silent"


class Files:
    """All files, made once in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stopped, self.whole = folder / "stopped", folder / "whole"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CONFIGS:
                stopped_run(name, self.stopped / name)
                shutil.copytree(self.stopped / name, self.whole / name)
                run(CONFIGS[name], ARMS[name], self.whole / name)
        NoiseSpec.parse("symmetric:0.4@seed=3").save(folder / "noise.json")
        labels = torch.arange(40) % 10
        torch.save({"clean": labels, "worse": labels.roll(1)}, folder / "labels.pt")
        torch.save(read_buffer(self.whole / "mtt" / "experts" / "replay_buffer_0.pt"), folder / "foreign_buffer.pt")
        self.expected = {name: digest(results_of(self.whole / name)) for name in CONFIGS}
        self.readers = {p: r for p in sorted(folder.rglob("*")) if p.is_file() and (r := reader(p)) is not None}

    def kind(self, path: Path) -> str:
        """Name of a kind of file in the table."""
        inside = path.relative_to(self.folder)
        return str(Path(*inside.parts[1:])) if len(inside.parts) > 1 else path.name

    def read(self, flips: int, generator: torch.Generator) -> dict[str, Counter[str]]:
        """Outcomes by kind of file, of flips that are spread over all files alike."""
        found: dict[str, Counter[str]] = {}
        paths = list(self.readers)
        expected = {path: digest(read()) for path, read in self.readers.items()}
        for number in range(flips):
            path = paths[number % len(paths)]
            undo = flip(path, generator)
            try:
                result = outcome(self.readers[path], expected[path])
            finally:
                undo()
            found.setdefault(self.kind(path), Counter())[result] += 1
        return found

    def resume(self, resumes: int, generator: torch.Generator) -> dict[str, Counter[str]]:
        """Outcomes of stopped runs that go on after a flip, by kind of file."""
        found: dict[str, Counter[str]] = {}
        paths = [p for p in self.readers if p.is_relative_to(self.stopped)]
        first = int(torch.randint(len(paths), (1,), generator=generator))
        for number in range(resumes):
            source = paths[(first + number * 7) % len(paths)]
            name = source.relative_to(self.stopped).parts[0]
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                copy = Path(place) / "run"
                shutil.copytree(self.stopped / name, copy)
                flip(copy / source.relative_to(self.stopped / name), generator)
                result = outcome(lambda: self._go_on(name, copy), self.expected[name])  # noqa: B023 - called at once
            found.setdefault(f"resumed: {self.kind(source)}", Counter())[result] += 1
        return found

    def _go_on(self, name: str, folder: Path) -> Any:
        run(CONFIGS[name], ARMS[name], folder)
        return results_of(folder)


def main(flips: int, resumes: int, seed: int) -> int:
    """Prints the table; 1 if a flip was silent or an internal error."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        table = files.read(flips, generator) | files.resume(resumes, generator)
    total: Counter[str] = sum(table.values(), Counter())
    for kind, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{kind:50}" + "".join(f"{counts[name]:6} {name}" for name in OUTCOMES))
    return int(total["silent"] + total["internal error"] > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=4000, help="flips in files that are then read")
    parser.add_argument("--resumes", type=int, default=100, help="flips in stopped runs that are then continued")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    sys.exit(main(values.flips, values.resumes, values.seed))
