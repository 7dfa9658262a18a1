"""Every loop with every method on any device, in any size, for tests and benchmarks that go over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, baseline_class
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.utils.seeds import expert_generator

LOOPS = ("dm", "idm", "dc", "dsa", "mtt", "datm")

#: settings of each loop that keep an iteration short, and do all that an iteration does
SHORT: dict[str, dict[str, Any]] = {
    "dm": {},
    "idm": {"start_networks": 2, "train_steps": 2},
    "dc": {"outer": 2, "inner": 1},
    "dsa": {"outer": 2, "inner": 1},
    "mtt": {"syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2, "lr_img": 1.0, "lr_lr": 1e-4},
    "datm": {"syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2, "lr_img": 1.0, "init": "real"},
}


@dataclass
class Problem:
    """Sizes of a problem. Images are random and separable; a share of the labels is wrong.

    Attributes:
        device: where everything is.
        classes: K.
        per_class: real images per class.
        shape: [C,H,W] of an image.
        width: channels of all networks.
        ipc: synthetic images per class.
        batch_real: real images per class and iteration.
        config: settings of the methods.
        settings: further settings of the loops.
    """

    device: torch.device | str = "cpu"
    classes: int = 10
    per_class: int = 12
    shape: tuple[int, int, int] = (3, 8, 8)
    width: int = 4
    ipc: int = 1
    batch_real: int = 8
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def data(self) -> tuple[Tensor, Tensor]:
        """Images float32 [N,C,H,W] and noisy labels int64 [N], classes interleaved, on the device."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.classes).repeat(self.per_class)
        centres = torch.randn(self.classes, *self.shape, generator=generator)
        images = centres[labels] + 0.5 * torch.randn(len(labels), *self.shape, generator=generator)
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        noisy = torch.where(wrong, (labels + 1) % self.classes, labels)
        return images.to(self.device), noisy.to(self.device)

    def hook(self, method: str, *, trains: bool = False, **more: Any) -> Hook:
        """A hook of the method on the data. ``trains``: a loop trains networks on them; else a scorer of two epochs."""
        images, labels = self.data()
        config: dict[str, Any] = {}
        for name in method.split("+"):
            own = {"tad": {"warmup": 1, "min_per_class": 4}, "iwd": {"early": 0, "warmup": 0, "networks": 1}}
            config[name] = {**own.get(name, {}), **self.config.get(name, {})}
        config.pop("none", None)
        if "tad" in config and not trains:
            config["scorer"] = {"epochs": 2, "width": self.width, **self.config.get("scorer", {})}
        given: dict[str, Any] = {
            "labels": labels,
            "data": images,
            "num_classes": self.classes,
            "dataset": "cifar10",
            "seed": 0,
        }
        return attach(method, **given, config=config, trains_on_real=trains, **more)

    def loop(self, name: str, method: str = "none") -> Baseline:
        """A loop whose iterations are ready to run. Experts of MTT and DATM are trained first."""
        cls = baseline_class(name)
        hook = self.hook(method, trains=cls.trains_on_real)
        assert hook.data is not None
        values = {"ipc": self.ipc, "width": self.width, "iterations": 100, **SHORT[name], **self.settings}
        prepared = []
        if cls.trains_on_real:
            prepared = [Experts([[self.expert(hook, epochs=3).trajectory]])]
            hook.settle()
        else:
            values.setdefault("batch_real", self.batch_real)
        config = cls.Config(**values)
        generator = torch.Generator().manual_seed(1)
        start = cls.initial_images(config, hook.data, hook, generator, *prepared)
        plain = Preprocessing((0.0,) * self.shape[0], (1.0,) * self.shape[0])
        more: Any = prepared
        return cls(config, hook.data, hook, SyntheticSet(*start, self.classes, plain, "cifar10"), generator, *more)

    def expert(self, hook: Hook, *, epochs: int = 0, **settings: Any) -> ExpertTrainer:
        """An expert after this many epochs, with a round of the methods after each."""
        assert isinstance(hook.data, RealData)
        config = ExpertConfig(**{"epochs": 3, "width": self.width, "batch_train": 32, "lr": 0.1, **settings})
        hook.begin_expert()
        trainer = ExpertTrainer(config, hook.data, hook, expert_generator(0, 0))
        for _ in range(epochs):
            trainer.run_epoch()
            hook.epoch_end(trainer.network)
        return trainer
