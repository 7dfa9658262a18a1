"""Compares implicit influence with captum, dattri and kronfluence: agreement, and samples per second.

Install the other libraries first: ``pip install captum dattri kronfluence`` (the project needs none of them), and the
extra ``reproduce``. Run ``python reproduce/benchmarks/implicit_influence.py``; it prints tables and writes JSON.

All answer one question: how much does each of N training samples move the mean loss of V held-out samples? The network
is a small ConvNet, trained on digits with 30% symmetric label noise. All run in one process, float32, in turns, best of
``--repeats``. Signs are turned to "negative = helpful". AUC says how well the influence alone finds the mislabelled
samples. Rank correlation and relative difference compare with the first row of each table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tad_plugin.errors import missing_extra
from tad_plugin.iwd.implicit import SegmentStep, curvature_product, inverse_hessian_influence, unrolled_influence
from tad_plugin.nn.derivatives.curvature import conjugate_gradient
from tad_plugin.nn.derivatives.per_sample import as_parameters, per_sample_gradients
from tad_plugin.nn.derivatives.vectors import flatten
from tad_plugin.nn.networks import make_network, seeded
from tad_plugin.utils.files import atomic_write


@dataclass
class Problem:
    network: nn.Module
    checkpoints: list[dict[str, Tensor]]
    rate: float
    x: Tensor
    y: Tensor
    wrong: Tensor
    held_out_x: Tensor
    held_out_y: Tensor
    hessian_damping: float
    damping: float
    iterations: int
    steps: int = 0

    def at(self, checkpoint: dict[str, Tensor]) -> nn.Module:
        self.network.load_state_dict(checkpoint)
        return self.network

    def direction(self, checkpoint: dict[str, Tensor]) -> Tensor:
        network = self.at(checkpoint)
        loss = F.cross_entropy(network(self.held_out_x), self.held_out_y)
        return flatten(torch.autograd.grad(loss, [q for q in network.parameters() if q.requires_grad]))


def make_problem(args: argparse.Namespace) -> Problem:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("sklearn", "reproduce", "this benchmark") from error
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=generator)
    x, y = (x[order] - x.mean()) / x.std(), y[order]
    n, v = args.samples, args.held_out
    wrong = torch.rand(n, generator=generator) < 0.3
    given = torch.where(wrong, (y[:n] + torch.randint(1, 10, (n,), generator=generator)) % 10, y[:n])
    network = make_network(
        "convnet", in_channels=1, num_classes=10, image_size=8, width=args.width, depth=2, generator=generator
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=args.rate)
    checkpoints = []
    for _ in range(args.checkpoints):
        checkpoints.append({name: value.clone() for name, value in network.state_dict().items()})
        for _ in range(3):
            for batch in torch.randperm(n, generator=generator).split(64):
                optimiser.zero_grad()
                F.cross_entropy(network(x[batch]), given[batch]).backward()
                optimiser.step()
    network.eval()
    return Problem(
        network, checkpoints, args.rate, x[:n], given, wrong, x[n : n + v], y[n : n + v],
        args.hessian_damping, args.damping, args.iterations,
    )  # fmt: skip


# -- sum over checkpoints of rate * <grad held-out loss, grad l_i> (TracIn) -------------------------------------------


def ours_forward_mode(p: Problem) -> Tensor:
    total = torch.zeros(len(p.x))
    for checkpoint in p.checkpoints:
        step = SegmentStep(as_parameters(p.at(checkpoint)), p.rate, divisor=1.0)
        total += unrolled_influence(p.network, [step], p.x, p.y, p.direction(checkpoint))
    return total


def ours_per_sample_gradients(p: Problem) -> Tensor:
    total = torch.zeros(len(p.x))
    for checkpoint in p.checkpoints:
        direction = p.direction(checkpoint)
        total -= p.rate * (per_sample_gradients(p.at(checkpoint), p.x, p.y) @ direction)
    return total


def captum_tracin(p: Problem, fast: bool = False) -> Tensor:
    from captum.influence import TracInCP

    def load(model: nn.Module, checkpoint: dict[str, Tensor]) -> float:
        model.load_state_dict(checkpoint)
        return p.rate

    tracin = TracInCP(
        p.network,
        TensorDataset(p.x, p.y),
        p.checkpoints,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if fast else "none"),
        batch_size=256,
        sample_wise_grads_per_batch=fast,
    )
    found: Tensor = tracin.influence((p.held_out_x, p.held_out_y), aggregate=True)
    return -found.flatten() / len(p.held_out_x)


def captum_tracin_hooks(p: Problem) -> Tensor:
    return captum_tracin(p, fast=True)


def dattri_task(p: Problem, checkpoints: list[dict[str, Tensor]], batched: bool) -> Any:
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        image, label = data if batched else (data[0][None], data[1][None])
        return F.cross_entropy(torch.func.functional_call(p.network, parameters, (image,)), label)

    def target(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        image, label = (data[0][0], data[1][0]) if batched else data  # all held-out samples form one target
        return F.cross_entropy(torch.func.functional_call(p.network, parameters, (image,)), label)

    return AttributionTask(loss_func=loss, target_func=target, model=p.network, checkpoints=checkpoints)


def dattri_loaders(p: Problem, batch: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return (
        DataLoader(TensorDataset(p.x, p.y), batch_size=batch),
        DataLoader(TensorDataset(p.held_out_x[None], p.held_out_y[None]), batch_size=1),
    )


def dattri_tracin(p: Problem) -> Tensor:
    from dattri.algorithm.tracin import TracInAttributor

    weights = torch.full((len(p.checkpoints),), p.rate)
    attributor = TracInAttributor(dattri_task(p, p.checkpoints, batched=False), weights, normalized_grad=False)
    found: Tensor = attributor.attribute(*dattri_loaders(p, 256))
    return -found.detach().flatten()


# -- <grad held-out loss, (H + damping)^-1 grad l_i> at the last checkpoint -------------------------------------------


def ours_hessian(p: Problem) -> Tensor:
    direction = p.direction(p.checkpoints[-1])
    return inverse_hessian_influence(
        p.network, p.x, p.y, direction, damping=p.hessian_damping,
        tolerance=1e-4, max_iterations=p.iterations, strict=True,
    )  # fmt: skip


def ours_gauss_newton(p: Problem) -> Tensor:
    direction = p.direction(p.checkpoints[-1])
    return inverse_hessian_influence(
        p.network, p.x, p.y, direction, damping=p.damping, curvature="gauss_newton",
        tolerance=1e-4, max_iterations=p.iterations, strict=True,
    )  # fmt: skip


def dattri_hessian(p: Problem, steps: int | None = None) -> Tensor:
    from dattri.algorithm.influence_function import IFAttributorCG

    train, held_out = dattri_loaders(p, len(p.x))
    attributor = IFAttributorCG(
        dattri_task(p, p.checkpoints[-1:], batched=True),
        max_iter=steps or p.iterations,
        tol=1e-4 * float(p.direction(p.checkpoints[-1]).norm()),
        regularization=p.hessian_damping,
    )
    attributor.cache(train)
    found: Tensor = attributor.attribute(train, held_out)
    return -found.detach().flatten() / len(p.x)


def dattri_hessian_short(p: Problem) -> Tensor:
    return dattri_hessian(p, p.steps)


def steps_needed(p: Problem) -> int:
    direction = p.direction(p.checkpoints[-1])
    product = curvature_product(p.network, p.x, p.y)
    return conjugate_gradient(
        lambda v: product(v) + p.hessian_damping * v,
        direction,
        tolerance=1e-4,
        max_iterations=p.iterations,
        strict=True,
    ).iterations


def ours_without_norms(p: Problem) -> Tensor:
    """Gauss-Newton without the norm layers, which kronfluence does not track."""
    norms = [q for m in p.network.modules() if isinstance(m, nn.GroupNorm) for q in m.parameters()]
    try:
        for parameter in norms:
            parameter.requires_grad_(False)
        return ours_gauss_newton(p)
    finally:
        for parameter in norms:
            parameter.requires_grad_(True)


def kronfluence_ekfac(p: Problem) -> Tensor:
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            labels = torch.multinomial(logits.detach().softmax(1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task = Classification()
    p.at(p.checkpoints[-1])
    model = prepare_model(copy.deepcopy(p.network), task)
    train, held_out = TensorDataset(p.x, p.y), TensorDataset(p.held_out_x, p.held_out_y)
    with tempfile.TemporaryDirectory() as folder, seeded(torch.Generator().manual_seed(0)):
        analyzer = Analyzer("benchmark", model, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=40)
        analyzer.fit_all_factors("ekfac", train, 256, factor_args=FactorArguments(strategy="ekfac"))
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", held_out, train, len(held_out), 256,
            score_args=ScoreArguments(damping_factor=p.damping, aggregate_query_gradients=True),
        )  # fmt: skip
        found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return -found.flatten() / len(p.x) / len(p.held_out_x)


Arm = tuple[str, Callable[[Problem], Tensor]]
TRACIN: list[Arm] = [
    ("ours, forward mode", ours_forward_mode),
    ("ours, per-sample gradients", ours_per_sample_gradients),
    ("captum TracInCP", captum_tracin),
    ("captum TracInCP, batched", captum_tracin_hooks),
    ("dattri TracIn", dattri_tracin),
]
HESSIAN: list[Arm] = [
    ("ours, CG", ours_hessian),
    ("dattri IF, CG", dattri_hessian),
    ("dattri IF, CG, steps as ours", dattri_hessian_short),
]
GAUSS_NEWTON: list[Arm] = [
    ("ours, CG", ours_gauss_newton),
    ("ours, CG, no norm layers", ours_without_norms),
    ("kronfluence EK-FAC", kronfluence_ekfac),
]


def compare(p: Problem, arms: list[Arm], repeats: int, passes: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name, _ in arms}
    scores: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, run in arms:
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # dattri's progress bars
                scores[name] = run(p).detach()
            seconds[name].append(time.perf_counter() - start)
    first = scores[arms[0][0]]
    rows = []
    for name, _ in arms:
        found = scores[name]
        harmful, fine = found[p.wrong], found[~p.wrong]
        auc = (harmful[:, None] > fine[None]).double().mean()
        rows.append(
            {
                "method": name,
                "seconds": min(seconds[name]),
                "samples_per_second": passes * len(p.x) / min(seconds[name]),
                "spearman": float(spearmanr(first.numpy(), found.numpy()).statistic),
                "relative_difference": float((found - first).norm() / first.norm()),
                "auc": float(auc),
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(f"{'':30s} {'seconds':>8s} {'samples/s':>10s} {'rank corr.':>10s} {'rel. diff.':>10s} {'AUC':>6s}")
    for row in rows:
        print(
            f"{row['method']:30s} {row['seconds']:8.3f} {row['samples_per_second']:10.0f} {row['spearman']:10.4f}"
            f" {row['relative_difference']:10.2g} {row['auc']:6.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="training samples that are scored")
    parser.add_argument("--held-out", type=int, default=200, help="held-out samples, one common target")
    parser.add_argument("--width", type=int, default=32, help="channels of the ConvNet")
    parser.add_argument("--checkpoints", type=int, default=4, help="checkpoints, three epochs apart")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of the training")
    # The network is not at an optimum (lowest Hessian eigenvalue about -7). With less damping there is no inverse.
    parser.add_argument(
        "--hessian-damping", type=float, default=10.0, help="multiple of the identity added to the Hessian"
    )
    parser.add_argument("--damping", type=float, default=0.1, help="the same for Gauss-Newton and EK-FAC")
    parser.add_argument("--iterations", type=int, default=50, help="most steps of the conjugate gradients")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/implicit_influence.json"))
    args = parser.parse_args()
    for package in ("captum", "dattri", "kronfluence"):
        try:
            __import__(package)
        except ImportError:
            parser.error(f"needs {package}: pip install captum dattri kronfluence")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"captum|dattri|kronfluence|torch")
    p = make_problem(args)
    count = sum(q.numel() for q in p.network.parameters())
    accuracy = float((p.at(p.checkpoints[-1])(p.held_out_x).argmax(1) == p.held_out_y).float().mean())
    print(f"{len(p.x)} samples ({int(p.wrong.sum())} mislabelled), {len(p.held_out_x)} held out, {count} parameters,")
    print(f"held-out accuracy at the last checkpoint {100 * accuracy:.1f}%, one thread, best of {args.repeats}")
    tracin = compare(p, TRACIN, args.repeats, len(p.checkpoints))
    show(f"TracIn over {len(p.checkpoints)} checkpoints (samples/s: samples x checkpoints)", tracin)
    p.steps = steps_needed(p)
    hessian = compare(p, HESSIAN, args.repeats, 1)
    show(f"Inverse Hessian at the last checkpoint, damping {args.hessian_damping} (solve included)", hessian)
    gauss_newton = compare(p, GAUSS_NEWTON, args.repeats, 1)
    show(f"Inverse Gauss-Newton at the last checkpoint, damping {args.damping} (solve, factors included)", gauss_newton)
    print(f"\nOurs stops at the tolerance ({p.steps} CG steps); dattri's CG always makes {p.iterations}.")
    print("Different by design: captum's batched mode and kronfluence leave out the norm layers' parameters,")
    print("dattri's TracIn projects gradients to 512 random dimensions, EK-FAC approximates Gauss-Newton.")
    packages = ("torch", "captum", "dattri", "kronfluence")
    result = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "parameters": count,
        "held_out_accuracy": 100 * accuracy,
        "cg_steps": p.steps,
        "tracin": tracin,
        "inverse_hessian": hessian,
        "inverse_gauss_newton": gauss_newton,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    atomic_write(args.out, json.dumps(result, indent=2))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
