"""The command line in a session of its own, for tests that send it real signals and count what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from tests.warm import Process, start_program

BOUND = 20.0
"""Seconds after a signal or the parent's death in which no process may be left; 5 hold on an idle machine."""


def members(group: int) -> list[int]:
    """Processes of a group that are alive (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    """Seconds until the condition holds. Fails after ``seconds``."""
    began = monotonic()
    while not condition():
        assert monotonic() - began < seconds, "it took too long"
        sleep(0.01)
    return monotonic() - began


@contextmanager
def command(*arguments: str, forks: bool = True) -> Iterator[Process]:
    """``tad-plugin`` with these arguments, as the leader of a new group. Afterwards the group is killed.

    Args:
        arguments: those of the command line.
        forks: its workers are forks; False starts them as a user's would, which takes seconds of imports for each.
    """
    process = start_program("tad_plugin.cli", *arguments, forks=forks)
    try:
        yield process
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
