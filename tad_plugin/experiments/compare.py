"""Runs several arms, seeds and IPC side by side and collects their results."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import traceback
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import ConfigError, TadPluginError, explain, missing_extra
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.lock import claimed_folder
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tad_plugin.experiments.strict_json import strict
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.progress import bar
from tad_plugin.utils.workers import handlers_kept, raise_if_stopped, stoppable, threads_each, worker_pool

__all__ = ["Failure", "Task", "compare", "parse_numbers", "parse_seeds", "tasks_of"]

RETRIES = 3
"""How often Ray starts a run again whose process or node died."""

SHARED = "shared"
"""Folder inside that of a comparison, for decisions and experts that its runs share."""


@dataclass(frozen=True)
class Task:
    """One run of a comparison. The process that runs it resolves its settings: "auto" is that machine's device.

    Attributes:
        arm: the arm.
        config: the user's settings, with the IPC and seed of this run.
        folder: run folder.
        shared: folder of what runs share.
    """

    arm: str
    config: RunConfig
    folder: Path
    shared: Path | None = None


@dataclass(frozen=True)
class Failure:
    """A run of a comparison that failed; ``str()`` gives one line.

    Attributes:
        arm: the arm.
        ipc: images per class.
        seed: the seed.
        message: the error's message.
        trace: the traceback.
    """

    arm: str
    ipc: int
    seed: int
    message: str
    trace: str

    def __str__(self) -> str:
        return f"arm {self.arm}, IPC {self.ipc}, seed {self.seed}: {self.message}"


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
    if numbers[0] < 1:
        raise ConfigError(explain("--seeds of at least 1", text, "Write --seeds 5, or --seeds 7,8,9"))
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


def _attempt(task: Task, threads: int, progress: bool, overwrite: bool) -> dict[str, Any] | Failure:
    """The results of one run, or its failure, which does not stop the other runs."""
    torch.set_num_threads(threads)
    try:
        return run(task.config, task.arm, task.folder, progress=progress, overwrite=overwrite, shared=task.shared)
    except Exception as error:
        raise_if_stopped()
        return _failure(task, error)


def _failure(task: Task, error: BaseException) -> Failure:
    message = str(error) if isinstance(error, TadPluginError) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(task.arm, task.config.ipc, task.config.seed, message, trace)


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
    if jobs is not None and jobs < 1:
        raise ConfigError(explain("--jobs of at least 1", str(jobs), "Correct the flag"))
    with claimed_folder(out):
        return _compare(tasks, out, jobs, launcher, overwrite, progress, failures, shared)


def _compare(
    tasks: list[Task],
    out: Path,
    jobs: int | None,
    launcher: str,
    overwrite: bool,
    progress: bool,
    failures: list[Failure] | None,
    shared: str | Path | None,
) -> list[dict[str, Any]]:
    if overwrite and not shared:
        shutil.rmtree(out / SHARED, ignore_errors=True)
    if launcher == "ray":
        found = _with_ray(tasks, jobs, progress, overwrite)
    elif launcher != "local":
        raise ConfigError(explain('--launcher "local" or "ray"', repr(launcher), "Correct the flag"))
    elif jobs is None or jobs == 1 or len(tasks) == 1:
        threads = torch.get_num_threads()
        found = [_attempt(t, threads, progress, overwrite) for t in bar(tasks, "runs", progress)]
    else:
        found = _in_processes(tasks, jobs, progress, overwrite)
    results = [f for f in found if not isinstance(f, Failure)]
    failed = [f for f in found if isinstance(f, Failure)]
    atomic_write(out / "results.json", json.dumps(strict(results), indent=1, allow_nan=False) + "\n")
    report = out / "failures.txt"
    report.unlink(missing_ok=True)
    if failed:
        atomic_write(report, "\n".join(f"{f}\n\n{f.trace}" for f in failed))
    if failures is not None:
        failures.extend(failed)
    elif failed:
        got = f"{len(failed)} that failed; the first: {failed[0]}"
        raise TadPluginError(explain(f"{len(tasks)} runs to finish", got, f"See {report}, then repeat the command"))
    return results


def _in_processes(tasks: list[Task], jobs: int, progress: bool, overwrite: bool) -> list[dict[str, Any] | Failure]:
    with worker_pool(jobs) as pool:
        futures = {pool.submit(_attempt, t, threads_each(jobs), False, overwrite): i for i, t in enumerate(tasks)}
        found: dict[int, dict[str, Any] | Failure] = {}
        for future in bar(as_completed(futures), "runs", progress, len(tasks)):
            error = future.exception()  # a process that died, out of memory for example
            i = futures[future]
            found[i] = future.result() if error is None else _failure(tasks[i], error)
    return [found[i] for i in range(len(tasks))]


def _with_ray(tasks: list[Task], jobs: int | None, progress: bool, overwrite: bool) -> list[dict[str, Any] | Failure]:
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "cluster", "--launcher ray") from error
    started = not ray.is_initialized()
    if started:
        with handlers_kept():
            ray.init(ignore_reinit_error=True, log_to_driver=False)
    found: dict[int, dict[str, Any] | Failure] = {}
    waiting: dict[Any, int] = {}
    with stoppable(signal.SIGTERM):
        try:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
            # A run whose process or node died goes on from its checkpoint.
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_attempt)
            left = iter(enumerate(tasks))
            for _ in bar(range(len(tasks)), "runs", progress):
                for i, t in islice(left, (jobs or len(tasks)) - len(waiting)):
                    shared = t.shared and t.shared.resolve()
                    absolute = dataclasses.replace(t, folder=t.folder.resolve(), shared=shared)
                    waiting[remote.remote(absolute, 1, False, overwrite)] = i
                reference = ray.wait(list(waiting), num_returns=1)[0][0]
                i = waiting.pop(reference)
                try:
                    found[i] = ray.get(reference)
                except ray.exceptions.RayError as error:  # it died again and again
                    found[i] = _failure(tasks[i], error)
        finally:
            for reference in waiting:  # after an error or a signal
                ray.cancel(reference, force=True)
            if started:
                ray.shutdown()
    return [found[i] for i in range(len(tasks))]
