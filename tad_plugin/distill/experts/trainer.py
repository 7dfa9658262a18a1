"""One expert: a network trained on the real data whose trajectory MTT and DATM match.

The data stay on their device and no work is done per sample. What counts of them, with what label, comes from the hook.
"""

from __future__ import annotations

import dataclasses
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
from tad_plugin.errors import ConfigError, NonFiniteError, explain
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import default_depth, make_network
from tad_plugin.nn.passes import pass_size
from tad_plugin.nn.training import EpochTrainer

__all__ = ["ExpertConfig", "ExpertTrainer", "expert_network"]

Event = Callable[[SampleState, Tensor, Tensor, Tensor], Tensor]


@dataclass
class ExpertConfig:
    """Settings of the experts; the defaults are MTT's published ones, but for the number of experts (100 there).

    Attributes:
        experts: how many are trained.
        epochs: epochs of each; a trajectory has one entry more, its start.
        network: architecture.
        width: channels of the ConvNet.
        depth: its blocks; 0 takes 3 (2 for images under 16 pixels).
        norm: its normalisation.
        batch_train: samples per step.
        lr: learning rate of SGD.
        momentum: its momentum.
        weight_decay: its L2 penalty.
        decay: a tenth of the learning rate in the second half.
        augment: DSA strategy, a set of numbers for each image; "auto" is the dataset's own, "none" switches it off.
        rho: length of the climb of a sharpness-aware step; 0 is plain SGD. FTD and DATM: 0.01.
        alpha: weight of the orthogonal part in the gradient surgery of that step. FTD and DATM: 0.3.
        adaptive: measure the climb in units of the parameters.
        pilots: networks that are trained before the experts for the methods alone, and not kept.
        pilot_epochs: epochs of each of them; 0 takes ``epochs``. The methods' warm-up must fit in.
        rounds: networks after whose epochs the methods decide: "pilots" alone, or "all"; see the README.
        experts_per_file: trajectories in one file of the buffer.
        half: store half precision; only this package reads it back.
    """

    experts: int = 10
    epochs: int = 50
    network: str = "convnet"
    width: int = 128
    depth: int = 0
    norm: str = "instance"
    batch_train: int = 256
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: bool = False
    augment: str = "auto"
    rho: float = 0.0
    alpha: float = 0.3
    adaptive: bool = True
    pilots: int = 1
    pilot_epochs: int = 0
    rounds: str = "pilots"
    experts_per_file: int = 10
    half: bool = False

    def __post_init__(self) -> None:
        lows = {"experts": 1, "epochs": 1, "width": 1, "depth": 0, "batch_train": 1, "pilots": 0, "pilot_epochs": 0}
        for name, low in {
            **lows,
            "experts_per_file": 1,
            "momentum": 0,
            "weight_decay": 0,
            "rho": 0,
            "alpha": 0,
        }.items():
            if getattr(self, name) < low:
                raise ConfigError(explain(f"{name} of at least {low}", str(getattr(self, name)), "Correct the setting"))
        if not self.lr > 0:
            raise ConfigError(explain("lr above 0", str(self.lr), "Correct the setting"))
        if self.rounds not in ("all", "pilots") or (self.rounds == "pilots" and not self.pilots):
            got = f"{self.rounds!r} with {self.pilots} pilots"
            raise ConfigError(explain('rounds "all", or "pilots" with at least one pilot', got, "Correct the setting"))

    def resolved_depth(self, height: int, width: int) -> int:
        """``depth``, or what suits images of this size where it is 0."""
        return self.depth or default_depth(height, width)


def expert_network(config: ExpertConfig, data: RealData, generator: torch.Generator) -> nn.Module:
    """A freshly drawn network of the experts' kind, on the data's device."""
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
    """One expert in training: ``run_epoch()`` until ``epoch`` is ``config.epochs``.

    Args:
        config: the settings.
        data: the real data.
        hook: the seam to the methods, or None for the plain loop without any.
        generator: CPU generator of every draw; see :func:`expert_generator`.
        state: what methods have decided for good, in place of a hook.

    Attributes:
        network: the expert.
        epoch: epochs done.
        trajectory: its parameters at the start and after each epoch, on the CPU.
    """

    def __init__(
        self,
        config: ExpertConfig,
        data: RealData,
        hook: Hook | None,
        generator: torch.Generator,
        *,
        state: SampleState | None = None,
    ) -> None:
        self.config, self.data, self.generator = config, data, generator
        hook = hook if hook is not None and hook.enabled else None
        self.state = state if hook is None else hook.state
        self.network = expert_network(config, data, generator).train()
        self.parameters = list(self.network.parameters())
        self.optimizer = self._fresh_optimizer(config.lr)
        augmentation = Augmentation.configured(config.augment, data.dataset)
        # The grid convention of the trajectory-matching codebases.
        self.augmentation = dataclasses.replace(augmentation, align_corners=True)
        # Where methods have decided for good, their weights and targets are all that enters.
        events = None if hook is None or hook.decided else hook.events
        self.events: tuple[Event | None, Event | None]
        self.events = (None, None) if events is None else (events.scorer_batch, events.scorer_again)
        # Passes that fit a CPU's cache take half the time; a batch norm needs its batch whole, and so do methods that
        # are asked twice about it.
        whole = any(isinstance(m, _BatchNorm) for m in self.network.modules())
        whole = whole or (events is not None and config.rho > 0)
        self.chunk = config.batch_train if whole else pass_size(data.images, config.width)
        if data.images.device.type == "cpu":
            _keep_freed_memory()
        self.epoch = 0
        self.trajectory: Trajectory = []
        self._remember()

    def run_epoch(self) -> float:
        """One epoch over all samples in a new order; returns the mean loss of its batches.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        self.network.train()
        order = torch.randperm(len(self.data), generator=self.generator).to(self.data.images.device)
        total = torch.zeros((), device=order.device)
        for indices in order.split(self.config.batch_train):
            images = self.data.images[indices]
            if self.augmentation.strategies:
                images = self.augmentation(images, generator=self.generator)
            total += self.step(indices, images) * len(indices)
        mean = float(total) / len(self.data)
        if not torch.isfinite(total):
            do = "Lower the experts' lr (or rho), and check the images for NaN; the last checkpoint is intact"
            raise NonFiniteError(explain("a finite loss of the expert", f"{mean} in epoch {self.epoch}", do))
        self.epoch += 1
        self._remember()
        # Where the published schedule has it: one epoch into the second half, with a new optimiser.
        if self.config.decay and self.epoch == self.config.epochs // 2 + 2:
            self.optimizer = self._fresh_optimizer(self.config.lr * 0.1)
        return mean

    def step(self, indices: Tensor, images: Tensor) -> Tensor:
        """One update on a batch, already augmented; returns its loss, a scalar.

        Args:
            indices: int64 [B], positions of its samples.
            images: float32 [B,C,H,W].
        """
        loss = self._gradient(indices, images, self.events[0])
        if self.config.rho > 0:
            self._climb_and_operate(indices, images)
        self.optimizer.step()
        return loss

    def _gradient(self, indices: Tensor, images: Tensor, event: Event | None) -> Tensor:
        """Puts the gradient of the weighted, relabelled cross-entropy (plus what methods add) into the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        targets, weights = self._wanted(indices)
        scale = weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        total = torch.zeros((), device=images.device)
        for start in range(0, len(images), self.chunk):
            part = slice(start, start + self.chunk)
            logits = self.network(images[part])
            loss = (weights[part] * F.cross_entropy(logits, targets[part], reduction="none")).sum() / scale
            if event is not None and self.state is not None:
                # A method adds a mean over the samples it is shown: the shares make that a mean over the batch.
                share = len(logits) / len(images)
                loss = share * event(self.state, indices[part], logits, loss / share)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _wanted(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state
        if state is None:
            return self.data.labels[indices], torch.ones(len(indices), device=indices.device)
        return state.targets(indices), state.training_weights(indices)

    @torch.no_grad()
    def _climb_and_operate(self, indices: Tensor, images: Tensor) -> None:
        config, parameters = self.config, self.parameters
        old = [_gradient_of(p).clone() for p in parameters]
        climb = perturbation(parameters, old, config.rho, adaptive=config.adaptive)
        for p, e in zip(parameters, climb, strict=True):
            p.add_(e)
        with frozen_statistics(self.network), torch.enable_grad():
            self._gradient(indices, images, self.events[1])
        new = surgery(old, [_gradient_of(p) for p in parameters], config.alpha)
        for p, e, g in zip(parameters, climb, new, strict=True):
            p.sub_(e)
            p.grad = g

    def _fresh_optimizer(self, lr: float) -> torch.optim.SGD:
        config = self.config
        return torch.optim.SGD(self.parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def _remember(self) -> None:
        self.trajectory.append([p.detach().to("cpu", copy=True) for p in self.parameters])

    def state_dict(self) -> dict[str, Any]:
        """See :class:`EpochTrainer`; with the trajectory so far."""
        return {**super().state_dict(), "trajectory": self.trajectory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        self.trajectory = [[p.cpu() for p in entry] for entry in state["trajectory"]]


def _keep_freed_memory() -> None:
    """Lets the C library keep what a pass frees for the next one.

    The GNU allocator hands blocks above a threshold back to the system, which clears every page that it gives out:
    up to half of the time of a small network's training. The threshold grows to the size of the largest block freed so
    far, up to 32 MiB; elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**17, dtype=torch.uint8)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
