"""SampleState: which real samples count, with what label, and how much.

One object per real dataset. Methods write it and loops read it. It is the only thing that they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.class_weights import batch_weights, check_means, product_of_factors
from tad_plugin.core.fields import check_classes, check_factor, check_field, check_rows
from tad_plugin.core.indices import check_indices, known_indices
from tad_plugin.core.pools import KEEP_ONE, Pools
from tad_plugin.core.state_file import FIELDS, read_state_file, write_state_file
from tad_plugin.data.labels import check_labels, integers_of, label_digest
from tad_plugin.data.real import RealData
from tad_plugin.errors import (
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    explain,
    unknown_name,
)
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.machine import check_device
from tad_plugin.utils.transfers import upload

__all__ = ["SampleState"]


class SampleState:
    """Label, weight and trust of each of N real samples; all tensors are indexed by position in the dataset.

    Attributes:
        observed: int64 [N], the labels as given. Never changes.
        target: int64 [N], the label that a loop trains on; starts as ``observed``.
        weight: float32 [N], >= 0, how much the sample counts; starts at 1. Use :meth:`weights` in a matching loss and
            :meth:`training_weights` in a training loss.
        trusted: bool [N], whether loops may draw it; starts True.
        trust: float32 [N] in [0, 1], posterior of being correctly labelled; starts at 1.
        version: number of writes so far.

    Every write keeps this true, or is refused: weights are finite and have mean 1 over each class's trusted samples,
    and each class has a trusted sample. With the starting values every loop gives the baseline's result bit for bit. A
    callback adds tensors of its own with :meth:`register`.

    Args:
        labels: integers [N] in [0, num_classes).
        num_classes: number of classes K.
        device: where the tensors live; by default the labels' device.
        allow_empty: accept a class without samples (cross-validation folds).

    Raises:
        InvalidLabelsError: labels out of range or of a wrong type.
        EmptyClassError: a class has no sample.
    """

    FIELDS = FIELDS

    @named_errors
    def __init__(
        self,
        labels: Tensor | Sequence[int],
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        allow_empty: bool = False,
    ) -> None:
        observed = check_labels(labels, num_classes)
        self._begin(observed if device is None else observed.to(check_device(device)), num_classes, allow_empty)

    @classmethod
    def of(cls, data: RealData, *, allow_empty: bool = False) -> SampleState:
        """The state of ``data`` on its device. RealData has checked the labels, so they are not checked again.

        Raises:
            EmptyClassError: a class has no sample and ``allow_empty`` is False.
        """
        state = cls.__new__(cls)
        state._begin(data.labels, data.num_classes, allow_empty)
        return state

    def _begin(self, observed: Tensor, num_classes: int, allow_empty: bool) -> None:
        self._allow_empty = allow_empty
        if not allow_empty:
            check_classes(observed, num_classes, "Remove the class and renumber the labels, or load more data")
        self.num_classes = num_classes
        self.observed = observed.clone()
        self.digest = label_digest(observed)
        self.target = observed.clone()
        n, where = len(observed), observed.device
        self.weight = torch.ones(n, dtype=torch.float32, device=where)
        self.trusted = torch.ones(n, dtype=torch.bool, device=where)
        self.trust = torch.ones(n, dtype=torch.float32, device=where)
        self._extra: dict[str, Tensor] = {}
        # Each method's factor of the weight. Factors multiply.
        self._factors: dict[str, Tensor] = {}
        self.version = 0
        self._pools: tuple[int, Pools] | None = None

    # -- description -------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.observed.device

    def __len__(self) -> int:
        return len(self.observed)

    def __repr__(self) -> str:
        s = self.summary()
        return f"SampleState(N={len(self)}, K={self.num_classes}, trusted={s['trusted']}, relabelled={s['relabelled']})"

    def summary(self) -> dict[str, Any]:
        """Counts as plain numbers: samples, trusted, untrusted, relabelled, smallest_pool, effective_sample_size.

        The effective sample size is a share in (0, 1]: (sum w)^2 / (n sum w^2) over the usable samples. It is 0 if
        no sample is usable.
        """
        usable = self.usable()
        w = self.weight[usable].double()
        ess = float(w.sum() ** 2 / (w.square().sum() * max(len(w), 1))) if len(w) else 0.0
        return {
            "samples": len(self),
            "trusted": int(self.trusted.sum()),
            "untrusted": int((~self.trusted).sum()),
            "relabelled": int((self.target != self.observed).sum()),
            "smallest_pool": int(torch.bincount(self.target[usable], minlength=self.num_classes).min()),
            "effective_sample_size": ess,
        }

    # -- writing -----------------------------------------------------------------------------------
    def update(
        self,
        *,
        target: Tensor | None = None,
        trusted: Tensor | None = None,
        trust: Tensor | None = None,
    ) -> None:
        """Replaces whole fields, each [N], all or none. Weights are scaled anew, and pools rebuilt at their next use.

        Raises:
            InvalidInputError: a wrong shape, a ``trusted`` that is neither True nor False, or a trust outside [0, 1].
            InvalidLabelsError: a target of a wrong shape or type, or out of range.
            EmptyClassError: a class would have no trusted sample. Nothing is changed.
        """
        if target is not None:
            target = self._checked("target", target, torch.int64, self.num_classes - 1, InvalidLabelsError)
        if trusted is not None:
            trusted = self._checked("trusted", trusted, torch.bool, 1)
        if trust is not None:
            trust = self._checked("trust", trust, torch.float32, 1)
        if target is not None or trusted is not None:
            target, trusted = self.target if target is None else target, self.trusted if trusted is None else trusted
            if not self._allow_empty:
                check_classes(target[trusted], self.num_classes, KEEP_ONE)
            self.target.copy_(target)
            self.trusted.copy_(trusted)
            self.refresh_weights()
        if trust is not None:
            self.trust.copy_(trust)
        self.version += 1

    def set_weights(self, factor: str, values: Tensor) -> None:
        """Sets one method's factor of the weight.

        The weight is the product of all factors, scaled to mean 1 over each class's trusted samples. The product is
        formed in float64, so factors may have any size.

        Args:
            factor: the method's name; a later call with the same name replaces the factor.
            values: float [N], finite and >= 0.

        Raises:
            InvalidInputError: a wrong shape, negative or non-finite values.
        """
        if not isinstance(factor, str) or not factor:
            raise InvalidInputError(explain("the method's name", repr(factor), "Pass self.name"))
        self._factors[factor] = check_factor("weights", values, len(self), self.device)
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Recomputes ``weight`` from the factors, with mean 1 over each class's trusted samples.

        Every write does this. A class whose trusted samples all weigh 0 gets weight 1.
        """
        weight = product_of_factors(self._factors.values(), self.target, self.trusted, self.num_classes)
        self.weight.copy_(weight)
        self.version += 1

    def _checked(
        self, name: str, values: Any, dtype: torch.dtype, high: float, error: type[Exception] = InvalidInputError
    ) -> Tensor:
        return check_field(name, values, dtype, high, len(self), self.device, error)

    def register(self, name: str, values: Tensor) -> Tensor:
        """Adds a tensor with first dimension N. It is saved and loaded with the state. Returns the stored tensor.

        A name that exists already keeps its values, so a resumed callback finds its own.

        Raises:
            InvalidInputError: the first dimension is not N, or the name is a built-in field.
        """
        if not isinstance(name, str) or name in ("", *self.FIELDS, "observed") or "/" in name:
            raise InvalidInputError(explain("a name of your own, without '/'", repr(name), "Choose another name"))
        if name not in self._extra:
            self._extra[name] = check_rows(name, values, len(self), self.device)
        return self._extra[name]

    def __getitem__(self, name: str) -> Tensor:
        """A field, ``observed``, or a tensor that a callback registered. Raises UnknownNameError for another name."""
        if name in (*self.FIELDS, "observed"):
            tensor: Tensor = getattr(self, name)
            return tensor
        if name not in self._extra:
            raise unknown_name("tensor of the state", name, [*self.FIELDS, "observed", *self._extra])
        return self._extra[name]

    def __contains__(self, name: str) -> bool:
        return name in (*self.FIELDS, "observed") or name in self._extra

    # -- reading -----------------------------------------------------------------------------------
    def usable(self) -> Tensor:
        """Bool [N]: trusted, with a weight above zero."""
        return self.trusted & (self.weight > 0)

    def untouched(self) -> bool:
        """True if every sample is trusted, weighs 1 and has its observed label as target."""
        return bool((self.trusted & (self.weight == 1) & (self.target == self.observed)).all())

    def pools(self) -> list[Tensor]:
        """One tensor per class: int64 indices of its usable samples, ascending. Copies: writing into them is safe."""
        return [pool.clone() for pool in self._current_pools().members]

    def _current_pools(self) -> Pools:
        """The pools themselves, rebuilt only after a write."""
        if self._pools is None or self._pools[0] != self.version:
            self._pools = self.version, Pools(self.target, self.num_classes, self.usable())
        return self._pools[1]

    def pool(self, c: int) -> Tensor:
        """Indices (int64, ascending) of usable samples with target ``c``; a copy.

        Raises:
            InvalidInputError: c is not a class.
        """
        return self._current_pools().of(c).clone()

    def sample(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """Up to n indices of class c, drawn without replacement. A smaller pool is returned whole and shuffled.

        The draw is one CPU permutation of the pool, so a CPU and a CUDA state draw the same samples.

        Args:
            c: class index.
            n: number of samples, at least 1.
            generator: a CPU generator.

        Raises:
            EmptyClassError: the pool is empty.
            InvalidInputError: c is not a class, n is no whole number of at least 1, or no CPU generator.
        """
        return self.placed([self.draw(c, n, generator)])[0]

    def draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """As :meth:`sample`, but the indices are on the CPU. :meth:`placed` moves those of several classes at once."""
        return self._current_pools().draw(c, n, generator)

    def draw_any(self, n: int, generator: torch.Generator) -> Tensor:
        """Up to n usable samples of any class, without replacement, int64 on the CPU."""
        return self._current_pools().draw_any(n, generator)

    def placed(self, drawn: Sequence[Tensor]) -> list[Tensor]:
        """Moves indices int64 [B] that :meth:`draw` gave to the state's device, in one copy that does not wait."""
        return [known_indices(t, len(self), host) for t, host in zip(upload(drawn, self.device), drawn, strict=True)]

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Weights for a matching loss: float32 [B], mean 1 over the batch's samples of each target class.

        With mean 1 each class keeps its share of the loss. An untrusted sample weighs 0. If all trusted samples of a
        class in the batch weigh 0, they count evenly. A class without a trusted sample in the batch drops out.
        Trusted samples of equal weight give exactly 1. Raises InvalidInputError for bad indices.
        """
        i = check_indices(indices, len(self), self.device)
        return batch_weights(self.weight[i], self.target[i], self.trusted[i], self.num_classes)

    def training_weights(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weights for a loss that trains a network on real data: float32 [B], ``weight``, or 0 if not trusted.

        They are not rescaled in the batch. None stands for all samples.
        """
        if indices is None:
            return self.weight * self.trusted
        i = check_indices(indices, len(self), self.device)
        return self.weight[i] * self.trusted[i]

    def targets(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Target labels of a batch, int64 [B]. Raises InvalidInputError for bad indices."""
        return self.target[check_indices(indices, len(self), self.device)]

    # -- saving ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore this state bit for bit."""
        return {
            "digest": self.digest,
            "num_classes": self.num_classes,
            **{name: getattr(self, name).clone() for name in self.FIELDS},
            "extra": {k: v.clone() for k, v in self._extra.items()},
            "factors": {k: v.clone() for k, v in self._factors.items()},
        }

    @named_errors
    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "the given state") -> None:
        """Restores :meth:`state_dict`, all of it or nothing. ``source`` names it in messages.

        Raises:
            StateMismatchError: it belongs to data with other observed labels.
            InvalidInputError: a part is missing, or has a wrong shape or range, or weights without mean 1 per class.
            InvalidLabelsError: a target out of range.
            EmptyClassError: a class has no trusted sample.
        """
        parts = ("digest", "num_classes", *self.FIELDS, "extra", "factors")
        if lost := [name for name in parts if name not in state]:
            do = "Pass what state_dict() returned"
            raise InvalidInputError(explain("a whole state", f"{source} without {', '.join(lost)}", do))
        digest, k = str(state["digest"]), int(state["num_classes"])
        if digest != self.digest or k != self.num_classes:
            _mismatch(self.num_classes, self.digest, k, digest, source)
        target = self._checked("target", state["target"], torch.int64, k - 1, InvalidLabelsError)
        trusted = self._checked("trusted", state["trusted"], torch.bool, 1)
        trust = self._checked("trust", state["trust"], torch.float32, 1)
        weight = self._checked("weight", state["weight"], torch.float32, torch.finfo(torch.float32).max)
        place = (len(self), self.device)
        factors = {name: check_factor(name, values, *place) for name, values in state["factors"].items()}
        extra = {name: check_rows(name, values, *place) for name, values in state["extra"].items()}
        if not self._allow_empty:
            check_classes(target[trusted], k, f"Delete {source} and let the method compute it again")
        check_means(weight, target, trusted, k, source)
        for name, values in (("target", target), ("trusted", trusted), ("trust", trust), ("weight", weight)):
            getattr(self, name).copy_(values)
        self._extra, self._factors, self.version = extra, factors, self.version + 1

    @named_errors
    def save(self, path: str | Path, *, configs: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file (atomically replaced), with a JSON header.

        The header holds format, version, num_classes, the label hash and ``configs`` (method name -> settings).
        """
        state = {**self.state_dict(), "observed": self.observed}
        write_state_file(path, state, dict(configs or {}))

    @classmethod
    def read_header(cls, path: str | Path) -> dict[str, Any]:
        """The JSON header of a state file. Raises FileFormatError if it is missing or damaged."""
        return read_state_file(path)[0]

    @classmethod
    @named_errors
    def load(
        cls, path: str | Path, labels: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> SampleState:
        """Reads a state file.

        Args:
            path: file written by :meth:`save`.
            labels: observed labels [N] that it must belong to; None takes those in the file.
            device: where the tensors go; by default the labels' device, else the CPU.

        Raises:
            FileFormatError: missing, truncated, or not a state file.
            StateMismatchError: it belongs to other labels; both hashes are shown.
        """
        _, saved = read_state_file(path)
        observed = saved["observed"] if labels is None else integers_of(labels)
        k, own = int(saved["num_classes"]), label_digest(observed)
        if own != saved["digest"]:
            _mismatch(k, own, k, saved["digest"], f"the file {path}")
        # Whether a class may be empty was decided when the state was made.
        state = cls(observed, k, device=device, allow_empty=True)
        state.load_state_dict(saved)
        state._allow_empty = bool((torch.bincount(state.target[state.trusted], minlength=k) == 0).any())
        return state


def _mismatch(num_classes: int, digest: str, their_classes: int, theirs: str, source: str) -> None:
    expected = f"a state for {num_classes} classes with label hash {digest[:16]}"
    got = f"{their_classes} classes with label hash {theirs[:16]} in {source}"
    do = (
        "Load the data with the files, order, --per_class and noise (kind, rate, seed) that the state was written"
        " with, or start without this state"
    )
    raise StateMismatchError(explain(expected, got, do))
