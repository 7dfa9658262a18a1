"""Worker processes on one machine, and their end.

The parent decides when workers end. They ignore Ctrl-C, and each watches its parent: when that is gone, killed for
example, the worker ends at once. A parent that is interrupted or terminated ends its workers before it goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, TypeVar

__all__ = ["SPAWN", "Terminated", "handlers_kept", "raise_if_stopped", "stoppable", "threads_each", "worker_pool"]

SPAWN = multiprocessing.get_context("spawn")
"""Starts processes afresh: a forked one would inherit locked thread pools and could not use CUDA."""

LAST_SECONDS = 3.0
"""Seconds after a signal in which the process may end in an orderly way. Then it ends at once."""

T = TypeVar("T")


class Terminated(SystemExit):
    """SIGTERM arrived. Not an ``Exception``, like KeyboardInterrupt; a program that lets it pass exits with 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def threads_each(jobs: int) -> int:
    """Threads for each of ``jobs`` processes that share the machine's cores; at least 1."""
    return max(1, (os.cpu_count() or 1) // jobs)


# -- signals -----------------------------------------------------------------------------------------

_RECEIVED: list[int] = []
"""Signals that arrived inside the present :func:`stoppable`."""


@contextmanager
def stoppable(*signals: int) -> Iterator[None]:
    """Context in which a signal ends the work in an orderly way, but within :data:`LAST_SECONDS`.

    The first signal raises KeyboardInterrupt (SIGINT) or :class:`Terminated` (SIGTERM). A second one ends the process
    at once. Handlers that the program has set itself stay, and so do ignored signals. Outside the main thread, where
    Python allows no handlers, nothing is done.

    Args:
        signals: SIGINT, SIGTERM, or both.

    Raises:
        KeyboardInterrupt, Terminated: after a signal, whatever else was raised since.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in signals}
    before = {number: handler for number, handler in before.items() if handler in default}
    last: list[threading.Timer] = []

    def handle(number: int, _frame: object) -> None:
        if _RECEIVED:
            os._exit(128 + number)
        _RECEIVED.append(number)
        # An exception raised in a destructor is lost, and a clean-up may hang.
        last.append(threading.Timer(LAST_SECONDS, os._exit, [128 + number]))
        last[0].daemon = True
        last[0].start()
        raise_if_stopped()

    try:
        for number in before:
            signal.signal(number, handle)
        yield
        raise_if_stopped()  # the exception was lost in a destructor
    except Exception:
        raise_if_stopped()  # C++ code turns a KeyboardInterrupt into errors of its own
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in last:
            timer.cancel()
        if before:
            _RECEIVED.clear()


def raise_if_stopped() -> None:
    """Raises what a signal inside :func:`stoppable` asked for, if one arrived. For code that catches other errors.

    Raises:
        KeyboardInterrupt, Terminated: SIGINT or SIGTERM arrived.
    """
    if _RECEIVED:
        raise KeyboardInterrupt if _RECEIVED[0] == signal.SIGINT else Terminated


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Undoes the handlers of SIGINT and SIGTERM that the body sets. Ray, for one, sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Holds Ctrl-C back. A process that is started meanwhile inherits this, so it is never hit while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # when it starts, it lets all signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- processes ---------------------------------------------------------------------------------------


class _Pool(ProcessPoolExecutor):
    def submit(self, fn: Callable[..., T], /, *args: Any, **more: Any) -> Future[T]:
        with _interrupt_held_back():
            return super().submit(fn, *args, **more)


@contextmanager
def worker_pool(
    jobs: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    patience: float = 0.0,
) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``jobs`` fresh processes, none of which outlives the body.

    At the end of the body it waits for all work. If the body raises, work that has not begun is dropped and the
    processes are killed. SIGTERM raises :class:`Terminated` in the body.

    Args:
        jobs: number of processes.
        initializer: runs first in each process, with ``initargs``.
        initargs: its arguments.
        patience: seconds that processes get to end by themselves before they are killed.
    """
    with stoppable(signal.SIGTERM):
        pool = _Pool(jobs, mp_context=SPAWN, initializer=_begin, initargs=(initializer, initargs))
        try:
            yield pool
            pool.shutdown()
        except BaseException:
            processes = list((pool._processes or {}).values())
            try:
                pool.shutdown(wait=False, cancel_futures=True)
                _join(processes, patience)
            finally:  # also after a second Ctrl-C
                for process in processes:
                    process.kill()
                _join(processes, 1.0)
            raise


def _join(processes: Sequence[BaseProcess], seconds: float) -> None:
    end = monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - monotonic()))


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """Runs first in each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    # The sentinel tells at once, unless another child of the parent holds it open.
    while os.getppid() == parent.pid and not connection.wait([parent.sentinel], 1.0):
        pass
    os._exit(1)
