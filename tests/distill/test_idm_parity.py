"""IDM beside the public code: the same networks, batches and augmentation give the same losses and the same images.

Partition, expansion, shrinking, augmentation, network and embedding are called from the checkout that TAD_UPSTREAM_IDM
names. The code between these calls is one long function there, so it is written out here: an SGD step over all images
for each class, the weight of the cross-entropy, and the steps of the networks. Batches and draws are those of our loop.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.mosaic import decode, mosaic
from tad_plugin.distill.idm import IDM, IDMConfig
from tad_plugin.nn.augment import DEFAULT_STRATEGY
from tests.checkouts import copy_parameters, import_upstream
from tests.distill.test_parity import CLASSES, IPC, SIDE, SMALL, WIDTH, loop_of, recorded_draws

pytestmark = pytest.mark.filterwarnings("ignore")  # the public code's own
SETTINGS: dict[str, Any] = {**SMALL, "lr_img": 0.2, "train_steps": 2, "batch_train": 12, "lr_net": 0.02}


@pytest.fixture
def utils() -> Iterator[types.ModuleType]:
    yield import_upstream("idm", "dc_utils.py", missing=("torchnet", "matplotlib", "efficientnet_pytorch", "tqdm"))


def their_network(utils: types.ModuleType, network: nn.Module) -> Any:
    theirs = utils.ConvNet(3, CLASSES, WIDTH, 3, "relu", "instancenorm", "avgpooling", (SIDE, SIDE))
    copy_parameters(network, theirs)
    return theirs


def test_partition_and_shrinking(utils: types.ModuleType) -> None:
    images, labels = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for mine, theirs in zip(decode(images, labels, 2), utils.number_sign_augment(images, labels), strict=True):
        assert torch.equal(mine, theirs)
    half = SIDE // 2
    parts = [images.roll(i, 0) for i in range(4)]
    whole = torch.zeros_like(images)
    for part, (row, column) in zip(parts, ((0, 0), (half, 0), (0, half), (half, half)), strict=True):
        whole[:, :, row : row + half, column : column + half] = utils.downscale(part, 0.5)
    assert torch.equal(mosaic(parts, 2), whole)


@pytest.mark.parametrize("strategy", ["none", *DEFAULT_STRATEGY.split("_"), DEFAULT_STRATEGY])
def test_losses_and_images_of_three_updates(utils: types.ModuleType, strategy: str) -> None:
    loop = loop_of(IDM, IDMConfig(**SETTINGS, augment=strategy))
    assert isinstance(loop, IDM)
    loop.queue = loop.queue[:1]
    learner = loop.queue[0]
    # from the second on with momentum, and with a network that has learned
    images = loop.synthetic.images.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=0.2, momentum=0.5)
    for iteration in range(3):
        network, accuracy = their_network(utils, learner.network).eval(), learner.accuracy
        with recorded_draws(loop) as indices:
            logged = loop._update(learner, iteration)
        gradients, total = [], 0.0
        for c in range(CLASSES):
            own = images[c * IPC : (c + 1) * IPC]
            shown, labels = utils.number_sign_augment(own, torch.full((IPC,), c))
            pair = [loop.data.images[indices[c]], shown]
            if strategy != "none":
                seed, param = loop.augmentation.seeds[c - CLASSES], utils.ParamDiffAug()  # type: ignore[attr-defined]
                with torch.random.fork_rng(devices=[]):
                    pair = [utils.DiffAugment(x, strategy, seed=seed, param=param) for x in pair]
            means = [network.embed_channel_avg(x, last=1000).mean(0) for x in pair]
            loss = (means[0].detach() - means[1]).square().sum()
            loss = loss + F.cross_entropy(network(pair[1]), labels) * accuracy * 0.5
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            assert images.grad is not None
            gradients.append(images.grad[c * IPC : (c + 1) * IPC].clone())
            optimizer.step()
            total += float(loss.detach())
        assert logged == pytest.approx(total, rel=1e-5) and (accuracy > 0) is (iteration > 0)
        agree(loop.synthetic.images.grad, torch.cat(gradients))
        agree(loop.synthetic.images.detach(), images.detach())
        for _ in range(2):
            loop._learn(learner, iteration)


def agree(ours: Tensor | None, theirs: Tensor) -> None:
    """Within 1e-5, relative to the largest entry."""
    scale = float(theirs.abs().max())
    assert ours is not None and scale > 0
    assert float((ours - theirs).abs().max()) <= 1e-5 * scale


def test_the_networks_learn_as_theirs_do(utils: types.ModuleType) -> None:
    loop = loop_of(IDM, IDMConfig(**SETTINGS))
    assert isinstance(loop, IDM)
    learner, seen = loop.queue[0], []
    theirs = their_network(utils, learner.network).train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=0.0005)
    usable = torch.cat(loop.hook.state.pools())  # sorted by class
    before = [p.detach().clone() for p in theirs.parameters()]
    for _ in range(3):
        generator = torch.Generator()
        generator.set_state(loop.generator.get_state())
        indices = usable[torch.randperm(len(usable), generator=generator)[:12]]
        logits = theirs(loop.data.images[indices])
        optimizer.zero_grad()
        F.cross_entropy(logits, loop.data.labels[indices]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append((logits.argmax(1) == loop.data.labels[indices]).float().mean())
        loop._learn(learner, 0)
    for start, mine, yours in zip(before, learner.network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
        assert not torch.equal(start, mine)
    assert learner.accuracy == pytest.approx(100 * float(torch.stack(seen).mean()))
