"""Runs a script of a public codebase in this process, repeatably if a seed is given."""

from __future__ import annotations

import os
import random
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.upstream.script import Script, belongs
from tad_plugin.upstream.switches import Switch
from tad_plugin.utils.workers import Terminated

__all__ = ["forget_modules", "run_script", "seeded_run"]


def run_script(
    script: Script, arguments: Sequence[str] = (), *, switches: Sequence[Switch] = (), seed: int | None = None
) -> int:
    """Runs a script as ``python script.py arguments...`` would from its own folder, in this process.

    Args:
        script: the script.
        arguments: its command line.
        switches: the switches that are on while it runs.
        seed: in [0, 2**32), makes the run repeatable (:func:`seeded_run`); None leaves clock and generators alone.

    Returns:
        Its exit status.

    Raises:
        InvalidInputError: the seed is out of range.
    """
    argv, path, folder = sys.argv, list(sys.path), os.getcwd()
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch.on(script))
        if seed is not None:
            stack.enter_context(seeded_run(script.root, seed))
        try:
            sys.argv, sys.path[:] = [str(script.path), *arguments], [str(script.path.parent), *path]
            os.chdir(script.path.parent)
            forget_modules(script.root)
            runpy.run_path(str(script.path), run_name="__main__")
        except Terminated:
            raise
        except SystemExit as stop:
            if stop.code is None or isinstance(stop.code, int):
                return stop.code or 0
            print(stop.code, file=sys.stderr)
            return 1
        finally:
            sys.argv, sys.path[:] = argv, path
            os.chdir(folder)
            forget_modules(script.root)
    return 0


@contextmanager
def seeded_run(root: Path, seed: int) -> Iterator[None]:
    """Seeds the global generators and replaces the checkout's clock, so that a run can be repeated.

    The public codebases seed augmentations and networks from the clock. For code under ``root``, ``time.time`` is a
    counter; other code sees the real time. The generators' states are restored afterwards.

    Args:
        root: folder of the checkout, absolute.
        seed: in [0, 2**32).

    Raises:
        InvalidInputError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise InvalidInputError(explain("a seed in [0, 2**32)", str(seed), "Pass another one"))
    real, ticks = time.time, 0

    def clock() -> float:
        nonlocal ticks
        if not belongs(Path(os.path.abspath(sys._getframe(1).f_code.co_filename)), root):
            return real()
        ticks += 1
        # not a whole number of milliseconds, because the scripts make seeds of those
        return 1_500_000_000.0 + ticks * 0.0137

    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002 - the script's generator
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the script draws from it
    try:
        torch.manual_seed(seed)  # also seeds CUDA
        with mock.patch.object(time, "time", clock):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def forget_modules(root: Path) -> None:
    """Unloads the modules of a checkout, because codebases share module names (utils, networks).

    Args:
        root: folder of the checkout, absolute.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        # a folder without __init__.py has no file, but places
        places = [file] if isinstance(file, str) else list(getattr(module, "__path__", None) or ())
        if any(isinstance(place, str) and belongs(Path(place).resolve(), root) for place in places):
            del sys.modules[name]
    # entries such as "../" mean another folder to the next script
    for entry in [e for e in sys.path_importer_cache if not os.path.isabs(e)]:
        del sys.path_importer_cache[entry]
