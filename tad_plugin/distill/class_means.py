"""What DM and IDM share: class means of embeddings, with all classes of an iteration in few passes.

Small classes share a pass and large ones are cut to what suits the device, with the values of the class-by-class form
but for rounding. Real images are embedded as a stream; of the synthetic ones, graphs of a group of classes are built
and used one after the other, so that memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, check_batch, check_loss, draw_class
from tad_plugin.nn.augment import Augmentation, Draw
from tad_plugin.nn.passes import Embed, chunk_size, embed_in_passes, pass_size

__all__ = ["MeanMatching", "classes_per_graph", "embedded_batches"]
ClassLosses = Callable[[Tensor, Tensor, list[Draw | None], int], Tensor]

# What the graph of one backward pass may keep. An image of the widest layer counts eight times: the block's
# convolution, norm, activation and pooling keep about five maps of that size, the smaller blocks the rest.
_GRAPH_BYTES = 2**32
_MAPS_KEPT = 8


@torch.no_grad()
def embedded_batches(embed: Embed, batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The embedding [B_c,D] of each batch [B_c,C,H,W] in turn, without a graph.

    Batches are taken from the iterable as they are needed: never more than ``size`` images and one batch are held.
    """
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= size:
            yield from _flush(embed, waiting, size)
            waiting = []
    if waiting:
        yield from _flush(embed, waiting, size)


def _flush(embed: Embed, batches: list[Tensor], size: int) -> list[Tensor]:
    joined = batches[0] if len(batches) == 1 else torch.cat(batches)
    return list(embed_in_passes(embed, joined, size).split([len(b) for b in batches]))


def classes_per_graph(per_class: int, images: Tensor, width: int, budget: int = _GRAPH_BYTES) -> int:
    """How many classes of ``per_class`` synthetic images a graph may hold: at least 1, as a mean is not cut.

    Args:
        per_class: images per class that go through the network.
        images: [B,C,H,W]; only their size matters.
        width: channels of the network's widest layer, taken to be as large as the images.
        budget: bytes for the graph.
    """
    return max(1, budget // (4 * width * images.shape[-2] * images.shape[-1] * _MAPS_KEPT * per_class))


class MeanMatching(Baseline):
    """Matches the (weighted) class means of real embeddings; a subclass says by what loss, and updates the images.

    Attributes:
        stream: real images per pass.
        classes: classes per backward pass; more of them change memory and speed, and the values only by rounding.
    """

    def __init__(
        self, config: Any, data: RealData, hook: Hook | None, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.augmentation = Augmentation.configured(config.augment, data.dataset)
        self.stream = min(chunk_size(data.images.device), pass_size(data.images, config.width))
        self.classes = data.num_classes
        # A batch norm takes its statistics from all of them.
        if config.norm != "batch":
            self.classes = classes_per_graph(config.ipc, data.images, config.width)

    def match(self, network: Any, iteration: int, class_losses: ClassLosses, **event: Any) -> float:
        """Works out the loss and its gradient, ``synthetic.images.grad``, and fires the event before an update.

        Args:
            network: has ``embed``; no gradient in its parameters is needed.
            iteration: for messages.
            class_losses: (synthetic images [k,IPC,C,H,W], means of real embeddings [k,D], augmentation draws of the k
                classes, the first of them) -> their losses [k].
            event: further arguments of ``hook.before_update``.

        Returns:
            The loss, summed over classes.

        Raises:
            EmptyClassError, NotEnoughSamplesError: see :func:`check_batch`.
            NonFiniteError: the loss is NaN or infinite.
        """
        images, classes = self.synthetic.images, self.data.num_classes
        means, draws = self.real_means(network)
        # Only a method that differentiates the loss needs all classes in one graph.
        keep = self.hook is not None and self.hook.wants_graph()
        count = classes if keep else self.classes
        gradient, losses = torch.zeros_like(images), []
        for first in range(0, classes, count):
            part = slice(first, first + count)
            own = images.unflatten(0, (classes, -1))[part]
            loss = class_losses(own, means[part], draws[part], first).sum()
            if not keep:
                gradient.unflatten(0, (classes, -1))[part] = torch.autograd.grad(loss, own)[0]
            losses.append(loss if keep else loss.detach())
        total = torch.stack(losses).sum()
        check_loss(total.detach(), iteration)
        if self.hook is not None:
            self.hook.before_update(total, images, network, labels=self.synthetic.labels, **event)
        images.grad = torch.autograd.grad(total, images)[0] if keep else gradient
        return float(total.detach())

    def real_means(self, network: Any) -> tuple[Tensor, list[Draw | None]]:
        """(Weighted) mean embedding of each class's real batch [K,D], and the classes' augmentation draws."""
        drawn: list[Tensor] = []
        draws: list[Draw | None] = []
        wanted, size = self.config.batch_real, self.data.images.shape[-2:]

        def batches() -> Iterator[Tensor]:
            for c in range(self.data.num_classes):
                indices = draw_class(self.hook, self.data, c, wanted, self.generator)
                check_batch(self.config, c, len(indices), wanted)
                drawn.append(indices)
                draw = None
                if self.augmentation.strategies:
                    draw = self.augmentation.draw(
                        len(indices),
                        (size[0], size[1]),
                        generator=self.generator,
                        siamese=True,
                        device=self.data.images.device,
                    )
                draws.append(draw)
                yield self.augmented(self.data.images[indices], draw)

        means = []
        for c, found in enumerate(embedded_batches(network.embed, batches(), self.stream)):
            rows, indices = self.picked(network, c, found, drawn[c])
            if self.hook is not None:
                rows = self.hook.reweight(rows, indices)
            means.append(rows.mean(0))
        return torch.stack(means), draws

    def picked(self, network: Any, c: int, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings [B,D] of class c's real batch that count, and their indices; here all of them."""
        return rows, indices

    def augmented(self, images: Tensor, draw: Draw | None) -> Tensor:
        """``images`` under a class's draw."""
        return images if draw is None else self.augmentation.apply(images, draw)
