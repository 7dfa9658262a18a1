"""Worker processes on one machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

__all__ = ["SPAWN", "spawn_pool", "threads_each"]

SPAWN = multiprocessing.get_context("spawn")
"""Starts processes afresh: a forked one would inherit locked thread pools and could not use CUDA."""


def threads_each(jobs: int) -> int:
    """Threads for each of ``jobs`` processes that share the machine's cores; at least 1."""
    return max(1, (os.cpu_count() or 1) // jobs)


def spawn_pool(
    jobs: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool of ``jobs`` fresh processes. Each runs ``initializer(*initargs)`` first."""
    return ProcessPoolExecutor(jobs, mp_context=SPAWN, initializer=initializer, initargs=initargs)
