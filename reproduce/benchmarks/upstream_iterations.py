"""Compares seconds per iteration of the bundled loops and the public scripts: DM, DC and IDM at the same settings.

Run ``python reproduce/benchmarks/upstream_iterations.py --dm CHECKOUT --idm CHECKOUT``; prints a table and writes JSON.
The first is VICO-UoE/DatasetCondensation (main_DM.py and main.py), the second uitrbn/IDM (IDM_cifar10.py); without one
its rows are left out.

Each script runs unchanged in a process of its own. After each of its iterations the same process makes one iteration of
the bundled loop, so that a busy machine slows both alike. Start-up, evaluation and the first iteration of both are not
counted. The images are random: no arithmetic depends on what they show. On a CPU one thread works and seconds are
processor time. On a GPU they are wall time after its queue has run dry. A row of DC is one update of the images with
its share of the network's training (``--outer`` updates per network, ``--inner`` epochs between them).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.attach import attach
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, baseline_class
from tad_plugin.upstream.stand_ins import error_meters
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions

CLASSES, SIDE = 10, 32
SCRIPTS = {
    "dm": ("dm", "main_DM.py"),
    "dc": ("dm", "main.py"),
    "dsa": ("dm", "main.py"),
    "idm": ("idm", "IDM_cifar10.py"),
}
TARGET = {"cpu": 0.8, "cuda": 0.5}


class Done(BaseException):
    """Raised after enough iterations; not an Exception, so that no script catches it."""


class RandomImages(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Replaces torchvision's CIFAR10."""

    classes = [str(c) for c in range(CLASSES)]  # noqa: RUF012  (as there)
    per_class = 256

    def __init__(self, *_args: Any, train: bool = True, **_more: Any) -> None:
        self.targets = list(range(CLASSES)) * (self.per_class if train else 2)
        self.images = torch.randn(len(self.targets), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(int(train)))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.targets[i]


def bundled(name: str, args: argparse.Namespace) -> Baseline:
    """Makes our loop with the same settings."""
    cls = baseline_class(name)
    settings: dict[str, Any] = {"ipc": args.ipc, "width": args.width, "batch_real": args.batch_real}
    if name in ("dc", "dsa"):
        settings |= {"outer": args.outer, "inner": args.inner}
    if name == "idm":
        settings |= {"train_steps": args.train_steps, "batch_train": args.batch_train}
    config, generator = cls.Config(**settings), torch.Generator().manual_seed(0)
    found = RandomImages()
    data = RealData(found.images.to(args.device), torch.tensor(found.targets), CLASSES, dataset="cifar10")
    plain = Preprocessing((0.0,) * 3, (1.0,) * 3)
    hook = attach("none", labels=data.labels, data=data.images, num_classes=CLASSES)
    start = SyntheticSet(*cls.initial_images(config, data, hook, generator), CLASSES, plain, "cifar10")
    return cls(config, data, hook, start, generator)


def command(name: str, script: str, args: argparse.Namespace, folder: str) -> list[str]:
    """Makes the script's command line: it evaluates no network, and is stopped before its own end."""
    flags: dict[str, Any] = {
        "dataset": "CIFAR10",
        "model": f"ConvNetW{args.width}",
        "ipc": args.ipc,
        "batch_real": args.batch_real,
        "num_exp": 1,
        "num_eval": 0,
        "init": "real",
        "Iteration": 10_000,
        "data_path": f"{folder}/data",
        "save_path": f"{folder}/out",
        "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
    }
    if name == "dm":
        flags |= {"lr_img": 1.0}
    elif name == "idm":
        flags |= {"lr_img": 0.2, "mismatch_lambda": 0, "embed_last": 1000, "ce_weight": 0.5, "train_net_num": 1}
        flags |= {"eval_interval": 20_000, "model_train_steps": args.train_steps, "trained_bs": args.batch_train}
    else:
        flags |= {"method": name.upper(), "init": "noise" if name == "dc" else "real"}
    line = [script, *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]
    return line + (["--net_train_real", "--net_decay", "--syn_ce", "--aug"] if name == "idm" else [])


def watch(name: str, args: argparse.Namespace, boundary: Callable[[], None]) -> None:
    """Calls ``boundary`` at the start of each iteration of the script."""
    if name == "idm":
        # the script shuffles the queue of networks twice per iteration and nowhere else
        import random

        shuffle, calls = random.shuffle, [0]

        def shuffled(*given: Any) -> None:
            calls[0] += 1
            if calls[0] % 2:
                boundary()
            shuffle(*given)

        random.shuffle = shuffled  # type: ignore[assignment]
        return
    import utils  # type: ignore[import-not-found]  # of the checkout

    made = utils.get_network

    def get_network(*given: Any, **more: Any) -> Any:
        boundary()
        return made(*given, **more)

    utils.get_network = get_network
    if name in ("dc", "dsa"):
        utils.get_loops = lambda _ipc: (args.outer, args.inner)


def worker(name: str, checkout: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Measures seconds per iteration of both, in this process."""
    import torchvision

    torch.set_num_threads(args.threads)
    gpu = args.device.startswith("cuda")
    share = args.outer if name in ("dc", "dsa") else 1  # updates in one of the script's iterations
    if gpu or args.threads > 1:
        clock: Callable[[], float] = perf_counter
    else:
        clock = process_time

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return clock()

    loop = bundled(name, args)
    times: dict[str, list[float]] = {"upstream": [], "bundled": []}
    state = {"since": 0.0, "rounds": -1, "steps": 0}

    def boundary() -> None:
        ended = now()
        rounds = int(state["rounds"])
        if rounds > 0:
            times["upstream"].append((ended - state["since"]) / share)
        if rounds >= 0:
            began = now()
            for _ in range(share):
                loop.step(int(state["steps"]))
                state["steps"] += 1
            if rounds > 0:
                times["bundled"].append((now() - began) / share)
        if rounds == args.iterations:
            raise Done
        state["rounds"] += 1
        state["since"] = now()

    if "scipy.ndimage.interpolation" not in sys.modules:
        stub = types.ModuleType("scipy.ndimage.interpolation")
        stub.rotate = None  # type: ignore[attr-defined]  # imported by the scripts, and not used here
        sys.modules["scipy.ndimage.interpolation"] = stub
    RandomImages.per_class = max(args.batch_real, args.ipc)
    torchvision.datasets.CIFAR10 = RandomImages
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for part in ("data", "out"):
            Path(folder, part).mkdir()
        stack.enter_context(error_meters())
        stack.enter_context(redirect_stdout(sys.stderr))
        sys.path.insert(0, str(checkout))
        watch(name, args, boundary)
        script = checkout / SCRIPTS[name][1]
        sys.argv = command(name, str(script), args, folder)
        os.chdir(folder)
        with suppress(Done):
            runpy.run_path(str(script), run_name="__main__")
    return times


def run(name: str, checkout: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one row of the table."""
    line = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", name, str(checkout)]
    for key in ("iterations", "ipc", "width", "batch_real", "batch_train", "train_steps", "outer", "inner", "threads"):
        line += [f"--{key}", str(getattr(args, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*line, "--device", args.device], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{SCRIPTS[name][1]} stopped:\n{done.stderr[-4000:]}")
    times = json.loads(done.stdout.splitlines()[-1])
    row: dict[str, Any] = {"loop": name, "script": SCRIPTS[name][1], "iterations": len(times["bundled"])}
    row |= {side: statistics.median(values) for side, values in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["bundled"], times["upstream"], strict=True)]
    return {**row, "ratio": row["bundled"] / row["upstream"], "spread": [min(ratios), max(ratios)], "seconds": times}


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Formats the rows as text."""
    lines = [f"{'loop':<6}{'script':<16}{'upstream s':>11}{'bundled s':>11}{'ratio':>7}  {'min - max':<13}"]
    for row in rows:
        low, high = row["spread"]
        lines.append(
            f"{row['loop']:<6}{row['script']:<16}{row['upstream']:>11.3f}{row['bundled']:>11.3f}{row['ratio']:>7.2f}"
            f"  {low:.2f} - {high:.2f}"
        )
    return "\n".join([*lines, f"aim: a ratio of at most {TARGET['cuda' if device.startswith('cuda') else 'cpu']}"])


def main() -> None:
    """Runs every loop whose checkout is given; prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dm", type=Path, help="checkout of VICO-UoE/DatasetCondensation")
    parser.add_argument("--idm", type=Path, help="checkout of uitrbn/IDM")
    parser.add_argument("--loops", default="dm,dc,idm", help="which of dm, dc, dsa, idm")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--width", type=int, default=128, choices=(32, 64, 128, 256))
    parser.add_argument("--batch_real", type=int, default=256)
    parser.add_argument("--batch_train", type=int, default=256, help="IDM: real images per step of a network")
    parser.add_argument("--train_steps", type=int, default=10, help="IDM: steps of a network in an iteration")
    parser.add_argument("--outer", type=int, default=2, help="DC: updates of the images per network")
    parser.add_argument("--inner", type=int, default=2, help="DC: epochs of the network between them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("upstream_iterations.json"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = worker(args.worker[0], Path(args.worker[1]), args)
        print(json.dumps(found))
        return
    checkouts = {"dm": args.dm, "idm": args.idm}
    wanted = [name for name in args.loops.split(",") if checkouts[SCRIPTS[name][0]] is not None]
    if not wanted:
        parser.error("pass --dm CHECKOUT or --idm CHECKOUT")
    rows = []
    for name in wanted:
        rows.append(run(name, checkouts[SCRIPTS[name][0]].resolve(), args))
        print(table(rows[-1:], args.device).splitlines()[1], flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("dm", "idm", "out", "worker")}
    text = table(rows, args.device)
    print("\n" + text)
    result = {"settings": settings, "rows": rows, "versions": versions(args.device), "command": command_line()}
    atomic_write(args.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
