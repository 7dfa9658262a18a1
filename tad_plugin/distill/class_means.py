"""Matching of class means of embeddings: the part that DM and IDM share.

The classes of an iteration go through the network together. Small classes share a pass; large ones are split into
passes that suit the device. Same result as looping over classes, up to rounding. Real images are embedded as a stream.
Synthetic images are matched in groups of classes, one graph after the other, so that memory does not grow with the
number of classes. A network that takes batch statistics sees all real images in one pass and all synthetic images in
another, as in the public code of DM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, check_loss
from tad_plugin.nn.augment import Augmentation, Draw
from tad_plugin.nn.passes import Embed, batch_statistics, bytes_for_passes, chunk_size, embed_in_passes, pass_size
from tad_plugin.utils.image_store import Images

__all__ = ["MeanMatching", "classes_per_graph", "embedded_batches"]
ClassLosses = Callable[[Tensor, Tensor, list[Draw | None], int], Tensor]

# Most memory of the graph of one backward pass. Each image counts as eight maps of the widest layer: convolution,
# norm, activation and pooling of the first block keep about five, the smaller blocks the rest.
_GRAPH_BYTES = 2**32
_MAPS_KEPT = 8


@torch.no_grad()
def embedded_batches(embed: Embed, batches: Iterable[Tensor], size: float) -> Iterator[Tensor]:
    """Yields the embedding [B_c,D] of each batch [B_c,C,H,W], in order and without a graph.

    Batches are read lazily: at most ``size`` images and one batch are in memory. An infinite ``size`` makes a
    single pass.
    """
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= size:
            yield from _flush(embed, waiting, size)
            waiting = []
    if waiting:
        yield from _flush(embed, waiting, size)


def _flush(embed: Embed, batches: list[Tensor], size: float) -> list[Tensor]:
    joined = batches[0] if len(batches) == 1 else torch.cat(batches)
    # One pass where it must be one: there is none that is smaller.
    rows = embed(joined) if math.isinf(size) else embed_in_passes(embed, joined, int(min(size, len(joined))))
    return list(rows.split([len(b) for b in batches]))


def classes_per_graph(per_class: int, images: Images, width: int, budget: int | None = None) -> int:
    """Number of classes whose synthetic images fit one graph; at least 1, because the mean of a class is not split.

    Args:
        per_class: images per class that go through the network.
        images: [B,C,H,W]; only height and width are read.
        width: channels of the network's widest layer, which is assumed to have the resolution of the images.
        budget: bytes for the graph; by default what passes may take on the device, at most 4 GiB.
    """
    budget = min(_GRAPH_BYTES, bytes_for_passes(images.device)) if budget is None else budget
    return max(1, budget // (4 * width * images.shape[-2] * images.shape[-1] * _MAPS_KEPT * per_class))


class MeanMatching(Baseline):
    """Matches the (weighted) class means of real embeddings. Subclasses define the loss and update the images.

    Attributes:
        stream: real images per pass, in a network without batch statistics. It changes memory and speed only.
        classes: classes per backward pass. It changes memory and speed; values change by rounding only.
    """

    def __init__(
        self, config: Any, data: RealData, hook: Hook, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.augmentation = Augmentation.configured(config.augment, data.dataset)
        self.stream = min(chunk_size(data.images.device), pass_size(data.images, config.width))
        self.classes = classes_per_graph(config.ipc, data.images, config.width)

    def match(self, network: Any, iteration: int, class_losses: ClassLosses, **event: Any) -> float:
        """Computes the loss and its gradient, ``synthetic.images.grad``, and calls ``hook.before_update``.

        Args:
            network: has ``embed``; its parameters need no gradient.
            iteration: number of the iteration, for messages.
            class_losses: computes the losses [k] of k classes from their synthetic images [k,IPC,C,H,W], their means
                of real embeddings [k,D], their augmentation draws, and the number of the first class.
            event: further arguments of ``hook.before_update``.

        Returns:
            The loss, summed over classes.

        Raises:
            EmptyClassError, NotEnoughSamplesError: see :meth:`Baseline.draw`.
            NonFiniteError: the loss is NaN or infinite.
        """
        images, classes = self.synthetic.images, self.data.num_classes
        means, draws = self.real_means(network)
        # A method that differentiates the loss needs all classes in one graph, and so do batch statistics.
        keep = self.hook.wants_graph()
        count = classes if keep or batch_statistics(network) else self.classes
        gradient, losses = torch.zeros_like(images), []
        for first in range(0, classes, count):
            part = slice(first, first + count)
            own = images.unflatten(0, (classes, -1))[part]
            loss = class_losses(own, means[part], draws[part], first).sum()
            if not keep:
                gradient.unflatten(0, (classes, -1))[part] = torch.autograd.grad(loss, own)[0]
            losses.append(loss if keep else loss.detach())
        total = torch.stack(losses).sum()
        value = check_loss(total.detach(), iteration)
        self.hook.before_update(total, images, network, labels=self.synthetic.labels, **event)
        images.grad = torch.autograd.grad(total, images)[0] if keep else gradient
        return value

    def _draws(self) -> tuple[list[Tensor], list[Draw | None]]:
        """Indices of one real batch per class, and its augmentation draw. The indices are moved in one copy."""
        drawn: list[Tensor] = []
        draws: list[Draw | None] = []
        height, width = (int(v) for v in self.data.images.shape[-2:])
        device = self.data.images.device
        for c in range(self.data.num_classes):
            drawn.append(self.draw_on_host(c, self.config.batch_real))
            draw = None
            if self.augmentation.strategies:
                draw = self.augmentation.draw(
                    len(drawn[-1]), (height, width), generator=self.generator, siamese=True, device=device
                )
            draws.append(draw)
        return self.hook.state.placed(drawn), draws

    def real_means(self, network: Any) -> tuple[Tensor, list[Draw | None]]:
        """(Weighted) mean embedding of one real batch per class, [K,D], and the augmentation draw of each class."""
        drawn, draws = self._draws()
        batches = (self.augmented(self.data.images[indices], draw) for indices, draw in zip(drawn, draws, strict=True))
        means = []
        stream = math.inf if batch_statistics(network) else self.stream
        for c, found in enumerate(embedded_batches(network.embed, batches, stream)):
            rows, indices = self.picked(network, c, found, drawn[c])
            means.append(self.hook.reweight(rows, indices).mean(0))
        return torch.stack(means), draws

    def picked(self, network: Any, c: int, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Selects from class c's real batch: embeddings [B,D] and indices [B] of the samples to match. Here all."""
        return rows, indices

    def augmented(self, images: Tensor, draw: Draw | None) -> Tensor:
        """``images`` augmented with the given draw; None leaves them unchanged."""
        return images if draw is None else self.augmentation.apply(images, draw)
