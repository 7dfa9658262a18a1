"""Worker processes: fresh ones, and their share of the cores."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from tad_plugin.utils.workers import SPAWN, Terminated, stoppable, threads_each, worker_pool

_NOTES: list[str] = []


def _remember(value: str) -> None:
    _NOTES.append(value)


def _recall(suffix: str) -> tuple[int, list[str]]:
    return os.getpid(), [*_NOTES, suffix]


def test_a_pool_of_fresh_processes_runs_the_initializer_in_each() -> None:
    assert SPAWN.get_start_method() == "spawn"
    _remember("parent")  # a forked process would inherit it
    with worker_pool(1, _remember, ("child",)) as pool:
        process, notes = pool.submit(_recall, "here").result()
    assert process != os.getpid() and notes == ["child", "here"] and _NOTES == ["parent"]


@pytest.mark.parametrize(("cores", "jobs", "each"), [(8, 1, 8), (8, 3, 2), (2, 8, 1), (None, 1, 1)])
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int | None, jobs: int, each: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert threads_each(jobs) == each


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_whose_exception_was_lost_is_raised_at_the_end(number: int, error: type[BaseException]) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under nohup and in background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    lost = contextlib.suppress(KeyboardInterrupt, Terminated)
    with pytest.raises(error), stoppable(signal.SIGINT, signal.SIGTERM), lost:
        os.kill(os.getpid(), number)  # as a destructor would lose it
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with stoppable(signal.SIGINT):  # nothing of it is left
        pass
