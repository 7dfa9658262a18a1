"""SampleState: which real samples count, with what label, and how much.

One object per real dataset. Methods write it, loops read it, and nothing else passes between them.
This module imports no method and no loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import (
    EmptyClassError,
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    explain,
)
from tad_plugin.files import atomic_save

__all__ = ["SampleState", "check_labels", "label_digest"]

FORMAT = "tad_plugin.state"
VERSION = 1


def check_labels(labels: Tensor, num_classes: int, length: int | None = None, name: str = "labels") -> Tensor:
    """Checks hard labels and returns them as a contiguous int64 tensor on their device.

    Args:
        labels: integer class labels, shape [N], values in [0, num_classes).
        num_classes: number of classes K, at least 1.
        length: the N that is expected, or None for any.
        name: the argument's name in messages.

    Raises:
        InvalidLabelsError: not 1-D, not integer, out of range, or of another length.
    """
    labels = torch.as_tensor(labels)
    if num_classes < 1:
        raise InvalidInputError(explain("num_classes of at least 1", str(num_classes), "Pass the number of classes"))
    if labels.ndim != 1:
        raise InvalidLabelsError(
            explain(f"`{name}` of shape [N]", f"shape {list(labels.shape)}", "Pass hard labels, one integer per sample")
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise InvalidLabelsError(
            explain(
                f"integer `{name}`", f"dtype {labels.dtype}", "Convert with .long() if the values are class indices"
            )
        )
    if length is not None and len(labels) != length:
        raise InvalidLabelsError(
            explain(
                f"`{name}` of length {length}",
                f"length {len(labels)}",
                "Pass one label per sample, in the dataset's order",
            )
        )
    if len(labels) == 0:
        raise InvalidLabelsError(
            explain(f"at least one label in `{name}`", "none", "Check that the dataset was loaded")
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        bad = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        raise InvalidLabelsError(
            explain(
                f"`{name}` in [0, {num_classes})",
                f"values from {low} to {high} (first at position {bad})",
                "Map the labels to 0..K-1 or pass the right num_classes",
            )
        )
    return labels.to(torch.int64).contiguous()


def label_digest(labels: Tensor) -> str:
    """Sha256 (hex) of labels as int64 bytes: the identity of a labelled dataset. ``labels``: integers, shape [N]."""
    data = labels.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


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
        """Counts as plain numbers: samples, trusted, untrusted, relabelled, smallest_pool, effective_sample_size (share)."""
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
        """Sets one method's factor of the weight; the weight is the product of all factors, mean 1 in each class's pool.

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
        """The tensor of that name: a field, ``observed``, or one that a callback registered."""
        if name in (*self.FIELDS, "observed"):
            tensor: Tensor = getattr(self, name)
            return tensor
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

        A class whose weights in the batch are all 0 counts evenly. Weights that are all equal give exactly 1.
        """
        w = self.weight[indices]
        if bool((w == w[:1]).all()):
            return torch.ones_like(w)
        y = self.target[indices]
        k = self.num_classes
        total = torch.zeros(k, device=w.device, dtype=torch.float64).index_add_(0, y, w.double())
        count = torch.bincount(y, minlength=k).double()
        scale = torch.where(total > 0, count / total.clamp_min(1e-300), torch.zeros_like(total))
        return torch.where((total > 0)[y], (w.double() * scale[y]).float(), torch.ones_like(w))

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
        self._check_same(str(state["digest"]), int(state["num_classes"]), "the given state")
        for name in self.FIELDS:
            getattr(self, name).copy_(state[name])
        self._extra = {k: v.to(self.device).clone() for k, v in state["extra"].items()}
        self._factors = {k: v.to(self.device).clone() for k, v in state["factors"].items()}
        self._version += 1

    def _check_same(self, digest: str, num_classes: int, source: str) -> None:
        if digest == self.digest and num_classes == self.num_classes:
            return
        raise StateMismatchError(
            explain(
                f"a state for {self.num_classes} classes with label hash {self.digest[:16]}",
                f"{num_classes} classes with label hash {digest[:16]} in {source}",
                "Load the data with the same files, order, --per-class and noise (kind, rate, seed) as when the state was"
                " written, or start without this state",
            )
        )

    def save(self, path: str | Path, *, configs: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file (atomically replaced), with a JSON header.

        The header holds format, version, num_classes, the label hash and ``configs`` (method name -> settings).
        """
        from safetensors.torch import save_file

        tensors = {"observed": self.observed, **{name: getattr(self, name) for name in self.FIELDS}}
        tensors |= {f"extra/{k}": v for k, v in self._extra.items()}
        tensors |= {f"factors/{k}": v for k, v in self._factors.items()}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_classes": self.num_classes,
            "digest": self.digest,
            "configs": dict(configs or {}),
        }
        ready = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
        atomic_save(
            path, lambda tmp: save_file(ready, str(tmp), metadata={"tad_plugin": json.dumps(header, default=str)})
        )

    @staticmethod
    def read_header(path: str | Path) -> dict[str, Any]:
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
        state = cls(tensors["observed"] if labels is None else labels, int(header["num_classes"]), device=device)
        state._check_same(str(header["digest"]), int(header["num_classes"]), f"the file {path}")
        for name in cls.FIELDS:
            getattr(state, name).copy_(tensors[name])
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            if group == "extra":
                state._extra[name] = value.to(state.device)
            elif group == "factors":
                state._factors[name] = value.to(state.device)
        state._version += 1
        return state


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    way_out = "Pass the file that SampleState.save wrote, or delete it and let the method compute it anew"
    if not path.is_file():
        raise FileFormatError(explain("a state file", f"nothing at {path}", way_out))
    try:
        with safe_open(str(path), framework="pt") as f:
            raw = (f.metadata() or {}).get("tad_plugin", "")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a dict)
        header = json.loads(raw) if raw else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(explain("a readable state file", f"{path}: {error}", way_out)) from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        got = f"format {header.get('format')!r}, version {header.get('version')!r} in {path}"
        raise FileFormatError(explain(f"format {FORMAT!r}, version {VERSION}", got, way_out))
    lost = {"observed", *SampleState.FIELDS} - set(tensors)
    if lost:
        raise FileFormatError(explain("all fields of a state", f"{path} without {', '.join(sorted(lost))}", way_out))
    if label_digest(tensors["observed"]) != header["digest"]:
        raise FileFormatError(explain("labels that match the header's hash", f"other labels in {path}", way_out))
    return header, tensors
