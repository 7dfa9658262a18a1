"""attach("check"): finds planted wiring mistakes, passes right integrations, and changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tad_plugin import Hook, attach
from tad_plugin.errors import ConfigError, InvalidInputError, TadPluginWarning, WiringError
from tests.core.hook.indexed_cases import IMAGES, LABELS, Items, K, network

Loop = Callable[[Hook], Any]


@pytest.fixture(autouse=True)
def keep_global_rng() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def hook_of(method: str = "check", **more: Any) -> Hook:
    return attach(method, labels=LABELS, num_classes=K, **more)


# loops; each returns what it learned


def distil(hook: Hook, change: str = "") -> Tensor:
    """Matches class means of a fresh linear embedding."""
    synthetic = torch.stack([IMAGES[hook.pool(c)[0]] for c in range(K)]).clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    frozen = hook.pools()
    optimizer = torch.optim.SGD([synthetic], lr=0.1)
    for _ in range(4):
        net = nn.Linear(6, 5)
        loss = torch.zeros(())
        for c in range(K):
            if change == "frozen pools":
                idx = torch.tensor(frozen[c])[torch.randperm(len(frozen[c]))[:8]]
            else:
                idx = hook.sample(c, 8, generator)
            rows = net(IMAGES[idx]).detach()
            if change == "no weights":
                real = rows
            elif change == "nothing drawn":
                real = hook.reweight(rows)
            elif change == "weights unused":
                hook.weights(idx)
                real = rows
            else:
                real = hook.reweight(rows, idx)
            loss = loss + (real.mean(0) - net(synthetic[c : c + 1]).mean(0)).square().sum()
        if change == "another loss":
            hook.before_update(synthetic.sum(), synthetic, net, labels=torch.arange(K))
        elif change != "no before_update":
            hook.before_update(loss, synthetic, net, labels=torch.arange(K))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return synthetic.detach()


def train(hook: Hook, change: str = "") -> Tensor:
    """Trains on a DataLoader with indices."""
    labels = LABELS.flip(0) if change == "labels of another order" else LABELS
    data = hook.dataset(Items(labels=labels))
    mixup = v2.MixUp(num_classes=K)
    net, loader = network(), DataLoader(data, batch_size=8, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        for number, (images, targets, idx) in enumerate(loader):
            if change == "indices of other rows":
                idx = idx.flip(0)
            if change in ("mixed", "mixed without partner"):
                images, targets = mixup(images.view(-1, 1, 2, 3), targets)
                images = images.flatten(1)
                partner = idx.roll(1, 0) if change == "mixed" else None
                loss = hook.loss(net(images), targets, idx, partner=partner)
            elif change == "own loss" or (change == "every second batch" and number % 2):
                loss = F.cross_entropy(net(images), targets)
            else:
                loss = hook.loss(net(images), targets, idx)
                if change == "result unused":
                    loss = F.cross_entropy(net(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if change == "scorer":
            hook.epoch_end(net)
    return net.weight.detach()


def wrapped(hook: Hook) -> Tensor:
    """hook.loader and hook.criterion around a plain loop."""
    net = network()
    loader = hook.loader(DataLoader(Items(), batch_size=8, shuffle=True))
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        for images, targets in loader:
            optimizer.zero_grad()
            criterion(net(images), targets).backward()
            optimizer.step()
        hook.epoch_end(net)
    return net.weight.detach()


def by_index(hook: Hook, change: str = "") -> Tensor:
    """The one line of the README."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for idx in torch.arange(len(LABELS)).split(8):
        targets = LABELS[idx] if change == "own labels" else hook.targets(idx)
        rows = F.cross_entropy(net(IMAGES[idx]), targets, reduction="none")
        optimizer.zero_grad()
        (hook.weights(idx) * rows).mean().backward()
        optimizer.step()
    return net.weight.detach()


RIGHT: list[tuple[Loop, dict[str, Any]]] = [
    (distil, {}),
    (train, {}),
    (lambda h: train(h, "mixed"), {}),
    (lambda h: train(h, "scorer"), {"trains_on_real": True}),
    (wrapped, {"trains_on_real": True}),
    (by_index, {}),
]


@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_right_integrations_pass_and_learn_what_they_learn_without(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, more = RIGHT[number]
    found = []
    for method in ("check", "none"):
        torch.manual_seed(1)
        hook = hook_of(method, **more)
        found.append(loop(hook))
        hook.finish()
        assert ("ok" in capsys.readouterr().out) == (method == "check")
    assert torch.equal(*found)


#: loop -> (error, what its message names)
WRONG: list[tuple[str, Loop, dict[str, Any], type[Exception], str]] = [
    ("drawn() is missing", lambda h: distil(h, "nothing drawn"), {}, InvalidInputError, "drawn"),
    ("weights never asked", lambda h: distil(h, "no weights"), {}, WiringError, "weights asked"),
    ("weights asked, not used", lambda h: distil(h, "weights unused"), {}, WiringError, "reach a loss"),
    ("no before_update", lambda h: distil(h, "no before_update"), {}, WiringError, "before_update"),
    ("before_update with another loss", lambda h: distil(h, "another loss"), {}, WiringError, "contains the weights"),
    ("lists frozen at the start", lambda h: distil(h, "frozen pools"), {}, WiringError, "class_indices"),
    ("labels of another order", lambda h: train(h, "labels of another order"), {}, InvalidInputError, "item"),
    ("indices of other rows", lambda h: train(h, "indices of other rows"), {}, InvalidInputError, "row"),
    ("mixed without partner", lambda h: train(h, "mixed without partner"), {}, InvalidInputError, "partner"),
    ("own loss", lambda h: train(h, "own loss"), {}, WiringError, "hook.loss"),
    ("every second batch", lambda h: train(h, "every second batch"), {}, WiringError, "every batch announced"),
    ("result unused", lambda h: train(h, "result unused"), {}, WiringError, "reach a loss"),
    ("no epoch_end", train, {"trains_on_real": True}, WiringError, "epoch_end"),
    ("own labels", lambda h: by_index(h, "own labels"), {}, WiringError, "hook.targets"),
    ("no handle at all", lambda h: None, {}, WiringError, "which samples"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[w[0] for w in WRONG])
def test_planted_mistakes_are_found(case: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, loop, more, error, named = case
    hook = hook_of(**more)
    with pytest.raises(error, match=named):
        loop(hook)
        hook.finish()
    if error is WiringError:
        assert "MISSING" in capsys.readouterr().out


def test_the_check_stands_alone_and_reads_no_dataset() -> None:
    class Unread(Items):
        def __getitem__(self, i: int) -> Any:
            raise AssertionError("read")

    hook = attach("check", data=Unread())
    assert hook.data is None and torch.equal(hook.state.observed, LABELS)
    for bad in ("check+random", "random+check"):
        with pytest.raises(ConfigError, match="alone"):
            attach(bad, labels=LABELS)
    with pytest.raises(ConfigError):
        attach("check", labels=LABELS, config={"tad": {}})


# the lines of finish()


def test_each_method_says_what_it_decided_and_how_often_it_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    hook = attach("random", labels=LABELS, num_classes=K, config={"random": {"keep": 0.5}})
    for _ in range(3):
        hook.weights([0, 1])
    hook.sample(0, 1)
    hook.finish()
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"{int(hook.state.trusted.sum())} of 60 trusted" in line
    assert "weights 3" in line and "sample 1" in line
    attach("none", labels=LABELS).finish()
    attach("random", labels=LABELS, announce=False).finish()
    assert capsys.readouterr().out == ""


def test_a_method_that_never_acted_is_said() -> None:
    images = IMAGES[:, :4].reshape(-1, 1, 2, 2)
    for method, named in (("iwd", "before_update"), ("tad", "epoch_end")):
        hook = attach(method, labels=LABELS, data=images, num_classes=K, trains_on_real=True)
        with pytest.warns(TadPluginWarning, match=named):
            hook.finish()
