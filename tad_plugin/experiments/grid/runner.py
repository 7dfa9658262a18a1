"""Runs a grid: checks everything, runs what is not finished, writes results and report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tad_plugin.errors import ResumeError, explain
from tad_plugin.experiments.grid.checks import check_disk, check_grid, find_checkouts
from tad_plugin.experiments.grid.script_data import write_torchvision
from tad_plugin.experiments.grid.scripts import ScriptTask
from tad_plugin.experiments.grid.spec import Grid
from tad_plugin.experiments.grid.tasks import grid_tasks
from tad_plugin.experiments.launch import Failure, Task, check_launcher, launch, write_outcome
from tad_plugin.experiments.lock import claimed_folder
from tad_plugin.experiments.strict_json import strict
from tad_plugin.utils.files import atomic_write, read_json

__all__ = ["GRID_FILE", "Prepared", "prepare_grid", "run_grid"]

GRID_FILE = "grid.json"
"""The grid that a folder was made from, with the cell of each run."""


@dataclass(frozen=True)
class Prepared:
    """A grid whose every run was checked.

    Attributes:
        grid: the grid.
        tasks: its runs, seed by seed.
        out: its folder.
    """

    grid: Grid
    tasks: tuple[Task, ...]
    out: Path

    @property
    def left(self) -> list[Task]:
        """Runs without results."""
        return [task for task in self.tasks if not (task.folder / "results.json").exists()]

    def minutes(self) -> float | None:
        """Estimated minutes for the runs that are left, one after another; None without any measured time.

        A run's time is that of finished runs of its cell here, else the one that the grid names for its cell.
        """
        cells = {cell.name: cell for cell in self.grid.cells}
        measured: dict[str, list[float]] = {}
        for task in self.tasks:
            path, begun = task.folder / "results.json", task.folder / "config.yaml"
            if path.exists() and begun.exists():
                spent = max(0.0, path.stat().st_mtime - begun.stat().st_mtime)
                measured.setdefault(_cell_of(task, self.out), []).append(spent / 60)
        total = 0.0
        for task in self.left:
            name = _cell_of(task, self.out)
            known = measured.get(name)
            each = sum(known) / len(known) if known else cells[name].minutes
            if each is None:
                return None
            total += each
        return total

    def describe(self) -> str:
        """The runs by cell and way, and the estimated time, for people."""
        lines = [f"{self.grid.name}, size {self.grid.size}: {self.grid.question}"]
        done = {task.folder for task in self.tasks} - {task.folder for task in self.left}
        for cell in self.grid.cells:
            for way in cell.ways:
                runs = [t for t in self.tasks if _cell_of(t, self.out) == cell.name and _way_of(t) == way]
                finished = sum(t.folder in done for t in runs)
                arms = ", ".join(dict.fromkeys(t.arm for t in runs))
                lines.append(f"  {cell.name} ({way}): {len(runs)} runs, {finished} finished; arms {arms}")
        minutes = self.minutes()
        time = "unknown (no run of some cell was timed)" if minutes is None else f"about {minutes:.0f} min one by one"
        return "\n".join([*lines, f"  {len(self.left)} runs left, time {time}, in {self.out}"])


def prepare_grid(
    grid: Grid, out: str | Path, *, given: Mapping[str, Any] | None = None, checkouts: str = ""
) -> Prepared:
    """Expands a grid into runs and checks all of them. Nothing is trained and nothing is written.

    Args:
        grid: from :func:`tad_plugin.experiments.grid.spec.read_grid`.
        out: folder for its runs.
        given: settings of the command line for all runs: fields of RunConfig.
        checkouts: see :func:`tad_plugin.experiments.grid.checks.find_checkouts`.

    Raises:
        TadPluginError: see :mod:`tad_plugin.experiments.grid.checks`.
        ResumeError: ``out`` holds another grid.
    """
    out = Path(out)
    folders = find_checkouts(grid, checkouts)
    tasks = tuple(grid_tasks(grid, out, given or {}, folders))
    check_grid(grid, tasks, folders)
    check_disk(out, tasks)
    held = out / GRID_FILE
    if held.is_file():
        before = read_json(held)["grid"]
        if before["name"] != grid.name or before["size"] != grid.size:
            do = "Pass another --out"
            got = f"{before['name']}, size {before['size']}"
            raise ResumeError(explain(f"runs of {grid.name}, size {grid.size}, in {out}", got, do))
    return Prepared(grid, tasks, out)


def run_grid(
    prepared: Prepared,
    *,
    jobs: int | None = None,
    launcher: str = "local",
    overwrite: bool = False,
    progress: bool = True,
    failures: list[Failure] | None = None,
) -> list[dict[str, Any]]:
    """Runs what is not finished and writes all results to ``results.json`` in the grid's folder.

    Args:
        prepared: from :func:`prepare_grid`.
        jobs: runs side by side.
        launcher: "local" or "ray".
        overwrite: start over.
        progress: show progress bars.
        failures: failed runs are appended; None raises for them at the end.

    Returns:
        The results of the runs that finished, each with "cell" and "way".
    """
    out, tasks = prepared.out, list(prepared.tasks)
    check_launcher(launcher, jobs)
    with claimed_folder(out):
        record = {"grid": dataclasses.asdict(prepared.grid)}
        atomic_write(out / GRID_FILE, json.dumps(strict(record), indent=1) + "\n")
        for task in tasks:
            if isinstance(task, ScriptTask):
                write_torchvision(task.config, task.data)
        found = launch(tasks, jobs=jobs, launcher=launcher, overwrite=overwrite, progress=progress)
        marked = [_marked(result, task, out) for result, task in zip(found, tasks, strict=True)]
        return write_outcome(marked, out, failures)


def _marked(result: dict[str, Any] | Failure, task: Task, out: Path) -> dict[str, Any] | Failure:
    if isinstance(result, Failure):
        return result
    return {**result, "cell": _cell_of(task, out), "way": _way_of(task)}


def _way_of(task: Task) -> str:
    return task.way if isinstance(task, ScriptTask) else "bundled"


def _cell_of(task: Task, out: Path) -> str:
    return task.folder.relative_to(out / "runs").parts[0]
