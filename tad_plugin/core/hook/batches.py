"""Batches: the real samples that a loop draws, and their weights in a loss.

A patched script cannot pass the indices of a batch to the place where its rows are averaged. It calls
``hook.drawn(indices)`` where it draws. Later handles without indices find the indices of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.class_weights import batch_weights
from tad_plugin.core.indices import check_indices
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.utils.arguments import named_errors

__all__ = ["Batches"]


class Batches:
    """The batches since the last update of the synthetic set. With no method every handle is an identity.

    All weights here are matching weights (:meth:`SampleState.weights`).

    Args:
        state: the sample state.
        enabled: whether a method is on.
        wants_graph: whether the weights of this iteration must carry a graph.
        drawn: samples are drawn by their weights, so that every usable sample of a batch weighs the same.

    Attributes:
        noted: draws that :meth:`drawn` noted.
        offset: float32 [N], zeros that :meth:`weights` adds; the leaf of the graph, or None without a graph.
        weighted: indices whose weights carry the graph.
    """

    def __init__(
        self, state: SampleState, enabled: bool, wants_graph: Callable[[], bool], *, drawn: bool = False
    ) -> None:
        self.state = state
        self.enabled = enabled
        self.wants_graph = wants_graph
        self.by_weight = drawn
        self.noted: list[Tensor] = []
        self.offset: Tensor | None = None
        self.weighted: list[Tensor] = []
        self._lists: tuple[int, list[list[int]]] | None = None

    def forget(self) -> None:
        """Forgets every draw. Called after each update of the synthetic set."""
        self.noted, self.offset, self.weighted = [], None, []

    def leaf(self) -> Tensor:
        """The leaf of the graph, float32 [N]; zeros without a graph where no weight carries one."""
        return (
            torch.zeros(len(self.state), dtype=torch.float32, device=self.state.device)
            if self.offset is None
            else self.offset
        )

    def positions(self) -> Tensor:
        """Indices int64 [B] of all samples whose weights carry the graph."""
        empty = torch.zeros(0, dtype=torch.int64, device=self.state.device)
        return torch.cat(self.weighted) if self.weighted else empty

    def pools(self) -> list[list[int]]:
        """Usable indices of each class: a drop-in for ``indices_class`` of the public codebases.

        They are made anew only after a method has written the state, so a loop may ask in each iteration. It gets
        copies: writing into them is safe.
        """
        if self._lists is None or self._lists[0] != self.state.version:
            self._lists = (self.state.version, [p.tolist() for p in self.state.pools()])
        return [list(pool) for pool in self._lists[1]]

    def drawn(self, indices: Tensor | Sequence[int]) -> None:
        """Notes a draw (a tensor, array or list [B]) for handles that are called without indices.

        Draws are forgotten after each update of the synthetic set. Raises InvalidInputError for bad indices.
        """
        index = self._checked(indices)
        if self.enabled:
            self.noted.append(index)

    def kept(self, rows: Tensor | Sequence[int]) -> None:
        """Reduces the latest noted draw to these rows (positions or a bool mask). Raises InvalidInputError."""
        latest = self.noted[-1] if self.noted else None
        chosen = check_indices(rows, None if latest is None else len(latest), self.state.device, name="rows")
        if latest is not None:
            self.noted[-1] = latest[chosen]

    def _checked(self, indices: Tensor | Sequence[int], count: int | None = None) -> Tensor:
        return check_indices(indices, len(self.state), self.state.device, count=count)

    def indices(self, count: int, given: Tensor | Sequence[int] | None) -> Tensor:
        """``given``, or the latest noted draws that make up ``count`` rows; int64 [count] on the state's device.

        Raises:
            InvalidInputError: another number of indices than ``count``.
        """
        if given is not None:
            return self._checked(given, count)
        parts: list[Tensor] = []
        found = 0
        for part in reversed(self.noted):
            if found >= count:
                break
            found += len(part)
            parts.append(part)
        if found != count or not parts:
            expected = f"draws noted by hook.drawn() that make up {count} rows"
            do = "Call hook.drawn(indices) for each draw of the batch, in the order of its rows, or pass indices"
            raise InvalidInputError(explain(expected, f"{found} indices in the latest {len(parts)}", do))
        return torch.cat(parts[::-1])

    def _check_labels(self, index: Tensor, labels: Tensor) -> None:
        """Raises InvalidInputError if ``labels`` [B] are not the targets of the samples ``index`` [B]."""
        wanted = self.state.target[index]
        if not isinstance(labels, Tensor) or labels.shape != wanted.shape or labels.is_floating_point():
            shape = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
            raise InvalidInputError(explain(f"labels int64 {list(wanted.shape)}", shape, "Pass hook.targets(indices)"))
        wrong = wanted != labels.detach().to(wanted.device)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            expected = f"label {int(wanted[row])} in row {row}, the target of sample {int(index[row])}"
            do = "Pass the indices of exactly these rows, in their order, and hook.targets(indices) as labels"
            raise InvalidInputError(explain(expected, str(int(labels[row])), do))

    def _matching(self, index: Tensor) -> Tensor:
        state = self.state
        if not self.by_weight:
            return state.weights(index)
        usable = state.trusted[index] & (state.weight[index] > 0)
        return batch_weights(torch.ones_like(state.weight[index]), state.target[index], usable, state.num_classes)

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Matching weights float32 [B], mean 1 over the batch's samples of each class; see :meth:`SampleState.weights`.

        Without a method it is ones. Where a method wants the influence of this iteration, the result carries a graph.
        Raises InvalidInputError for bad indices.
        """
        index = self._checked(indices)
        if not self.enabled:
            return torch.ones(len(index), dtype=torch.float32, device=self.state.device)
        w = self._matching(index)
        if self.wants_graph():
            if self.offset is None:
                self.offset = torch.zeros(
                    len(self.state), dtype=torch.float32, device=self.state.device, requires_grad=True
                )
            self.weighted.append(index)
            w = w + self.offset[index]
        return w

    @named_errors
    def reweight(self, rows: Tensor, indices: Tensor | Sequence[int] | None) -> Tensor:
        """Rows [B,...] scaled by the matching weights, so that their plain mean is the weighted mean.

        Without a method it returns the same object.

        Args:
            rows: one row per real sample.
            indices: their positions [B]; None takes the latest noted by :meth:`drawn`.

        Raises:
            InvalidInputError: another number of indices than of rows.
        """
        if not self.enabled:
            if indices is not None:
                self._checked(indices, len(rows))
            return rows
        index = self.indices(len(rows), indices)
        return rows * self.weights(index).to(rows.device).view(-1, *[1] * (rows.ndim - 1))

    @named_errors
    def weighted_loss(
        self, loss: Tensor, logits: Tensor, labels: Tensor, indices: Tensor | Sequence[int] | None
    ) -> Tensor:
        """Mean cross-entropy of a batch of real samples with the matching weights; ``loss`` itself if all are 1.

        Args:
            loss: the script's own loss, the scalar mean cross-entropy.
            logits: [B,K], with a graph.
            labels: int64 [B], the targets of these samples.
            indices: positions [B]; None takes the latest noted by :meth:`drawn`.

        Raises:
            InvalidInputError: bad indices, another number of them than of rows, or labels that are not their targets.
        """
        if not self.enabled:
            if indices is not None:
                self._checked(indices, len(logits))
            return loss
        index = self.indices(len(logits), indices)
        self._check_labels(index, labels)
        return self.reduced(loss, logits, labels, index)

    def reduced(self, loss: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """:meth:`weighted_loss` for labels that the state gave for these indices."""
        if not self.enabled:
            return loss
        weights = self._matching(index).to(logits.device)
        # Another reduction would round differently. The baseline's bits must stay while nothing is weighted.
        plain = (weights == 1).all()
        on_cpu = plain.device.type == "cpu"
        if on_cpu and bool(plain):
            return loss
        weighted = (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
        return weighted if on_cpu else torch.where(plain, loss, weighted)

    @named_errors
    def matched_gradient(
        self,
        gradient: Sequence[Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | Sequence[int] | None,
    ) -> list[Tensor]:
        """The gradient of real samples that a loop matches (DC, DSA), with a graph where a method needs one.

        The values are those of ``gradient`` to the last bit. Where a method wants the influence of this iteration, a
        second pass over the batch adds the derivative in each sample's matching weight.

        Args:
            gradient: detached gradient of the (weighted) mean cross-entropy in each parameter of the network.
            network: in the mode in which ``gradient`` was computed.
            images: float32 [B,C,H,W], augmented as for ``gradient``.
            labels: int64 [B], the targets of these samples.
            indices: positions [B]; None takes the latest noted by :meth:`drawn`.

        Raises:
            InvalidInputError: bad indices, another number of them than of images, labels that are not their targets, or
                another number of gradients than of parameters.
        """
        given = list(gradient)
        if not self.wants_graph():
            if indices is not None:
                self._checked(indices, len(images))
            return given
        index, parameters = self.indices(len(images), indices), list(network.parameters())
        if len(parameters) != len(given):
            do = "Pass one gradient for each of network.parameters(), in their order"
            expected = f"gradients of {len(parameters)} parameters"
            raise InvalidInputError(explain(expected, f"{len(given)} gradients", do))
        self._check_labels(index, labels)
        rows = F.cross_entropy(network(images), labels, reduction="none")
        loss = (self.weights(index).to(rows.device) * rows).mean()
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        return [g.detach() + (f - f.detach()) for g, f in zip(given, found, strict=True)]
