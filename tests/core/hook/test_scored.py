"""What methods score: images of any dataset, and a loop's own network, with images and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tad_plugin.core.hook.images as kept
from tad_plugin import Hook, attach, attach_dataset
from tad_plugin.core.scorer import score_all
from tad_plugin.errors import ConfigError, TadPluginWarning
from tad_plugin.utils.image_store import ImageStore
from tests.problems import blobs, flip

IMAGES, TRUE = blobs(spread=0.8)
LABELS = flip(TRUE, 3, 0.3)
SMALL: dict[str, Any] = {"scorer": {"epochs": 3, "width": 4, "batch_size": 32}, "tad": {"warmup": 1}}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


class Augmented(Dataset):  # type: ignore[type-arg]
    """Draws from the global generator, and counts its reads."""

    def __init__(self) -> None:
        self.transform: Any = lambda x: x + torch.randn(())
        self.labels, self.reads = LABELS, [0]

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads[0] += 1
        return self.transform(IMAGES[i]), int(LABELS[i])


def plain(x: Tensor) -> Tensor:
    return x


def same(a: Hook, b: Hook) -> bool:
    return all(torch.equal(a.state[name], b.state[name]) for name in ("target", "weight", "trusted", "trust"))


def test_a_dataset_is_scored_as_its_images_are_and_lazily_if_large(
    monkeypatch: pytest.MonkeyPatch, global_rng_untouched: None
) -> None:
    expected = attach("tad", labels=LABELS, data=IMAGES, config=SMALL)
    dataset = Augmented()
    small = attach("tad", data=dataset, scoring_transform=plain, config=SMALL)
    assert same(expected, small) and isinstance(small.data.images, Tensor) and dataset.reads[0] == 60  # type: ignore[union-attr]
    monkeypatch.setattr(kept.as_images, "__kwdefaults__", {**kept.as_images.__kwdefaults__, "keep_bytes": 1000})
    large = attach("tad", data=dataset, scoring_transform=plain, config=SMALL)
    assert same(expected, large) and isinstance(large.data.images, ImageStore)  # type: ignore[union-attr]


def test_none_and_check_read_nothing(global_rng_untouched: None) -> None:
    for method in ("none", "check"):
        dataset = Augmented()
        wrapped, hook = attach_dataset(method, dataset, scoring_transform=plain)
        hook.epoch_end(nn.Identity())
        assert dataset.reads[0] == 0 and hook.data is None and len(wrapped) == 60


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def rounds(hook: Hook, batches: Any, net: nn.Module, epochs: int = 4, step: bool = True) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(epochs):
        for images, labels, idx in batches:
            loss = hook.loss(net(images), labels, idx)
            optimizer.zero_grad()
            loss.backward()
            if step:
                optimizer.step()
        hook.epoch_end(net)


def test_the_loops_network_is_scored_on_the_wrapped_dataset() -> None:
    found = []
    for data in (IMAGES, None):
        hook = attach("tad", labels=LABELS, data=data, trains_on_real=True, scoring_transform=None, config=settings())
        net = network()
        dataset = Augmented()
        dataset.transform = plain
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            rounds(hook, DataLoader(hook.dataset(dataset), batch_size=16, shuffle=True), net)
        found.append(hook)
    assert same(*found) and not found[0].state.untouched()


def settings() -> dict[str, Any]:
    return {"tad": {"warmup": 1}}


def test_without_images_the_logits_of_the_batches_are_scored() -> None:
    """With a network that does not learn, they are those of a pass over the data."""
    hook = attach("tad", labels=LABELS, num_classes=3, trains_on_real=True, config=settings())
    net = network()
    batches = [(IMAGES[i], hook.targets(i), i) for i in torch.randperm(60).split(16)]
    rounds(hook, batches, net, epochs=2, step=False)
    with torch.no_grad():
        expected = F.cross_entropy(net(IMAGES), LABELS, reduction="none")
    torch.testing.assert_close(hook.state["tad_loss"], expected)
    assert not hook.state.untouched()
    seen, known = hook.indexed.scored(net)
    torch.testing.assert_close(score_all(seen, known).logits, net(IMAGES).detach())  # type: ignore[arg-type]


def test_a_sample_that_was_never_seen_is_waited_for_and_said() -> None:
    hook = attach("tad", labels=LABELS, num_classes=3, trains_on_real=True, config=settings())
    batches = [(IMAGES[i], hook.targets(i), i) for i in torch.arange(59).split(16)]
    rounds(hook, batches, network(), epochs=3)
    assert hook.state.untouched()
    with pytest.warns(TadPluginWarning, match="1 samples that never"):
        hook.finish()
    with pytest.raises(ConfigError, match="hook.loss"):
        attach("tad", labels=LABELS, trains_on_real=True).epoch_end(network())


def test_a_wrapped_network_is_scored_as_the_one_inside() -> None:
    found = []
    for net in (network(), nn.DataParallel(network())):
        hook = attach("tad", labels=LABELS, data=IMAGES, trains_on_real=True, config=settings())
        for _ in range(2):
            hook.epoch_end(net)
        found.append(hook)
    assert same(*found)


def test_short_announced_runs_of_iwd_act() -> None:
    """Its first weights come before a twentieth of the run; long runs keep their schedule."""
    from tad_plugin.iwd.method import IWD

    due = {}
    for iterations in (None, 4, 60, 200, 5000):
        method = IWD()
        method.iterations = iterations
        due[iterations] = [i for i in range(200) if method.due(i)]
    assert due[None] == due[200] == due[5000] == [0, 10, 20, 40, 80, 160]
    assert due[4] == [0, 1, 2, 4, 8, 16, 32, 64, 128] and due[60] == [0, 3, 6, 12, 24, 48, 96, 192]
    hook = attach("iwd", labels=LABELS, data=IMAGES, iterations=60)
    assert hook.callbacks[0].iterations == 60
