"""DM, DC and DSA beside the public code: the same network, batch and augmentation give the same loss and gradient.

Network, augmentation, distance and the training of the network are called from the checkout that TAD_UPSTREAM_DM names.
Indices and draws are those of our loop.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, BaselineConfig
from tad_plugin.distill.dc import DC, DSA, LOOPS, DCConfig, DSAConfig
from tad_plugin.distill.dm import DM, DMConfig
from tad_plugin.nn.augment import DEFAULT_STRATEGY, Augmentation, Draw
from tests.checkouts import copy_parameters, import_upstream, upstream_draw
from tests.problems import PLAIN, plain_hook

pytestmark = pytest.mark.filterwarnings("ignore")  # the public code's own
CLASSES, IPC, SIDE, WIDTH = 3, 2, 32, 8
SMALL: dict[str, Any] = {"ipc": IPC, "width": WIDTH, "batch_real": 8}
NAMES = {"layerwise": "ours", "mse": "mse", "cosine": "cos"}


class Replayed:
    """Our augmentation with the numbers that the public code draws for a known seed. Each draw has a new seed."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self.strategies = augmentation.strategies
        self.seeds: list[int] = []

    def draw(self, n: int, size: tuple[int, int], **_more: Any) -> Draw:
        # 7 apart, because each number that is drawn there moves the seed on by one
        self.seeds.append(7 * len(self.seeds))
        return upstream_draw(self.augmentation, size, seed=self.seeds[-1])

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        return self.augmentation.apply(images, draw)

    def __call__(self, images: Tensor, **more: Any) -> Tensor:
        return self.augmentation(images, **more)


@contextmanager
def recorded_draws(loop: Baseline) -> Iterator[list[Tensor]]:
    """The indices of each real batch that the loop draws."""
    original, found = loop.hook.draw, []

    def draw(*args: Any) -> Tensor:
        found.append(original(*args))
        return found[-1]

    loop.hook.draw = draw  # type: ignore[method-assign]
    try:
        yield found
    finally:
        loop.hook.draw = original  # type: ignore[method-assign]


def loop_of(cls: type[Baseline], config: BaselineConfig) -> Baseline:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(10)
    # a pattern for each class, so that the loss is no matter of noise alone
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = patterns.repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)
    images = patterns[labels] + 0.5 * torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    own = torch.arange(CLASSES).repeat_interleave(config.ipc)
    start = torch.randn(len(own), 3, SIDE, SIDE, generator=generator)
    synthetic = SyntheticSet(start, own, CLASSES, PLAIN)
    data = RealData(images, labels, CLASSES)
    loop = cls(config, data, plain_hook(data), synthetic, generator)
    loop.augmentation = Replayed(loop.augmentation)  # type: ignore[attr-defined]
    return loop


def their_network(network: nn.Module, norm: str = "instancenorm") -> nn.Module:
    theirs: nn.Module = import_upstream("dm", "networks.py").ConvNet(
        3, CLASSES, WIDTH, 3, "relu", norm, "avgpooling", (SIDE, SIDE)
    )
    copy_parameters(network, theirs)
    for mine, yours in zip(network.buffers(), theirs.buffers(), strict=True):
        yours.copy_(mine)
    return theirs


class Theirs:
    """Their functions, on the batches of one update of our loop."""

    def __init__(self, loop: Baseline, indices: list[Tensor], start: Tensor) -> None:
        self.utils = import_upstream("dm", "utils.py")
        self.loop, self.indices = loop, indices
        self.images = start.clone().requires_grad_()
        augmentation = loop.augmentation  # type: ignore[attr-defined]
        self.strategy = augmentation.augmentation.strategy
        self.seeds = augmentation.seeds[-CLASSES:]

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(class, real, synthetic), augmented by their function where the loop augments."""
        ipc = self.loop.config.ipc
        for c in range(CLASSES):
            pair = [self.loop.data.images[self.indices[c]], self.images[c * ipc : (c + 1) * ipc]]
            if self.loop.augmentation.strategies:  # type: ignore[attr-defined]
                with torch.random.fork_rng(devices=[]):
                    param = self.utils.ParamDiffAug()
                    pair = [self.utils.DiffAugment(x, self.strategy, seed=self.seeds[c], param=param) for x in pair]
            yield c, *pair

    def gradient_matching(self, network: nn.Module, distance: str) -> Tensor:
        args = types.SimpleNamespace(device="cpu", dis_metric=NAMES[distance])
        parameters = list(network.parameters())
        total = torch.zeros(())
        for c, real, own in self.batches():
            slopes = [
                torch.autograd.grad(
                    F.cross_entropy(network(x), torch.full((len(x),), c)), parameters, create_graph=x is own
                )
                for x in (real, own)
            ]
            total = total + self.utils.match_loss(slopes[1], slopes[0], args)
        return total

    def distribution_matching(self, network: Any) -> Tensor:
        terms = [
            (network.embed(real).detach().mean(0) - network.embed(own).mean(0)).square().sum()
            for _, real, own in self.batches()
        ]
        return torch.stack(terms).sum()


def agree(loop: Baseline, logged: float, theirs: Theirs, loss: Tensor) -> None:
    """Loss and gradient on the images within 1e-5 of theirs, relative to the largest entry."""
    (gradient,) = torch.autograd.grad(loss, theirs.images)
    assert logged == pytest.approx(float(loss.detach()), rel=1e-5)
    ours, scale = loop.synthetic.images.grad, float(gradient.abs().max())
    assert ours is not None and scale > 0
    assert float((ours - gradient).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("strategy", ["none", *DEFAULT_STRATEGY.split("_"), DEFAULT_STRATEGY])
def test_dm(strategy: str) -> None:
    loop = loop_of(DM, DMConfig(**SMALL, augment=strategy))
    start = loop.synthetic.images.detach().clone()
    with recorded_draws(loop) as indices:
        logged = loop.step(0)["loss"]
    theirs = Theirs(loop, indices, start)
    agree(loop, logged, theirs, theirs.distribution_matching(their_network(loop.network)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("distance", list(NAMES))
def test_dc(distance: str) -> None:
    """Three updates on one network, trained on the synthetic set in between."""
    loop = loop_of(DC, DCConfig(**SMALL, outer=3, inner=4, lr_net=0.1, distance=distance))
    for iteration in range(3):
        start = loop.synthetic.images.detach().clone()
        with recorded_draws(loop) as indices:
            logged = loop.step(iteration)["loss"]
        theirs = Theirs(loop, indices, start)
        network = their_network(loop.network)  # type: ignore[attr-defined]
        agree(loop, logged, theirs, theirs.gradient_matching(network, distance))


@pytest.mark.parametrize("strategy", [*DEFAULT_STRATEGY.split("_"), DEFAULT_STRATEGY])
def test_dsa(strategy: str) -> None:
    loop = loop_of(DSA, DSAConfig(**SMALL, outer=2, inner=1, augment=strategy))
    for iteration in range(2):
        start = loop.synthetic.images.detach().clone()
        with recorded_draws(loop) as indices:
            logged = loop.step(iteration)["loss"]
        theirs = Theirs(loop, indices, start)
        network = their_network(loop.network)  # type: ignore[attr-defined]
        agree(loop, logged, theirs, theirs.gradient_matching(network, "layerwise"))


def test_dc_with_batch_norm_held_at_the_statistics_of_real_images() -> None:
    loop = loop_of(DC, DCConfig(**SMALL, outer=1, norm="batch"))
    start = loop.synthetic.images.detach().clone()
    with recorded_draws(loop) as indices:
        logged = loop.step(0)["loss"]
    assert [len(i) for i in indices] == [10] * CLASSES + [8] * CLASSES  # statistics first, of up to 16 a class
    theirs = Theirs(loop, indices[CLASSES:], start)
    network = their_network(loop.network, "batchnorm").eval()  # type: ignore[attr-defined]
    agree(loop, logged, theirs, theirs.gradient_matching(network, "layerwise"))


def test_the_network_learns_from_the_synthetic_set_as_theirs_does() -> None:
    """In full batches, where the order of the images does not matter."""
    loop = loop_of(DC, DCConfig(**SMALL, outer=2, inner=5, lr_net=0.05))
    loop.step(0)
    utils, network = import_upstream("dm", "utils.py"), their_network(loop.network)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in network.parameters()]
    args = types.SimpleNamespace(device="cpu", dsa=False, dc_aug_param=None)
    data = torch.utils.data.TensorDataset(loop.synthetic.images.detach().clone(), loop.synthetic.labels)
    optimizer, criterion = torch.optim.SGD(network.parameters(), lr=0.05), nn.CrossEntropyLoss()
    for _ in range(5):
        utils.epoch("train", torch.utils.data.DataLoader(data, 256), network, optimizer, criterion, args, aug=False)
    loop.step(1)
    for start, mine, yours in zip(before, loop.network.parameters(), network.parameters(), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
        assert not torch.equal(start, mine)


def test_loop_counts() -> None:
    counts = import_upstream("dm", "utils.py").get_loops
    for ipc, loops in LOOPS.items():
        assert counts(ipc) == loops
