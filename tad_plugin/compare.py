"""Several arms x several seeds x several IPC, side by side: runs, table, pictures, page."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import ConfigError, explain, missing_extra
from tad_plugin.experiment import RunConfig, parse_arm, run
from tad_plugin.files import atomic_write

__all__ = ["Task", "compare", "parse_numbers", "parse_seeds"]


@dataclass(frozen=True)
class Task:
    """One run of a comparison."""

    arm: str
    config: RunConfig
    folder: Path


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
    """ "5" -> seeds 0..4; "7,8,9" -> these. Raises ConfigError."""
    numbers = parse_numbers(text, "seeds")
    if "," in str(text):
        return numbers
    if numbers[0] < 1:
        raise ConfigError(explain("--seeds of at least 1", text, "Write --seeds 5, or --seeds 7,8,9"))
    return list(range(numbers[0]))


def tasks_of(
    config: RunConfig, arms: Iterable[str], seeds: Iterable[int], ipcs: Iterable[int], out: Path
) -> list[Task]:
    """All runs, seeds first, so that a comparison that is cut short holds whole arms of few seeds."""
    arms, ipcs = list(arms), list(ipcs)
    for arm in arms:
        parse_arm(arm)
    return [
        Task(arm, dataclasses.replace(config, ipc=ipc, seed=seed), out / arm / f"ipc{ipc}" / f"seed{seed}")
        for seed in seeds
        for ipc in ipcs
        for arm in arms
    ]


def _execute(task: Task, threads: int, progress: bool, overwrite: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return run(task.config, task.arm, task.folder, progress=progress, overwrite=overwrite)


def compare(
    config: RunConfig,
    *,
    arms: Iterable[str],
    seeds: Iterable[int],
    ipcs: Iterable[int],
    out: str | Path,
    jobs: int = 1,
    launcher: str = "local",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Runs every combination (finished ones are kept) and returns their results, also in ``out/results.json``.

    Args:
        config: settings that all runs share.
        arms: names of ``experiment.ARMS`` or methods.
        seeds: one run each; a seed fixes noise, split, initial images and networks, the same for all arms.
        ipcs: images per class.
        out: folder; a run stands in ``out/ARM/ipcN/seedS``.
        jobs: processes side by side (local launcher).
        launcher: "local", or "ray" to run them as Ray tasks on a cluster that shares the file system.
        overwrite: start over runs that stand there with other settings.
        progress: show progress bars.
    """
    out = Path(out)
    tasks = tasks_of(config, arms, seeds, ipcs, out)
    if jobs < 1:
        raise ConfigError(explain("--jobs of at least 1", str(jobs), "Correct the flag"))
    if launcher == "ray":
        results = _with_ray(tasks, overwrite)
    elif launcher != "local":
        raise ConfigError(explain('--launcher "local" or "ray"', repr(launcher), "Correct the flag"))
    elif jobs == 1 or len(tasks) == 1:
        results = [_execute(t, torch.get_num_threads(), progress, overwrite) for t in _bar(tasks, progress)]
    else:
        results = _in_processes(tasks, jobs, progress, overwrite)
    atomic_write(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _in_processes(tasks: list[Task], jobs: int, progress: bool, overwrite: bool) -> list[dict[str, Any]]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spawn, because a forked process inherits locked thread pools and cannot use CUDA
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_execute, t, threads, False, overwrite): i for i, t in enumerate(tasks)}
        found: dict[int, dict[str, Any]] = {}
        try:
            for future in _bar(as_completed(futures), progress, len(tasks)):
                found[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[i] for i in range(len(tasks))]


def _with_ray(tasks: list[Task], overwrite: bool) -> list[dict[str, Any]]:
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "cluster", "--launcher ray") from error
    started = not ray.is_initialized()
    if started:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(_execute)
        absolute = [dataclasses.replace(t, folder=t.folder.resolve()) for t in tasks]
        return list(ray.get([remote.remote(t, 1, False, overwrite) for t in absolute]))
    finally:
        if started:
            ray.shutdown()


def _bar(items: Any, show: bool, total: int | None = None) -> Any:
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra("tqdm", "reproduce", "progress bars") from error
    return tqdm(items, desc="runs", total=total)
