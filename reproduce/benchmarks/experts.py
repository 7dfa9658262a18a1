"""Compares the speed of expert training: this package and MTT's public training function.

Run ``python reproduce/benchmarks/experts.py --mtt PATH`` with a checkout of GeorgeCazenavette/mtt-distillation; prints
a table and writes JSON. Without ``--mtt`` only this package's arms run.

Each arm is a process of its own, because in one process an arm could reuse memory that another has freed. The arms take
turns by epochs, so that a busy machine slows all of them. Rates are medians over processor time on one CPU thread,
which other programs change little. A first round warms up and is not counted. With ``--threads 2`` rates are over wall
time, so the machine must be idle.

upstream         the epoch function of their utils.py with the network, loader and criterion that their buffer.py makes
ours             an epoch of :class:`ExpertTrainer`
ours, tad        the same with TAD on: its consistency term, and its round after the epoch
ours, one pass   the same without a method, each batch in one pass instead of in passes that fit the cache
ours, batched    several experts at once in one computation (``torch.func.stack_module_state`` and ``vmap``)
ours, side by side  as many experts at once as there are threads, each a process of one thread (``--jobs``)

Start-up (their script stacks the data once for each sample) and testing are not counted. The images are random: no
arithmetic depends on what they show.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.data import DataLoader

from tad_plugin import attach
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer, expert_network
from tad_plugin.nn.augment import DEFAULT_STRATEGY
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions
from tad_plugin.utils.seeds import expert_generator


def real_data(args: argparse.Namespace) -> RealData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.images, 3, 32, 32, generator=generator)
    return RealData(images.to(args.device), (torch.arange(args.images) % 10).to(args.device), 10, dataset="cifar10")


def config_of(args: argparse.Namespace, width: int) -> ExpertConfig:
    return ExpertConfig(width=width, batch_train=args.batch_train, rho=args.rho)


def upstream_arm(args: argparse.Namespace, width: int) -> Callable[[], int]:
    """Trains one epoch of theirs; returns the number of images."""
    sys.path.insert(0, str(args.mtt))
    try:
        import networks
        import utils
    finally:
        sys.path.pop(0)
    data = real_data(args)
    network = networks.ConvNet(3, 10, width, 3, "relu", "instancenorm", "avgpooling", (32, 32)).to(args.device)
    loader = DataLoader(
        utils.TensorDataset(data.images.cpu(), data.labels.cpu()), batch_size=args.batch_train, shuffle=True
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    settings = types.SimpleNamespace(
        device=args.device, dataset="CIFAR10", dsa=True, dsa_strategy=DEFAULT_STRATEGY, dsa_param=utils.ParamDiffAug()
    )

    def epoch() -> int:
        utils.epoch("train", loader, network, optimizer, nn.CrossEntropyLoss(), settings, aug=True)
        return len(data)

    return epoch


def our_arm(args: argparse.Namespace, width: int, *, method: str = "none", whole: bool = False) -> Callable[[], int]:
    data = real_data(args)
    settings = {"tad": {"warmup": 0}} if method == "tad" else None
    hook = attach(method, labels=data.labels, data=data.images, trains_on_real=True, config=settings)
    trainer = ExpertTrainer(config_of(args, width), data, hook, expert_generator(0, 0))
    if whole:
        trainer.chunk = args.batch_train

    def epoch() -> int:
        trainer.run_epoch()
        trainer.trajectory.clear()
        hook.epoch_end(trainer.network)
        return len(data)

    return epoch


def batched_arm(args: argparse.Namespace, width: int) -> Callable[[], int]:
    """Trains several experts by plain SGD in one computation, each with its own order and augmentation."""
    data, config, count = real_data(args), config_of(args, width), args.together
    generators = [expert_generator(0, number) for number in range(count)]
    networks = [expert_network(config, data, g) for g in generators]
    parameters, _ = stack_module_state(networks)
    hook = attach("none", labels=data.labels, data=data.images, trains_on_real=True)
    augmentation = ExpertTrainer(config, data, hook, expert_generator(0, 0)).augmentation

    def loss(p: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(networks[0], p, (images,)), labels)

    slope = vmap(grad(loss))

    def epoch() -> int:
        orders = [torch.randperm(len(data), generator=g).to(args.device).split(args.batch_train) for g in generators]
        for step in zip(*orders, strict=True):
            pairs = zip(step, generators, strict=True)
            images = torch.stack([augmentation(data.images[i], generator=g) for i, g in pairs])
            found = slope(parameters, images, data.labels[torch.stack(list(step))])
            with torch.no_grad():
                for name, p in parameters.items():
                    p.sub_(config.lr * found[name])
        return count * len(data)

    return epoch


SIDE_BY_SIDE = "ours, side by side"
ARMS: dict[str, Callable[[argparse.Namespace, int], Callable[[], int]]] = {
    "upstream": upstream_arm,
    "ours": our_arm,
    "ours, tad": lambda args, width: our_arm(args, width, method="tad"),
    "ours, one pass": lambda args, width: our_arm(args, width, whole=True),
    "ours, batched": batched_arm,
    SIDE_BY_SIDE: our_arm,
}


def start(args: argparse.Namespace, name: str, width: int) -> list[subprocess.Popen[str]]:
    """Starts the processes of one arm; each runs an epoch for every line that it receives."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--serve", name, "--widths", str(width)]
    count = args.threads if name == SIDE_BY_SIDE else 1
    if count > 1:
        command += ["--threads", "1"]
    return [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]


def ask(args: argparse.Namespace, children: list[subprocess.Popen[str]]) -> float:
    """Measures images per second of an arm's next epoch; over wall time if the arm has several processes."""
    began = perf_counter()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    rates = [float(child.stdout.readline()) for child in children if child.stdout is not None]
    return rates[0] if len(rates) == 1 else len(rates) * args.images / (perf_counter() - began)


def serve(args: argparse.Namespace) -> None:
    epoch = ARMS[args.serve](args, int(args.widths))
    for _ in sys.stdin:
        print(rate(epoch, args.device), flush=True)


def rate(epoch: Callable[[], int], device: str) -> float:
    """Measures images per second of one epoch."""
    clock = process_time if device == "cpu" and torch.get_num_threads() == 1 else perf_counter
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = clock()
    images = epoch()
    synchronize()
    return images / (clock() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtt", type=Path, default=None, help="folder of the checkout")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--widths", default="16,32")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch_train", type=int, default=256)
    parser.add_argument("--together", type=int, default=5, help="experts of the batched arm")
    parser.add_argument("--rho", type=float, default=0.0, help="sharpness-aware steps of our arms")
    parser.add_argument("--skip", default="", help="arms to leave out, joined by ';'")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("experts.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(args)
        return
    rows: list[dict[str, Any]] = []
    skipped = {*args.skip.split(";")} | ({"upstream"} if args.mtt is None else set())
    arms = [name for name in ARMS if name not in skipped | ({SIDE_BY_SIDE} if args.threads == 1 else set())]
    for width in map(int, args.widths.split(",")):
        children = {name: start(args, name, width) for name in arms}
        seen: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(args.repeats + 1):
            for name, those in children.items():
                found = ask(args, those)
                if number:
                    seen[name].append(found)
        for child in (c for those in children.values() for c in those):
            child.communicate("")
        base = statistics.median(seen[arms[0]])
        print(f"width {width:<13} {'images/s':>9} {'of ' + arms[0]:>12}")
        for name, rates in seen.items():
            middle = statistics.median(rates)
            print(f"{name:19} {middle:9.0f} {middle / base:11.2f}x")
            rows.append(
                {"width": width, "arm": name, "images_per_second": middle, "ratio": middle / base, "all": rates}
            )
    setting = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "mtt", "serve")
    }
    result = {"setting": setting, "rows": rows, "versions": versions(args.device), "command": command_line()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
