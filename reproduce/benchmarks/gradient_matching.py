"""Cost of an update of DC, without a method and with the two forms of the derivative in the real samples' weights.

Run ``python reproduce/benchmarks/gradient_matching.py``; prints a table and writes JSON.

Four arms take turns, so that a busy machine slows all of them. The first is a direct loop: each class in one pass, all
classes differentiated at the end by ``backward``. The second is the loop of this package without a method. The other
two add a method that asks for the explicit influence of the batch; its derivative is taken by a forward-mode pass
("forward") or through a graph of the real gradient ("graph"). The gradient of the target, which IWD also needs, is not
counted. The images are random: no arithmetic depends on what they show. Seconds are medians; on one CPU thread they are
processor time, which other programs hardly change. A first round warms up and is not counted. Peak memory is measured
in a process of its own for each arm, above what it held before its first update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dc import DC, DCConfig
from tad_plugin.distill.gradient_distance import layerwise_distance
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.nn.networks import reinitialise
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, peak_memory_bytes, reset_peak_memory, versions


class Influence(Callback):
    """Asks for the explicit influence of every batch on a fixed linear target."""

    name: ClassVar[str] = "influence"
    needs_graph: ClassVar[bool] = True
    found: Tensor

    def on_match(self, *, state: SampleState, match: Match) -> None:
        self.found = explicit_influence(
            match.loss, match.weights, match.synthetic[0], torch.ones_like(match.synthetic[0])
        )


def loop_of(args: argparse.Namespace, form: str = "") -> DC:
    generator = torch.Generator().manual_seed(0)
    count = args.classes * args.batch_real
    images = torch.randn(count, 3, 32, 32, generator=generator).to(args.device)
    labels = (torch.arange(count) % args.classes).to(args.device)
    data = RealData(images, labels, args.classes)
    callbacks = [Influence()] if form else []
    hook = Hook(SampleState(labels, args.classes), data, callbacks, method="influence" if form else "none").start()
    config = DCConfig(
        ipc=args.ipc, width=args.width, batch_real=args.batch_real, outer=1, weight_derivative=form or "forward"
    )
    synthetic = SyntheticSet(
        *initial_images(config, data, hook, generator), args.classes, Preprocessing((0.0,) * 3, (1.0,) * 3)
    )
    return DC(config, data, hook, synthetic, generator)


def direct(loop: DC) -> Callable[[int], None]:
    """Makes one update of the same loop, written in the usual way."""

    def step(_iteration: int) -> None:
        images, ipc, data = loop.synthetic.images, loop.config.ipc, loop.data
        reinitialise(loop.network, loop.generator)
        parameters = list(loop.network.parameters())
        total = torch.zeros((), device=images.device)
        for c in range(data.num_classes):
            pool = (data.labels == c).nonzero().flatten()
            drawn = pool[torch.randperm(len(pool), generator=loop.generator).to(pool.device)]
            slopes = []
            for x, graph in ((data.images[drawn], False), (images[c * ipc : (c + 1) * ipc], True)):
                loss = F.cross_entropy(loop.network(x), torch.full((len(x),), c, device=x.device))
                slopes.append(torch.autograd.grad(loss, parameters, create_graph=graph))
            total = total + layerwise_distance(slopes[1], slopes[0])
        loop.optimizer.zero_grad()
        total.backward()
        loop.optimizer.step()
        loop.network.zero_grad(set_to_none=True)

    return step


ARMS = ("direct loop", "no method", "influence, forward", "influence, graph")


def arm_of(args: argparse.Namespace, name: str) -> tuple[DC, Callable[[int], Any]]:
    loop = loop_of(args, name.partition(", ")[2])
    return loop, direct(loop) if name == "direct loop" else loop.step


def timed(step: Callable[[int], Any], device: str) -> float:
    clock = process_time if device == "cpu" and torch.get_num_threads() == 1 else perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    step(0)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def peak(args: argparse.Namespace, name: str) -> int:
    """Measures the bytes of an arm's first update, in a fresh process because freed memory would hide some."""
    _, step = arm_of(args, name)
    reset_peak_memory(args.device)
    before = peak_memory_bytes(args.device) or 0
    step(0)
    return max(0, (peak_memory_bytes(args.device) or 0) - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch_real", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak_of", default="", choices=["", *ARMS], help="print one arm's peak memory in bytes")
    parser.add_argument("--out", type=Path, default=Path("gradient_matching.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args, args.peak_of))
        return
    made = {name: arm_of(args, name) for name in ARMS}
    loops = {name: loop for name, (loop, _) in made.items()}
    seen: dict[str, list[float]] = {name: [] for name in ARMS}
    for round_number in range(args.repeats + 1):
        for name, (_, step) in made.items():
            seconds = timed(step, args.device)
            if round_number:
                seen[name].append(seconds)
    peaks = {}
    for name in ARMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak_of", name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = {name: loop.hook.callbacks[0].found for name, loop in loops.items() if loop.hook.enabled}  # type: ignore[attr-defined]
    forward, graph = found.values()
    arms = {name: {"seconds": statistics.median(runs), "peak_bytes": peaks[name]} for name, runs in seen.items()}
    same = float((forward - graph).abs().max() / graph.abs().max())
    images = [loop.synthetic.images.detach() for name, loop in loops.items() if name != "direct loop"]
    equal = all(torch.equal(images[0], other) for other in images[1:])
    plain = arms["no method"]
    print(f"{'':20} {'s/update':>9} {'of no method':>13} {'MiB':>7}")
    for name, row in arms.items():
        ratio = row["seconds"] / plain["seconds"]
        print(f"{name:20} {row['seconds']:9.3f} {ratio:12.2f}x {row['peak_bytes'] / 2**20:7.0f}")
    print(f"influences differ by {same:.1e} of the largest; images equal to the last bit without and with: {equal}")
    setting = {k: v for k, v in vars(args).items() if k not in ("out", "peak_of")}
    result = {"setting": setting, "arms": arms, "influence_difference": same, "equal_bits": equal,
              "versions": versions(args.device), "command": command_line()}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
