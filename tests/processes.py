"""The command line in a session of its own, for tests that send it real signals and count what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from tests import ROOT

BOUND = 20.0
"""Seconds after a signal or the parent's death in which no process may be left; 5 hold on an idle machine."""

# A background shell ignores SIGINT, and its children would inherit that. With 2 cores, 2 jobs have one thread each.
MAIN = """if __name__ == "__main__":
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.cpu_count = lambda: 2
    from tad_plugin.cli import main
    sys.exit(main())
"""


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
def command(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """``tad-plugin`` with these arguments, as the leader of a new group. Afterwards the group is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
