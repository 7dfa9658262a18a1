"""One process of a group of two (gloo), or a single one: what the methods decide, as tensors in a file.

``main(["0", "2", FOLDER])`` is the first of two.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tad_plugin.core.distributed import broadcast, gather_rows, merge_rows, ranks, shard
from tad_plugin.core.hook.attach import attach
from tad_plugin.errors import ConfigError, UnimodalClassWarning
from tad_plugin.nn.networks import make_network
from tests.problems import blobs, flip

IMAGES, TRUE = blobs(41)  # 123 samples: an odd number
OBSERVED = flip(TRUE, 3, 0.3)
K = 3
TAD = {"tad": {"warmup": 1, "min_per_class": 4}, "scorer": {"epochs": 4, "width": 4, "batch_size": 32}}


def network(generator: torch.Generator) -> nn.Module:
    return make_network("convnet", in_channels=1, num_classes=K, image_size=8, width=4, depth=2, generator=generator)


def division(folder: Path) -> dict[str, Tensor]:
    """TAD with the plugin's own scorer. The state file is written once."""
    hook = attach("tad", labels=OBSERVED, data=IMAGES, num_classes=K, seed=1, config=TAD, state=folder / "state")
    hook.finish()
    state = hook.state
    return {name: state[name] for name in ("target", "trusted", "trust", "weight", "tad_loss", "recall_score")}


def trained(of: Any) -> dict[str, Tensor]:
    """TAD in a script's own training with DistributedDataParallel: each process has its part of each batch."""
    settings = {"tad": TAD["tad"]}
    images, labels = IMAGES[:120], OBSERVED[:120]
    hook = attach("tad", labels=labels, data=images, num_classes=K, seed=1, trains_on_real=True, config=settings)
    model: nn.Module = network(torch.Generator().manual_seed(3))
    dataset = TensorDataset(images, labels)
    sampler = DistributedSampler(dataset, of.size, of.rank, shuffle=False) if of.size > 1 else None
    if of.size > 1:
        model = DistributedDataParallel(model)
    loader = hook.loader(DataLoader(dataset, batch_size=24 // of.size, sampler=sampler))
    criterion = hook.criterion(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hook.begin_expert()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        hook.epoch_end(model)
    ensemble = hook.callbacks[0].ensemble
    state = hook.state
    return {"trust": state.trust, "trusted": state.trusted, "mean": ensemble.mean, "count": ensemble.count}


def influence(mode: str) -> dict[str, Tensor]:
    """IWD in a loop that matches class means. All processes draw the same samples."""
    settings = {"iwd": {"mode": mode, "every": 1, "early": 0, "warmup": 0, "held_out": 5}}
    hook = attach("iwd", labels=TRUE, data=IMAGES, num_classes=K, seed=2, config=settings)
    generator = torch.Generator().manual_seed(5)
    synthetic = IMAGES[: 2 * K].clone().requires_grad_()
    labels = TRUE[: 2 * K]
    for _ in range(2):
        model, loss = network(generator), torch.zeros(())
        for c in range(K):
            index = hook.sample(c, 16, generator)
            real = hook.reweight(model.embed(IMAGES[index]).detach(), index).mean(0)
            loss = loss + (real - model.embed(synthetic[labels == c]).mean(0)).square().sum()
        hook.before_update(loss, synthetic, model, labels=labels, fresh_network=network)
    return {name: hook.state[name] for name in ("influence", "influence_count", "weight")}


def parts(of: Any) -> dict[str, Tensor]:
    """The pure functions, and what happens to arguments that differ."""
    whole = torch.arange(10.0).view(5, 2)
    flags = torch.tensor([of.rank == 0, True])
    broadcast(flags)
    rows, visits = torch.full((4, 2), float(of.rank)).half(), torch.tensor([2, 1, 1, 0], dtype=torch.int32)
    if of.rank == 1:
        visits = torch.tensor([1, 1, 3, 0], dtype=torch.int32)
    merge_rows(rows, visits)
    own = slice(0, 3) if of.rank == 0 else slice(3, 3)
    try:
        attach("tad", labels=OBSERVED.roll(of.rank), data=IMAGES, num_classes=K, config=TAD)
        raised = False
    except ConfigError as error:
        raised = "rank 1" in str(error)
    return {
        "gathered": gather_rows(whole[shard(5, of)]),
        "uneven": gather_rows(torch.arange(3)[own]),
        "flags": flags,
        "rows": rows,
        "visits": visits,
        "raised": torch.tensor(raised),
    }


def everything(folder: Path) -> dict[str, dict[str, Tensor]]:
    of = ranks()
    warnings.simplefilter("ignore", UnimodalClassWarning)  # the problem is small
    return {
        "division": division(folder),
        "trained": trained(of),
        "all": influence("all"),
        "batch": influence("batch"),
        "parts": parts(of),
    }


def main(arguments: list[str]) -> None:
    rank, size, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(everything(folder), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
