"""The state of a run between its start and its results, and the checkpoint that holds it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.utils.machine import peak_memory_bytes

__all__ = ["RunState"]


class RunState:
    """Counters, candidates and accuracies of one run so far. Its checkpoint also holds the hook and the loop.

    Args:
        folder: where checkpoints go.
        hook: the run's hook.
        device: device whose peak memory counts.
        every: seconds between checkpoints.

    Attributes:
        loop: the baseline; None before the distillation.
        iteration: updates done.
        seconds: time spent in updates.
        before: seconds spent before the first update, on scoring and on training experts. Shared work counts in full.
            None before the first update.
        finished: True once the distillation is over and ``hook.finish()`` was called.
        chosen: iteration that the held-out data chose; None before.
        candidates: synthetic sets by iteration.
        evaluated: accuracies in percent by "part/network/run", and what :meth:`curve` and :meth:`class_accuracy` read.
    """

    def __init__(self, folder: RunFolder, hook: Hook, *, device: str, every: float) -> None:
        self.folder, self.hook = folder, hook
        self.loop: Baseline | None = None
        self.iteration = 0
        self.seconds = 0.0
        self.before: float | None = None
        self.finished = False
        self.chosen: int | None = None
        self.candidates: dict[int, SyntheticSet] = {}
        self.evaluated: dict[str, float] = {}
        self._device, self._every = device, every
        self._peak = 0
        self._saved_at = perf_counter()
        self._pending: Mapping[str, Any] = {}
        self._loop: Mapping[str, Any] | None = None  # as loaded, until the loop is made

    def peak_memory(self) -> int | None:
        """Peak memory in bytes over all processes of the run, killed ones included; None if it is not known."""
        now = peak_memory_bytes(self._device)
        return None if now is None else max(now, self._peak)

    def maybe_save(self) -> None:
        """Writes a checkpoint if the last one is more than ``every`` seconds old."""
        if perf_counter() - self._saved_at > self._every:
            self.save()

    def curve(self) -> dict[str, list[Any]] | None:
        """Accuracy of one network on each candidate, in percent; None unless held-out data chose among several.

        Returns:
            "iterations", "heldout" (accuracy on held-out training images by the labels that the arm sees) and "test"
            (None where there are no other test images).
        """
        found = sorted(int(key.removeprefix("choose/")) for key in self.evaluated if key.startswith("choose/"))
        if not found:
            return None
        return {
            "iterations": found,
            "heldout": [self.evaluated[f"choose/{i}"] for i in found],
            "test": [self.evaluated.get(f"curve/{i}") for i in found],
        }

    def class_accuracy(self, network: str, num_classes: int) -> list[float | None] | None:
        """Accuracy of the last set on each of K classes, in percent, mean over networks of one architecture.

        It is None for a class without images, and in all if nothing was evaluated.
        """
        table: list[list[float]] = [[] for _ in range(num_classes)]
        for key, share in self.evaluated.items():
            part, *rest = key.split("/")
            if part == "classes" and rest[0] == network:
                table[int(rest[2])].append(share)
        return [statistics.fmean(shares) if shares else None for shares in table] if any(table) else None

    def save(self) -> None:
        """Writes a checkpoint."""
        tree = {
            "hook": self.hook.state_dict(),
            "loop": self.loop.state_dict() if self.loop is not None else self._loop,
            "progress": {
                "iteration": self.iteration,
                "seconds": self.seconds,
                "before": self.before,
                "finished": self.finished,
                "chosen": self.chosen,
                "peak": self.peak_memory() or 0,
                "evaluated": dict(self.evaluated),
                "candidates": {
                    **self._pending,
                    **{str(i): [s.images, s.labels, s.learning_rate] for i, s in self.candidates.items()},
                },
            },
        }
        self.folder.save_checkpoint(tree, self.iteration)
        self._saved_at = perf_counter()

    def load(self, saved: Mapping[str, Any], loop: Mapping[str, Any] | None = None) -> None:
        """Restores the "progress" part of a checkpoint, without candidates; see :meth:`restore_candidates`.

        Args:
            saved: the "progress" part.
            loop: the "loop" part. A checkpoint before :attr:`loop` is set keeps it.
        """
        self._loop = loop
        self.iteration = int(saved["iteration"])
        self.seconds = float(saved["seconds"])
        self.before = saved["before"]
        self.finished = bool(saved["finished"])
        self.chosen = saved["chosen"]
        self.evaluated = dict(saved["evaluated"])
        self._peak = int(saved["peak"])
        self._pending = saved["candidates"]

    def restore_candidates(self, loop: Baseline) -> None:
        """Makes the candidates of a loaded checkpoint synthetic sets again, with the loop's preprocessing and names."""
        where = loop.synthetic.images.device
        for i, (images, labels, rate) in self._pending.items():
            self.candidates[int(i)] = dataclasses.replace(
                loop.result(), images=images.to(where), labels=labels.to(where), learning_rate=rate
            )
        self._pending = {}
