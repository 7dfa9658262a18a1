"""hook.dataset and hook.loss: in every loader the loss is that of a for-loop over the samples of the batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, Subset, WeightedRandomSampler
from torchvision.transforms import v2

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.errors import InvalidInputError, InvalidLabelsError
from tad_plugin.nn.training import inner_network
from tests.core.hook.indexed_cases import IMAGES, LABELS, Items, K, N, ahead, by_hand, decide, made, network

CLOSE = {"rel": 1e-6, "abs": 1e-6}


@pytest.fixture(autouse=True)
def keep_global_rng() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def value(loss: Tensor) -> float:
    return float(loss.detach())


def batches_of(hook: Hook, dataset: Any = None, *, size: int = 8, **more: Any) -> DataLoader[Any]:
    return DataLoader(hook.dataset(Items() if dataset is None else dataset), batch_size=size, **more)


def follow(hook: Hook, batches: Any, net: nn.Module | None = None) -> list[list[int]]:
    """Checks the loss and the labels of every batch. Returns the samples."""
    net, seen = network() if net is None else net, []
    for images, labels, idx in batches:
        rows = images[:, 0].long().tolist()
        assert idx.tolist() == rows
        hard = labels.argmax(1) if labels.ndim == 2 else labels
        assert torch.equal(hard, hook.state.target[rows])
        logits = net(images)
        assert value(hook.loss(logits, labels, idx)) == pytest.approx(by_hand(hook.state, logits, rows), **CLOSE)
        seen.append(rows)
    return seen


class Threaded:
    """A loader in a background thread, as data prefetchers are."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        waiting: queue.Queue[Any] = queue.Queue(maxsize=3)

        def fill() -> None:
            for batch in self.loader:
                waiting.put(batch)
            waiting.put(None)

        threading.Thread(target=fill, daemon=True).start()
        while (batch := waiting.get()) is not None:
            yield batch


class Endless:
    """A batch sampler that never ends."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self.sampler


@pytest.mark.parametrize("form", ["tuple", "list", "soft"])
def test_samples_of_every_form_carry_index_and_label(form: str) -> None:
    seen = follow(made(), batches_of(made(), Items(form), shuffle=True))
    assert sorted(chain.from_iterable(seen)) == list(range(N))


def test_a_mapping_gets_its_index_under_a_key() -> None:
    hook, net = made(), network()
    for batch in DataLoader(hook.dataset(Items("dict"), key="position"), batch_size=8, shuffle=True):
        rows = batch["image"][:, 0].long().tolist()
        assert batch["position"].tolist() == rows and torch.equal(batch["label"], hook.state.target[rows])
        logits = net(batch["image"])
        found = hook.loss(logits, batch["label"], batch["position"])
        assert value(found) == pytest.approx(by_hand(hook.state, logits, rows), **CLOSE)
    with pytest.raises(InvalidInputError, match="'label'"):
        hook.dataset(Items("dict"), key="label")[0]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_prefetcher_ahead(depth: int) -> None:
    hook = made()
    follow(hook, ahead(batches_of(hook, shuffle=True), depth))


def test_a_background_thread() -> None:
    hook = made()
    assert len(follow(hook, Threaded(batches_of(hook, shuffle=True)))) == 8


def test_two_loaders_zipped() -> None:
    hook, net = made(), network()
    for one, two in zip(batches_of(hook, shuffle=True), batches_of(hook, shuffle=True), strict=True):
        follow(hook, [two, one], net)  # in the other order


def test_an_endless_sampler_drop_last_and_a_class_balanced_one() -> None:
    hook = made()
    endless: Any = Endless(BatchSampler(RandomSampler(range(N)), 8, drop_last=True))
    batches = iter(DataLoader(hook.dataset(Items()), batch_sampler=endless))
    follow(hook, [next(batches) for _ in range(20)])
    assert len(follow(hook, batches_of(hook, shuffle=True, drop_last=True))) == N // 8
    balanced = WeightedRandomSampler(1.0 / torch.bincount(LABELS)[LABELS], N)
    follow(hook, batches_of(hook, sampler=balanced))


def test_subsets_of_subsets_and_concatenated_datasets() -> None:
    hook = made()
    inner = Subset(Items(), list(range(0, N, 2)))
    assert [*chain.from_iterable(follow(hook, batches_of(hook, Subset(inner, [3, 1, 2]))))] == [6, 2, 4]
    one, two = Items(), Items()
    both = ConcatDataset([Subset(one, list(range(20))), Subset(two, list(range(20, N)))])
    assert [*chain.from_iterable(follow(hook, batches_of(hook, both)))] == list(range(N))
    some = [(IMAGES[i].clone().index_fill_(0, torch.tensor(0), float(i)), int(LABELS[i])) for i in (7, 3)]
    follow(hook, DataLoader(hook.dataset(some, positions=[7, 3]), batch_size=2))
    with pytest.raises(InvalidInputError, match="positions"):
        hook.dataset(some)


def test_worker_processes_see_the_labels_of_today() -> None:
    """Forked workers that live on: after a change the next epoch has the new labels."""
    hook = made()
    loader = batches_of(hook, shuffle=True, num_workers=2, persistent_workers=True)
    assert len(follow(hook, loader)) == 8
    before = hook.state.target.clone()
    decide(hook.state, shift=2)
    assert not torch.equal(before, hook.state.target)
    follow(hook, loader)


def test_spawned_workers_see_the_labels_of_today() -> None:
    hook = made()
    loader = batches_of(hook, num_workers=1, multiprocessing_context="spawn", persistent_workers=True, size=20)
    follow(hook, loader)
    decide(hook.state, shift=2)
    follow(hook, loader)


def test_a_batch_read_before_a_change_is_trained_on_the_label_of_today() -> None:
    hook, net = made(), network()
    old = [hook.state.target.clone(), list(batches_of(hook))]
    decide(hook.state, shift=2)
    for images, labels, idx in old[1]:
        assert torch.equal(labels, old[0][idx])
        logits = net(images)
        expected = by_hand(hook.state, logits, idx.tolist())
        assert value(hook.loss(logits, labels, idx)) == pytest.approx(expected, **CLOSE)


# labels


@pytest.mark.parametrize("mix", [v2.CutMix(num_classes=K), v2.MixUp(num_classes=K)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_weigh_both_samples(mix: Any, smoothing: float) -> None:
    hook, net = made(), network()
    images = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, K))
    for idx in torch.randperm(N).split(16):
        own = hook.targets(idx)
        x, mixed = mix(images[idx], own)
        pairs = [(r, j) for r, (i, j) in enumerate(zip(own, own.roll(1), strict=True)) if i != j]
        share = float(mixed[pairs[0][0], own[pairs[0][0]]])
        mixed = (1 - smoothing) * mixed + smoothing / K
        logits, partner = net(x), idx.roll(1, 0)
        expected = by_hand(hook.state, logits, idx.tolist(), partner.tolist(), share, smoothing)
        assert value(hook.loss(logits, mixed, idx, partner=partner)) == pytest.approx(expected, rel=1e-5)
        found = hook.loss(logits, mixed.double(), idx, partner=partner, share=share)
        assert value(found) == pytest.approx(expected, **CLOSE)
        if 0.01 < share < 0.99:  # else nothing was mixed
            with pytest.raises(InvalidLabelsError, match="partner"):
                hook.loss(logits, mixed, idx)
            with pytest.raises(InvalidLabelsError):
                hook.loss(logits, mixed, idx, partner=idx.roll(2, 0))


def test_mixing_by_hand_with_two_index_vectors() -> None:
    hook, net, share = made(), network(), 0.3
    idx = torch.arange(16)
    partner = torch.randperm(16)
    logits = net(share * IMAGES[idx] + (1 - share) * IMAGES[partner])
    expected = by_hand(hook.state, logits, idx.tolist(), partner.tolist(), share)
    found = hook.loss(logits, hook.targets(idx), idx, partner=partner, share=share)
    assert value(found) == pytest.approx(expected, **CLOSE)
    # Hard labels without a share: nothing was mixed into this batch.
    unmixed = hook.loss(logits, hook.targets(idx), idx, partner=partner)
    assert value(unmixed) == pytest.approx(by_hand(hook.state, logits, idx.tolist()), **CLOSE)
    # The usual form of such loops: two losses. Both batches hold the same samples, so it is the same.
    y = hook.targets(idx)
    two = share * hook.loss(logits, y, idx) + (1 - share) * hook.loss(logits, y[partner], idx[partner])
    assert value(two) == pytest.approx(expected, **CLOSE)


def test_soft_labels_of_one_sample_each() -> None:
    hook, net, idx = made(), network(), torch.arange(5, 21)
    soft = torch.rand(16, K).softmax(1)
    logits = net(IMAGES[idx])
    top = bottom = 0.0
    for r, i in enumerate(idx.tolist()):
        w = float(hook.state.weight[i]) * float(hook.state.trusted[i])
        logs = logits[r].detach().double().log_softmax(0)
        top, bottom = top - w * float((soft[r].double() * logs).sum()), bottom + w
    assert value(hook.loss(logits, soft, idx)) == pytest.approx(top / bottom, **CLOSE)
    two = torch.zeros(16, K)
    two[:, 0], two[:, 1] = 0.7, 0.3  # what annotators disagree on looks like a mixture
    with pytest.raises(InvalidLabelsError, match="share=1"):
        hook.loss(logits, two, idx)
    hook.loss(logits, two, idx, share=1)


def test_criteria() -> None:
    hook, net, idx = made(), network(), torch.arange(16)
    logits, y = net(IMAGES[idx]), hook.targets(idx)
    rows = idx.tolist()
    smoothed = hook.loss(logits, y, idx, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    assert value(smoothed) == pytest.approx(by_hand(hook.state, logits, rows, smoothing=0.1), **CLOSE)
    w = hook.state.training_weights(idx)
    per_row = F.cross_entropy(logits, y, reduction="none")
    each = hook.loss(logits, y, idx, criterion=nn.CrossEntropyLoss(reduction="none"))
    torch.testing.assert_close(each, w * per_row)
    assert value(hook.loss(logits, y, idx, criterion=nn.CrossEntropyLoss(reduction="sum"))) == pytest.approx(
        value((w * per_row).sum()), **CLOSE
    )
    of_class = torch.tensor([1.0, 2.0, 0.5, 1.5])
    found = hook.loss(logits, y, idx, criterion=nn.CrossEntropyLoss(weight=of_class))
    expected = (w * of_class[y] * per_row).sum() / (w * of_class[y]).sum()
    assert value(found) == pytest.approx(value(expected), **CLOSE)
    with pytest.raises(InvalidInputError, match="reduction"):
        hook.loss(logits, y, idx, criterion=lambda a, b: a.sum())


def test_without_a_method_it_is_the_scripts_own_loss_bit_for_bit(global_rng_untouched: None) -> None:
    hook, net, criterion = attach("none", labels=LABELS), network(), nn.CrossEntropyLoss(label_smoothing=0.1)
    before = hook.generator.get_state()
    for images, labels, idx in DataLoader(hook.dataset(Items()), batch_size=8, generator=torch.Generator()):
        logits = net(images)
        assert torch.equal(labels, LABELS[idx])
        assert torch.equal(hook.loss(logits, labels, idx), F.cross_entropy(logits, labels))
        assert torch.equal(hook.loss(logits, labels, idx, criterion=criterion), criterion(logits, labels))
        soft = F.one_hot(labels, K) * 0.6 + F.one_hot(labels.roll(1), K) * 0.4
        assert torch.equal(hook.loss(logits, soft, idx, partner=idx.roll(1)), F.cross_entropy(logits, soft))
    assert torch.equal(before, hook.generator.get_state())


# the step


def step(hook: Hook, net: Any, parts: int = 1, **mode: Any) -> list[Tensor]:
    """Gradients of one batch of 16, in micro-batches."""
    net.zero_grad()
    images, labels, idx = next(iter(batches_of(hook, size=16)))
    for x, y, i in zip(images.chunk(parts), labels.chunk(parts), idx.chunk(parts), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(mode)):
            loss = hook.loss(net(x), y, i) / parts
        loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def weighted_gradients(hook: Hook, net: nn.Module, chunks: int) -> list[Tensor]:
    net.zero_grad()
    images = torch.stack([Items()[i][0] for i in range(16)])
    total = torch.zeros(())
    for idx in torch.arange(16).chunk(chunks):
        w, logits = hook.state.training_weights(idx), net(images[idx])
        losses = [w[r] * F.cross_entropy(logits[r : r + 1], hook.targets(idx)[r : r + 1]) for r in range(len(idx))]
        total = total + sum(losses) / w.sum() / chunks
    total.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("parts", [1, 4])
def test_gradient_accumulation(parts: int) -> None:
    hook, net = made(), network()
    for found, expected in zip(step(hook, net, parts), weighted_gradients(hook, net, parts), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_autocast_gives_the_loss_of_its_own_logits_in_float32() -> None:
    hook, net = made(), network()
    images, labels, idx = next(iter(batches_of(hook, size=16)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(images)
        loss = hook.loss(logits, labels, idx)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert value(loss) == pytest.approx(by_hand(hook.state, logits.float(), idx.tolist()), **CLOSE)


def test_a_compiled_network() -> None:
    hook, net = made(), network()
    compiled: Any = torch.compile(net, backend="eager")
    assert inner_network(compiled) is net
    for found, expected in zip(step(hook, compiled), step(hook, net), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# what is refused


def test_batches_are_checked() -> None:
    hook, net = made(), network()
    idx = torch.arange(8)
    logits, y = net(IMAGES[idx]), hook.targets(idx)
    other = (idx + 1) % N
    for bad in (
        lambda: hook.loss(logits, y, idx[:7]),
        lambda: hook.loss(logits, y, idx + N),
        lambda: hook.loss(logits, y, other),
        lambda: hook.loss(logits, y[:7], idx),
        lambda: hook.loss(logits, y.tolist(), idx),
        lambda: hook.loss(logits[0], y[:1], idx[:1]),
        lambda: hook.loss(logits, torch.ones(8, K + 1), idx),
        lambda: hook.loss(logits, y, idx, partner=idx[:7], share=0.5),
    ):
        with pytest.raises(InvalidInputError):
            bad()


def test_a_dataset_in_another_order_is_refused_where_it_is_read() -> None:
    hook = made()
    with pytest.raises(InvalidLabelsError, match="item"):
        list(batches_of(hook, Items(labels=LABELS.flip(0))))
    with pytest.raises(InvalidLabelsError, match="label="):
        hook.dataset([(x, "path.png", 0) for x in IMAGES])[0]
    assert hook.dataset([(x, "path.png", int(y)) for x, y in zip(IMAGES, LABELS, strict=True)], label=2)[3][3] == 3
