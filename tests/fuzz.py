"""Random calls of the public API: each gives finite results or a named error, within five seconds.

    python -m tests.fuzz --calls 10000            # about ten minutes
    python -m tests.fuzz --calls 1 --first 4711   # one call again

Call number i draws everything from a generator seeded with i. Most calls are right but for one or two arguments.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin import Hook, SampleState
from tad_plugin.errors import TadPluginError
from tests.fuzz_calls import CALLS
from tests.fuzz_values import Draw

SECONDS = 5.0


class Late(BaseException):
    """A call took too long."""


#: PyTorch's own arithmetic on the caller's numbers, and a callback's own tensors
ARITHMETIC = ("forward", "reweight", "weighted_loss", "inverse", "Preprocessing", "register")
#: results whose documentation gives NaN or infinity a meaning
SPECIAL = {"calibrate_threshold": {"threshold", "threshold_agree", "precision", "corrected", "noise_rate", "scores"}}


def unsound(value: Any, special: set[str], name: str = "result") -> str:
    """Where a result holds a NaN, or ""."""
    if name in special:
        return ""
    if isinstance(value, Tensor):
        bad = value.is_floating_point() and value.device.type != "meta" and bool(torch.isnan(value).any())
        return name if bad else ""
    if isinstance(value, float):
        return name if math.isnan(value) else ""
    if isinstance(value, SampleState):
        whole = bool(torch.isfinite(value.weight).all()) and min(len(p) for p in value.pools()) > 0
        return "" if whole else "state"
    if isinstance(value, Hook):
        return unsound(value.state, special, "hook")
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = zip(names, value, strict=True)
    elif type(value).__module__.startswith("tad_plugin.") and hasattr(value, "__dict__"):
        parts = vars(value).items()
    return next((found for key, part in parts if (found := unsound(part, special, str(key)))), "")


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    # The time of the processor: others may use the machine.
    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def one_call(seed: int, only: str = "") -> tuple[str, str, str]:
    """Makes call number ``seed``: (function, "result", "named" or what went wrong, details)."""
    draw = Draw(seed)
    group = only or draw.random.choice(sorted(CALLS))
    function, arguments = CALLS[group](draw)
    name = getattr(function, "__qualname__", type(function).__name__)
    changed = []
    for key in draw.random.sample(sorted(arguments), min(len(arguments), draw.random.choice([0, 1, 1, 1, 2]))):
        arguments[key] = draw.broken(arguments[key])
        if key == "config" and arguments[key] is None:  # the defaults: right, and long
            arguments[key] = "text"
        changed.append(key)
    keyword = draw.random.random() < 0.01
    if keyword:
        arguments["no_such_argument"] = 1
    at = f"{group}: {name}({', '.join(f'{k}={_short(arguments[k])}' for k in changed)})"
    try:
        with warnings.catch_warnings(), in_time(SECONDS):
            warnings.simplefilter("ignore")
            result = function(**arguments)
    except TadPluginError:
        return name, "named", at
    except Late:
        return name, f"over {SECONDS:g} s", at
    except TypeError as error:
        if keyword:
            return name, "named", at
        return name, "raw TypeError", f"{at}\n{_where(error)}"
    except Exception as error:
        return name, f"raw {type(error).__name__}", f"{at}\n{_where(error)}"
    if name.endswith(ARITHMETIC) or any(result is value for value in arguments.values()):
        return name, "result", at
    special = SPECIAL.get(getattr(function, "__name__", ""), set())
    place = unsound(result, special)
    return name, f"NaN in {place}" if place else "result", at


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)[:60]


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "tad_plugin" in f.filename]
    last = frames[-1] if frames else None
    place = f"{Path(last.filename).name}:{last.lineno}" if last else "?"
    return f"    {type(error).__name__}: {str(error)[:200]} at {place}"


def run(calls: int, first: int = 0, only: str = "") -> list[tuple[int, str, str]]:
    """Makes ``calls`` calls; returns (number, what went wrong, details) of those that were wrong."""
    wrong = []
    for seed in range(first, first + calls):
        _, outcome, details = one_call(seed, only)
        if outcome not in ("result", "named"):
            wrong.append((seed, outcome, details))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", default="", choices=["", *sorted(CALLS)], help="one group of calls")
    values = parser.parse_args()
    torch.set_num_threads(1)
    began, counts = time.perf_counter(), Counter[str]()
    for seed in range(values.first, values.first + values.calls):
        name, outcome, details = one_call(seed, values.only)
        counts[outcome] += 1
        if outcome not in ("result", "named"):
            print(f"{seed} {outcome}: {details}", flush=True)
        elif values.calls == 1:
            print(name, outcome, details)
    print(f"{values.calls} calls in {time.perf_counter() - began:.0f} s: {dict(counts)}")
    sys.exit(bool(set(counts) - {"result", "named"}))


if __name__ == "__main__":
    main()
