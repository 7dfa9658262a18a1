"""The scorer: a network trained on the real data, whose losses and features methods read. [ours]

MTT and DATM have such a network already: the expert in training. So has IDM. DM and DC train nothing on real data,
so the hook trains this small network before distillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.distributed import ALONE, Ranks, broadcast, gather_rows, ranks, shard
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import InvalidInputError, NonFiniteError, explain
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import default_depth, make_network
from tad_plugin.nn.passes import forward_size, halved
from tad_plugin.nn.training import EpochTrainer
from tad_plugin.utils.seeds import seeded_generator
from tad_plugin.utils.settings import Settings, setting

__all__ = [
    "RecordedScores",
    "Scorer",
    "ScorerConfig",
    "Scores",
    "features_and_logits",
    "score_all",
    "train_logits",
    "weighted_cross_entropy",
]


@dataclass
class Scores:
    """Logits float32 [N,K] and features float32 [N,D] (input of the last linear layer) of the whole data, eval mode."""

    logits: Tensor
    features: Tensor


class RecordedScores(nn.Module):
    """Stands for a network whose outputs were noted while a loop trained it: it can be scored, not called.

    Args:
        scores: what :func:`score_all` gives.
    """

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores


def features_and_logits(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass. Features are the input of the last ``nn.Linear``, so that any such network works.

    Returns:
        (features [B,D], logits [B,K]).

    Raises:
        InvalidInputError: the network has no ``nn.Linear``.
    """
    last = None
    for module in network.modules():
        if isinstance(module, nn.Linear):
            last = module
    if last is None:
        expected, got = "a network with an nn.Linear classifier", type(network).__name__
        raise InvalidInputError(explain(expected, got, "Give it a linear last layer"))
    caught: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        logits = network(images)
    finally:
        handle.remove()
    return caught[-1].flatten(1), logits


@torch.no_grad()
def score_all(network: nn.Module, data: RealData, of: Ranks = ALONE) -> Scores:
    """Logits and features of every real sample: eval mode, no augmentation, no gradient. The mode is restored.

    Args:
        network: a network with a linear last layer.
        data: the real data.
        of: the processes that divide the samples among them; each gets all scores. The default scores them all here.
    """
    if isinstance(network, RecordedScores):
        return network.scores
    training = network.training
    network.eval()
    own = shard(len(data), of) if len(data) >= of.size else slice(0, len(data))
    try:
        found = halved(lambda size: _scored(network, data, own, size), forward_size(data.images, network))
    finally:
        network.train(training)
    if own.stop - own.start < len(data):
        return Scores(gather_rows(found.logits), gather_rows(found.features))
    return found


def _scored(network: nn.Module, data: RealData, own: slice, size: int) -> Scores:
    """The outputs for the samples ``own``, with ``size`` images per pass."""
    found: tuple[Tensor, Tensor] | None = None
    first = 0
    for start in range(own.start, own.stop, size):
        images = data.images[start : min(start + size, own.stop)]
        parts = features_and_logits(network, images)
        if found is None:  # written in place: a list of parts would take all of the memory twice
            features, logits = (p.new_empty(own.stop - own.start, p.shape[1], dtype=torch.float32) for p in parts)
            found = features, logits
        found[0][first : first + len(images)], found[1][first : first + len(images)] = parts
        first += len(images)
    if found is None:
        raise InvalidInputError(explain("at least one image to score", "none", "Pass the real images"))
    return Scores(found[1], found[0])


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i CE_i / sum_i w_i, a scalar; 0 with a graph if every weight is 0.

    Args:
        logits: [B,K].
        targets: int64 [B].
        weights: float [B], >= 0.
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (weights * losses).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


@dataclass
class ScorerConfig(Settings):
    """Settings of the plugin's own scorer [ours].

    Attributes:
        network: architecture name.
        width: channels of a ConvNet.
        depth: blocks of a ConvNet; 0 takes 3, or fewer for images under 16 pixels.
        norm: normalisation.
        epochs: epochs before distillation.
        batch_size: samples per step; 0 takes 128, or fewer so that an epoch has at least 50 steps.
        lr: peak learning rate of SGD; one cosine decay over ``epochs``.
        momentum: SGD momentum.
        weight_decay: L2 penalty.
        augment: augmentation strategy while training: "" none, "auto" crop_flip, or crop_scale_rotate for digits.
        refresh_every: iterations of distillation between further epochs; 0 never.
    """

    prefix: ClassVar[str] = "scorer."

    network: str = "convnet"
    width: int = setting(32, at_least=1)
    depth: int = setting(0, at_least=0)
    norm: str = "instance"
    epochs: int = setting(10, at_least=1)
    batch_size: int = setting(0, at_least=0)
    lr: float = setting(0.02, above=0)
    momentum: float = setting(0.9, at_least=0, below=1)
    weight_decay: float = setting(5e-4, at_least=0)
    augment: str = "auto"
    refresh_every: int = setting(0, at_least=0)


class Scorer(EpochTrainer):
    """Trains a network on the real data with the state's targets and training weights. Fires the scorer events.

    Args:
        data: the real data.
        config: settings.
        seed: seed of its own CPU generator (initial weights, order of samples, augmentation).
    """

    def __init__(self, data: RealData, config: ScorerConfig | None = None, *, seed: int = 0) -> None:
        self.data = data
        self.config = config = config or ScorerConfig()
        self.generator = seeded_generator(seed)
        shape = data.images.shape
        flat = data.images.ndim == 2
        size = int(shape[-1])
        depth = config.depth or default_depth(int(shape[-2]), size)
        self.network = make_network(
            "mlp" if flat else config.network,
            in_channels=1 if flat else int(shape[1]),
            num_classes=data.num_classes,
            image_size=(1, size) if flat else (int(shape[2]), size),
            width=config.width,
            depth=depth,
            norm=config.norm,
            generator=self.generator,
            device=data.images.device,
        )
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.augmentation = Augmentation(_strategy(config.augment, data))
        self.epoch = 0

    def run_epoch(self, state: SampleState, events: CallbackList) -> float:
        """Trains one epoch. Fires on_scorer_batch for each batch and on_scorer_epoch at the end. Returns the mean loss.

        Samples that are not trusted weigh 0 in the cross-entropy. They still take part in the terms that callbacks add.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        config, n = self.config, len(self.data)
        self.network.train()
        order = torch.randperm(n, generator=self.generator)
        batches = state.placed(order.split(config.batch_size or max(8, min(128, n // 50))))
        weights = state.training_weights()
        total = torch.zeros((), dtype=torch.float64, device=state.device)
        for step, indices in enumerate(batches):
            progress = min(1.0, (self.epoch + step / len(batches)) / config.epochs)
            # Refreshes after the schedule continue with a small constant rate.
            rate = config.lr * max(0.05, 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi)))))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            images = self.data.images[indices]
            if self.augmentation.strategies:
                images = self.augmentation(images, generator=self.generator)
            logits = self.network(images)
            loss = weighted_cross_entropy(logits, state.target[indices], weights[indices])
            loss = events.scorer_batch(state, indices, logits, loss)
            # An accelerator is asked once per epoch, because each answer would wait.
            if loss.device.type == "cpu":
                self._check(float(loss.detach()))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach().double() * len(indices)
        mean = self._check(float(total) / n)
        self.epoch += 1
        if ranks().size > 1:  # kernels of a card may round differently: all ranks score with one network
            for tensor in (*self.network.parameters(), *self.network.buffers()):
                broadcast(tensor.data)
        events.position(scorer_epoch=self.epoch)
        events.scorer_epoch(state, self.network, self.data)
        return mean

    def _check(self, loss: float) -> float:
        if not math.isfinite(loss):
            got = f"{loss} in epoch {self.epoch}"
            do = "Lower scorer.lr, and check the images for NaN"
            raise NonFiniteError(explain("a finite scorer loss", got, do))
        return loss


def _strategy(name: str, data: RealData) -> str:
    if name != "auto":
        return name
    if data.images.ndim != 4:
        return ""
    # A mirrored digit is no digit. Small rotations and scalings replace the flip.
    return "crop_scale_rotate" if data.dataset.lower() in ("digits", "mnist", "svhn") else "crop_flip"


def train_logits(
    data: RealData, config: ScorerConfig, *, seed: int, on: Tensor | None = None, average_last: int = 1
) -> list[Tensor]:
    """Trains one network on the observed labels and returns its logits on all of ``data``.

    Args:
        data: the real data.
        config: settings of the scorer; runs ``config.epochs`` epochs.
        seed: of the network and its batches.
        on: int64 indices to train on; None trains on everything.
        average_last: number of last epochs whose logits are returned.

    Returns:
        ``average_last`` tensors float32 [N, K], in the order of the epochs.
    """
    training = data if on is None else data.subset(on)
    # A cross-validation fold may have no sample of a small class.
    state = SampleState.of(training, allow_empty=True)
    scorer = Scorer(training, config, seed=seed)
    kept: list[Tensor] = []
    for epoch in range(config.epochs):
        scorer.run_epoch(state, CallbackList())
        if epoch >= config.epochs - average_last:
            kept.append(score_all(scorer.network, data, ranks()).logits)
    return kept
