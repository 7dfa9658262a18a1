"""hook.loader and hook.criterion: with identity weights the plain loop, bit for bit; else a for-loop's loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.hook.given_batches import GivenBatches
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.hook.loader import IndexedLoader, TrustedCriterion
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError

K, N = 3, 37
IMAGES = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % K


class Identity(Callback):
    """A method that is on and leaves everything as it is, but through the multiplication."""

    name = "identity"

    def on_start(self, *, state: SampleState, data: Any) -> None:
        state.set_weights(self.name, torch.ones(len(state)))


def identity() -> Hook:
    state = SampleState(LABELS, K)
    return Hook(state, None, [Identity()]).start()


class Data(TensorDataset):
    """Draws from the global generator for each sample, as augmenting datasets do."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn(6), y


def trained(hook: Hook | None, workers: int, shuffle: bool, criterion: nn.Module) -> tuple[Tensor, ...]:
    """Parameters, test loss and global generator after two epochs of an ordinary training loop."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, K))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    loader: Any = DataLoader(Data(IMAGES, LABELS), batch_size=8, shuffle=shuffle, num_workers=workers)
    test = (IMAGES[:5], LABELS[:5])
    loss_fn: Any = criterion
    if hook is not None:
        loader, loss_fn = hook.loader(loader), hook.criterion(criterion)
        assert len(loader) == 5 and loader.batch_size == 8
    for _ in range(2):
        for x, y in loader:
            loss = loss_fn(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tested = loss_fn(network(test[0]), test[1])
    return (*(p.detach() for p in network.parameters()), tested.detach(), torch.get_rng_state())


@pytest.fixture
def keep_global_rng() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize(("workers", "shuffle"), [(0, False), (0, True), (2, True)])
def test_identity_weights_train_as_the_plain_loop_bit_for_bit(
    workers: int, shuffle: bool, keep_global_rng: None
) -> None:
    plain = trained(None, workers, shuffle, nn.CrossEntropyLoss())
    for hook in (identity(), attach("none", labels=LABELS, num_classes=K)):
        for a, b in zip(plain, trained(hook, workers, shuffle, nn.CrossEntropyLoss()), strict=True):
            assert torch.equal(a, b)


def in_flight(indices: Tensor) -> tuple[GivenBatches, Any]:
    """Batches of which the one of these samples was just given, and the pass that gave it."""
    given = GivenBatches()
    given.loaders = 1
    passing = given.passed(None, iter([(indices, (IMAGES[indices], LABELS[indices]))]))
    next(passing)
    return given, passing


def criteria() -> list[Any]:
    weight = torch.tensor([1.0, 2.0, 0.5])
    return [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=weight),
        nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.MultiMarginLoss(),
    ]


@pytest.mark.parametrize("number", range(len(criteria())))
def test_identity_weights_keep_what_the_criterion_says(number: int) -> None:
    criterion = criteria()[number]
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(2), requires_grad=True)
    given, _passing = in_flight(torch.arange(N))
    wrapped = TrustedCriterion(criterion, SampleState(LABELS, K), given, CallbackList())
    torch.testing.assert_close(wrapped(logits, LABELS), criterion(logits, LABELS))


def test_relabelled_and_weighted_loss_is_that_of_a_for_loop() -> None:
    state = SampleState(LABELS, K)
    generator = torch.Generator().manual_seed(3)
    state.update(target=LABELS.flip(0), trusted=torch.rand(N, generator=generator) < 0.7)
    state.set_weights("m", torch.rand(N, generator=generator))
    logits = torch.randn(10, K, generator=generator).requires_grad_()
    batch = torch.randperm(N, generator=generator)[:10]
    given, _passing = in_flight(batch)
    weight = torch.tensor([1.0, 2.0, 0.5])
    for criterion, cw in ((nn.CrossEntropyLoss(), torch.ones(K)), (nn.CrossEntropyLoss(weight=weight), weight)):
        top, bottom = 0.0, 0.0
        for row, i in enumerate(batch.tolist()):
            w = float(state.weight[i]) * float(state.trusted[i])
            target = int(LABELS.flip(0)[i])
            top += w * float(cw[target]) * -float(logits[row].log_softmax(0)[target].detach())
            bottom += w * float(cw[target])
        got = TrustedCriterion(criterion, state, given, CallbackList())(logits, LABELS[batch])
        assert float(got.detach()) == pytest.approx(top / bottom, rel=1e-5)
    got.backward()
    untrusted = ~state.trusted[batch]
    assert bool(untrusted.any()) and logits.grad is not None and not bool(logits.grad[untrusted].any())


def test_a_batch_without_weight_gives_zero_with_a_graph() -> None:
    state = SampleState(LABELS, K)
    state.update(trusted=torch.arange(N) > 3)
    given, _passing = in_flight(torch.arange(4))
    logits = torch.randn(4, K, requires_grad=True)
    loss = TrustedCriterion(nn.CrossEntropyLoss(), state, given, CallbackList())(logits, LABELS[:4])
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not bool(logits.grad.any())


def test_the_criterion_may_be_called_twice_per_batch() -> None:
    """As sharpness-aware training does: at the parameters, and at perturbed ones."""
    hook = identity()
    loader = hook.loader(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    network = nn.Linear(6, K)
    for x, y in loader:
        first = criterion(network(x), y)
        second = criterion(copy.deepcopy(network)(x), y)
        assert torch.equal(first, second) and torch.allclose(first, F.cross_entropy(network(x), y))


def test_testing_gets_the_plain_criterion_inside_and_after_an_epoch() -> None:
    hook = attach("oracle", labels=LABELS, num_classes=K, true_labels=(LABELS + (torch.arange(N) < 9)) % K)
    loader = hook.loader(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=9))
    criterion: Any = hook.criterion(nn.CrossEntropyLoss(label_smoothing=0.3))
    network, plain = nn.Linear(6, K), nn.CrossEntropyLoss(label_smoothing=0.3)
    x, y = IMAGES[9:18], LABELS[9:18].flip(0)
    for step, (images, labels) in enumerate(loader):
        with torch.no_grad():
            assert torch.equal(criterion(network(x), y), plain(network(x), y))
        if step == 0:  # all of them are untrusted
            assert float(criterion(network(images), labels).detach()) == 0
            break
    assert torch.equal(criterion(network(x), y), plain(network(x), y))


def test_batches_are_those_of_the_wrapped_loader_whatever_they_hold() -> None:
    rows = [{"x": IMAGES[i], "y": int(LABELS[i])} for i in range(N)]
    plain = DataLoader(rows, batch_size=7, drop_last=True)  # type: ignore[arg-type]
    given = GivenBatches()
    wrapped = IndexedLoader(plain, given, N)
    seen = []
    for a, b in zip(plain, wrapped, strict=True):
        assert torch.equal(a["x"], b["x"]) and torch.equal(a["y"], b["y"])
        batch = given.find(b["y"], 7, LABELS)
        assert batch is not None
        seen += batch.indices.tolist()
    assert seen == list(range(35)) and wrapped.dataset is rows


class Endless(IterableDataset):  # type: ignore[type-arg]
    """No positions."""

    def __iter__(self) -> Any:
        return iter([(IMAGES[0], 0)])


def test_bad_loaders_are_named() -> None:
    hook = identity()
    plain = TensorDataset(IMAGES, LABELS)
    for bad, message in (
        (IMAGES, "Tensor"),
        (DataLoader(Endless()), "Endless"),
        (DataLoader(plain, batch_size=None), "TensorDataset"),
        (DataLoader(Subset(plain, range(5)), batch_size=2), "37.* 5"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            hook.loader(bad)  # type: ignore[arg-type]


class Rows(nn.Module):
    """A criterion that leaves more than one loss per sample unreduced."""

    reduction = "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.mean() if self.reduction == "mean" else logits


def test_bad_criteria_and_batches_are_named() -> None:
    hook = identity()
    for bad in (lambda a, b: a.sum(), nn.CrossEntropyLoss(reduction="none")):
        with pytest.raises(InvalidInputError, match="reduction"):
            hook.criterion(bad)
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    network = nn.Linear(6, K)
    for x, y in hook.loader(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)):
        with pytest.raises(InvalidInputError, match="8.* 3"):
            criterion(network(x[:3]), y[:3])
        break
    rows: Any = hook.criterion(Rows())
    for x, y in hook.loader(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)):
        with pytest.raises(InvalidInputError, match=r"\[8\].*\[8, 3\]"):
            rows(network(x), y)
        break


def test_labels_in_another_order_than_the_loaders_are_named() -> None:
    hook = identity()
    moved = (LABELS + 1) % K
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    for x, y in hook.loader(DataLoader(TensorDataset(IMAGES, moved), batch_size=8)):
        with pytest.raises(InvalidInputError, match="label 0 for sample 0.* 1 "):
            criterion(nn.Linear(6, K)(x), y)
        break


def test_corrupted_labels_reach_the_training_loop_with_no_method_too() -> None:
    hook = attach("none", labels=LABELS, num_classes=K, noise="symmetric:0.5")
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    network = nn.Linear(6, K)
    assert not torch.equal(hook.state.observed, LABELS)
    for x, y in hook.loader(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=N)):
        got = criterion(network(x), y)
        assert torch.allclose(got, F.cross_entropy(network(x), hook.state.observed))
