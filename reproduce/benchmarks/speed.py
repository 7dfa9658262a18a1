"""All timings of the project in one command, on a CPU or a GPU. Writes JSON with versions, device and command.

    python reproduce/benchmarks/speed.py --device cpu --width 16 --tables abe            # minutes on a CPU
    python reproduce/benchmarks/speed.py --device cuda --tables abcde --dm ../DatasetCondensation

Tables:

a  seconds per iteration and peak memory of each loop with none, tad and iwd, at CIFAR shape. All cells take turns in
   one process, so that a busy machine slows them alike; a ratio is to "none" of the same loop. With ``--dm`` and
   ``--idm`` also beside the public scripts (upstream_iterations.py, in processes of its own).
b  what makes an iteration wait for its device, copies that do not, and kernels: counted on the emulated device, and on
   a GPU also as its profiler saw them
c  an epoch of experts with 1, 2 and 4 jobs, and the evaluation of 5 networks
d  a round of TAD beside scikit-learn, and its memory (tad_round.py, in processes of its own)
e  growth with N: bytes of state and pools, seconds of pools, of a draw for all classes, of the mixture and of weights

On a CPU one thread works and seconds are processor time. On a GPU they are between CUDA events. IWD refreshes every
2,000 iterations; its row is an iteration between two refreshes, and "refresh" is one with a refresh on one network.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tad_plugin.core.state import SampleState  # noqa: E402  (the folder above is not installed)
from tad_plugin.data.synthetic import SyntheticSet  # noqa: E402
from tad_plugin.distill.experts.train import train_experts  # noqa: E402
from tad_plugin.distill.experts.trainer import ExpertConfig  # noqa: E402
from tad_plugin.evaluate import EvaluateConfig, evaluate  # noqa: E402
from tad_plugin.iwd.weighting import weights_from_scores  # noqa: E402
from tad_plugin.tad.mixture import fit_class_mixture  # noqa: E402
from tad_plugin.utils.files import atomic_write  # noqa: E402
from tad_plugin.utils.machine import command_line, peak_memory_bytes, reset_peak_memory, versions  # noqa: E402
from tests.emulated_device import DEVICE, counted, emulated_device  # noqa: E402
from tests.loops import LOOPS, Problem  # noqa: E402

METHODS = ("none", "tad", "iwd")
Row = dict[str, Any]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: between CUDA events, or processor time."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3
    began = time.process_time()
    run()
    return time.process_time() - began


def problem(args: argparse.Namespace, device: torch.device) -> Problem:
    """The problem of tables a to c: CIFAR shape, random images, the sizes that were asked for."""
    shape = (3, args.size, args.size)
    per_class = max(args.batch_real, args.per_class)
    config = {"scorer": {"epochs": 2}, "tad": {"warmup": 1}}
    return Problem(device, args.classes, per_class, shape, args.width, args.ipc, args.batch_real, config)


def table_a(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Seconds per iteration and peak memory of each loop with each method."""
    rows: list[Row] = []
    for name in args.loops:
        steps: dict[str, Callable[[], Any]] = {}
        memory: dict[str, int | None] = {}
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for method in METHODS:
            known = reset_peak_memory(device)
            loop = problem(args, device).loop(name, method)
            number = iter(range(1, 1_000_000))
            steps[method] = lambda loop=loop, number=number: loop.step(next(number))
            steps[method]()
            memory[method] = peak_memory_bytes(device) if known else None
        for _ in range(args.repeats):
            for method, step in steps.items():
                seconds[method].append(timed(step, device))
        loop.hook.iteration = 2000
        refresh = timed(steps["iwd"], device)
        for method, found in seconds.items():
            row = {"loop": name, "method": method, "seconds": statistics.median(found), "peak_bytes": memory[method]}
            row["ratio"] = row["seconds"] / statistics.median(seconds["none"])
            rows.append(row | ({"refresh_seconds": refresh} if method == "iwd" else {}))
            show("a", rows[-1])
    return rows


def table_b(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Waits, queued copies and kernels of an iteration: a short one on the emulated device, and on a GPU."""
    rows: list[Row] = []
    for name in args.loops:
        for method in METHODS:
            with emulated_device():
                loop = Problem(DEVICE, args.classes).loop(name, method)
                loop.step(0)
                with counted() as found:
                    loop.step(1)
                    loop.step(2)
            waiting, queued = sum(found.waiting.values()) / 2, sum(found.queued.values()) / 2
            row: Row = {"loop": name, "method": method, "waiting": waiting, "queued": queued}
            row["kernels"] = found.kernels / 2
            if device.type == "cuda":
                row |= profiled(problem(args, device), name, method)
            rows.append(row)
            show("b", row)
    return rows


def profiled(given: Problem, name: str, method: str) -> Row:
    """Kernels, their microseconds, and calls that wait, of one iteration, from the profiler of the GPU."""
    from torch.profiler import ProfilerActivity, profile

    loop = given.loop(name, method)
    loop.step(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        loop.step(1)
    events = found.key_averages()
    calls = {e.key: e.count for e in events}
    launched = sum(count for key, count in calls.items() if key in ("cudaLaunchKernel", "cuLaunchKernel"))
    waits = {key: n for key, n in calls.items() if "Synchronize" in key and "Device" not in key}
    busy = sum(getattr(e, "self_device_time_total", 0.0) for e in events)
    return {"gpu_launches": launched, "gpu_waits": waits, "gpu_busy_seconds": busy / 1e6}


def table_c(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Wall seconds of two epochs of four experts side by side, and of the evaluation of 5 networks."""
    rows: list[Row] = []
    given = problem(args, device)
    for jobs in args.jobs:
        hook = given.hook("none", trains=True)
        assert hook.data is not None
        config = ExpertConfig(experts=4, epochs=args.expert_epochs, width=args.width)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train_experts(hook.data, config, Path(folder) / "buffer", hook, jobs=jobs)
            rows.append({"what": "4 experts", "jobs": jobs, "epochs": args.expert_epochs})
            rows[-1]["seconds"] = time.perf_counter() - began
            show("c", rows[-1])
    loop = given.loop("dm")
    settings = EvaluateConfig(width=args.width, runs=5, epochs=args.eval_epochs)
    found: SyntheticSet = loop.result()
    test = (loop.data.images, loop.data.labels)
    generator = torch.Generator().manual_seed(0)
    seconds = timed(lambda: evaluate(found, test, settings, generator=generator), device)
    rows.append({"what": "evaluation of 5 networks", "epochs": args.eval_epochs, "seconds": seconds})
    show("c", rows[-1])
    return rows


def table_d(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rounds of TAD at the sizes asked for; the first beside scikit-learn."""
    rows: list[Row] = []
    for i, size in enumerate(args.rounds):
        n, k, d = map(int, size.split("/"))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "round.json"
            command = [sys.executable, str(ROOT / "reproduce/benchmarks/tad_round.py"), "--out", str(out)]
            command += ["--samples", str(n), "--classes", str(k), "--dims", str(d)]
            subprocess.run(command + ([] if i == 0 else ["--no-scikit"]), check=True, cwd=ROOT)
            rows.append({"samples": n, "classes": k, "dims": d, **json.loads(out.read_text())})
    return rows


def table_e(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Growth with the number of samples."""
    rows: list[Row] = []
    for size in args.growth:
        n, k = map(int, size.split("/"))
        rows.append(growth(n, k, args.batch_real, device))
        show("e", rows[-1])
    return rows


def growth(n: int, k: int, batch: int, device: torch.device) -> Row:
    """Bytes and seconds at one size."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)])
    values = torch.randn(n, generator=generator).abs().to(device)
    state = SampleState(labels.to(device), k)
    tensors = [state[name] for name in (*SampleState.FIELDS, "observed")]
    row: Row = {"samples": n, "classes": k, "state_bytes": sum(t.nbytes for t in tensors)}
    row["pools_seconds"] = timed(state.pools, device)
    row["pools_bytes"] = sum(p.nbytes for p in state.pools())

    def draw() -> None:
        state.placed([state.draw(c, batch, generator) for c in range(k)])

    draw()
    row["draw_seconds"] = statistics.mean(timed(draw, device) for _ in range(5))
    row["mixture_seconds"] = timed(lambda: fit_class_mixture(values, state.observed, k), device)
    row["weights_seconds"] = timed(lambda: weights_from_scores(values, state.observed, k), device)
    return row


def beside_scripts(args: argparse.Namespace) -> Row:
    """The result of upstream_iterations.py for the checkouts given."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "upstream.json"
        command = [sys.executable, str(ROOT / "reproduce/benchmarks/upstream_iterations.py"), "--out", str(out)]
        command += ["--device", args.device, "--ipc", str(args.ipc), "--width", str(args.width)]
        for flag in ("dm", "idm"):
            command += [f"--{flag}", str(getattr(args, flag))] if getattr(args, flag) else []
        subprocess.run(command, check=True, cwd=ROOT)
        found: Row = json.loads(out.read_text())
        return found


def save(path: Path, found: Row) -> None:
    """Writes the JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found, indent=1) + "\n")


def show(table: str, row: Row) -> None:
    """Prints a row as soon as it is known: a table may take long."""
    print(table, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tables", default="abcde", help="which tables, one letter each")
    parser.add_argument("--loops", type=lambda text: text.split(","), default=list(LOOPS))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per_class", type=int, default=256, help="real images per class")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch_real", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--expert_epochs", type=int, default=2)
    parser.add_argument("--eval_epochs", type=int, default=20)
    parser.add_argument("--rounds", nargs="+", default=["50000/100/2048", "1300000/1000/512"], help="N/K/D of table d")
    parser.add_argument("--growth", nargs="+", default=["50000/100", "200000/200", "1300000/1000"], help="N/K, table e")
    parser.add_argument("--dm", type=Path, help="checkout of DatasetCondensation, for table a")
    parser.add_argument("--idm", type=Path, help="checkout of IDM, for table a")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/speed.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available: use --device cpu")
    if unknown := sorted(set(args.tables) - set("abcde")):
        parser.error(f"tables out of a, b, c, d, e; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: Row = {"command": command_line(), "versions": versions(device), "threads": torch.get_num_threads()}
    found["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    makers = {"a": table_a, "b": table_b, "c": table_c, "d": table_d, "e": table_e}
    for letter in dict.fromkeys(args.tables):
        found[letter] = makers[letter](args, device)
        found["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        save(args.out, found)  # after each table, so that a stopped run leaves what it has
    if "a" in args.tables and (args.dm or args.idm):
        found["a_beside_scripts"] = beside_scripts(args)
        save(args.out, found)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
