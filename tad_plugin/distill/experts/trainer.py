"""One expert: a network trained on the real data, whose trajectory MTT and DATM match.

The data stay on their device, and whole batches are processed at once. Targets, weights and trust come from the hook.
"""

# no postponed annotations: jsonargparse reads the types of the settings below

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import Trajectory
from tad_plugin.distill.experts.sharpness import frozen_statistics, perturbation, surgery
from tad_plugin.errors import NonFiniteError, explain
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import default_depth, make_network
from tad_plugin.nn.passes import pass_size
from tad_plugin.nn.training import EpochTrainer
from tad_plugin.utils.settings import Settings, setting
from tad_plugin.utils.transfers import download

__all__ = ["ExpertConfig", "ExpertTrainer", "expert_network"]

Event = Callable[[SampleState, Tensor, Tensor, Tensor], Tensor]


@dataclass
class ExpertConfig(Settings):
    """Settings of the experts. The defaults are the published ones of MTT, except ``experts`` (100 there).

    Attributes:
        experts: number of experts.
        epochs: epochs of each expert. A trajectory has ``epochs`` + 1 entries; the first is the start.
        network: architecture.
        width: channels of the ConvNet.
        depth: blocks of the ConvNet; 0 takes 3 (2 for images under 16 pixels).
        norm: normalisation of the network.
        batch_train: samples per step.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        weight_decay: L2 penalty.
        decay: divide the learning rate by 10 in the second half.
        augment: DSA strategy, drawn for each image; "auto" takes the dataset's own, "none" switches it off.
        rho: radius of a sharpness-aware step; 0 is plain SGD. FTD and DATM use 0.01.
        alpha: weight of the orthogonal part in the gradient surgery of that step. FTD and DATM use 0.3.
        adaptive: measure the radius in units of the parameters (ASAM).
        pilots: networks trained before the experts for the methods only; they are not kept.
        pilot_epochs: epochs of each pilot; 0 takes ``epochs``. Must exceed the warm-up of the methods.
        rounds: after which networks the methods decide: "pilots" or "all" (pilots and experts).
        experts_per_file: trajectories per file of the buffer.
        half: store half precision, which only this package reads back.
    """

    experts: int = setting(10, at_least=1)
    epochs: int = setting(50, at_least=1)
    network: str = "convnet"
    width: int = setting(128, at_least=1)
    depth: int = setting(0, at_least=0)
    norm: str = "instance"
    batch_train: int = setting(256, at_least=1)
    lr: float = setting(0.01, above=0)
    momentum: float = setting(0.0, at_least=0)
    weight_decay: float = setting(0.0, at_least=0)
    decay: bool = False
    augment: str = "auto"
    rho: float = setting(0.0, at_least=0)
    alpha: float = setting(0.3, at_least=0)
    adaptive: bool = True
    pilots: int = setting(1, at_least=0)
    pilot_epochs: int = setting(0, at_least=0)
    rounds: str = setting("pilots", one_of=("all", "pilots"))
    experts_per_file: int = setting(10, at_least=1)
    half: bool = False

    def check(self) -> None:
        """Rounds of pilots need a pilot."""
        super().check()
        self.require(self.pilots > 0 or self.rounds == "all", 'pilots of at least 1 for rounds "pilots"', self.pilots)

    def resolved_depth(self, height: int, width: int) -> int:
        """``depth``, or the default for images of this size if it is 0."""
        return self.depth or default_depth(height, width)


def expert_network(config: ExpertConfig, data: RealData, generator: torch.Generator) -> nn.Module:
    """Draws an untrained expert, on the device of the data."""
    c, h, w = (int(v) for v in data.images.shape[1:])
    return make_network(
        config.network,
        in_channels=c,
        num_classes=data.num_classes,
        image_size=(h, w),
        width=config.width,
        depth=config.resolved_depth(h, w),
        norm=config.norm,
        generator=generator,
        device=data.images.device,
    )


class ExpertTrainer(EpochTrainer):
    """Trains one expert: call ``run_epoch()`` until ``epoch`` is ``config.epochs``.

    Args:
        config: the settings.
        data: the real data.
        hook: the hook, which holds targets, weights and trust. Its methods are asked in each step, unless they have
            decided already.
        generator: CPU generator of every draw; see :func:`tad_plugin.utils.seeds.expert_generator`.

    Attributes:
        network: the expert.
        epoch: epochs done.
        trajectory: the parameters at the start and after each epoch, float32 on the CPU.
        chunk: images per pass through the network.
        events: the methods' terms in the loss, at the parameters and at the perturbed ones; None if there are none.
    """

    def __init__(self, config: ExpertConfig, data: RealData, hook: Hook, generator: torch.Generator) -> None:
        self.config, self.data, self.generator = config, data, generator
        self.state = hook.state
        self.network = expert_network(config, data, generator).train()
        self.parameters = list(self.network.parameters())
        self.optimizer = self._fresh_optimizer(config.lr)
        augmentation = Augmentation.configured(config.augment, data.dataset)
        # The grid convention of the trajectory-matching codebases.
        self.augmentation = dataclasses.replace(augmentation, align_corners=True)
        asked = hook.enabled and not hook.decided
        self.events: tuple[Event | None, Event | None] = (None, None)
        if asked:
            self.events = (hook.events.scorer_batch, hook.events.scorer_again)
        # Small passes take half the time on a CPU. A batch norm needs the whole batch in one pass, and so do methods
        # that are asked twice about a batch.
        whole = any(isinstance(m, _BatchNorm) for m in self.network.modules()) or (asked and config.rho > 0)
        self.chunk = config.batch_train if whole else pass_size(data.images, config.width)
        if data.images.device.type == "cpu":
            _keep_freed_memory()
        self.epoch = 0
        self.trajectory: Trajectory = []
        self._remember()

    def run_epoch(self) -> float:
        """Trains one epoch, in a new order of the samples; returns the mean loss.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        self.network.train()
        order = torch.randperm(len(self.data), generator=self.generator)
        total = torch.zeros((), device=self.data.images.device)
        for indices in self.state.placed(order.split(self.config.batch_train)):
            images = self.data.images[indices]
            if self.augmentation.strategies:
                images = self.augmentation(images, generator=self.generator)
            total += self.step(indices, images) * len(indices)
        mean = float(total) / len(self.data)
        if not math.isfinite(mean):
            do = "Lower the experts' lr or rho, and check the images for NaN; the last checkpoint is intact"
            raise NonFiniteError(explain("a finite loss of the expert", f"{mean} in epoch {self.epoch}", do))
        self.epoch += 1
        self._remember()
        # As in the published schedule: one epoch into the second half, with a new optimiser.
        if self.config.decay and self.epoch == self.config.epochs // 2 + 2:
            self.optimizer = self._fresh_optimizer(self.config.lr * 0.1)
        return mean

    def step(self, indices: Tensor, images: Tensor) -> Tensor:
        """Takes one step on a batch; returns its loss, a scalar.

        Args:
            indices: int64 [B], positions of the samples.
            images: float32 [B,C,H,W], the augmented images.
        """
        loss = self._gradient(indices, images, self.events[0])
        if self.config.rho > 0:
            self._sharpness_aware_gradient(indices, images)
        self.optimizer.step()
        return loss

    def _gradient(self, indices: Tensor, images: Tensor, event: Event | None) -> Tensor:
        """Sets the gradients of the weighted cross-entropy on the targets, plus the terms of the methods."""
        self.optimizer.zero_grad(set_to_none=True)
        state = self.state
        targets, weights = state.targets(indices), state.training_weights(indices)
        scale = weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        total = torch.zeros((), device=images.device)
        for start in range(0, len(images), self.chunk):
            part = slice(start, start + self.chunk)
            logits = self.network(images[part])
            loss = (weights[part] * F.cross_entropy(logits, targets[part], reduction="none")).sum() / scale
            if event is not None:
                # A method adds a mean over the samples it sees. The shares turn these into a mean over the batch.
                share = len(logits) / len(images)
                loss = share * event(state, indices[part], logits, loss / share)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def _sharpness_aware_gradient(self, indices: Tensor, images: Tensor) -> None:
        """Replaces the gradients by those of the sharpness-aware step."""
        config, parameters = self.config, self.parameters
        old = [_gradient_of(p).clone() for p in parameters]
        moves = perturbation(parameters, old, config.rho, adaptive=config.adaptive)
        for p, e in zip(parameters, moves, strict=True):
            p.add_(e)
        with frozen_statistics(self.network), torch.enable_grad():
            self._gradient(indices, images, self.events[1])
        new = surgery(old, [_gradient_of(p) for p in parameters], config.alpha)
        for p, e, g in zip(parameters, moves, new, strict=True):
            p.sub_(e)
            p.grad = g

    def _fresh_optimizer(self, lr: float) -> torch.optim.SGD:
        config = self.config
        return torch.optim.SGD(self.parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def _remember(self) -> None:
        self.trajectory.append(download([p.detach() for p in self.parameters]))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`EpochTrainer`; also the trajectory so far."""
        return {**super().state_dict(), "trajectory": self.trajectory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        self.trajectory = [[p.cpu() for p in entry] for entry in state["trajectory"]]


def _keep_freed_memory() -> None:
    """Makes the C library reuse freed memory instead of returning it to the system.

    The GNU allocator returns blocks above a threshold to the system, which then clears every page it hands out. This
    takes up to half of the training time of a small network. The threshold grows to the size of the largest block that
    was freed, up to 32 MiB. Other allocators are not affected.
    """
    torch.empty(2**25 - 2**17, dtype=torch.uint8)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
