#!/usr/bin/env python3
"""Memory and time of one update of trajectory matching, in the constant-memory form and in the plain form.

Each measurement is a process of its own. Time is processor time of one update (loss and gradients of images and
learning rate) after one warm-up update of a single step. Memory is the peak of resident memory during the update, above
what the process held before it. Freed memory is returned to the system at once (MALLOC_MMAP_THRESHOLD_), so resident
memory is memory in use.

The two forms are compared at the first number of steps: in float64 with chunks, as they are run, and in float32 with
whole steps. In float32 chunks round differently. If that moves a number past a kink of a ReLU, both forms are as far
from the float64 gradient as from each other.

    python reproduce/benchmarks/trajectory_memory.py --out trajectory_memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tad_plugin.distill.student import Student, flat_parameters, matching_loss, plan_steps
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import make_network
from tad_plugin.nn.passes import pass_size
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import peak_memory_bytes, reset_peak_memory, versions

CLASSES, SIDE = 10, 32


def update(
    arguments: argparse.Namespace, form: str, steps: int, *, dtype: torch.dtype = torch.float32, whole: bool = False
) -> list[torch.Tensor]:
    """Computes the loss of one update and its gradients; ``whole`` takes whole steps instead of chunks."""
    generator = torch.Generator().manual_seed(0)
    width, count, augmentation = arguments.width, CLASSES * arguments.ipc, Augmentation(align_corners=True)
    network = make_network(
        "convnet", in_channels=3, num_classes=CLASSES, image_size=SIDE, width=width, generator=generator
    )
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator).to(dtype).requires_grad_()
    labels = torch.randn(count, CLASSES, generator=generator).to(dtype).requires_grad_()
    rate = torch.tensor(0.01, dtype=dtype, requires_grad=True)
    start = flat_parameters(list(network.parameters())).to(dtype)
    target = start + 0.01 * torch.randn(start.shape, generator=generator).to(dtype)
    student = Student(network.to(dtype), augmentation, chunk=0 if whole else pass_size(images, width))
    plan = plan_steps(count, steps, arguments.batch_syn, augmentation, (SIDE, SIDE), generator=generator)
    loss = matching_loss(student, start, target, images, labels, rate, plan, form=form)
    return [loss.detach(), *torch.autograd.grad(loss, [images, rate, labels])]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures seconds and bytes of one update in this process."""
    torch.set_num_threads(1)
    update(arguments, arguments.form, 1)
    before = _resident()
    reset_peak_memory()
    began = time.process_time()
    update(arguments, arguments.form, arguments.steps[0])
    seconds = time.process_time() - began
    return {"seconds": seconds, "bytes": (peak_memory_bytes() or 0) - before}


def _resident() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status: this benchmark needs Linux")


def in_process(arguments: argparse.Namespace, form: str, steps: int, threshold: str) -> dict[str, Any]:
    """Runs :func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--form", form, "--steps", str(steps)]
    for name in ("width", "ipc", "batch_syn"):
        command += [f"--{name}", str(getattr(arguments, name))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"MALLOC_MMAP_THRESHOLD_": threshold} if threshold else {})}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures every form and number of steps, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch_syn", type=int, default=0, help="images per step; 0 for all")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--plain_steps", type=int, nargs="+", default=[10], help="steps of the plain form")
    parser.add_argument("--repeats", type=int, default=3, help="alternating timings; the smallest counts")
    parser.add_argument("--out", default="")
    parser.add_argument("--form", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments)))
        return
    cells = [("plain", s) for s in arguments.plain_steps] + [("constant", s) for s in arguments.steps]
    rows = [
        {"form": form, "steps": steps, "bytes": in_process(arguments, form, steps, str(2**18))["bytes"]}
        for form, steps in cells
    ]
    for row in rows:
        row["seconds"] = float("inf")
    for _ in range(arguments.repeats):
        for row in rows:
            if row["steps"] in arguments.plain_steps or row["form"] == "plain":
                row["seconds"] = min(row["seconds"], in_process(arguments, row["form"], row["steps"], "")["seconds"])
    differences = {}
    for name, more in {"float64": {"dtype": torch.float64}, "float32": {"whole": True}}.items():
        pairs = zip(
            *(update(arguments, form, arguments.steps[0], **more) for form in ("constant", "plain")), strict=True
        )
        found = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
        differences[name] = dict(zip(("loss", "images", "rate", "labels"), found, strict=True))
    print(f"ConvNet-3 width {arguments.width}, IPC {arguments.ipc}, {CLASSES} classes, {SIDE}x{SIDE}, one thread")
    print(f"{'form':10}{'steps':>6}{'MiB':>10}{'s':>9}{'s/plain':>9}")
    plain = {row["steps"]: row["seconds"] for row in rows if row["form"] == "plain"}
    for row in rows:
        timed = row["seconds"] < float("inf")
        ratio = row["seconds"] / plain[row["steps"]] if timed else None
        row["seconds"], row["of_plain"] = (row["seconds"] if timed else None), ratio
        shown = f"{row['seconds']:9.2f}{ratio:9.2f}" if ratio is not None else f"{'':>18}"
        print(f"{row['form']:10}{row['steps']:6}{row['bytes'] / 2**20:10.1f}{shown}")
    flat = [row["bytes"] for row in rows if row["form"] == "constant"]
    growth = max(flat) / flat[0] - 1
    print(f"constant form, largest memory over that at {arguments.steps[0]} steps: {growth:+.1%}")
    for name, by_tensor in differences.items():
        print(f"largest relative difference, {name}: " + ", ".join(f"{k} {v:.1e}" for k, v in by_tensor.items()))
    if arguments.out:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "form")}
        result = {"settings": settings, "rows": rows, "growth": growth, "differences": differences}
        atomic_write(arguments.out, json.dumps({**result, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
