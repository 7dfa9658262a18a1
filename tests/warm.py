"""Starts programs as forks of a process that has imported everything: milliseconds each, where an import takes seconds.

    process = start_program("tad_plugin.cli", "compare", "--out", "runs")    # main() in a session of its own
    process.wait()

The server is started once per test process, when it is first needed. A program is an ordinary one after the fork: it
may be killed, it handles its signals, and it ends through the interpreter's own shutdown.

``forks=True`` makes the package's worker processes forks too, instead of fresh interpreters. They start with the
default action for SIGTERM, as fresh ones do. ``start_program("tests.warm", CODE, ...)`` runs Python code.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tests import ROOT

#: imported before the first fork: what nearly every run needs
MODULES = (
    "torch._dynamo",  # the first optimizer imports it
    "sklearn.datasets",
    "jsonargparse",
    "yaml",
    "tad_plugin.cli",
    "tad_plugin.experiments.compare",
    "tad_plugin.experiments.expert_run",
    "tad_plugin.experiments.flags",
    "tad_plugin.experiments.parser",
    "tad_plugin.experiments.report.tables",
    "tad_plugin.experiments.report.page",
)


#: modules that start workers, and what they use instead of SPAWN to start them as forks
WITH_WORKERS = ("tad_plugin.utils.workers", "tad_plugin.distill.experts.workers")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


class Server:
    """The process that forks. Requests go to its input; "PID started" and "PID status" come back."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.warm"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.statuses: dict[int, int] = {}
        atexit.register(self.close)

    def close(self) -> None:
        """Ends it; programs under way go on."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.kill()
        self.process.wait()

    def start(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        while True:
            pid, status = self._line()
            if status is None:
                return pid

    def _line(self) -> tuple[int, int | None]:
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: select() does not see what a buffer has read ahead
            line += os.read(self.process.stdout.fileno(), 1)
        pid, what = line.decode().split()
        if what == "started":
            return int(pid), None
        self.statuses[int(pid)] = int(what)
        return int(pid), int(what)

    def status(self, pid: int, seconds: float) -> int | None:
        """The status of a program, as subprocess gives it; None if it still runs after ``seconds``."""
        end = monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            assert self.process.stdout is not None
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while pid not in self.statuses and selector.select(max(0.0, end - monotonic())):
                self._line()
        return self.statuses.get(pid)


_SERVER: list[Server] = []


@dataclass
class Process:
    """A program that was started.

    Attributes:
        pid: its process, which leads a group of the same number.
        output: file with what it printed, errors included.
    """

    pid: int
    output: Path | None
    server: Server

    def poll(self) -> int | None:
        """Its status, or None while it runs."""
        return self.server.status(self.pid, 0.0)

    def wait(self, seconds: float = 300.0) -> int:
        """Its status: the exit code, or -N after signal N."""
        status = self.server.status(self.pid, seconds)
        assert status is not None, f"it took over {seconds:g} s"
        return status


def start_program(
    module: str, *arguments: str, output: Path | None = None, path: Path | None = None, forks: bool = False
) -> Process:
    """Runs ``main(arguments)`` of a module in a new session.

    Args:
        module: name of the module.
        arguments: a list of strings for its ``main``.
        output: file for what it prints; None drops it.
        path: folder that is put in front of ``sys.path``.
        forks: start the package's workers as forks.
    """
    if not _SERVER:
        _SERVER.append(Server())
    request = {"module": module, "arguments": arguments, "forks": forks}
    request |= {"output": str(output or os.devnull), "path": None if path is None else str(path)}
    return Process(_SERVER[0].start(request), output, _SERVER[0])


# -- inside the server -------------------------------------------------------------------------------


def _program(request: dict[str, Any]) -> None:
    """In the fork: an ordinary process, which ends with the status of the program."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.cpu_count = lambda: 2  # so that two jobs have one thread each
    if request["path"] is not None:
        sys.path.insert(0, request["path"])
    if request["forks"]:
        workers_are_forks()
    module = importlib.import_module(request["module"])
    sys.argv = [request["module"], *request["arguments"]]
    sys.exit(module.main(request["arguments"]))


def workers_are_forks() -> None:
    """Makes the package start its workers as forks of this process, once and for all."""
    for module in WITH_WORKERS:
        importlib.import_module(module).SPAWN = FORK  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _reap(output: Any) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        print(pid, os.waitstatus_to_exitcode(status), file=output, flush=True)


def main(arguments: list[str]) -> None:
    """Runs Python code as a program: the code, and the arguments that it finds in sys.argv[1:]."""
    sys.argv = ["-c", *arguments[1:]]
    exec(arguments[0], {"__name__": "__main__"})


def serve() -> None:
    """Forks once for each line of the input, and tells when a fork has ended. Ends with the input."""
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # the collector of a fork leaves these objects, and so their memory stays shared
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == woken:
                os.read(woken, 1024)
                _reap(sys.stdout)
                continue
            line = sys.stdin.readline()
            if not line:
                return
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _program(json.loads(line))
            print(pid, "started", flush=True)


if __name__ == "__main__":
    serve()
