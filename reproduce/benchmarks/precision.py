"""Compares test accuracy in bfloat16 with that in float32: the same runs, seeds and evaluations. Writes JSON.

    python reproduce/benchmarks/precision.py --seeds 3

Distils digits with DM at the defaults of its preset, but ``--iterations`` updates. Evaluations are float32 in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.run import run
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--baseline", default="dm")
    parser.add_argument("--arm", default="noisy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("reproduce/results/precision.json"))
    args = parser.parse_args()
    accuracy: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(args.seeds):
        for precision, found in accuracy.items():
            given = {"baseline": args.baseline, "iterations": args.iterations, "ipc": args.ipc, "device": args.device}
            config = RunConfig(**given, seed=seed, precision=precision, candidates=1)
            with tempfile.TemporaryDirectory() as folder:
                results = run(config, args.arm, Path(folder) / "run")
            found.append(statistics.mean(results["accuracy"]["last"]))
            print(f"seed {seed}, {precision}: {found[-1]:.2f} %", flush=True)
    mean = {name: statistics.mean(found) for name, found in accuracy.items()}
    result = {"accuracy": accuracy, "mean": mean, "difference": mean["bf16"] - mean["fp32"], "command": command_line()}
    result["settings"] = {k: v for k, v in vars(args).items() if k != "out"}
    result["versions"] = versions(args.device)
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")
    print(f"bf16 - fp32: {result['difference']:+.2f} points")


if __name__ == "__main__":
    main()
