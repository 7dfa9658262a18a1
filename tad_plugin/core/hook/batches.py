"""Which samples, with what label, how much: the part of the hook that a loop asks for each batch.

A script that can only be given further lines (a patched one) cannot pass the indices of a batch to where its rows are
averaged. It says ``hook.drawn(indices)`` where it draws, and the handles after it find the indices of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError, explain

__all__ = ["BatchHandles"]


class BatchHandles:
    """Base of :class:`tad_plugin.core.hook.Hook`; with no method on every handle is an identity that draws nothing."""

    state: SampleState
    events: CallbackList
    enabled: bool
    generator: torch.Generator
    iteration: int
    _ones: Tensor
    _offset: Tensor | None
    _drawn: list[Tensor]
    _noted: list[Any]
    _lists: tuple[list[Tensor], list[list[int]]] | None = None

    # -- which samples -------------------------------------------------------------------------------
    def sample(self, c: int, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Up to n indices (int64) of usable samples of class c, without replacement.

        Args:
            c: class.
            n: how many.
            generator: CPU generator of the loop; by default the hook's own, seeded by ``attach(seed=...)``.

        Raises:
            EmptyClassError: the class has no usable sample.
        """
        return self.state.sample(c, n, self.generator if generator is None else generator)

    def pool(self, c: int) -> Tensor:
        """Indices (int64) of usable samples with target c, ascending."""
        return self.state.pool(c)

    def pools(self) -> list[list[int]]:
        """For each class the list of usable indices: a drop-in for the public codebases' ``indices_class``.

        The lists are made anew only after a method has written the state, so a loop may ask in each iteration.
        """
        pools = self.state.pools()
        if self._lists is None or self._lists[0] is not pools:
            self._lists = (pools, [p.tolist() for p in pools])
        return list(self._lists[1])

    def drawn(self, indices: Tensor | Sequence[int]) -> None:
        """Notes what the script has just drawn (a tensor, an array or a list [B]), for handles called without indices.

        Forgotten after each update of the synthetic set.
        """
        if self.enabled:
            self._noted.append(indices)

    def kept(self, rows: Tensor | Sequence[int]) -> None:
        """Notes that the script goes on with these rows (positions or a bool mask) of its latest draw only."""
        if self.enabled and self._noted:
            self._noted[-1] = torch.as_tensor(self._noted[-1], device=self.state.device)[rows]

    def _indices(self, count: int, indices: Tensor | Sequence[int] | None) -> Tensor:
        """The given indices, or the latest noted ones that make up ``count`` rows; int64 on the state's device."""
        if indices is not None:
            if len(indices) != count:
                raise InvalidInputError(
                    explain(f"{count} indices", str(len(indices)), "Pass the indices of exactly these rows")
                )
            return torch.as_tensor(indices, device=self.state.device)
        found, parts = 0, []
        for part in reversed(self._noted):
            if found >= count:
                break
            found += len(part)
            parts.append(torch.as_tensor(part, device=self.state.device))
        if found != count or not parts:
            raise InvalidInputError(
                explain(
                    f"draws noted by hook.drawn() that make up {count} rows",
                    f"{found} indices in the latest {len(parts)}",
                    "Call hook.drawn(indices) for each draw of the batch, in the order of its rows, or pass indices",
                )
            )
        return torch.cat(parts[::-1])

    # -- what label, how much ------------------------------------------------------------------------
    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Weights float32 [B] with mean 1 over the batch's samples of each class; the one line in a loop.

        With no method on it is a view of a single 1. Where a method wants the influence of this
        iteration, the result carries a graph.
        """
        if not self.enabled:
            return self._ones.expand(len(indices))
        index = torch.as_tensor(indices, device=self.state.device)
        w = self.state.weights(index)
        if self.events.wants_graph(self.iteration):
            if self._offset is None:
                self._offset = torch.zeros(len(self.state), device=self.state.device, requires_grad=True)
            self._drawn.append(index)
            w = w + self._offset[index]
        return w

    def targets(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Target labels int64 [B]."""
        return self.state.targets(torch.as_tensor(indices, device=self.state.device))

    def reweight(self, rows: Tensor, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Rows [B,...] scaled so that a plain mean over them is the weighted mean; the same object with no method on.

        Args:
            rows: one row per real sample.
            indices: their positions [B]; None takes the latest that :meth:`drawn` noted.

        Raises:
            InvalidInputError: another number of indices than of rows.
        """
        if not self.enabled:
            return rows
        index = self._indices(len(rows), indices)
        return rows * self.weights(index).to(rows.device).view(-1, *[1] * (rows.ndim - 1))

    def weighted_loss(
        self, loss: Tensor, logits: Tensor, labels: Tensor, indices: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """The mean cross-entropy of a batch of real samples, weighted; ``loss`` itself where every weight is 1.

        Args:
            loss: what the script computed, the scalar mean cross-entropy.
            logits: [B,K], with a graph.
            labels: int64 [B].
            indices: positions [B]; None takes the latest that :meth:`drawn` noted.

        Raises:
            InvalidInputError: another number of indices than of rows.
        """
        if not self.enabled:
            return loss
        weights = self.state.weights(self._indices(len(logits), indices)).to(logits.device)
        # The same bits as the baseline while nothing is weighted: another reduction would round differently.
        if bool((weights == 1).all()):
            return loss
        return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()

    def matched_gradient(
        self,
        gradient: Sequence[Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """The gradient of real samples that a loop matches (DC, DSA), in iterations that need it with a graph.

        The values are those of ``gradient`` to the last bit; where a method wants the influence of this iteration, a
        second pass over the batch gives them the derivative in each sample's weight. Else ``gradient`` itself.

        Args:
            gradient: detached gradient of the (weighted) mean cross-entropy in each parameter of the network.
            network: in the mode in which that was taken.
            images: float32 [B,C,H,W], augmented as for ``gradient``.
            labels: int64 [B].
            indices: positions [B]; None takes the latest that :meth:`drawn` noted.

        Raises:
            InvalidInputError: another number of indices than of images, or of gradients than of parameters.
        """
        given = list(gradient)
        if not (self.enabled and self.events.wants_graph(self.iteration)):
            return given
        index, parameters = self._indices(len(images), indices), list(network.parameters())
        if len(parameters) != len(given):
            got = f"{len(given)} gradients"
            do = "Pass one gradient for each of network.parameters(), in their order"
            raise InvalidInputError(explain(f"gradients of {len(parameters)} parameters", got, do))
        rows = F.cross_entropy(network(images), labels, reduction="none")
        loss = (self.weights(index).to(rows.device) * rows).mean()
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        return [g.detach() + (f - f.detach()) for g, f in zip(given, found, strict=True)]
