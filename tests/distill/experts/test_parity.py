"""Experts beside the public code: the same steps give the same parameters, and buffers go both ways.

Needs checkouts of the pinned commits, named by TAD_UPSTREAM_MTT and TAD_UPSTREAM_DATM. Their training functions run on
the batches and augmentation numbers that our trainer used; their scripts run on a copy.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import buffer_files, check_buffer, read_buffer
from tad_plugin.distill.experts.train import train_experts
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer, expert_network
from tad_plugin.nn.augment import DEFAULT_STRATEGY, Augmentation
from tad_plugin.nn.networks import make_network
from tad_plugin.utils.seeds import expert_generator
from tests.checkouts import copy_parameters, import_upstream, isolated_imports, upstream, upstream_draw
from tests.distill.experts.training import plain
from tests.patches.conftest import at_finish  # noqa: F401 - a fixture
from tests.patches.foreign import any_checksum, copied, run, tiny_cifar10  # noqa: F401 - one is a fixture

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # the public code's own
CLASSES, SIDE, WIDTH, BATCH = 3, 32, 8, 16


class Replayed:
    """Our augmentation with the numbers that the public code draws from the global generator after a known seed."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation, self.strategies, self.seed = augmentation, augmentation.strategies, 0

    def __call__(self, images: Tensor, **_more: Any) -> Tensor:
        self.seed += 100
        draw = upstream_draw(self.augmentation, (SIDE, SIDE), seed=self.seed, n=len(images), siamese=False)
        return self.augmentation.apply(images, draw)


def real_data() -> RealData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(14)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = patterns.repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)
    images = patterns[labels] + 0.5 * torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    return RealData(images, labels, CLASSES)


class Batches:
    """What our trainer will draw, as a loader for their training function; seeds the global generator each time."""

    def __init__(self, data: RealData, generator: torch.Generator) -> None:
        expert_network(setup(), data, generator)  # the draw before the order
        self.data, self.order = data, torch.randperm(len(data), generator=generator)

    def __len__(self) -> int:
        return len(self.order.split(BATCH))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, indices in enumerate(self.order.split(BATCH), 1):
            torch.manual_seed(100 * number)
            yield self.data.images[indices], self.data.labels[indices]


def setup(**changes: Any) -> ExpertConfig:
    return ExpertConfig(epochs=1, width=WIDTH, batch_train=BATCH, lr=0.05, **changes)


def ours(**changes: Any) -> ExpertTrainer:
    real = real_data()
    trainer = ExpertTrainer(setup(**changes), real, plain(real), expert_generator(0, 0))
    trainer.augmentation = Replayed(trainer.augmentation)  # type: ignore[assignment]
    trainer.chunk = 5
    trainer.run_epoch()
    return trainer


def theirs(name: str, start: list[Tensor]) -> nn.Module:
    network: nn.Module = import_upstream(name, "networks.py").ConvNet(
        3, CLASSES, WIDTH, 3, "relu", "instancenorm", "avgpooling", (SIDE, SIDE)
    )
    own = make_network("convnet", in_channels=3, num_classes=CLASSES, image_size=SIDE, width=WIDTH,
                       generator=torch.Generator())  # fmt: skip
    with torch.no_grad():
        for p, value in zip(own.parameters(), start, strict=True):
            p.copy_(value)
    copy_parameters(own, network)
    return network


def their_arguments(utils: types.ModuleType, augment: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        device="cpu", dataset="CIFAR10", dsa=True, dsa_strategy=augment, dsa_param=utils.ParamDiffAug()
    )


def agree(trainer: ExpertTrainer, network: nn.Module) -> None:
    """Parameters after the epoch within 1e-5, relative to each tensor's largest entry."""
    moved = 0.0
    for start, mine, yours in zip(*trainer.trajectory, network.parameters(), strict=True):
        assert float((mine - yours.detach()).abs().max()) <= 1e-5 * float(yours.detach().abs().max())
        moved = max(moved, float((mine - start).abs().max()))
    assert moved > 1e-2


@pytest.mark.parametrize("augment", ["crop", "flip", "scale", "rotate", DEFAULT_STRATEGY])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_epoch_gives_the_parameters_of_mtts_training_step(augment: str, momentum: float) -> None:
    utils = import_upstream("mtt", "utils.py", missing=("kornia", "hyper", "wandb"))
    trainer = ours(augment=augment, momentum=momentum, weight_decay=5e-4)
    network = theirs("mtt", trainer.trajectory[0])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=momentum, weight_decay=5e-4)
    with torch.random.fork_rng(devices=[]):
        utils.epoch(
            "train", Batches(real_data(), expert_generator(0, 0)), network, optimizer, nn.CrossEntropyLoss(),
            their_arguments(utils, augment), aug=True,
        )  # fmt: skip
    agree(trainer, network)


@pytest.mark.parametrize("adaptive", [True, False])
def test_an_epoch_gives_the_parameters_of_datms_sharpness_aware_step(adaptive: bool) -> None:
    utils = import_upstream("datm", "utils/utils_gsam.py", "buffer", missing=("kornia", "hyper", "wandb"))
    with isolated_imports(upstream("datm") / "buffer"):
        import gsam  # type: ignore[import-not-found]
    trainer = ours(rho=0.05, alpha=0.3, adaptive=adaptive)
    network = theirs("datm", trainer.trajectory[0])
    base = torch.optim.SGD(network.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=1000, gamma=1)
    rho = gsam.ProportionScheduler(pytorch_lr_scheduler=schedule, max_lr=0.05, min_lr=0.05, max_value=0.05,
                                   min_value=0.05)  # fmt: skip
    optimizer = gsam.GSAM(params=network.parameters(), base_optimizer=base, model=network, gsam_alpha=0.3,
                          rho_scheduler=rho, adaptive=adaptive)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        utils.epoch(
            "train", Batches(real_data(), expert_generator(0, 0)), network, optimizer, nn.CrossEntropyLoss(),
            their_arguments(utils, DEFAULT_STRATEGY), aug=True, scheduler=schedule,
        )  # fmt: skip
    agree(trainer, network)


# -- buffers, both ways ------------------------------------------------------------------------------

WIDE = make_network("convnet", in_channels=3, num_classes=10, image_size=32, width=32, generator=torch.Generator())


@pytest.mark.usefixtures("any_checksum")
def test_their_buffer_is_read_and_fits_our_network(tmp_path: Path) -> None:
    root, data = copied("mtt", tmp_path), tiny_cifar10(tmp_path / "data", per_class=5)
    size = ["--num_experts", "2", "--train_epochs", "2", "--save_interval", "2", "--model", "ConvNetW32"]
    run(
        root,
        "buffer.py",
        [*size, "--data_path", str(data), "--buffer_path", str(tmp_path / "b"), "--batch_train", "25"],
    )
    folder = tmp_path / "b" / "CIFAR10_NO_ZCA" / "ConvNetW32"
    (path,) = buffer_files(folder)
    found = read_buffer(path)
    raw = torch.load(path, weights_only=True)
    assert len(found) == 2
    for expert, original in zip(found, raw, strict=True):
        check_buffer(expert, WIDE, need_epochs=2)
        assert all(torch.equal(a, b) for x, y in zip(expert, original, strict=True) for a, b in zip(x, y, strict=True))
        assert not torch.equal(expert[0][0], expert[1][0])


@pytest.mark.usefixtures("any_checksum")
def test_our_buffer_is_distilled_from_by_their_script(tmp_path: Path, at_finish: dict[str, Any]) -> None:  # noqa: F811
    root, data = copied("mtt", tmp_path), tiny_cifar10(tmp_path / "data", per_class=5)
    labels = torch.arange(10).repeat(5)
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "b" / "CIFAR10_NO_ZCA" / "ConvNetW32"
    real = RealData(images, labels, 10, dataset="cifar10")
    train_experts(real, ExpertConfig(experts=2, epochs=2, width=32, batch_train=25), folder, plain(real))
    size = ["--ipc", "1", "--Iteration", "1", "--num_eval", "0", "--syn_steps", "2", "--model", "ConvNetW32"]
    segment = ["--expert_epochs", "1", "--max_start_epoch", "1", "--lr_img", "1", "--lr_lr", "1e-9"]
    where = ["--lr_teacher", "0.01", "--data_path", str(data), "--buffer_path", str(tmp_path / "b")]
    run(root, "distill.py", [*size, *segment, *where])
    assert bool(torch.isfinite(at_finish["grand_loss"])) and float(at_finish["grand_loss"].detach()) > 0
    # what it matched is one of our entries
    ends = [torch.cat([p.flatten() for p in expert[1]]) for expert in read_buffer(folder / "replay_buffer_0.pt")]
    assert any(torch.equal(at_finish["target_params"].flatten(), end) for end in ends)
