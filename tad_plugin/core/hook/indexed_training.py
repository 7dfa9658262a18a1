"""IndexedTraining: a loop that trains on samples which carry their index, and the scorer that its network is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.distributed import merge_rows
from tad_plugin.core.hook.given_loss import GivenLoss
from tad_plugin.core.hook.images import as_images
from tad_plugin.core.hook.indexed import IndexedDataset, SharedTargets, positions_of
from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.scorer import RecordedScores, Scores
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain

__all__ = ["IndexedTraining", "SeenLogits"]


class SeenLogits:
    """The latest logits of each sample, noted while a loop trains: float32 [N,K] on the state's device.

    They stand in for a pass over the data where no images are given.
    """

    def __init__(self, state: SampleState) -> None:
        self.logits = torch.zeros(len(state), state.num_classes, device=state.device)
        self.visits = torch.zeros(len(state), dtype=torch.int32, device=state.device)

    def note(self, index: Tensor, logits: Tensor) -> None:
        """Notes the logits [B,K] of the samples ``index`` int64 [B]."""
        self.logits[index] = logits.detach().to(self.logits.device, torch.float32)
        self.visits[index] += 1

    def missing(self) -> int:
        """Number of samples without logits."""
        return int((self.visits == 0).sum())

    def scores(self) -> Scores:
        """Logits of all samples. They are also their features."""
        return Scores(self.logits.clone(), self.logits.clone())


class IndexedTraining:
    """Datasets that carry indices, their losses, and what a network of the loop is scored on.

    Args:
        state: the sample state.
        known: labels and, if attach() got them, images.
        source: the dataset that attach() got, or None.
        given: int64 [N], the labels that the user's dataset gives.
        active: a method is on, or labels were corrupted.
        drawn: samples are drawn by weight.
        usage: counts.
        transform: how an image is made for scoring.
        seed: seeds the reading of a dataset.

    Attributes:
        data: the real data with images, or None while there are none.
    """

    def __init__(
        self,
        state: SampleState,
        known: RealData,
        source: Any,
        given: Tensor,
        *,
        active: bool,
        drawn: bool,
        usage: Usage,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.state, self.known, self.source, self.usage = state, known, source, usage
        self.given, self.active = given, active
        self.given_loss = GivenLoss(state, active, drawn, usage)
        self.transform, self.seed = transform, seed
        self.data = known if known.images.numel() else None
        self.reads: Tensor | None = None
        self._targets: SharedTargets | None = None
        self._whole: Any = None
        self._seen: SeenLogits | None = None

    def dataset(
        self,
        dataset: Any,
        label: int | str | None = None,
        key: str = "index",
        positions: Tensor | Sequence[int] | None = None,
    ) -> IndexedDataset:
        """See :meth:`tad_plugin.Hook.dataset`."""
        self.usage.note("dataset")
        where = positions_of(dataset, len(self.state), self.source, positions)
        if self._targets is None:
            self._targets = SharedTargets(self.state)
        if self.usage.watching and self.reads is None:
            self.reads = torch.zeros(len(self.state), dtype=torch.int64).share_memory_()
        if where is None:
            self.scores_on(dataset)
        targets = self._targets.values
        return IndexedDataset(dataset, targets, self.given.cpu(), where, label=label, key=key, reads=self.reads)

    def scores_on(self, dataset: Any) -> None:
        """Takes a dataset of all samples in the state's order as images to score, if attach() got none."""
        self._whole = dataset if self._whole is None else self._whole

    def refresh(self) -> None:
        """Notes what the methods have decided, and shows it to worker processes."""
        self.given_loss.follow()
        if self._targets is not None:
            self._targets.refresh()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        indices: Any,
        partner: Any,
        share: Tensor | float | None,
        criterion: Any,
        events: CallbackList | None,
        again: bool,
    ) -> Tensor:
        """See :meth:`tad_plugin.Hook.loss`. ``events`` is None where the network is not the scorer."""
        criterion = F.cross_entropy if criterion is None else criterion
        self.refresh()
        loss, index = self.given_loss(logits, labels, indices, partner, share, criterion)
        if events is None or not logits.requires_grad:
            return self.usage.watch(loss)
        if partner is None:  # the logits of a mixed image are of no sample
            if self.data is None and self._whole is None:
                self._seen = SeenLogits(self.state) if self._seen is None else self._seen
                self._seen.note(index, logits)
            if loss.ndim == 0:
                loss = (events.scorer_again if again else events.scorer_batch)(self.state, index, logits, loss)
        return self.usage.watch(loss)

    def scored(self, network: nn.Module) -> tuple[nn.Module, RealData] | str:
        """The network and the data on which the methods score, or why they cannot yet.

        Images come from attach(), else from the dataset that was wrapped, else the logits of the training batches
        stand in for them.

        Raises:
            ConfigError: there is nothing of the kind.
        """
        if self.data is None and self._whole is not None:
            images = as_images(self._whole, len(self.state), transform=self.transform, seed=self.seed)
            k = self.known
            more = (k.true_labels, k.dataset, k.noise_rate, k.ipc)
            self.data = RealData(images.to(k.labels.device), k.labels, k.num_classes, *more)  # type: ignore[union-attr]
        if self.data is not None:
            return network, self.data
        if self._seen is None:
            do = "Pass data=images to attach(), wrap the data with hook.dataset, or train with hook.loss"
            raise ConfigError(explain("something to score the network on", "no images and no losses", do))
        # Each process has seen its own part of the data.
        merge_rows(self._seen.logits, self._seen.visits)
        if missing := self._seen.missing():
            return f"no images, and {missing} samples that never went through hook.loss(logits, labels, idx) unmixed"
        return RecordedScores(self._seen.scores()), self.known
