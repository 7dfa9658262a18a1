"""Compares the class-wise mixture of all classes at once with loops over scikit-learn and over single classes.

Run ``python reproduce/benchmarks/mixture.py``; prints a table and writes JSON. All arms alternate in one process on one
thread, with the same tolerance, iterations and variance floor. ``same start`` also uses the same starting values. Needs
the extra ``reproduce`` (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tad_plugin.errors import missing_extra
from tad_plugin.tad.mixture import ClassMixture, MixtureInit, fit_class_mixture


def make_losses(classes: int, per_class: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws losses like a scorer's on noisy labels: 60% low gamma, 40% high gamma. Returns float32 [N], int64 [N]."""
    rng = np.random.default_rng(seed)
    n = classes * per_class
    losses = np.where(rng.random(n) < 0.6, rng.gamma(2.0, 0.3, n), rng.gamma(6.0, 0.5, n))
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    return torch.tensor(losses, dtype=torch.float32), torch.tensor(labels)


def scikit_loop(losses: torch.Tensor, labels: torch.Tensor, classes: int, init: MixtureInit | None) -> torch.Tensor:
    """Computes the trust [N] by one ``GaussianMixture`` per class, from its own k-means start or from ``init``."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise missing_extra("sklearn", "reproduce", "this benchmark") from error
    values, given, trust = losses.double().numpy(), labels.numpy(), np.empty(len(losses), dtype=np.float32)
    for c in range(classes):
        index = np.flatnonzero(given == c)
        x = values[index, None]
        x = (x - x.min()) / (x.max() - x.min())
        start = {}
        if init is not None:
            start = {
                "means_init": init.means[c, :, None].numpy(),
                "weights_init": init.proportions[c].numpy(),
                "precisions_init": 1 / init.variances[c, :, None, None].numpy(),
            }
        model = GaussianMixture(2, random_state=0, **start).fit(x)
        trust[index] = model.predict_proba(x)[:, int(model.means_.argmin())]
    return torch.from_numpy(trust)


def single_loop(losses: torch.Tensor, labels: torch.Tensor, classes: int, init: MixtureInit | None) -> torch.Tensor:
    """Computes the trust [N] by this package's fit, one class at a time."""
    trust = torch.empty(len(losses))
    for c in range(classes):
        index = (labels == c).nonzero().flatten()
        one = None if init is None else MixtureInit(*(part[c : c + 1] for part in init))
        trust[index] = fit_class_mixture(losses[index], torch.zeros_like(index), 1, init=one).trust
    return trust


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measures seconds of each call, in turns so that a busy machine slows all alike, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/mixture.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # scikit-learn's convergence warnings would hide the table

    k = args.classes
    losses, labels = make_losses(k, args.per_class, args.seed)
    init = MixtureInit(
        torch.tensor([[0.1, 0.5]], dtype=torch.float64).repeat(k, 1),
        torch.full((k, 2), 0.02, dtype=torch.float64),
        torch.full((k, 2), 0.5, dtype=torch.float64),
    )
    rows = []
    for name, start in (("own start", None), ("same start", init)):
        batched: Callable[[], ClassMixture] = lambda start=start: fit_class_mixture(losses, labels, k, init=start)  # noqa: E731
        seconds = measure(
            {
                "all classes at once": batched,
                "loop over single classes": lambda start=start: single_loop(losses, labels, k, start),
                "loop over scikit-learn": lambda start=start: scikit_loop(losses, labels, k, start),
            },
            args.repeats,
        )
        mixture = batched()
        difference = (mixture.trust - scikit_loop(losses, labels, k, start)).abs()
        base = statistics.median(seconds["all classes at once"])
        for method, times in seconds.items():
            middle = statistics.median(times)
            rows.append({"start": name, "method": method, "seconds": middle, "all": times, "ratio": middle / base})
        rows[-1]["largest_posterior_difference"] = float(difference.max())
        rows[-1]["mean_iterations"] = float(mixture.iterations.double().mean())

    print(f"{k} classes x {args.per_class} losses, median of {args.repeats}, 1 thread, torch {torch.__version__}\n")
    print(f"{'start':<12}{'method':<28}{'seconds':>10}{'times ours':>12}")
    for row in rows:
        print(f"{row['start']:<12}{row['method']:<28}{row['seconds']:>10.4f}{row['ratio']:>12.1f}")
        if "largest_posterior_difference" in row:
            print(f"{'':<12}largest difference of posteriors: {row['largest_posterior_difference']:.1e}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps({"classes": k, "per_class": args.per_class, "rows": rows}, indent=1))
    os.replace(temporary, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
