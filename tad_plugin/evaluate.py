"""Evaluation of a synthetic set: trains fresh networks on it and tests them on real images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.data.labels import check_labels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import InvalidInputError, NonFiniteError, explain
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import default_depth, make_network
from tad_plugin.nn.passes import forward_size, halved
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.settings import Settings, setting
from tad_plugin.utils.torch_modes import default_modes
from tad_plugin.utils.transfers import upload
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["EvaluateConfig", "Evaluation", "accuracy", "evaluate", "train_on_synthetic"]


@dataclass
class EvaluateConfig(Settings):
    """Settings of an evaluation. The defaults are the field's protocol.

    Attributes:
        network: architecture, or several joined by "," for cross-architecture evaluation; see :attr:`networks`.
        width: channels of a ConvNet.
        depth: blocks of a ConvNet; 0 takes 3 (2 for images under 16 pixels).
        norm: normalisation layer; "" takes the architecture's own.
        runs: number of networks.
        epochs: epochs of each network.
        batch_size: images per step.
        lr: SGD learning rate, times 0.1 after half of the epochs. A learned rate of the synthetic set replaces it.
        momentum: SGD momentum.
        weight_decay: L2 penalty.
        augment: DSA strategy; "auto" takes the dataset's, "none" switches augmentation off.
    """

    prefix: ClassVar[str] = "evaluation."

    network: str = "convnet"
    width: int = setting(128, at_least=1)
    depth: int = setting(0, at_least=0)
    norm: str = ""
    runs: int = setting(5, at_least=1)
    epochs: int = setting(1000, at_least=1)
    batch_size: int = setting(256, at_least=1)
    lr: float = setting(0.01, above=0)
    momentum: float = setting(0.9, at_least=0, below=1)
    weight_decay: float = setting(5e-4, at_least=0)
    augment: str = "auto"

    @property
    def networks(self) -> list[str]:
        """The architectures in :attr:`network`."""
        return [name.strip() for name in self.network.split(",")]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        accuracies: accuracy of each network in percent, [0, 100].
        network: the architecture.
        mean: mean of the accuracies.
        std: their standard deviation (biased).
        per_class: for each network the accuracy in percent on each of the K classes; NaN for a class without images.
        also: accuracies in percent on the further images; empty without them.
    """

    accuracies: tuple[float, ...]
    network: str = "convnet"
    per_class: tuple[tuple[float, ...], ...] = ()
    also: tuple[float, ...] = ()
    mean: float = field(init=False)
    std: float = field(init=False)

    def __post_init__(self) -> None:
        values = torch.tensor(self.accuracies, dtype=torch.float64)
        object.__setattr__(self, "mean", float(values.mean()))
        object.__setattr__(self, "std", float(values.std(unbiased=False)))


@named_errors
def train_on_synthetic(
    network: nn.Module, synthetic: SyntheticSet, config: EvaluateConfig, generator: torch.Generator
) -> nn.Module:
    """Trains ``network`` in place on the synthetic set and returns it in eval mode.

    Args:
        network: a fresh network, on the device of the set.
        synthetic: the set; with soft labels the loss is cross-entropy with probabilities.
        config: the settings.
        generator: CPU generator of the batch order and of augmentation.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        InvalidInputError: the set's learned learning rate is not above 0.
    """
    images, labels = synthetic.training_pairs()
    images, labels = images.detach(), labels.detach().to(images.device)
    augmentation = Augmentation.configured(config.augment, synthetic.dataset)
    rate = config.lr if synthetic.learning_rate is None else synthetic.learning_rate
    if not 0 < rate < math.inf:
        do = "Set synthetic.learning_rate to None to train with the lr of the evaluation"
        raise InvalidInputError(explain("a learned learning rate above 0", str(rate), do))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    network.train()
    for epoch in range(config.epochs):
        if epoch == config.epochs // 2 + 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.1
        order = torch.randperm(len(images), generator=generator)
        for indices in upload(order.split(config.batch_size), images.device):
            batch = images[indices]
            if augmentation.strategies:
                batch = augmentation(batch, generator=generator)
            loss = F.cross_entropy(network(batch), labels[indices])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            explain(
                "a finite training loss on the synthetic set",
                str(float(loss.detach())),
                "Lower the evaluation lr, and look at the synthetic images",
            )
        )
    return network.eval()


@named_errors
@torch.no_grad()
def accuracy(network: nn.Module, images: Images, labels: Tensor) -> float:
    """Accuracy in percent of ``network`` on images [N,C,H,W] and labels int64 [N].

    Switches the network to eval mode. The labels may lie on another device than the images.
    """
    return 100.0 * int(_hits(network, images, labels).sum()) / len(labels)


@torch.no_grad()
def _hits(network: nn.Module, images: Images, labels: Tensor) -> Tensor:
    """Which images the network classifies rightly: bool [N] on the CPU."""
    network.eval()
    labels = labels.to(images.device)

    def hits(size: int) -> Tensor:
        parts = zip(images.split(size), labels.split(size), strict=True)
        return torch.cat([network(x).argmax(1) == y for x, y in parts]).cpu()

    return halved(hits, forward_size(images, network))


def _class_accuracies(hits: Tensor, labels: Tensor, num_classes: int) -> tuple[float, ...]:
    """Accuracy in percent on each of K classes, from hits bool [N] and labels int64 [N]; NaN without images."""
    labels = labels.cpu()
    sizes = torch.bincount(labels, minlength=num_classes).double()
    right = torch.bincount(labels[hits], minlength=num_classes).double()
    return tuple((100.0 * right / sizes).tolist())


@named_errors
@default_modes()
def evaluate(
    synthetic: SyntheticSet,
    test: tuple[Images, Tensor],
    config: EvaluateConfig | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    network: str | None = None,
    runs: int | None = None,
    also: tuple[Images, Tensor] | None = None,
    generator: torch.Generator,
) -> Evaluation:
    """Trains fresh networks on the synthetic set and tests them.

    Args:
        synthetic: the set.
        test: (images float32 [N,C,H,W] or a store of them, labels int64 [N]). The images' device is that of the
            evaluation.
        config: the settings; defaults if None.
        preprocessing: preprocessing of the test images, compared with that of the set; None skips the comparison.
        network: one architecture; overrides ``config.network``, and is needed if that names several.
        runs: overrides ``config.runs``.
        also: further images and labels that each network is tested on; they change nothing else.
        generator: CPU generator of initial weights, batches and augmentation.

    Raises:
        PreprocessingMismatchError: test and synthetic images were normalised or whitened differently.
        InvalidInputError: test images of another shape, or a learned learning rate that is not above 0.
        InvalidLabelsError: test labels that are no classes of the set, or not one per image.
        UnknownNameError: no such architecture.
        NonFiniteError: the training loss is NaN or infinite.
    """
    config = EvaluateConfig() if config is None else config
    if not len(test[0]):
        do = "Add test images (test/<class>/ of a folder), or pass held-out training images"
        raise InvalidInputError(explain("at least one test image", "none", do))
    if isinstance(test[0], Tensor) and not bool(torch.isfinite(test[0]).all()):
        raise InvalidInputError(explain("finite test images", "a NaN or infinite value", "Leave out or repair them"))
    images, labels = test[0], check_labels(test[1], synthetic.num_classes, len(test[0]), "test labels")
    if preprocessing is not None:
        synthetic.preprocessing.check_same(preprocessing)
    if images.shape[1:] != synthetic.images.shape[1:]:
        raise InvalidInputError(
            explain(
                f"test images {list(synthetic.images.shape[1:])}",
                f"{list(images.shape[1:])}",
                "Load the dataset that was distilled",
            )
        )
    synthetic = synthetic.to(images.device)
    name = network or config.network
    size = int(images.shape[-1])
    results, per_class, further = [], [], []
    for _ in range(config.runs if runs is None else check_whole("runs", runs, 1)):
        fresh = make_network(
            name,
            in_channels=int(images.shape[1]),
            num_classes=synthetic.num_classes,
            image_size=(int(images.shape[2]), size),
            width=config.width,
            depth=config.depth or default_depth(int(images.shape[2]), size),
            norm=config.norm or None,
            generator=generator,
            device=images.device,
        )
        trained = train_on_synthetic(fresh, synthetic, config, generator)
        hits = _hits(trained, images, labels)
        results.append(100.0 * int(hits.sum()) / len(labels))
        per_class.append(_class_accuracies(hits, labels, synthetic.num_classes))
        if also is not None:
            further.append(accuracy(trained, *also))
    return Evaluation(tuple(results), name, tuple(per_class), tuple(further))
