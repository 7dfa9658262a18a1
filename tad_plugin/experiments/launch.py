"""Runs of a comparison or a grid: one after another, side by side in processes, or as tasks of a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
import signal
import traceback
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import ConfigError, TadPluginError, explain, missing_extra
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.run import run
from tad_plugin.experiments.strict_json import strict
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import named_memory_error
from tad_plugin.utils.progress import bar
from tad_plugin.utils.workers import handlers_kept, raise_if_stopped, stoppable, threads_each, worker_pool

__all__ = ["Failure", "Task", "check_launcher", "launch", "write_outcome"]

RETRIES = 3
"""How often Ray starts a run again whose process or node died."""


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

    def __str__(self) -> str:
        return f"arm {self.arm}, IPC {self.config.ipc}, seed {self.config.seed}"

    def absolute(self) -> Task:
        """The same task for a process with another working directory."""
        return dataclasses.replace(self, folder=self.folder.resolve(), shared=self.shared and self.shared.resolve())

    def execute(self, *, progress: bool, overwrite: bool) -> dict[str, Any]:
        """Runs, resumes, or returns the results of a finished run."""
        return run(self.config, self.arm, self.folder, progress=progress, overwrite=overwrite, shared=self.shared)


@dataclass(frozen=True)
class Failure:
    """A run that failed; ``str()`` gives one line.

    Attributes:
        task: the run.
        message: the error's message.
        trace: the traceback.
    """

    task: Task
    message: str
    trace: str

    def __str__(self) -> str:
        return f"{self.task}: {self.message}"


def check_launcher(launcher: str, jobs: int | None) -> None:
    """Raises ConfigError for an unknown launcher or fewer than one job, MissingExtraError where Ray is missing."""
    if jobs is not None and jobs < 1:
        raise ConfigError(explain("--jobs of at least 1", str(jobs), "Correct the flag"))
    if launcher == "ray":
        _ray()
    elif launcher != "local":
        raise ConfigError(explain('--launcher "local" or "ray"', repr(launcher), "Correct the flag"))


def launch(
    tasks: Sequence[Task],
    *,
    jobs: int | None = None,
    launcher: str = "local",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, Any] | Failure]:
    """Runs every task that is not finished. A failed one does not stop the others.

    Args:
        tasks: the runs.
        jobs: runs side by side. None: one on this machine; with Ray as many as the cluster has room for.
        launcher: "local", or "ray" to run Ray tasks on a cluster that shares the file system.
        overwrite: start over and remove what earlier runs left.
        progress: show progress bars.

    Returns:
        The results, or the failure, of each task in order.

    Raises:
        ConfigError, MissingExtraError: see :func:`check_launcher`.
    """
    check_launcher(launcher, jobs)
    if launcher == "ray":
        return _with_ray(tasks, jobs, progress, overwrite)
    if jobs is None or jobs == 1 or len(tasks) == 1:
        threads = torch.get_num_threads()
        return [_attempt(t, threads, progress, overwrite) for t in bar(tasks, "runs", progress)]
    return _in_processes(tasks, jobs, progress, overwrite)


def write_outcome(
    found: Sequence[dict[str, Any] | Failure], out: Path, failures: list[Failure] | None
) -> list[dict[str, Any]]:
    """Writes ``out/results.json``, and ``out/failures.txt`` with the tracebacks of failed runs.

    Args:
        found: from :func:`launch`.
        out: an existing folder.
        failures: failed runs are appended to it; None raises for them after the results are written.

    Returns:
        The results of the runs that finished.

    Raises:
        TadPluginError: runs failed and ``failures`` is None.
    """
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
        raise TadPluginError(explain(f"{len(found)} runs to finish", got, f"See {report}, then repeat the command"))
    return results


def _attempt(task: Task, threads: int, progress: bool, overwrite: bool) -> dict[str, Any] | Failure:
    """The results of one run, or its failure, which does not stop the other runs."""
    torch.set_num_threads(threads)
    try:
        return task.execute(progress=progress, overwrite=overwrite)
    except Exception as error:
        raise_if_stopped()
        return _failure(task, error)


def _failure(task: Task, error: BaseException) -> Failure:
    error = named_memory_error(error) or error
    message = str(error) if isinstance(error, TadPluginError) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(task, message, trace)


def _in_processes(tasks: Sequence[Task], jobs: int, progress: bool, overwrite: bool) -> list[dict[str, Any] | Failure]:
    with worker_pool(jobs) as pool:
        futures = {pool.submit(_attempt, t, threads_each(jobs), False, overwrite): i for i, t in enumerate(tasks)}
        found: dict[int, dict[str, Any] | Failure] = {}
        for future in bar(as_completed(futures), "runs", progress, len(tasks)):
            raise_if_stopped()
            error = future.exception()  # a process that died, out of memory for example
            i = futures[future]
            found[i] = future.result() if error is None else _failure(tasks[i], error)
    return [found[i] for i in range(len(tasks))]


def _with_ray(
    tasks: Sequence[Task], jobs: int | None, progress: bool, overwrite: bool
) -> list[dict[str, Any] | Failure]:
    ray = _ray()
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
                    waiting[remote.remote(t.absolute(), 1, False, overwrite)] = i
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


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "cluster", "--launcher ray") from error
    return ray
