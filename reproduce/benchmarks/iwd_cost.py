"""Measures the cost of IWD in DM: one refresh against DM iterations, extrapolated to the published length.

Run ``python reproduce/benchmarks/iwd_cost.py``; it prints tables and writes JSON and Markdown.

Two DM loops on the same data take turns, one without a hook and one with IWD, so that a busy machine slows both. The
cost of IWD in an iteration is the time inside its event, which the hook counts. A refresh passes all N samples through
a fresh network. So its time is measured at ``--samples`` and at half of them, and scaled linearly from the larger one
to ``--full``. A DM iteration does not depend on N. Images are random: no running time depends on their content.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dm import DM, DMConfig
from tad_plugin.iwd.config import DEFAULT_EVERY, IWDConfig
from tad_plugin.iwd.method import IWD
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import peak_memory_bytes, reset_peak_memory, versions

CLASSES = 10


def peak_bytes(device: str, reset: bool = False) -> int:
    """Peak memory since the last reset: allocated on the GPU, or resident in the process."""
    if reset:
        reset_peak_memory(device)
    return peak_memory_bytes(device) or 0


def loop_of(args: argparse.Namespace, n: int, method: bool) -> tuple[DM, Hook]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 32, 32, generator=generator).to(args.device)
    labels = (torch.arange(n) % CLASSES).to(args.device)
    # Every second iteration is due, so that each kind is seen as often.
    settings = {"iwd": {"every": 2, "early": 0, "networks": 1, "warmup": 0}} if method else None
    name = "iwd" if method else "none"
    hook = attach(name, labels=labels, data=images, num_classes=CLASSES, config=settings)
    config = DMConfig(ipc=args.ipc, width=args.width, batch_real=args.batch_real)
    data = RealData(images, labels, CLASSES)
    start, own = initial_images(config, data, hook, generator)
    synthetic = SyntheticSet(start, own, CLASSES, Preprocessing((0.0,) * 3, (1.0,) * 3))
    return DM(config, data, hook, synthetic, generator), hook


def timed(loop: DM, iteration: int, device: str) -> tuple[float, int]:
    peak_bytes(device, reset=True)
    if device == "cuda":
        torch.cuda.synchronize()
    began = perf_counter()
    loop.step(iteration)
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began, peak_bytes(device)


def measure(args: argparse.Namespace, n: int) -> dict[str, Any]:
    """Seconds of a plain iteration, of an iteration with IWD but no refresh, and of a refresh on one network."""
    plain, _ = loop_of(args, n, False)
    weighted, hook = loop_of(args, n, True)
    found: dict[str, list[float]] = {"plain": [], "idle": [], "refresh": [], "plain_peak": [], "refresh_peak": []}
    for iteration in range(2 * (args.refreshes + 1)):
        seconds, peak = timed(plain, iteration, args.device)
        before = hook.scoring_seconds
        whole, weighted_peak = timed(weighted, iteration, args.device)
        inside = hook.scoring_seconds - before
        if iteration < 2:  # warm-up, one iteration of each kind
            continue
        found["plain"].append(seconds)
        found["plain_peak"].append(peak)
        due = iteration % 2 == 0
        found["refresh" if due else "idle"].append(inside if due else whole)
        if due:
            found["refresh_peak"].append(weighted_peak)
    method = next(c for c in hook.callbacks if isinstance(c, IWD))
    kept = [hook.state[k] for k in ("influence", "influence_count", "influence_weight")]
    kept += [v for v in method.state_dict()["running"].values() if isinstance(v, torch.Tensor)]
    kept += [hook.state._factors["iwd"], method.state_dict()["scored_as"]]
    return {
        "samples": n,
        "refreshes": len(found["refresh"]),
        "plain_iteration_seconds": statistics.median(found["plain"]),
        "iteration_not_due_seconds": statistics.median(found["idle"]),
        "refresh_seconds_per_network": statistics.median(found["refresh"]),
        "all_refresh_seconds": found["refresh"],
        "kept_bytes_per_sample": sum(t.numel() * t.element_size() for t in kept) / n,
        "peak_plain_bytes": max(found["plain_peak"]),
        "peak_refresh_bytes": max(found["refresh_peak"]),
    }


def schedule(every: int, early: int, iterations: int) -> int:
    method = IWD(IWDConfig(every=every, early=early))
    return sum(method.due(i) for i in range(iterations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="real samples in the measurement")
    parser.add_argument("--full", type=int, default=50000, help="real samples to extrapolate to")
    parser.add_argument("--iterations", type=int, default=20000, help="length of the run to extrapolate to")
    parser.add_argument("--refreshes", type=int, default=3, help="timed refreshes, at least 3")
    parser.add_argument("--width", type=int, default=128, help="channels of the ConvNet")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch_real", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "iwd_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    half, whole = measure(args, args.samples // 2), measure(args, args.samples)
    names = ("samples", "full", "iterations", "width", "ipc", "batch_real", "threads", "device")
    setting = {name: getattr(args, name) for name in names}
    command = "python reproduce/benchmarks/iwd_cost.py " + " ".join(sys.argv[1:])
    result = extrapolate(setting, half, whole) | {"cpu": cpu(), "versions": used(args.device), "command": command}
    text = markdown(result)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")
    atomic_write(args.out.with_suffix(".md"), text + "\n")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def used(device: str) -> dict[str, Any]:
    return {k: v for k, v in versions(device).items() if k in ("python", "torch", "numpy", "tad_plugin", "cuda", "gpu")}


def extrapolate(setting: dict[str, Any], half: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Cost of a run of full length, from the two measurements."""
    n, full, iterations = setting["samples"], setting["full"], setting["iterations"]
    seconds, smaller = whole["refresh_seconds_per_network"], half["refresh_seconds_per_network"]
    at_full = seconds * full / n
    # A part of a refresh does not grow with N (gradients on S). Linear scaling scales it too; this does not.
    affine = seconds + (seconds - smaller) / (n - half["samples"]) * (full - n)
    default = IWDConfig()

    def ratio(every: int, networks: int, each: float) -> float:
        count = schedule(every, default.early, iterations)
        return 1 + count * networks * each / (iterations * whole["plain_iteration_seconds"])

    every = default.every or DEFAULT_EVERY["all"]
    return {
        "setting": setting,
        "half": half,
        "whole": whole,
        "linear_in_samples": seconds / smaller,
        "refresh_seconds_per_network_at_full": at_full,
        "refresh_in_iterations_at_full": at_full / whole["plain_iteration_seconds"],
        "default": {
            "every": every,
            "early": default.early,
            "networks": default.networks,
            "refreshes": schedule(every, default.early, iterations),
            "ratio": ratio(every, default.networks, at_full),
            "ratio_affine": ratio(every, default.networks, affine),
        },
        "table": [
            {"every": e, "networks": k, "ratio": ratio(e, k, at_full)}
            for e in (100, 250, 500, 1000, 2000)
            for k in (1, 2, 4)
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    setting, half, whole, default = (result[k] for k in ("setting", "half", "whole", "default"))
    mib = 2**20
    extra = (whole["peak_refresh_bytes"] - whole["peak_plain_bytes"]) / mib
    lines = [
        "# Cost of IWD beside DM",
        "",
        f"DM, ConvNet-3 width {setting['width']}, IPC {setting['ipc']}, {setting['batch_real']} real images per class,"
        f" 32x32; {setting['threads']} thread(s) on {setting['device']} ({result['cpu']}), torch"
        f" {result['versions']['torch']}.",
        f"Medians of {whole['refreshes']} refreshes, two loops taking turns. Command: `{result['command'].strip()}`",
        "",
        "| | seconds |",
        "|---|---|",
        f"| DM iteration without a method | {whole['plain_iteration_seconds']:.3f} |",
        f"| DM iteration with IWD, not due | {whole['iteration_not_due_seconds']:.3f} |",
        f"| refresh, one network, {half['samples']:,} samples | {half['refresh_seconds_per_network']:.3f} |",
        f"| refresh, one network, {whole['samples']:,} samples | {whole['refresh_seconds_per_network']:.3f} |",
        f"| refresh, one network, {setting['full']:,} samples (scaled linearly) |"
        f" {result['refresh_seconds_per_network_at_full']:.2f} = {result['refresh_in_iterations_at_full']:.1f}"
        " DM iterations |",
        "",
        f"Doubling the samples took {result['linear_in_samples']:.2f} times as long.",
        f"Memory: {whole['kept_bytes_per_sample']:.0f} bytes kept per sample"
        f" ({whole['kept_bytes_per_sample'] * setting['full'] / mib:.1f} MiB for {setting['full']:,});"
        f" peak of an iteration with a refresh {whole['peak_refresh_bytes'] / mib:.0f} MiB,"
        f" without {whole['peak_plain_bytes'] / mib:.0f} MiB ({extra:+.0f} MiB).",
        "",
        f"A run of {setting['iterations']:,} iterations on {setting['full']:,} samples at the default settings"
        f" (every {default['every']}, early {default['early']}, {default['networks']} networks:"
        f" {default['refreshes']} refreshes) takes **{default['ratio']:.3f}x** of DM alone by linear scaling,"
        f" {default['ratio_affine']:.3f}x if the part of a refresh that does not grow with the samples is kept apart.",
        "Other settings, linear scaling:",
        "",
        "| every | 1 network | 2 networks | 4 networks |",
        "|---|---|---|---|",
    ]
    for every in sorted({row["every"] for row in result["table"]}):
        cells = [f"{row['ratio']:.3f}x" for row in result["table"] if row["every"] == every]
        lines.append(f"| {every} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
