"""The runs of a grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tad_plugin.experiments.grid.scripts import ScriptTask
from tad_plugin.experiments.grid.spec import Cell, Grid
from tad_plugin.experiments.launch import Task

__all__ = ["UNMODIFIED", "folder_of", "grid_tasks"]

UNMODIFIED = ("clean",)
"""Arms of the way "upstream": an unmodified script sees the labels of its dataset, and no method."""


def grid_tasks(
    grid: Grid, out: Path, given: Mapping[str, Any], checkouts: Mapping[str, Path], shared: Path | None = None
) -> list[Task]:
    """All runs of a grid, seed by seed, so that an interrupted one has whole rows for its first seeds.

    Args:
        grid: the grid.
        out: folder of the grid.
        given: settings of the command line for all runs, such as device and root.
        checkouts: name -> folder of a checkout.
        shared: folder of what runs share; ``out/shared`` by default.
    """
    common = shared or out / "shared"
    found: list[tuple[int, Task]] = []
    for cell in grid.cells:
        for way in cell.ways:
            arms = UNMODIFIED if way == "upstream" else cell.arms
            for noise in ("none",) if way == "upstream" else cell.noise:
                for ipc in cell.ipc:
                    for place, seed in enumerate(cell.seeds):
                        for arm in arms:
                            config = cell.config(noise, ipc, seed, given)
                            folder = folder_of(out, cell, way, noise, arm, ipc, seed)
                            if way == "bundled":
                                task = Task(arm, config, folder, common)
                            else:
                                task = ScriptTask(
                                    arm, config, folder, None, way=way, codebase=cell.checkout,
                                    checkout=checkouts[cell.checkout], steps=cell.steps,
                                    tad_config=dict(cell.tad_config), data=out / "data",
                                )  # fmt: skip
                            found.append((place, task))
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]


def folder_of(out: Path, cell: Cell, way: str, noise: str, arm: str, ipc: int, seed: int) -> Path:
    """The folder of one run, with names that every file system takes."""
    names = (cell.name, way, noise, arm, f"ipc{ipc}", f"seed{seed}")
    return out.joinpath("runs", *(re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "_" for name in names))
