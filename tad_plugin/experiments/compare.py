"""Runs several arms, seeds and IPC side by side and collects their results."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tad_plugin.errors import ConfigError, explain
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.launch import Failure, Task, check_launcher, launch, write_outcome
from tad_plugin.experiments.lock import claimed_folder
from tad_plugin.experiments.plan import resolve

__all__ = ["SHARED", "compare", "parse_numbers", "parse_seeds", "tasks_of"]

SHARED = "shared"
"""Folder inside that of a comparison, for decisions and experts that its runs share."""


MOST_SEEDS = 10_000
"""A larger number of seeds is taken for a seed that was meant."""


def parse_numbers(text: str, name: str) -> list[int]:
    """ "1,10" -> [1, 10]. Raises ConfigError naming the flag."""
    try:
        numbers = [int(part) for part in str(text).split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(
            explain(f"--{name} as whole numbers joined by commas", repr(text), f"Write for example --{name} 1,10")
        )
    return numbers


def parse_seeds(text: str) -> list[int]:
    """ "5" -> seeds 0..4; "7,8,9" -> these; "7," -> only 7. Raises ConfigError."""
    numbers = parse_numbers(str(text).strip().removesuffix(","), "seeds")
    if "," in str(text):
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        expected = f"--seeds from 1 to {MOST_SEEDS}"
        raise ConfigError(explain(expected, text, "Write --seeds 5 for how many, or --seeds 7,8,9 for which"))
    return list(range(numbers[0]))


def tasks_of(
    config: RunConfig,
    arms: Iterable[str],
    seeds: Iterable[int],
    ipcs: Iterable[int],
    out: Path,
    shared: str | Path | None = None,
) -> list[Task]:
    """All runs of a comparison, seed by seed, so that an interrupted one has complete sets of arms for the first seeds.

    Args:
        config: settings of all runs.
        arms: names of ``ARMS`` or methods.
        seeds: one run each.
        ipcs: images per class.
        out: folder of the comparison.
        shared: folder of what runs share; ``out/shared`` by default.

    Raises:
        UnknownNameError, ConfigError: wrong settings of any arm, no arm, or an arm named twice.
    """
    arms, ipcs, seeds = list(arms), list(ipcs), list(seeds)
    for flag, values in (("--arms", arms), ("--seeds", seeds), ("--ipc", ipcs)):
        if not values or len(set(values)) != len(values):
            got = ",".join(map(str, values)) or "nothing"
            raise ConfigError(explain(f"{flag} with at least one value, each once", got, f"Correct {flag}"))
    for arm in arms:
        for ipc in ipcs:
            resolve(dataclasses.replace(config, ipc=ipc), arm)
    common = Path(shared) if shared else out / SHARED
    return [
        Task(arm, dataclasses.replace(config, ipc=ipc, seed=seed), out / arm / f"ipc{ipc}" / f"seed{seed}", common)
        for seed in seeds
        for ipc in ipcs
        for arm in arms
    ]


def compare(
    config: RunConfig,
    *,
    arms: Iterable[str],
    seeds: Iterable[int],
    ipcs: Iterable[int],
    out: str | Path,
    jobs: int | None = None,
    launcher: str = "local",
    overwrite: bool = False,
    progress: bool = True,
    failures: list[Failure] | None = None,
    shared: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Runs every combination that is not finished yet and writes all results to ``out/results.json``.

    A failed run does not stop the others. Failures are written to ``out/failures.txt`` with their tracebacks; the same
    command tries them again.

    Args:
        config: settings of all runs.
        arms: names of ``ARMS`` or methods.
        seeds: one run each. A seed fixes noise, split, initial images and networks, the same for all arms.
        ipcs: images per class.
        out: folder of the comparison; run folders are ``out/ARM/ipcN/seedS``.
        jobs: runs side by side, at least 1. None: one on this machine; with Ray as many as the cluster has room for.
        launcher: "local", or "ray" to run Ray tasks on a cluster that shares the file system.
        overwrite: start over and remove what earlier runs left.
        progress: show progress bars.
        failures: failed runs are appended to it; None raises for them after the results are written.
        shared: folder of decisions and experts that runs share (:mod:`tad_plugin.experiments.sharing`). The default is
            ``out/shared``, which ``overwrite`` removes; another folder is not removed.

    Returns:
        The results.json of each run that finished.

    Raises:
        UnknownNameError, ConfigError: wrong settings, before anything runs.
        FolderInUseError: another comparison is writing to ``out``.
        TadPluginError: runs failed and ``failures`` is None.
    """
    out = Path(out)
    tasks = tasks_of(config, arms, seeds, ipcs, out, shared)
    check_launcher(launcher, jobs)
    with claimed_folder(out):
        if overwrite and not shared:
            shutil.rmtree(out / SHARED, ignore_errors=True)
        found = launch(tasks, jobs=jobs, launcher=launcher, overwrite=overwrite, progress=progress)
        return write_outcome(found, out, failures)
