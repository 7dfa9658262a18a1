"""Times one round of TAD beside a plain scikit-learn version of it, and measures its peak memory.

    python reproduce/benchmarks/tad_round.py                                            # 50,000 x 2048, 100 classes
    python reproduce/benchmarks/tad_round.py --samples 130000 --classes 1000 --dims 128 --no-scikit

The arms get the same logits and features and run in turns in one process on one thread: the mixture of each class, the
division, the projection, the calibration on two halves, and the proposals. ``scikit-learn`` calls its functions class
by class (``GaussianMixture``, ``PCA``, ``LedoitWolf(...).mahalanobis``). ``whitened by hand`` replaces the last one by
a triangular solve, which is what this package does. The memory is what the process grew by during a round with its
scoring, beyond the data, as a multiple of N x K float32; a process of its own measures it. Needs the extra
``reproduce`` (scikit-learn). At the defaults it takes some two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tad_plugin.core.scorer import RecordedScores, score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import missing_extra
from tad_plugin.tad.method import TAD, TADConfig
from tad_plugin.utils.files import atomic_write


class Problem(NamedTuple):
    """Features as "images" [N, D] with noisy labels, and a linear network that knows the class means, or its scores."""

    data: RealData
    network: nn.Module


def make_problem(n: int, k: int, d: int, noise: float, seed: int) -> Problem:
    """Draws features behind a ReLU around K class means in 64 dimensions. A share ``noise`` of the labels is random."""
    g = torch.Generator().manual_seed(seed)
    true = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=g)])
    centres = torch.randn(k, 64, generator=g)
    mixing = torch.randn(64, d, generator=g) / 8
    features = torch.empty(n, d)
    for rows in torch.arange(n).split(8192):
        low = centres[true[rows]] + 0.8 * torch.randn(len(rows), 64, generator=g)
        features[rows] = torch.relu(low @ mixing + 0.3 * torch.randn(len(rows), d, generator=g) + 0.2)
    means = torch.zeros(k, d).index_add_(0, true, features) / torch.bincount(true, minlength=k).unsqueeze(1)
    observed = torch.where(torch.rand(n, generator=g) < noise, torch.randint(k, (n,), generator=g), true)
    network = nn.Linear(d, k)
    spread = (features[:4096] - means[true[:4096]]).square().mean()
    with torch.no_grad():
        network.weight.copy_(means / (4 * spread))
        network.bias.copy_(-means.square().sum(1) / (8 * spread))
    return Problem(RealData(features, observed, k), network)


def our_round(problem: Problem) -> SampleState:
    """One round of the callback."""
    data = problem.data
    state, method = SampleState.of(data), TAD(TADConfig(warmup=0))
    method.on_start(state=state, data=data)
    method.on_scorer_epoch(state=state, network=problem.network, data=data)
    return state


def scikit_round(problem: Problem, *, by_hand: bool) -> np.ndarray:
    """The same steps with scikit-learn, class by class where it has no other way. Returns the targets, int64 [N].

    ``by_hand`` whitens once for all classes instead of calling scikit-learn's ``mahalanobis`` for each.
    """
    try:
        from scipy.linalg import solve_triangular
        from scipy.optimize import minimize_scalar
        from scipy.special import log_softmax, logsumexp
        from sklearn.covariance import LedoitWolf
        from sklearn.decomposition import PCA
        from sklearn.metrics import precision_recall_curve
        from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
        from sklearn.mixture import GaussianMixture
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise missing_extra("sklearn", "reproduce", "this benchmark") from error
    scores = score_all(problem.network, problem.data)
    logits, features = scores.logits.numpy(), scores.features.numpy()
    labels, k = problem.data.labels.numpy(), problem.data.num_classes
    losses, predicted = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels], logits.argmax(1)
    trusted = np.zeros(len(labels), dtype=bool)
    for c in range(k):
        index = np.flatnonzero(labels == c)
        x = losses[index, None].astype(np.float64)
        x = (x - x.min()) / (x.max() - x.min())
        model = GaussianMixture(2, random_state=0).fit(x)
        trusted[index] = model.predict_proba(x)[:, model.means_.argmin()] > 0.5
    if features.shape[1] > 128:
        features = PCA(128, random_state=0).fit(features[trusted]).transform(features)

    def measure(fit: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        anchors = np.stack([features[fit & (labels == c)].mean(0) for c in range(k)])
        model = LedoitWolf(assume_centered=True).fit(features[fit] - anchors[labels[fit]])
        root, centre = np.linalg.cholesky(model.covariance_), anchors.mean(0)
        white = solve_triangular(root, (anchors - centre).T, lower=True).T
        z = solve_triangular(root, (features[rows] - centre).T, lower=True).T
        similar = cosine_similarity(z, white)
        if by_hand:
            return euclidean_distances(z, white), similar
        squares = [model.mahalanobis(features[rows] - anchor) for anchor in anchors]
        return np.sqrt(np.stack(squares, axis=1)), similar

    def score(distance: np.ndarray, similar: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        nearest = distance.argmin(1)
        share, at = -(distance**2) / (2 * t), np.arange(len(distance))
        value = np.exp(share[at, nearest] - logsumexp(share, axis=1)) * (1 + similar[at, nearest]) / 2
        return nearest, np.where(nearest == similar.argmax(1), value, 0.0)

    distance, similar = np.empty((len(labels), k)), np.empty((len(labels), k))
    for fit, rows in StratifiedKFold(2, shuffle=True, random_state=0).split(features, labels):
        mask = np.zeros(len(labels), dtype=bool)
        mask[fit] = True
        distance[rows], similar[rows] = measure(mask & trusted, rows)
    sample = np.flatnonzero(trusted)[:: max(1, int(trusted.sum()) // 5000)]

    def loss(inverse: float) -> float:
        own = -(distance[sample] ** 2) * inverse / 2
        return float(-log_softmax(own, axis=1)[np.arange(len(sample)), labels[sample]].mean())

    temperature = 1 / minimize_scalar(loss, bounds=(1e-6, 1), method="bounded").x
    proposal, value = score(distance, similar, temperature)
    value[proposal != predicted] = 0
    precision, _, limits = precision_recall_curve((proposal == labels)[trusted], value[trusted])
    reached = np.flatnonzero(precision[:-1] >= 0.9)
    proposal, value = score(*measure(trusted, np.arange(len(labels))), temperature)
    recalled = ~trusted & (proposal == predicted) & (value >= (limits[reached[0]] if len(reached) else np.inf))
    return np.where(recalled, proposal, labels)


def peak_growth(problem: Problem) -> float:
    """Bytes by which the process grew at most during one round, beyond what it held before (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = _kilobytes("VmRSS")
    our_round(problem)
    return (_kilobytes("VmHWM") - before) * 1024.0


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dims", type=int, default=2048)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scikit", action=argparse.BooleanOptionalAction, default=True, help="run the other arm too")
    parser.add_argument("--memory", action="store_true", help="only print the growth of this process in one round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/tad_round.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = make_problem(args.samples, args.classes, args.dims, args.noise, seed=0)
    if args.memory:
        print(peak_growth(problem))
        return
    names = ("tad_plugin", "scikit-learn", "whitened by hand")
    seconds: dict[str, list[float]] = {name: [] for name in names[: 3 if args.scikit else 1]}
    scored = problem._replace(network=RecordedScores(score_all(problem.network, problem.data)))
    for _ in range(args.repeats):
        for name in seconds:
            start = time.process_time()
            if name == "tad_plugin":
                found = our_round(scored).target
            else:
                found = torch.from_numpy(scikit_round(scored, by_hand=name != "scikit-learn"))
            seconds[name].append(time.process_time() - start)
            changed = float((found != problem.data.labels).float().mean())
            print(f"{name:<17}{seconds[name][-1]:8.2f} s of CPU, {changed:.1%} relabelled")
    own = [sys.executable, __file__, "--memory"]
    own += [f"--{name}={getattr(args, name)}" for name in ("samples", "classes", "dims", "noise")]
    growth = float(subprocess.run(own, check=True, capture_output=True, text=True).stdout)
    result = {
        "samples": args.samples,
        "classes": args.classes,
        "dims": args.dims,
        "seconds": seconds,
        "ratio": {name: min(times) / min(seconds["tad_plugin"]) for name, times in seconds.items()},
        "peak_bytes": growth,
        "peak_n_k_float32": growth / (4 * args.samples * args.classes),
        "torch": torch.__version__,
        "command": sys.argv[1:],
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")


def _single_threaded() -> None:
    """NumPy's threads are set before it is loaded: starts this script again if they are not."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    if any(os.environ.get(name) != "1" for name in names):
        os.execvpe(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(names, "1"))


if __name__ == "__main__":
    _single_threaded()
    main()
