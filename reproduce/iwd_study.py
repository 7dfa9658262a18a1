"""Study behind tad_plugin/iwd/README.md: variants of IWD and the baseline on a small fixed part of CIFAR-10.

Run ``bash reproduce/iwd_cifar10.sh`` (or this file with ``--help``). Each variant and seed is one entry of the results
file, written when it is finished. A second start runs the missing ones. A seed fixes the noise, the initial images, the
draws of DM and the evaluation networks, equally for all variants. The split into training and held-out images is the
same for all seeds. Accuracies are measured on the test images, which choose nothing. For choosing, the file also has
the accuracy on the held-out images, whose labels are as noisy as the training ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dm import DM, DMConfig
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.evaluate import EvaluateConfig, accuracy, train_on_synthetic
from tad_plugin.nn.networks import make_network
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import versions
from tad_plugin.utils.seeds import seeded_generator

NOISE = "symmetric:0.4"
BASE = {"networks": 2, "early": 10, "every": 500, "ess": 0.9, "saturate": 0.0}


def iwd(v: str = "observed", noise: str = NOISE, method: str = "iwd", **settings: Any) -> dict[str, Any]:
    return {"method": method, "v": v, "noise": noise, "iwd": settings}


# name -> method, settings that override BASE, label noise, source of V. "observed": any sample with its observed label.
# "trusted": only samples that are known to be labelled correctly, about as many.
VARIANTS: dict[str, dict[str, Any]] = {
    "noisy": {},
    "iwd": iwd(),
    "iwd, V trusted": iwd("trusted"),
    "iwd reversed": iwd(sign=-1),
    "clean": {"noise": "none"},
    "clean iwd": iwd(noise="none"),
    "clean iwd reversed": iwd(noise="none", sign=-1),
    "tad": {"method": "tad"},
    "tad+iwd": iwd(method="tad+iwd"),
}
for share, left in ((0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.0, 0.9), (0.5, 0.6), (0.5, 0.75), (0.5, 0.9)):
    text = f"ess {left}, saturate {share}"
    VARIANTS[f"iwd {text}"] = iwd(ess=left, saturate=share)
    VARIANTS[f"iwd {text}, V trusted"] = iwd("trusted", ess=left, saturate=share)
    VARIANTS[f"clean iwd {text}"] = iwd(noise="none", ess=left, saturate=share)
    VARIANTS[f"clean iwd {text} reversed"] = iwd(noise="none", ess=left, saturate=share, sign=-1)
    VARIANTS[f"tad+iwd {text}"] = iwd(method="tad+iwd", ess=left, saturate=share)
VARIANTS |= {
    "iwd 1 network": iwd(networks=1),
    "iwd 4 networks": iwd(networks=4),
    "iwd V 30%": iwd(held_out=0.3),
    "iwd every 40": iwd(early=0, every=40),
    "iwd from the first refresh": iwd(warmup=0),
    "iwd from the fifth refresh": iwd(warmup=4),
    "iwd one refresh of 4 networks": iwd(early=0, warmup=0, networks=4),
    "iwd decay 0.8": iwd(decay=0.8),
    "iwd target matching": iwd(target="matching"),
    "iwd in the batch": iwd(mode="batch", every=1),
}
DEFAULT = ["noisy", "iwd", "iwd, V trusted", "clean", "clean iwd", "clean iwd reversed"]


def seeded(*parts: Any) -> torch.Generator:
    return seeded_generator(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big"))


def observed_labels(labels: Tensor, noise: str, seed: int) -> Tensor:
    return labels.clone() if noise == "none" else NoiseSpec.parse(noise, seed=seed).apply(labels, 10).labels


def study(splits: DataSplits, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one variant with one seed."""
    variant, x, true = VARIANTS[name], splits.train_images, splits.train_labels
    noise, method = variant.get("noise", NOISE), variant.get("method", "none")
    observed = observed_labels(true, noise, seed)
    held_out = observed_labels(splits.holdout_labels, noise, seed + 1000)
    settings = {"iwd": {**BASE, **variant.get("iwd", {})}} if "iwd" in method else {}
    records: list[dict[str, Any]] = []
    hook: Hook = attach(
        method, labels=observed, data=x, num_classes=10, seed=seed + 77, config=settings, true_labels=true,
        dataset="cifar10", ipc=10, log=records.append,
    )  # fmt: skip
    if variant.get("v") == "trusted":
        drawn = torch.rand(len(true), generator=seeded_generator(seed + 9)) < 0.166
        hook.state.register("held_out", drawn & (observed == true))
    loop_generator = seeded(seed, "loop")
    config = DMConfig(ipc=10, iterations=args.iterations, lr_img=1.0, width=32, batch_real=args.batch_real)
    assert hook.data is not None
    start, labels = initial_images(config, hook.data, hook, loop_generator)
    first = SyntheticSet(start, labels, 10, splits.preprocessing, "cifar10")
    loop = DM(config, hook.data, hook, first, loop_generator)
    began = perf_counter()
    for iteration in range(config.iterations):
        loop.step(iteration)
    seconds = perf_counter() - began
    evaluation = EvaluateConfig(width=32, epochs=args.eval_epochs)
    test, choose = [], []
    for run in range(args.eval_runs):
        generator = seeded(seed, "eval", run)
        network = make_network(
            "convnet", in_channels=3, num_classes=10, image_size=32, width=32, norm="instance", generator=generator
        )
        train_on_synthetic(network, loop.result(), evaluation, generator)
        test.append(accuracy(network, splits.test_images, splits.test_labels))
        choose.append(accuracy(network, splits.holdout_images, held_out))
    quality = [r for r in records if r["event"] == "influence_quality"]
    return {
        "variant": name, "seed": seed, "batch_real": args.batch_real, "test": test, "held_out": choose,
        "auc": [r["auc"] for r in quality], "clean_weight": [r["clean_weight"] for r in quality],
        "loop_seconds": seconds, "scoring_seconds": hook.scoring_seconds, "settings": settings.get("iwd"),
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each variant, in the order of VARIANTS."""
    lines = [
        "| variant | seeds | test accuracy, mean (each seed) | held-out | AUC first -> last refresh"
        " | scoring s / loop s |",
        "|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        found = sorted((r for r in results if r["variant"] == name), key=lambda r: r["seed"])
        if not found:
            continue
        each = [statistics.mean(r["test"]) for r in found]
        held = statistics.mean(statistics.mean(r["held_out"]) for r in found)
        auc = "-"
        if found[0]["auc"] and found[0]["auc"][0] == found[0]["auc"][0]:
            first, last = (statistics.mean(r["auc"][k] for r in found) for k in (0, -1))
            auc = f"{first:.3f} -> {last:.3f}"
        cost = [statistics.mean(r[k] for r in found) for k in ("scoring_seconds", "loop_seconds")]
        lines.append(
            f"| {name} | {len(found)} | {statistics.mean(each):.1f} ({', '.join(f'{v:.1f}' for v in each)}) |"
            f" {held:.1f} | {auc} | {cost[0]:.0f} / {cost[1]:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="cifar10", help="cifar10, or folder:PATH of an image folder or a zip of it"
    )
    parser.add_argument("--root", default="data", help="where cifar10 is, or is downloaded to")
    known = ", ".join(VARIANTS).replace("%", "%%")  # argparse formats the help text
    parser.add_argument("--variants", default=";".join(DEFAULT), help=f"joined by semicolons, of {known}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch_real", type=int, default=64)
    parser.add_argument("--eval_epochs", type=int, default=300)
    parser.add_argument("--eval_runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "iwd_cifar10.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [n.strip() for n in args.variants.split(";")]
    if unknown := [n for n in names if n not in VARIANTS]:
        raise InvalidInputError(explain(f"variants out of {list(VARIANTS)}", str(unknown), "Correct --variants"))
    splits = load_dataset(args.dataset, args.root, per_class=1000, seed=0)
    setting = {k: getattr(args, k) for k in ("iterations", "batch_real", "eval_epochs", "eval_runs")}
    found = json.loads(args.out.read_text()) if args.out.is_file() else {"setting": setting, "runs": []}
    if found["setting"] != setting:
        raise InvalidInputError(explain(f"results of {setting}", f"{found['setting']}", "Choose another --out"))
    for seed in (int(s) for s in args.seeds.split(",")):
        for name in names:
            if any(r["variant"] == name and r["seed"] == seed for r in found["runs"]):
                continue
            result = study(splits, name, seed, args)
            print(json.dumps({k: v for k, v in result.items() if k != "settings"}), flush=True)
            found["runs"].append(result)
            found["versions"] = versions("cpu")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(args.out, json.dumps(found, indent=1) + "\n")
            atomic_write(args.out.with_suffix(".md"), table(found["runs"]) + "\n")
    print(table(found["runs"]))


if __name__ == "__main__":
    main()
