"""SampleState: which real samples count, with what label, and how much.

One object per real dataset. Methods write it, loops read it, and nothing else passes between them.
This module imports no method and no loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels, label_digest
from tad_plugin.errors import (
    EmptyClassError,
    FileFormatError,
    InvalidInputError,
    StateMismatchError,
    explain,
    unknown_name,
)
from tad_plugin.utils.tensor_file import TensorFile

__all__ = ["SampleState", "check_labels", "label_digest"]


class SampleState:
    """What is believed of each of N real samples; all tensors are indexed by position in the dataset.

    Attributes:
        observed: int64 [N], the labels as given. Never changes.
        target: int64 [N], the label that a loop trains on; starts as ``observed``.
        weight: float32 [N], >= 0, how much the sample counts; starts at 1.
        trusted: bool [N], whether loops may draw it; starts True.
        trust: float32 [N] in [0, 1], posterior of being correctly labelled; starts at 1.

    A callback adds tensors of its own with :meth:`register`. With the starting values every loop
    gives the baseline's result bit for bit.

    Args:
        labels: integers [N] in [0, num_classes).
        num_classes: number of classes K.
        device: where the tensors live; by default the labels' device.
        allow_empty: accept a class without samples (cross-validation folds).

    Raises:
        InvalidLabelsError: labels out of range or of a wrong type.
        EmptyClassError: a class has no sample.
    """

    FIELDS = ("target", "weight", "trusted", "trust")

    def __init__(
        self,
        labels: Tensor,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        allow_empty: bool = False,
    ) -> None:
        observed = check_labels(labels, num_classes)
        if device is not None:
            observed = observed.to(device)
        counts = torch.bincount(observed, minlength=num_classes)
        if not allow_empty and bool((counts == 0).any()):
            missing = (counts == 0).nonzero().flatten().tolist()
            raise EmptyClassError(
                explain(
                    f"at least one sample in each of {num_classes} classes",
                    f"no sample of class {', '.join(map(str, missing))}",
                    "Remove the class and renumber the labels, or load more data",
                )
            )
        self.num_classes = num_classes
        self.observed = observed.clone()
        self.digest = label_digest(observed)
        n, where = len(observed), observed.device
        self.target = observed.clone()
        self.weight = torch.ones(n, dtype=torch.float32, device=where)
        self.trusted = torch.ones(n, dtype=torch.bool, device=where)
        self.trust = torch.ones(n, dtype=torch.float32, device=where)
        self._extra: dict[str, Tensor] = {}
        # What each factor of the weight was set to, by method: weights multiply (TAD's, then IWD's).
        self._factors: dict[str, Tensor] = {}
        self._version = 0
        self._pools: tuple[int, list[Tensor]] | None = None

    # -- description -------------------------------------------------------------------------------
    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.observed)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.observed.device

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        s = self.summary()
        return f"SampleState(N={len(self)}, K={self.num_classes}, trusted={s['trusted']}, relabelled={s['relabelled']})"

    def summary(self) -> dict[str, Any]:
        """Counts as plain numbers: samples, trusted, untrusted, relabelled, smallest_pool, effective_sample_size.

        The last is a share, (sum w)^2 / (n sum w^2) over the usable samples, in (0, 1]; 0 where there is none.
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
        """Replaces whole fields (each [N]); the pools are rebuilt at their next use.

        Raises:
            InvalidInputError: a wrong shape, or a trust outside [0, 1].
            InvalidLabelsError: a target out of range.
        """
        if target is not None:
            self.target.copy_(check_labels(target, self.num_classes, len(self), "target"))
        if trusted is not None:
            self.trusted.copy_(self._checked(trusted, "trusted").to(torch.bool))
        if trust is not None:
            values = self._checked(trust, "trust").float()
            if bool(((values < 0) | (values > 1) | ~torch.isfinite(values)).any()):
                raise InvalidInputError(
                    explain(
                        "`trust` in [0, 1]",
                        f"values from {float(values.min())} to {float(values.max())}",
                        "Pass a posterior",
                    )
                )
            self.trust.copy_(values)
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
        values = self._checked(values, "weights").float()
        if bool((~torch.isfinite(values) | (values < 0)).any()):
            bad = int((~torch.isfinite(values) | (values < 0)).nonzero()[0])
            raise InvalidInputError(
                explain(
                    "finite weights >= 0",
                    f"{float(values[bad])} at position {bad}",
                    "Check the method that computed them",
                )
            )
        self._factors[factor] = values.detach().clone()
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Recomputes ``weight`` from the factors, with mean 1 over each class's trusted samples (0/0 gives 1)."""
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
        # A class whose every weight vanished would divide by zero: it counts evenly instead.
        product = torch.where((total > 0)[self.target], product * scale[self.target], torch.ones_like(product))
        self.weight.copy_(product)
        self._version += 1

    def _checked(self, values: Tensor, name: str) -> Tensor:
        values = torch.as_tensor(values, device=self.device).detach()
        if values.shape != (len(self),):
            raise InvalidInputError(
                explain(f"`{name}` of shape [{len(self)}]", f"shape {list(values.shape)}", "Pass one value per sample")
            )
        return values

    def register(self, name: str, values: Tensor) -> Tensor:
        """Adds a tensor whose first dimension is N, saved and loaded with the state; returns the stored tensor.

        A name that exists already keeps its values (so a resumed callback finds its own).

        Raises:
            InvalidInputError: the first dimension is not N, or the name is a built-in field.
        """
        if name in (*self.FIELDS, "observed") or "/" in name:
            raise InvalidInputError(explain("a name of your own, without '/'", repr(name), "Choose another name"))
        if name not in self._extra:
            values = torch.as_tensor(values, device=self.device)
            if values.ndim == 0 or values.shape[0] != len(self):
                raise InvalidInputError(
                    explain(
                        f"`{name}` with first dimension {len(self)}",
                        f"shape {list(values.shape)}",
                        "Pass one row per sample",
                    )
                )
            self._extra[name] = values.detach().clone()
        return self._extra[name]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name: a field, ``observed``, or one that a callback registered; else UnknownNameError."""
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

    def pools(self) -> list[Tensor]:
        """For each class the int64 indices of usable samples with that target, ascending. Cached until a write."""
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
        """Up to n indices of class c, drawn without replacement (a smaller pool gives all of it, shuffled).

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
            raise EmptyClassError(
                explain(
                    f"a usable sample of class {c}",
                    "an empty pool",
                    "Lower the threshold or raise min_per_class of the method",
                )
            )
        order = torch.randperm(len(pool), generator=generator)[:n]
        return pool[order.to(pool.device)]

    def weights(self, indices: Tensor) -> Tensor:
        """Weights of a batch, float32 [B], with mean 1 over the batch's samples of each target class.

        An untrusted sample weighs 0. A class whose trusted samples in the batch all weigh 0 counts them evenly, and a
        class without a trusted sample in the batch drops out. Trusted samples of equal weight give exactly 1.
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            StateMismatchError: it belongs to data with other observed labels.
        """
        digest, k = str(state["digest"]), int(state["num_classes"])
        if digest != self.digest or k != self.num_classes:
            _mismatch(self.num_classes, self.digest, k, digest, "the given state")
        for name in self.FIELDS:
            getattr(self, name).copy_(state[name])
        self._extra = {k: v.to(self.device).clone() for k, v in state["extra"].items()}
        self._factors = {k: v.to(self.device).clone() for k, v in state["factors"].items()}
        self._version += 1

    def save(self, path: str | Path, *, configs: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file (atomically replaced), with a JSON header.

        The header holds format, version, num_classes, the label hash and ``configs`` (method name -> settings).
        """
        tensors = {"observed": self.observed, **{name: getattr(self, name) for name in self.FIELDS}}
        tensors |= {f"extra/{k}": v for k, v in self._extra.items()}
        tensors |= {f"factors/{k}": v for k, v in self._factors.items()}
        header = {"num_classes": self.num_classes, "digest": self.digest, "configs": dict(configs or {})}
        _FILE.write(path, tensors, header)

    @classmethod
    def read_header(cls, path: str | Path) -> dict[str, Any]:
        """The JSON header of a state file.

        Raises:
            FileFormatError: missing, truncated, or not a state file of a version that this package reads.
        """
        return _read(path)[0]

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
        header, tensors = _read(path)
        theirs, k = str(header["digest"]), int(header["num_classes"])
        if labels is not None and label_digest(torch.as_tensor(labels)) != theirs:
            _mismatch(k, label_digest(torch.as_tensor(labels)), k, theirs, f"the file {path}")
        # An empty class was either accepted when the state was made, or refused then.
        where = tensors["observed"] if labels is None else torch.as_tensor(labels)
        state = cls(where, k, device=device, allow_empty=True)
        groups: dict[str, dict[str, Tensor]] = {"extra": {}, "factors": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            if group in groups:
                groups[group][name] = value
        fields = {name: tensors[name] for name in cls.FIELDS}
        state.load_state_dict({"digest": theirs, "num_classes": k, **fields, **groups})
        return state


_FILE = TensorFile(
    "tad_plugin.state",
    "a state file",
    "Pass the file that SampleState.save wrote, or delete it and let the method compute it anew",
    tensors=("observed", *SampleState.FIELDS),
    fields=("digest", "num_classes", "configs"),
)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = _FILE.read(path)
    if label_digest(tensors["observed"]) != header["digest"]:
        got = f"another one in {path}"
        raise FileFormatError(explain("labels that match the header's label hash", got, _FILE.way_out))
    return header, tensors


def _mismatch(num_classes: int, digest: str, their_classes: int, theirs: str, source: str) -> None:
    raise StateMismatchError(
        explain(
            f"a state for {num_classes} classes with label hash {digest[:16]}",
            f"{their_classes} classes with label hash {theirs[:16]} in {source}",
            "Load the data with the same files, order, --per_class and noise (kind, rate, seed) as when the state"
            " was written, or start without this state",
        )
    )
