"""The labels that a criterion gets: used for the batch that they belong to, or refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, TadPluginWarning

K, N = 3, 48
IMAGES = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(1))
LABELS[:K] = torch.arange(K)


class Some(Callback):
    """Weights, distrusts and relabels some samples."""

    name = "some"

    def on_start(self, *, state: SampleState, data: Any) -> None:
        n = torch.arange(len(state))
        state.update(target=torch.where(n % 5 == 4, (state.observed + 1) % K, state.observed), trusted=n % 7 > 0)
        state.set_weights(self.name, 1.0 + n % 4)


def made(labels: Tensor = LABELS) -> Hook:
    return Hook(SampleState(labels, K), None, [Some()]).start()


def loader(labels: Tensor = LABELS, size: int = 8, seed: int = 0, **more: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.arange(len(labels)), labels)
    return DataLoader(data, batch_size=size, shuffle=True, generator=generator, **more)


def logits_of(rows: Tensor, network: nn.Module) -> Tensor:
    out: Tensor = network(IMAGES[rows])
    return out


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Linear(6, K)


def by_hand(hook: Hook, logits: Tensor, rows: Tensor, smoothing: float = 0.0) -> float:
    """The loss of a batch of these samples, in a for-loop."""
    state, top, bottom = hook.state, 0.0, 0.0
    for row, i in zip(logits.detach().double(), rows.tolist(), strict=True):
        logs = [float(v) for v in row.log_softmax(0)]
        loss = -(1 - smoothing) * logs[int(state.target[i])] - smoothing * sum(logs) / K
        w = float(state.weight[i]) * float(state.trusted[i])
        top, bottom = top + w * loss, bottom + w
    return top / bottom


Batch = tuple[Tensor, Tensor]


def ahead(batches: Any, depth: int) -> Iterator[Batch]:
    """Takes ``depth`` batches before it gives the first."""
    kept: deque[Batch] = deque()
    for batch in batches:
        kept.append(batch)
        if len(kept) > depth:
            yield kept.popleft()
    yield from kept


def same(labels: Tensor) -> Tensor:
    return labels


@pytest.mark.parametrize("copied", [same, Tensor.clone, Tensor.int, lambda y: y.view(-1)])
@pytest.mark.parametrize("depth", [0, 1, 3, 9])
def test_batches_taken_ahead_get_their_own_weights(depth: int, copied: Callable[[Tensor], Tensor]) -> None:
    hook, net, seen = made(), network(), 0
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    wrapped = hook.loader(loader())
    for _ in range(2):
        for rows, labels in ahead(wrapped, depth):
            logits = logits_of(rows, net)
            got = float(criterion(logits, copied(labels)).detach())
            assert got == pytest.approx(by_hand(hook, logits, rows), abs=1e-6)
            seen += len(rows)
    assert seen == 2 * N


@pytest.mark.parametrize("copied", [same, Tensor.clone])
def test_batches_of_two_loaders_get_their_own_weights(copied: Callable[[Tensor], Tensor]) -> None:
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
    first, second = hook.loader(loader(seed=1)), hook.loader(loader(seed=2))
    for one, two in zip(first, second, strict=True):
        for rows, labels in (two, one):
            logits = logits_of(rows, net)
            got = float(criterion(logits, copied(labels)).detach())
            assert got == pytest.approx(by_hand(hook, logits, rows, 0.1), abs=1e-6)


def test_batches_of_one_class_are_told_apart_by_their_tensor_or_refused() -> None:
    labels = torch.arange(N) // (N // K)
    hook, net = made(labels), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    wrapped = hook.loader(DataLoader(TensorDataset(torch.arange(N), labels), batch_size=8))
    for rows, y in ahead(wrapped, 1):
        logits = logits_of(rows, net)
        assert float(criterion(logits, y).detach()) == pytest.approx(by_hand(hook, logits, rows), abs=1e-6)
    for rows, y in wrapped:  # in turn, a copy is enough: also for a second evaluation
        logits = logits_of(rows, net)
        for _ in range(2):
            got = float(criterion(logits, y.clone()).detach())
            assert got == pytest.approx(by_hand(hook, logits, rows), abs=1e-6)
    with pytest.raises(InvalidInputError, match="2 batches"):
        for rows, y in ahead(wrapped, 1):
            criterion(logits_of(rows, net), y.clone())


def mixed(y: Tensor) -> Tensor:
    """The labels of CutMix's and MixUp's second image."""
    return y.flip(0)


CHANGED: list[Callable[[Tensor], Any]] = [
    mixed,
    lambda y: F.one_hot(y, K).float(),
    lambda y: 0.3 * F.one_hot(y, K).float() + 0.7 * F.one_hot(y.flip(0), K).float(),
    lambda y: y.float(),
    lambda y: y[:, None],
    lambda y: y.copy_((y + 1) % K),  # in place
    lambda y: torch.cat([y, y]),
]


@pytest.mark.parametrize("number", range(len(CHANGED)))
@pytest.mark.parametrize("step", [0, 3])
def test_mixed_and_soft_labels_are_refused_in_every_batch(number: int, step: int) -> None:
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    # A copy: one of the changes writes into the batch.
    for at, (rows, labels) in enumerate(hook.loader(loader(LABELS.clone()))):
        logits = logits_of(rows, net)
        if at == step:
            with pytest.raises(InvalidInputError):
                criterion(logits, CHANGED[number](labels))
            break
        criterion(logits, labels)


def test_labels_of_other_data_are_found_in_every_batch() -> None:
    moved = LABELS.clone()
    moved[40] = (moved[40] + 1) % K
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    with pytest.raises(InvalidInputError, match="sample 40"):
        for rows, labels in hook.loader(DataLoader(TensorDataset(torch.arange(N), moved), batch_size=8)):
            criterion(logits_of(rows, net), labels)


def test_a_criterion_without_a_wrapped_loader_is_refused() -> None:
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    with pytest.raises(InvalidInputError, match=r"hook\.loader"):
        criterion(net(IMAGES), LABELS)
    with torch.no_grad():
        assert torch.equal(criterion(net(IMAGES), LABELS), F.cross_entropy(net(IMAGES), LABELS))


def test_a_test_with_gradients_gets_the_plain_criterion_after_a_pass() -> None:
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    wrapped = hook.loader(loader())
    x, y = IMAGES[:8], LABELS[:8]
    for batches in (wrapped, ahead(wrapped, 2)):
        for rows, labels in batches:
            criterion(logits_of(rows, net), labels)
        assert torch.equal(criterion(net(x), y), F.cross_entropy(net(x), y))
    for _ in wrapped:  # nothing was trained on: the last batches still wait
        pass
    assert torch.equal(criterion(net(x), y), F.cross_entropy(net(x), y))


# loaders with an iterator of their own


class Repeated:
    """As in IDC, DREAM and NCFM: never ends, and has no length."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from iter(self.sampler)


class ManyEpochs(DataLoader):  # type: ignore[type-arg]
    """As ``MultiEpochsDataLoader`` of these codebases: one iterator for all epochs."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        object.__setattr__(self, "batch_sampler", Repeated(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)  # type: ignore[union-attr]

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield next(self.iterator)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop", [False, True])
def test_a_loader_that_never_ends_gives_epochs_of_its_length(workers: int, drop: bool) -> None:
    hook, net = made(), network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())

    def many() -> ManyEpochs:
        generator = torch.Generator().manual_seed(6)
        data = TensorDataset(torch.arange(N), LABELS)
        more = {"shuffle": True, "generator": generator, "num_workers": workers, "drop_last": drop}
        return ManyEpochs(data, batch_size=9, **more)

    plain, wrapped = many(), hook.loader(many())
    assert len(wrapped) == len(plain) == (5 if drop else 6)
    for epoch in range(3):
        orders = [], []  # type: ignore[var-annotated]
        for rows, labels in wrapped:
            logits = logits_of(rows, net)
            got = float(criterion(logits, labels).detach())
            assert got == pytest.approx(by_hand(hook, logits, rows), abs=1e-6)
            orders[0].extend(rows.tolist())
        for rows, _ in plain:
            orders[1].extend(rows.tolist())
        assert len(orders[0]) == len(set(orders[0])) == (45 if drop else N)
        if not workers:  # with workers the plain one has drawn the first epoch's order already
            assert orders[0] == orders[1], epoch


def test_a_loader_that_never_ends_and_has_no_length_is_named() -> None:
    class NoLength(ManyEpochs):
        def __len__(self) -> int:
            raise TypeError("no length")

    with pytest.raises(InvalidInputError, match="NoLength"):
        made().loader(NoLength(TensorDataset(torch.arange(N), LABELS), batch_size=8))


def test_a_loader_that_changes_its_batches_in_its_iterator_is_named() -> None:
    class Changes(DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            for rows, labels in super().__iter__():
                yield rows, labels.flip(0)

    with pytest.warns(TadPluginWarning, match="Changes"):
        assert len(list(made().loader(Changes(TensorDataset(torch.arange(N), LABELS), batch_size=8)))) == 6
