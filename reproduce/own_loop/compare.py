"""Compares the user's script without and with TAD, and behind cleanlab's filter: digits with 40% wrong labels, 5 seeds.

    python reproduce/own_loop/compare.py --out reproduce/results/own_loop    # 2 cores: about 8 minutes

Every arm trains the same network on the same loader with random crops and CutMix. A seed fixes the wrong labels, the
initial network and the order of the samples.

noisy:     ``train.py`` as it is.
tad:       ``train_tad.py``, which differs in the lines that the report counts.
cleanlab:  ``train.py`` without the samples that ``find_label_issues`` names. Its probabilities are out of sample: three
           folds, each judged by a network of the same script that was trained on the others for a quarter of the
           epochs.
oracle:    ``train.py`` without all mislabelled samples.
"""

from __future__ import annotations

import argparse
import difflib
import json
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from reproduce.own_loop import train, train_tad
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import missing_extra
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import versions

FOLDS = 3
ARMS = ("noisy", "tad", "cleanlab", "oracle")


def changed_lines() -> int:
    """Lines of ``train_tad.py`` that differ from ``train.py``; a replaced line counts once."""
    one, two = (Path(m.__file__).read_text(encoding="utf-8").splitlines() for m in (train, train_tad))
    steps = difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for tag, a, b, c, d in steps if tag != "equal")


def issues(seed: int, epochs: int, noise: str) -> list[int]:
    """Positions that cleanlab's filter names."""
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise missing_extra("cleanlab", "reproduce", "the arm cleanlab") from error
    splits = load_dataset("digits")
    labels = splits.apply_noise(NoiseSpec.parse(noise, seed=seed))[0].labels
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) % FOLDS
    probabilities = np.zeros((len(labels), 10))
    for number in range(FOLDS):
        judged = (fold == number).nonzero().flatten().tolist()
        probabilities[judged] = train.main(
            seed, epochs // 4, noise, leave_out=judged, predict=splits.train_images[judged]
        )
    return [int(i) for i in find_label_issues(labels.numpy(), probabilities).nonzero()[0]]


def accuracy(arm: str, seed: int, epochs: int, noise: str) -> float:
    """Accuracy on the test images in percent."""
    if arm == "tad":
        return train_tad.main(seed, epochs, noise)
    leave_out: list[int] = []
    if arm == "cleanlab":
        leave_out = issues(seed, epochs, noise)
    elif arm == "oracle":
        splits = load_dataset("digits")
        noisy = splits.apply_noise(NoiseSpec.parse(noise, seed=seed))[0].labels
        leave_out = (noisy != splits.train_labels).nonzero().flatten().tolist()
    return train.main(seed, epochs, noise, leave_out=leave_out)


def main() -> None:
    """Runs what is missing in ``--out`` and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and table.md")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--noise", default="symmetric:0.4")
    parser.add_argument("--arms", default=",".join(ARMS))
    args = parser.parse_args()
    file = args.out / "results.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    for seed in range(args.seeds):
        for arm in args.arms.split(","):
            key = {"arm": arm, "seed": seed, "epochs": args.epochs, "noise": args.noise}
            if any(key.items() <= r.items() for r in runs):
                continue
            began = perf_counter()
            value = accuracy(arm, seed, args.epochs, args.noise)
            runs.append({**key, "accuracy": value, "seconds": perf_counter() - began})
            print(f"{arm} seed {seed}: {value:.1f} % in {runs[-1]['seconds']:.0f} s", flush=True)
            about = {"changed_lines": changed_lines(), "versions": versions(torch.device("cpu"))}
            text = json.dumps({**about, "runs": runs}, indent=1)
            args.out.mkdir(parents=True, exist_ok=True)
            atomic_write(file, text)
    lines = [f"TAD in {changed_lines()} changed lines of the script.", "", "| arm | accuracy | n | seconds |"]
    lines.append("|---|--:|--:|--:|")
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm and r["noise"] == args.noise and r["epochs"] == args.epochs]
        if mine:
            values = [r["accuracy"] for r in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            seconds = statistics.mean(r["seconds"] for r in mine)
            lines.append(f"| {arm} | {statistics.mean(values):.1f} ± {spread:.1f} | {len(mine)} | {seconds:.0f} |")
    text = "\n".join(lines) + "\n"
    atomic_write(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
