"""Digests of what tiny runs give, to hold a refactoring against the code before it: same bits, or which differ.

    python reproduce/benchmarks/same_bits.py --out before.json           # in the old checkout
    python reproduce/benchmarks/same_bits.py --out after.json --against before.json

Runs every loop with every method on digits at a tiny setting, through the command line, in the checkout from which it
is started. A digest covers the tensors of the synthetic set, those of the state, and the accuracies. Equal digests
are expected on one machine with one version of torch only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOOPS = ("dm", "idm", "dc", "dsa", "mtt", "datm")
ARMS = ("noisy", "tad", "iwd", "tad+iwd")

COMMON = (
    "--dataset digits --per_class 20 --noise symmetric:0.4 --ipc 2 --iterations 6 --width 4 --eval_epochs 3 "
    "--eval_runs 1 --candidates 2 --seed 3 --device cpu"
)
METHODS = {
    "tad": {"warmup": 1, "history": 2},
    "iwd": {"every": 2, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2},
    "scorer": {"epochs": 4, "width": 4, "batch_size": 32, "refresh_every": 3},
}
TRAJECTORIES = {
    "syn_steps": 2,
    "expert_epochs": 1,
    "max_start_epoch": 3,
    "lr_teacher": 0.02,
    "lr_lr": 1e-5,
    "experts": {"experts": 2, "batch_train": 16, "lr": 0.1, "momentum": 0.5},
}
LOOP_SETTINGS = {
    "dm": {"batch_real": 8},
    "idm": {"batch_real": 8},
    "dc": {"batch_real": 8, "outer": 2, "inner": 2},
    "dsa": {"batch_real": 8, "outer": 2, "inner": 2},
    "mtt": TRAJECTORIES,
    "datm": TRAJECTORIES | {"init": "real", "threshold": 10.0, "lr_y": 0.1, "ema_decay": 0.9},
}


def digest_of(folder: Path) -> dict[str, str]:
    """Sha256 of the synthetic set, of the state and of the accuracies of a finished run folder."""
    from safetensors.torch import load_file

    found = {}
    for name in ("synthetic", "state"):
        digest = hashlib.sha256()
        for key, tensor in sorted(load_file(folder / f"{name}.safetensors").items()):
            digest.update(f"{key}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        found[name] = digest.hexdigest()
    accuracy = json.loads((folder / "results.json").read_text())["accuracy"]
    found["accuracy"] = json.dumps(accuracy, sort_keys=True)
    return found


def methods_of(loop: str, arm: str) -> dict[str, object]:
    """The settings that have an effect on this arm of this loop; others are refused."""
    names = set(arm.split("+"))
    if "tad" in names and loop not in ("mtt", "datm"):
        names.add("scorer")
    return {name: own for name, own in METHODS.items() if name in names}


def run_one(loop: str, arm: str, folder: Path) -> dict[str, str]:
    """Runs one arm of one loop and gives its digests."""
    command = [sys.executable, "-m", "tad_plugin.cli", "distill", *COMMON.split(), "--baseline", loop]
    command += ["--arm", arm, "--loop", json.dumps(LOOP_SETTINGS[loop])]
    command += ["--methods", json.dumps(methods_of(loop, arm)), "--out", str(folder)]
    if loop in ("mtt", "datm"):
        command += ["--lr_img", "10.0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{loop}/{arm} failed:\n{done.stderr[-3000:]}")
    return digest_of(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the digests")
    parser.add_argument("--against", type=Path, help="digests of an earlier run to compare with")
    parser.add_argument("--loops", default=",".join(LOOPS), help="loops joined by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    values = parser.parse_args()
    wanted = [(loop, arm) for loop in values.loops.split(",") for arm in ARMS]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(values.jobs) as pool:
        digests = pool.map(lambda pair: run_one(*pair, Path(scratch) / "-".join(pair)), wanted)
        found = {f"{loop}/{arm}": digest for (loop, arm), digest in zip(wanted, digests, strict=True)}
    values.out.write_text(json.dumps(found, indent=1) + "\n")
    if values.against is None:
        return
    before = json.loads(values.against.read_text())
    differing = [f"{key}: {part}" for key, parts in found.items() for part in parts if parts[part] != before[key][part]]
    print("\n".join(differing) or f"{len(found)} runs, all with the same bits")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
