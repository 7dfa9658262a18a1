"""Several networks trained on the real data in turn, sharpness-aware training, and a second phase from a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.errors import TadPluginWarning
from tad_plugin.tad.consistency import consistency_loss, ramp_up
from tad_plugin.tad.method import TAD
from tests.problems import blobs, flip

K = 3


def made(**more: Any) -> tuple[Hook, Tensor, Tensor]:
    images, true = blobs(spread=0.8)
    labels = flip(true, K, 0.3)
    settings = {"tad": {"warmup": 1, "consistency_rounds": 2}}
    hook = attach("tad", labels=labels, data=images, num_classes=K, trains_on_real=True, config=settings, **more)
    return hook, images, labels


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, K))


def train(hook: Hook, images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> nn.Module:
    """An expert, from ``begin_expert`` to the last ``epoch_end``."""
    loader = hook.loader(DataLoader(TensorDataset(images, labels), batch_size=20))
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    expert = network(seed)
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.05)
    hook.begin_expert()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(expert(x), y).backward()
            optimizer.step()
        hook.epoch_end(expert)
    return expert


def test_each_expert_warms_up_while_the_division_stands(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    path = tmp_path / "state.safetensors"
    hook, images, labels = made(state=path, log=records.append)
    train(hook, images, labels, 3)
    division = hook.state.trusted.clone()
    assert 20 < int(division.sum()) < 60 and not path.exists()
    train(hook, images, labels, 1, seed=1)
    assert torch.equal(SampleState.load(path).trusted, division)  # written before the second expert
    assert torch.equal(hook.state.trusted, division)  # its first epoch is warm-up again
    rounds = [(r["expert"], r["round"], r["warmup"]) for r in records if r["event"] == "round"]
    assert rounds == [(0, 1, True), (0, 2, False), (0, 3, False), (1, 1, True)]
    (tad,) = hook.callbacks
    assert isinstance(tad, TAD) and len(tad.history) == 1 and tad.ensemble is not None
    assert tad.ensemble.count.unique().tolist() == [1]


def test_a_file_decides_for_later_experts_with_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    hook, images, labels = made(state=path)
    train(hook, images, labels, 3)
    hook.finish()
    later, *_ = made(state=path)
    before = path.read_bytes()
    criterion: Any = later.criterion(nn.CrossEntropyLoss())
    expert, state = network(), later.state
    for step, (x, y) in enumerate(later.loader(DataLoader(TensorDataset(images, labels), batch_size=20))):
        inside = torch.arange(20 * step, 20 * step + 20)
        w = state.weight[inside] * state.trusted[inside]
        rows = F.cross_entropy(expert(x), state.target[inside], reduction="none")
        assert torch.allclose(criterion(expert(x), y), (w * rows).sum() / w.sum())  # no consistency term
    train(later, images, labels, 2)
    assert path.read_bytes() == before and torch.equal(later.state.trusted, hook.state.trusted)


def test_networks_that_never_leave_the_warm_up_are_named() -> None:
    hook, images, labels = made()
    train(hook, images, labels, 1)
    with pytest.warns(TadPluginWarning, match="tad"):
        hook.finish()
    train(hook, images, labels, 2)
    hook.finish()


def test_the_second_evaluation_of_a_batch_is_the_same_objective_and_counts_nothing() -> None:
    """Sharpness-aware training calls the criterion at the parameters and at perturbed ones."""
    hook, images, labels = made()
    train(hook, images, labels, 2)
    (tad,) = hook.callbacks
    assert isinstance(tad, TAD) and tad.ensemble is not None
    visits, expert = tad.ensemble.count.clone(), network(3)
    moved = copy.deepcopy(expert)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.1
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    weight = ramp_up(tad.round, 2, 1.0)
    for step, (x, y) in enumerate(hook.loader(DataLoader(TensorDataset(images, labels), batch_size=20))):
        inside = torch.arange(20 * step, 20 * step + 20)
        mean = tad.ensemble.ensemble(inside)
        w = hook.state.weight[inside] * hook.state.trusted[inside]
        for model in (expert, moved, moved):
            logits = model(x)
            plain = (w * F.cross_entropy(logits, hook.state.target[inside], reduction="none")).sum() / w.sum()
            assert torch.allclose(criterion(logits, y), plain + weight * consistency_loss(logits, mean))
        once = copy.deepcopy(tad.ensemble)
        assert torch.equal(once.count[inside], visits[inside] + 1)
    # the prediction that counted is that of the first evaluation
    torch.testing.assert_close(tad.ensemble.count, visits + 1)


def test_a_network_on_several_devices_is_scored_as_what_it_holds() -> None:
    hook, images, labels = made()
    expert = train(hook, images, labels, 2)
    other, *_ = made()
    train(other, images, labels, 1)
    (one,), (two,) = hook.callbacks, other.callbacks
    other.epoch_end(nn.DataParallel(expert))
    assert isinstance(one, TAD) and isinstance(two, TAD)
    assert torch.equal(one.history[-1], two.history[-1])
