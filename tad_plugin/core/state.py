"""SampleState: which real samples count, with what label, and how much.

One object per real dataset. Methods write it and loops read it. It is the only thing that they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.core.state_file import FIELDS, read_state_file, write_state_file
from tad_plugin.data.labels import check_labels, label_digest
from tad_plugin.data.real import RealData
from tad_plugin.errors import (
    EmptyClassError,
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    explain,
    unknown_name,
)

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

    A callback adds tensors of its own with :meth:`register`. With the starting values every loop gives the
    baseline's result bit for bit.

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

    def __init__(
        self,
        labels: Tensor,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        allow_empty: bool = False,
    ) -> None:
        observed = check_labels(labels, num_classes)
        self._begin(observed if device is None else observed.to(device), num_classes, allow_empty)

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
        counts = torch.bincount(observed, minlength=num_classes)
        if not allow_empty and bool((counts == 0).any()):
            missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()))
            expected = f"at least one sample in each of {num_classes} classes"
            do = "Remove the class and renumber the labels, or load more data"
            raise EmptyClassError(explain(expected, f"no sample of class {missing}", do))
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
        self._version = 0
        self._pools: tuple[int, list[Tensor]] | None = None

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
        """Replaces whole fields, each [N]. The pools are rebuilt at their next use.

        Raises:
            InvalidInputError: a wrong shape, or a trust outside [0, 1].
            InvalidLabelsError: a target of a wrong shape or type, or out of range.
        """
        if target is not None:
            self.target.copy_(self._checked("target", target, torch.int64, self.num_classes - 1, InvalidLabelsError))
        if trusted is not None:
            self.trusted.copy_(self._checked("trusted", trusted, torch.bool, 1))
        if trust is not None:
            self.trust.copy_(self._checked("trust", trust, torch.float32, 1))
        self._version += 1

    def set_weights(self, factor: str, values: Tensor) -> None:
        """Sets one method's factor of the weight.

        The weight is the product of all factors, scaled to mean 1 over each class's trusted samples.

        Args:
            factor: the method's name; a later call with the same name replaces the factor.
            values: float [N], finite and >= 0.

        Raises:
            InvalidInputError: a wrong shape, negative or non-finite values.
        """
        largest = torch.finfo(torch.float32).max
        self._factors[factor] = self._checked("weights", values, torch.float32, largest).clone()
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Recomputes ``weight`` from the factors, with mean 1 over each class's trusted samples.

        Call it after ``trusted`` or ``target`` changed. A class whose trusted samples all weigh 0 gets weight 1.
        """
        product = torch.ones_like(self.weight)
        for values in self._factors.values():
            product = product * values
        k = self.num_classes
        inside = self.trusted
        count = torch.zeros(k, device=self.device).index_add_(0, self.target[inside], torch.ones_like(product[inside]))
        total = torch.zeros(k, device=self.device).index_add_(0, self.target[inside], product[inside])
        scale = torch.where(
            total > 0, count / total.clamp_min(torch.finfo(torch.float32).tiny), torch.zeros_like(total)
        )
        # A class without any weight would divide by zero. It counts evenly instead.
        product = torch.where((total > 0)[self.target], product * scale[self.target], torch.ones_like(product))
        self.weight.copy_(product)
        self._version += 1

    def _checked(
        self, name: str, values: Tensor, dtype: torch.dtype, high: float, error: type[Exception] = InvalidInputError
    ) -> Tensor:
        """``values`` as ``dtype`` on this device, after a check of shape, kind and range [0, high]. NaN fails."""
        values = torch.as_tensor(values, device=self.device).detach()
        if values.shape != (len(self),):
            expected, got = f"`{name}` of shape [{len(self)}]", f"shape {list(values.shape)}"
            raise error(explain(expected, got, "Pass one value per sample"))
        if dtype == torch.int64 and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
            raise error(explain(f"integer `{name}`", f"dtype {values.dtype}", "Convert with .long()"))
        values = values.to(dtype)
        wrong = ~((values >= 0) & (values <= high))
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            got = f"{values[place].item()} at position {place}"
            raise error(explain(f"`{name}` in [0, {high}]", got, "Check the method that computed it"))
        return values

    def register(self, name: str, values: Tensor) -> Tensor:
        """Adds a tensor with first dimension N. It is saved and loaded with the state. Returns the stored tensor.

        A name that exists already keeps its values, so a resumed callback finds its own.

        Raises:
            InvalidInputError: the first dimension is not N, or the name is a built-in field.
        """
        if name in (*self.FIELDS, "observed") or "/" in name:
            raise InvalidInputError(explain("a name of your own, without '/'", repr(name), "Choose another name"))
        if name not in self._extra:
            values = torch.as_tensor(values, device=self.device)
            if values.ndim == 0 or values.shape[0] != len(self):
                expected, got = f"`{name}` with first dimension {len(self)}", f"shape {list(values.shape)}"
                raise InvalidInputError(explain(expected, got, "Pass one row per sample"))
            self._extra[name] = values.detach().clone()
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
        """Bool [N]: trusted, and with a weight above zero."""
        return self.trusted & (self.weight > 0)

    def untouched(self) -> bool:
        """True if every sample is trusted, weighs 1 and has its observed label as target."""
        return bool((self.trusted & (self.weight == 1) & (self.target == self.observed)).all())

    def pools(self) -> list[Tensor]:
        """One tensor per class: int64 indices of its usable samples, ascending. Cached until the next write."""
        if self._pools is None or self._pools[0] != self._version:
            usable = self.usable()
            self._pools = (
                self._version,
                [(usable & (self.target == c)).nonzero().flatten() for c in range(self.num_classes)],
            )
        return self._pools[1]

    def pool(self, c: int) -> Tensor:
        """Indices (int64, ascending) of usable samples with target ``c``.

        Raises:
            InvalidInputError: c is not a class.
        """
        if not 0 <= c < self.num_classes:
            raise InvalidInputError(explain(f"a class in [0, {self.num_classes})", str(c), "Pass a class index"))
        return self.pools()[c]

    def sample(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """Up to n indices of class c, drawn without replacement. A smaller pool is returned whole and shuffled.

        The draw is one CPU permutation of the pool, so a CPU and a CUDA state draw the same samples.

        Args:
            c: class index.
            n: number of samples, at least 1.
            generator: a CPU generator.

        Raises:
            EmptyClassError: the pool is empty.
        """
        pool = self.pool(c)
        if n < 1:
            raise InvalidInputError(explain("n of at least 1", str(n), "Ask for at least one sample"))
        if len(pool) == 0:
            do = "Lower the threshold or raise min_per_class of the method"
            raise EmptyClassError(explain(f"a usable sample of class {c}", "an empty pool", do))
        order = torch.randperm(len(pool), generator=generator)[:n]
        return pool[order.to(pool.device)]

    def weights(self, indices: Tensor) -> Tensor:
        """Weights for a matching loss: float32 [B], mean 1 over the batch's samples of each target class.

        With mean 1 each class keeps its share of the loss. An untrusted sample weighs 0. If all trusted samples of a
        class in the batch weigh 0, they count evenly. A class without a trusted sample in the batch drops out.
        Trusted samples of equal weight give exactly 1.
        """
        w, inside = self.weight[indices], self.trusted[indices]
        if bool((inside & (w == w[:1])).all()):
            return torch.ones_like(w)
        y = self.target[indices]
        k = self.num_classes

        def per_class(values: Tensor) -> Tensor:
            return torch.zeros(k, device=w.device, dtype=torch.float64).index_add_(0, y, values)

        even = inside.double()
        own = w.double() * even
        own = torch.where((per_class(own) > 0)[y], own, even)
        scale = torch.bincount(y, minlength=k).double() / per_class(own).clamp_min(1e-300)
        return torch.where(inside, (own * scale[y]).float(), torch.zeros_like(w))

    def training_weights(self, indices: Tensor | None = None) -> Tensor:
        """Weights for a loss that trains a network on real data: float32 [B], ``weight``, or 0 if not trusted.

        They are not rescaled in the batch. None stands for all samples.
        """
        if indices is None:
            return self.weight * self.trusted
        return self.weight[indices] * self.trusted[indices]

    def targets(self, indices: Tensor) -> Tensor:
        """Target labels of a batch, int64 [B]."""
        return self.target[indices]

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

    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "the given state") -> None:
        """Restores :meth:`state_dict`. ``source`` names it in messages.

        Raises:
            StateMismatchError: it belongs to data with other observed labels.
        """
        digest, k = str(state["digest"]), int(state["num_classes"])
        if digest != self.digest or k != self.num_classes:
            _mismatch(self.num_classes, self.digest, k, digest, source)
        for name in self.FIELDS:
            getattr(self, name).copy_(state[name])
        self._extra = {k: v.to(self.device).clone() for k, v in state["extra"].items()}
        self._factors = {k: v.to(self.device).clone() for k, v in state["factors"].items()}
        self._version += 1

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
        observed = saved["observed"] if labels is None else torch.as_tensor(labels)
        k, own = int(saved["num_classes"]), label_digest(observed)
        if own != saved["digest"]:
            _mismatch(k, own, k, saved["digest"], f"the file {path}")
        # Whether a class may be empty was decided when the state was made.
        state = cls(observed, k, device=device, allow_empty=True)
        state.load_state_dict(saved)
        return state


def _mismatch(num_classes: int, digest: str, their_classes: int, theirs: str, source: str) -> None:
    expected = f"a state for {num_classes} classes with label hash {digest[:16]}"
    got = f"{their_classes} classes with label hash {theirs[:16]} in {source}"
    do = (
        "Load the data with the files, order, --per_class and noise (kind, rate, seed) that the state was written"
        " with, or start without this state"
    )
    raise StateMismatchError(explain(expected, got, do))
