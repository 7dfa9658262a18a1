"""Two gloo processes with DistributedSampler: the hook has the same state on both, with and without images."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tad_plugin import attach
from tests.problems import blobs, flip

IMAGES, TRUE = blobs(spread=0.8)
LABELS = flip(TRUE, 3, 0.3)


def rank(number: int, port: int, folder: Path) -> None:
    """One process: trains with half of each epoch's samples, and saves what the methods decided."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    found: dict[str, Any] = {}
    for given in ("images", "wrapped", "logits"):
        torch.manual_seed(0)
        net = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)))
        images = IMAGES if given == "images" else None
        config = {"tad": {"warmup": 1}}
        hook = attach("tad", labels=LABELS, num_classes=3, data=images, trains_on_real=True, config=config)
        dataset: Any = TensorDataset(IMAGES, torch.arange(60))
        if given == "wrapped":
            dataset = hook.dataset(TensorDataset(IMAGES, LABELS))
        sampler: Any = DistributedSampler(dataset, seed=3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for x, *_, idx in DataLoader(dataset, batch_size=10, sampler=sampler):
                optimizer.zero_grad()
                hook.loss(net(x), hook.targets(idx), idx).backward()
                optimizer.step()
            hook.epoch_end(net)
        assert not hook.state.untouched()
        found[given] = {name: hook.state[name] for name in (*hook.state.FIELDS, "tad_loss")}
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_both_ranks_decide_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # they have imported torch already
    processes = [context.Process(target=rank, args=(number, port, tmp_path)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    for given in one:
        for name, values in one[given].items():
            assert torch.equal(values, two[given][name]), (given, name)
