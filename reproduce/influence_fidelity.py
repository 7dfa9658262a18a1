"""Does a score of real samples predict what weighting by it does to a distillation?

The linear datamodelling score (LDS) of data attribution, for distillation: draw M random halves of the real data (half
of each class, or half of its clusters), distil a short run from each, train networks on the result, and measure their
loss on held-out real samples. A score predicts a subset's outcome by the sum of its members' scores. Its LDS is the
Spearman correlation, over the M runs, between predicted and measured outcome: 1 is perfect, 0 says nothing.

Beside it the curve of fifths: a distillation from each fifth of a ranking alone, best to worst. Monotone and steep is
good. And cuts: a distillation from the best share of each class by each score.

    python reproduce/influence_fidelity.py --dataset digits --ipc 10 --subsets 50 --out runs/fidelity-digits.json

Scores are signed so that *lower is better* (a loss). Each finished run is written at once; a second start goes on.
Test images are never touched: outcomes are measured on the held-out part of the training data, with labels as noisy as
the rest. The labels of the networks' training are the observed ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.stats import spearmanr
from torch import Tensor

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.hook.attach import attach
from tad_plugin.core.scorer import Scorer, ScorerConfig, score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import baseline_class
from tad_plugin.evaluate import EvaluateConfig, train_on_synthetic
from tad_plugin.iwd.explicit import embedding_directions
from tad_plugin.iwd.scoring import embedding_of, held_out_folds
from tad_plugin.iwd.targets import target_gradient
from tad_plugin.iwd.weighting import standardise
from tad_plugin.nn.networks import make_network
from tad_plugin.tad.mixture import fit_class_mixture
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions
from tad_plugin.utils.seeds import generator_of

FIFTHS = 5


class Study:
    """One setting: data, observed labels, loop. Everything derives from the arguments and their seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.splits: DataSplits = load_dataset(args.dataset, args.root, per_class=args.per_class or None, seed=0)
        noisy, noisy_holdout = self.splits.apply_noise(NoiseSpec.parse(args.noise, seed=args.seed))
        self.labels = noisy.labels
        self.held_labels = noisy_holdout.labels if noisy_holdout is not None else self.splits.holdout_labels
        self.images, self.k = self.splits.train_images, self.splits.num_classes
        self.real = RealData(self.images, self.labels, self.k, dataset=self.splits.name)
        self.groups = self._grouped()

    def network(self, generator: torch.Generator) -> torch.nn.Module:
        c, h, w = (int(v) for v in self.images.shape[1:])
        return make_network(
            "convnet", in_channels=c, num_classes=self.k, image_size=(h, w), width=self.args.width,
            depth=3 if min(h, w) >= 16 else 2, norm="instance", generator=generator,
        )  # fmt: skip

    # -- outcomes ------------------------------------------------------------------------------------
    def outcome(self, members: Tensor, *key: Any) -> dict[str, float]:
        """Distils from ``members`` (bool [N]) alone; held-out loss and accuracy of networks trained on the result."""
        args, generator = self.args, generator_of(self.args.seed, "loop", *key)
        hook = attach("none", labels=self.labels, data=self.images, num_classes=self.k, seed=args.seed)
        hook.state.update(trusted=members)
        cls = baseline_class(args.loop)
        config = cls.Config(ipc=args.ipc, iterations=args.iterations, lr_img=args.lr_img, width=args.width,
                            **json.loads(args.loop_settings))  # fmt: skip
        images, labels = cls.initial_images(config, self.real, hook, generator)
        first = SyntheticSet(images, labels, self.k, self.splits.preprocessing, self.splits.name)
        loop = cls(config, self.real, hook, first, generator)
        for iteration in range(config.iterations):
            loop.step(iteration)
        losses, accuracies = [], []
        evaluation = EvaluateConfig(width=args.width, epochs=args.eval_epochs)
        for run in range(args.eval_runs):
            generator = generator_of(args.seed, "evaluation", run)
            network = train_on_synthetic(self.network(generator), loop.result(), evaluation, generator)
            held = RealData(self.splits.holdout_images, self.held_labels, self.k)
            logits = score_all(network, held).logits
            losses.append(float(F.cross_entropy(logits, self.held_labels)))
            accuracies.append(100.0 * float((logits.argmax(1) == self.held_labels).float().mean()))
        return {"loss": statistics.mean(losses), "accuracy": statistics.mean(accuracies)}

    def half(self, number: int) -> Tensor:
        """Bool [N]: half of the groups of each class, drawn at random."""
        generator = generator_of(self.args.seed, "half", number)
        members = torch.zeros(len(self.labels), dtype=torch.bool)
        for c in range(self.k):
            rows = (self.labels == c).nonzero().flatten()
            groups = self.groups[rows]
            chosen = groups.unique()
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[: len(chosen) // 2]]
            members[rows[torch.isin(groups, chosen)]] = True
        return members

    def _grouped(self) -> Tensor:
        """Int64 [N]: the group of each sample. Without --groups each sample is one.

        The sum of a score over a random half of a class hardly varies from half to half, and neither does the
        outcome. Halves made of clusters differ more. The clusters are k-means on the pixels of each class, which no
        score uses.
        """
        groups = torch.arange(len(self.labels))
        if self.args.groups:
            flat = self.images.flatten(1).numpy()
            for c in range(self.k):
                rows = (self.labels == c).nonzero().flatten()
                _, found = kmeans2(flat[rows], self.args.groups, minit="++", rng=self.args.seed)
                groups[rows] = torch.as_tensor(found, dtype=torch.int64) + c * self.args.groups
        return groups

    def fifth(self, score: Tensor, number: int) -> Tensor:
        """Bool [N]: the ``number``-th fifth of each class by ascending score."""
        members = torch.zeros(len(self.labels), dtype=torch.bool)
        for c in range(self.k):
            rows = (self.labels == c).nonzero().flatten()
            rows = rows[score[rows].argsort(stable=True)]
            members[rows[number * len(rows) // FIFTHS : (number + 1) * len(rows) // FIFTHS]] = True
        return members

    def best(self, score: Tensor, share: float) -> Tensor:
        """Bool [N]: the ``share`` of each class with the lowest scores."""
        members = torch.zeros(len(self.labels), dtype=torch.bool)
        for c in range(self.k):
            rows = (self.labels == c).nonzero().flatten()
            rows = rows[score[rows].argsort(stable=True)]
            members[rows[: max(self.args.ipc, round(share * len(rows)))]] = True
        return members

    # -- scores --------------------------------------------------------------------------------------
    def scores(self) -> dict[str, tuple[Tensor, float]]:
        """Name -> (score [N], lower = better; seconds that it took)."""
        found: dict[str, tuple[Tensor, float]] = {}
        began = perf_counter()
        epochs = self._epochs()
        spent = perf_counter() - began
        losses = torch.stack([F.cross_entropy(z, self.labels, reduction="none") for z in epochs])
        margins = torch.stack([self._margin(z) for z in epochs])
        onehot = F.one_hot(self.labels, self.k).float()
        right = torch.stack([z.argmax(1) == self.labels for z in epochs])
        loss = losses[-3:].mean(0)
        found["loss (last 3 epochs)"] = (loss, spent)
        found["loss (all epochs)"] = (losses.mean(0), spent)
        found["margin (all epochs)"] = (-margins.mean(0), spent)
        early = epochs[len(epochs) // 2 - 1]
        found["EL2N (half of the epochs)"] = ((early.softmax(1) - onehot).norm(dim=1), spent)
        found["forgetting"] = ((right[:-1] & ~right[1:]).sum(0).float() + (~right).float().mean(0), spent)
        found["trust (mixture)"] = (-fit_class_mixture(loss, self.labels, self.k).trust.float(), spent)
        found |= self._influences()
        iwd = found["influence"][0]
        z = {n: standardise(found[n][0], self.labels, self.k) for n in ("loss (all epochs)", "influence")}
        found["influence + loss"] = (z["influence"] + z["loss (all epochs)"], spent + found["influence"][1])
        found["|influence|"] = (iwd.abs(), found["influence"][1])
        found["random"] = (torch.rand(len(self.labels), generator=generator_of(self.args.seed, "random")), 0.0)
        return found

    def _epochs(self) -> list[Tensor]:
        """Logits on all samples after each epoch, averaged over ``--scorers`` scorers."""
        runs = []
        for number in range(self.args.scorers):
            state = SampleState(self.labels, self.k)
            scorer = Scorer(
                self.real, ScorerConfig(epochs=self.args.scorer_epochs), seed=1000 * number + self.args.seed
            )
            logits = []
            for _ in range(self.args.scorer_epochs):
                scorer.run_epoch(state, CallbackList())
                logits.append(score_all(scorer.network, self.real).logits)
            runs.append(torch.stack(logits))
        return list(torch.stack(runs).mean(0))

    def _margin(self, logits: Tensor) -> Tensor:
        own = logits.gather(1, self.labels[:, None]).squeeze(1)
        return own - logits.scatter(1, self.labels[:, None], float("-inf")).max(1).values

    def _influences(self) -> dict[str, tuple[Tensor, float]]:
        """Influence on random networks, S = random real images; plain, relative, and with networks trained on S."""
        args, generator = self.args, generator_of(self.args.seed, "influence")
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(len(self.labels))
        began = perf_counter()
        for _ in range(args.networks):
            drawn = []
            for c in range(self.k):
                rows = (self.labels == c).nonzero().flatten()
                drawn.append(rows[torch.randperm(len(rows), generator=generator)[: args.ipc]])
            s_rows = torch.cat(drawn)
            synthetic, s_labels = self.images[s_rows], self.labels[s_rows]
            folds = held_out_folds(
                self.labels, self.k, 0.1, torch.ones(len(self.labels), dtype=torch.bool), generator=generator
            )
            fold, network = folds[0], self.network(generator)
            v_images, v_labels = self.images[fold.held_out], self.labels[fold.held_out]
            _, slope = target_gradient("validation", [network], synthetic, s_labels, v_images, v_labels, self.k)
            embed = embedding_of(network)
            directions = embedding_directions(embed, synthetic, s_labels, slope, self.k)
            with torch.no_grad():
                phi = torch.cat([embed(x) for x in self.images.split(256)])
            for c in range(self.k):
                rows = (self.labels == c).nonzero().flatten()
                centred = phi[rows] - phi[rows].mean(0)
                plain = centred @ directions[c]
                length = centred.norm(dim=1).clamp_min(1e-12)
                for name, value in (
                    ("influence", plain),
                    ("relative influence (cosine)", plain / length),
                    ("distance to the class mean", length),
                ):
                    store = sums.setdefault(name, torch.zeros(len(self.labels)))
                    held = torch.isin(rows, fold.held_out)
                    store[rows] += torch.where(held, torch.zeros_like(value), (value - value.mean()) / value.std())
            counts += 1
            counts[fold.held_out] -= 1
        spent = perf_counter() - began
        return {name: (total / counts.clamp_min(1), spent) for name, total in sums.items()}


def lds(scores: Tensor, halves: list[Tensor], outcomes: list[float]) -> tuple[float, float, float]:
    """Spearman correlation of predicted and measured outcome, with a 95% interval by bootstrap over the runs."""
    predicted = np.array([float(scores[h].double().sum()) for h in halves])
    measured = np.array(outcomes)
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(measured), len(measured)) for _ in range(2000)]
    found = [spearmanr(predicted[d], measured[d]).statistic for d in draws if len(set(d.tolist())) > 2]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(spearmanr(predicted, measured).statistic), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--per_class", type=int, default=0)
    parser.add_argument("--noise", default="none")
    parser.add_argument("--loop", default="dm")
    parser.add_argument("--loop_settings", default='{"batch_real": 64}')
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--lr_img", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument(
        "--groups", type=int, default=0, help="clusters of each class that halves are made of; 0: samples"
    )
    parser.add_argument("--cuts", default="", help="shares of each class, the best by each score, to distil: 0.5;0.3")
    parser.add_argument("--fifths", default="", help="names of scores whose curve of fifths is run, joined by ;")
    parser.add_argument("--eval_epochs", type=int, default=200)
    parser.add_argument("--eval_runs", type=int, default=2)
    parser.add_argument("--scorers", type=int, default=2)
    parser.add_argument("--scorer_epochs", type=int, default=10)
    parser.add_argument("--networks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = {k: v for k, v in vars(args).items() if k not in ("out", "root", "subsets", "fifths", "cuts")}
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"setting": setting, "runs": {}}
    if done["setting"] != setting:
        raise SystemExit(f"{args.out} holds another setting: {done['setting']}")
    study = Study(args)

    def once(name: str, members: Tensor, *key: Any) -> dict[str, float]:
        if name not in done["runs"]:
            done["runs"][name] = study.outcome(members, *key)
            atomic_write(args.out, json.dumps(done, indent=1) + "\n")
            print(name, done["runs"][name], flush=True)
        return done["runs"][name]

    scores = study.scores()
    halves = [study.half(i) for i in range(args.subsets)]
    # the draws of the loop differ from subset to subset, so that no single draw decides the correlation
    results = [once(f"half {i}", h, i) for i, h in enumerate(halves)]
    outcomes = [r["loss"] for r in results]
    done["lds"] = {}
    lines = ["| score | LDS (loss) | 95% | LDS (error) | seconds |", "|---|--:|---|--:|--:|"]
    for name, (score, seconds) in scores.items():
        value, low, high = lds(score, halves, outcomes)
        error = lds(score, halves, [-r["accuracy"] for r in results])[0]
        done["lds"][name] = {"lds": value, "low": low, "high": high, "lds_error": error, "seconds": seconds}
        lines.append(f"| {name} | {value:.2f} | {low:.2f} to {high:.2f} | {error:.2f} | {seconds:.0f} |")
    for name in filter(None, args.fifths.split(";")):
        curve = [
            once(f"fifth {i} of {name}", study.fifth(scores[name][0], i), "fifth")["accuracy"] for i in range(FIFTHS)
        ]
        lines.append(f"\nFifths by {name}, best to worst, held-out accuracy: {', '.join(f'{v:.1f}' for v in curve)}")
    for share in map(float, filter(None, args.cuts.split(";"))):
        for name, (score, _) in scores.items():
            found = once(f"best {share} by {name}", study.best(score, share), "cut")["accuracy"]
            lines.append(f"\nBest {share} by {name}, held-out accuracy: {found:.1f}")
    done["versions"], done["command"] = versions("cpu"), command_line()
    atomic_write(args.out, json.dumps(done, indent=1) + "\n")
    atomic_write(args.out.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
