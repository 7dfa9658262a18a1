"""The trial of ``tad-plugin audit``: an image folder whose labels are partly wrong, without names or a test split.

Takes images of each class from a folder or zip, gives them random names, moves a share of them to a wrong class, and
runs the audit on the result. The verdicts are compared with the labels that the images really have, and with the
scores of cleanlab from the same cross-fitted probabilities.

    python reproduce/benchmarks/audit_trial.py cifar10-jpeg-mini.zip --out runs/audit-trial
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.diagnostics import average_precision
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.data.image_tree import open_tree
from tad_plugin.experiments.audit.audit import AuditConfig, audit
from tad_plugin.experiments.audit.correct import write_corrected
from tad_plugin.experiments.config import RunConfig
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions


def make_folder(source: Path, target: Path, per_class: int, rate: float, seed: int) -> dict[str, str]:
    """Writes the folder. Returns file name -> right class."""
    draw, truth = random.Random(seed), {}
    with open_tree(source) as tree:
        names = sorted({name.split("/")[1] for name in tree.files if name.startswith("train/")})
        for name in names:
            files = sorted(f for f in tree.files if f.startswith(f"train/{name}/"))[:per_class]
            for file in files:
                observed = draw.choice([n for n in names if n != name]) if draw.random() < rate else name
                random_name = f"{draw.getrandbits(64):016x}{Path(file).suffix}"
                place = target / "train" / observed
                place.mkdir(parents=True, exist_ok=True)
                (place / random_name).write_bytes(tree.read(file))
                truth[random_name] = name
    return truth


def cleanlab_scores(probabilities: Tensor, observed: Tensor) -> dict[str, Tensor]:
    """cleanlab's label quality scores, turned so that greater = more doubtful."""
    from cleanlab.rank import get_label_quality_scores

    found = {}
    for method in ("self_confidence", "normalized_margin"):
        quality: Any = get_label_quality_scores(observed.numpy(), probabilities.double().numpy(), method=method)
        found[f"cleanlab {method}"] = -torch.as_tensor(quality)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/audit-trial"))
    parser.add_argument("--results", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--per_class", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    default = AuditConfig()
    for name in ("folds", "networks", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--epochs", type=int, default=default.scorer.epochs)
    parser.add_argument("--width", type=int, default=default.scorer.width)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.out / f"images-{args.seed}"
    listing = args.out / f"truth-{args.seed}.json"
    if not listing.exists():
        truth = make_folder(args.images, folder, args.per_class, args.rate, args.seed)
        atomic_write(listing, json.dumps(truth))
    truth = json.loads(listing.read_text())
    began = perf_counter()
    scorer = ScorerConfig(epochs=args.epochs, width=args.width)
    settings = AuditConfig("tad", args.folds, args.networks, args.rounds, scorer)
    name = f"audit-{args.seed}-{args.folds}-{args.networks}-{args.rounds}-{args.epochs}-{args.width}"
    dataset = f"folder:{folder}"
    found = audit(RunConfig(dataset=dataset, seed=args.seed, device="cpu"), settings, args.out / name)
    seconds = perf_counter() - began
    rows = found.rows
    right = [truth[Path(row["path"]).name] for row in rows]
    wrong = torch.tensor([row["class"] != name for row, name in zip(rows, right, strict=True)])
    place = found.verdicts.order
    scores: dict[str, Tensor] = {"audit": found.verdicts.doubt[place]}
    scores |= {n: s[place] for n, s in cleanlab_scores(found.probabilities, found.observed).items()}
    written = write_corrected(rows, dataset, str(args.out / f"{name}-corrected"), "csv")
    kept = [(r, n) for r, n in zip(rows, right, strict=True) if r["verdict"] in ("keep", "relabel")]
    after = [(r["proposed_class"] if r["verdict"] == "relabel" else r["class"]) == n for r, n in kept]
    relabelled = [r["proposed_class"] == n for r, n in kept if r["verdict"] == "relabel"]
    result = {
        "average_precision": {n: average_precision(s, wrong) for n, s in scores.items()},
        "label_accuracy_before": float((~wrong).double().mean()),
        "label_accuracy_after": sum(after) / len(after),
        "relabel_precision": sum(relabelled) / max(1, len(relabelled)),
        "images": len(rows),
        "written": written,
        "estimated_noise_rate": found.results["noise_rate"],
        "seconds": seconds,
        "settings": {k: str(v) for k, v in vars(args).items()},
        "versions": versions("cpu"),
        "command": command_line(),
    }
    print(json.dumps(result, indent=1))
    if args.results:
        atomic_write(args.results, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
