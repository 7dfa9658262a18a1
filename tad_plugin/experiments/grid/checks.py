"""Everything about a grid that can be checked before its first run: names, packages, data, checkouts, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tad_plugin.data.sources import DATASETS
from tad_plugin.errors import ConfigError, DiskSpaceError, PatchError, UnknownNameError, explain, unknown_name
from tad_plugin.experiments.flags import check_picture_packages
from tad_plugin.experiments.grid.scripts import filled_step
from tad_plugin.experiments.grid.spec import Cell, Grid
from tad_plugin.experiments.launch import Task
from tad_plugin.experiments.plan import resolve
from tad_plugin.upstream.checkout import plan_apply, status
from tad_plugin.upstream.patch import load_patch
from tad_plugin.upstream.script import Script

__all__ = ["check_disk", "check_grid", "find_checkouts"]

_SPARE = 256 * 2**20
_PER_RUN = 32 * 2**20
"""Bytes that a grid needs free, and bytes that a run's files may take: state, two checkpoints, synthetic set."""


def find_checkouts(grid: Grid, given: str, environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The folder of each checkout that a grid needs.

    Args:
        grid: the grid.
        given: "dm=PATH,mtt=PATH", as on the command line.
        environment: where TAD_UPSTREAM_DM and others are looked for.

    Raises:
        ConfigError: a checkout is not given, is no folder, or the text is of another form.
    """
    named: dict[str, str] = {}
    for part in filter(None, given.split(",")):
        name, equals, path = part.partition("=")
        if not equals or not path:
            raise ConfigError(explain("--checkouts as dm=PATH,mtt=PATH", repr(part), "Correct the flag"))
        named[name.strip()] = path.strip()
    needed = {cell.checkout for cell in grid.cells if cell.checkout}
    for name in named.keys() - needed:
        do = "Leave it out: no cell of this size uses it"
        raise ConfigError(explain(f"--checkouts of {', '.join(sorted(needed)) or 'nothing'}", name, do))
    found = {}
    for name in sorted(needed):
        value = named.get(name) or environment.get(f"TAD_UPSTREAM_{name.upper()}", "")
        folder = Path(os.path.expanduser(value)) if value else None
        if folder is None or not folder.is_dir():
            do = f"Clone it, and pass --checkouts {name}=PATH or set TAD_UPSTREAM_{name.upper()}"
            raise ConfigError(explain(f"the checkout of {name}", value or "none", do))
        found[name] = folder.resolve()
    return found


def check_grid(grid: Grid, tasks: Sequence[Task], checkouts: Mapping[str, Path]) -> None:
    """Checks every run of a grid without training anything.

    Raises:
        UnknownNameError: no such dataset, arm, method, baseline or network.
        ConfigError: a setting out of range, missing data, or a step with an unknown place.
        MissingExtraError: a package that an arm or the report needs is not installed.
        PatchError: a checkout without a script of a step, or one that cannot be patched.
    """
    check_picture_packages()
    seen = set()
    for task in tasks:
        key = (task.arm, repr(task.config))
        if key not in seen:
            seen.add(key)
            resolve(task.config, task.arm)
    for dataset, root in sorted({(task.config.dataset, task.config.root) for task in tasks}):
        _check_data(dataset, Path(os.path.expanduser(root)))
    for cell in grid.cells:
        if cell.checkout:
            _check_scripts(cell, checkouts[cell.checkout])


def check_disk(out: Path, tasks: Sequence[Task]) -> None:
    """Raises DiskSpaceError where the disk of ``out`` has not enough room for the runs that are not finished."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    left = sum(not (task.folder / "results.json").exists() for task in tasks)
    needed, free = _SPARE + left * _PER_RUN, shutil.disk_usage(place).free
    if left and free < needed:
        do = "Free some, or pass another --out"
        got = f"{free / 2**20:.0f} MiB"
        raise DiskSpaceError(explain(f"{needed / 2**20:.0f} MiB free for {left} runs in {out}", got, do))


def _check_data(dataset: str, root: Path) -> None:
    if dataset.startswith("folder:"):
        path = Path(os.path.expanduser(dataset.removeprefix("folder:")))
        if not path.exists():
            do = "Correct the path in the grid, or pass --images"
            raise ConfigError(explain(f"images at {path}", "nothing", do))
    elif dataset not in DATASETS:
        raise unknown_name("dataset", dataset, [*DATASETS, "folder:PATH"])
    elif dataset == "tinyimagenet" and not root.exists():
        do = "Download it there (its folder layout), or pass another --root"
        raise ConfigError(explain(f"tinyimagenet below {root}", "nothing", do))


def _check_scripts(cell: Cell, checkout: Path) -> None:
    try:
        patch = load_patch(cell.checkout)
    except UnknownNameError:
        if "patched" in cell.ways:
            raise
        patch = None
    for step in cell.steps:
        words = filled_step(step, ipc=cell.ipc[0], seed=cell.seeds[0], data=Path("data"), folder=Path("folder"))
        Script.find(checkout, words[0])
        if "patched" in cell.ways and patch is not None and words[0] not in {file.path for file in patch.files}:
            do = "Run one of these, or only the way upstream"
            got = f"{words[0]} in cell {cell.name!r}"
            raise PatchError(explain(f"a script that is patched ({', '.join(f.path for f in patch.files)})", got, do))
    if patch is None:
        return
    condition = status(patch, checkout).condition
    if condition.startswith(("patched", "partly")):
        do = f"Pass an unmodified checkout with --checkouts {cell.checkout}=PATH; the runs patch copies of it"
        raise PatchError(explain(f"an unmodified checkout of {cell.checkout}", f"one that is {condition}", do))
    if "patched" in cell.ways:
        plan_apply(patch, checkout)
