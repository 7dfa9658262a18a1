"""Label noise as a versioned object: kind, rate, convention and seed.

Codebases differ in the meaning of "40% symmetric", so :class:`NoiseSpec` states the convention. :class:`NoisyLabels`
records the realised rate, the realised matrix and the hash of the labels. All draws come from a CPU generator of their
own, so a CUDA run gets the same labels.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels, label_digest
from tad_plugin.data.noise import flips
from tad_plugin.data.noise.class_maps import asymmetric_map
from tad_plugin.data.noise.label_files import human_labels
from tad_plugin.data.noise.text import ACCEPTED, parse_fields, read_matrix
from tad_plugin.errors import ConfigError, FileFormatError, StateMismatchError, explain, suggestion
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.files import atomic_write, read_json
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.seals import sealed_json

__all__ = ["KINDS", "NoiseSpec", "NoisyLabels"]

VERSION = 1
_FORMAT = "tad_plugin.noise"
# The settings of each kind beside kind, seed and version.
_TAKES: dict[str, set[str]] = {
    "none": set(),
    "symmetric": {"rate", "convention"},
    "asymmetric": {"rate", "class_map"},
    "pair": {"rate"},
    "instance": {"rate", "spread"},
    "matrix": {"matrix", "path"},
    "human": {"path", "key"},
}
KINDS = tuple(_TAKES)
_RATED = {kind for kind, takes in _TAKES.items() if "rate" in takes}


@dataclass(frozen=True)
class NoisyLabels:
    """Labels after noise, with the realised noise.

    Attributes:
        labels: int64 [N], the observed labels, on the true labels' device.
        true_labels: int64 [N].
        realised_rate: share of labels that differ from the true ones, in [0, 1].
        matrix: float64 [K, K] on the CPU, ``matrix[true, observed]`` as shares of the true class; a class without
            samples has a row of zeros.
        digest: sha256 (hex) of the observed labels.
        spec: the noise that made them.
    """

    labels: Tensor
    true_labels: Tensor
    realised_rate: float
    matrix: Tensor
    digest: str
    spec: NoiseSpec

    @classmethod
    def of(cls, spec: NoiseSpec, labels: Tensor, true_labels: Tensor, num_classes: int) -> NoisyLabels:
        """Compares observed labels (int64 [N]) with the true ones (int64 [N]) of K classes."""
        pairs = true_labels.cpu() * num_classes + labels.cpu()
        counts = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).double()
        matrix = counts / counts.sum(1, keepdim=True).clamp_min(1.0)
        rate = float((labels != true_labels).double().mean())
        return cls(labels, true_labels, rate, matrix, label_digest(labels), spec)

    def description(self) -> dict[str, Any]:
        """Plain values for a JSON file: spec, realised rate and matrix, hash."""
        return {
            "format": _FORMAT,
            "spec": self.spec.to_dict(),
            "samples": len(self.labels),
            "realised_rate": self.realised_rate,
            "matrix": self.matrix.tolist(),
            "digest": self.digest,
        }

    def save(self, path: str | Path) -> None:
        """Writes :meth:`description` as JSON (atomically replaced). The labels follow from the spec."""
        atomic_write(path, sealed_json(self.description()))

    def check(self, path: str | Path) -> None:
        """Checks that these are the labels of a saved description.

        Raises:
            FileFormatError: not such a file.
            StateMismatchError: other labels. Both hashes and both specs are shown.
        """
        saved = _read_description(path)
        if saved.get("digest") == self.digest:
            return
        theirs = NoiseSpec.from_dict(saved["spec"])
        raise StateMismatchError(
            explain(
                f"labels with hash {str(saved.get('digest'))[:16]} ({theirs}), as in {path}",
                f"labels with hash {self.digest[:16]} ({self.spec})",
                "Load the same data (files, order, per_class) and give the same noise, or write to another folder",
            )
        )


@dataclass(frozen=True)
class NoiseSpec:
    """Label noise. Checked when created; equal specs give equal labels.

    Attributes:
        kind: "none"; "symmetric"; "asymmetric" (to the confusable class, for classes that have one); "pair" (c to
            c + 1 mod K); "instance" (depends on the image, see
            :func:`tad_plugin.data.noise.flips.instance_dependent`); "matrix"; "human" (a label file).
        rate: flip probability of a sample in [0, 1], for symmetric, asymmetric, pair and instance. For asymmetric it
            concerns classes with a confusable class, so the share over the dataset is lower. For instance it is the
            mean before truncation.
        seed: seed of the generator, in [0, 2^63). Ignored by none and human.
        convention: for symmetric: "others" draws from the other K-1 classes (0.4 makes 40% wrong), "all" from all K
            (with K = 10, 0.4 makes 36% wrong).
        matrix: for matrix: K x K row-stochastic, ``matrix[true][observed]``; any nested sequence or tensor.
        path: for human the label file, for matrix the file of the matrix (``.npy`` or ``.json``).
        key: for human the label set of the file ("worse", "aggre", ...).
        class_map: for asymmetric pairs (class, confusable class); None takes the dataset's own.
        spread: for instance the standard deviation of the samples' flip probabilities, > 0.
        version: of this definition. A definition that draws differently gets another number.

    Raises:
        ConfigError: an unknown kind, a value out of range, or one that the kind does not take.
    """

    kind: str
    rate: float = 0.0
    seed: int = 0
    convention: str = "others"
    matrix: tuple[tuple[float, ...], ...] | None = None
    path: str | None = None
    key: str | None = None
    class_map: tuple[tuple[int, int], ...] | None = None
    spread: float = 0.1
    version: int = VERSION

    @named_errors
    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            do = suggestion(str(self.kind), KINDS) or ACCEPTED
            raise ConfigError(explain(f"a kind of noise out of {', '.join(KINDS)}", repr(self.kind), do))
        try:
            self._normalise()
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(explain("noise settings of the documented types", str(error), ACCEPTED)) from error
        for field in dataclasses.fields(self):
            if field.name not in {"kind", "seed", "version"} and getattr(self, field.name) != field.default:
                takes = field.name in _TAKES[self.kind]
                self._require(takes, f"no {field.name} for {self.kind} noise", getattr(self, field.name))
        rows, sources = self.matrix or (), [a for a, _ in self.class_map or ()]
        self._require(self.version == VERSION, f"version {VERSION} of the noise definition", self.version)
        self._require(0.0 <= self.rate <= 1.0, "a rate in [0, 1]", self.rate)
        self._require(type(self.seed) is int and 0 <= self.seed < 2**63, "a seed from 0 to 2**63 - 1", self.seed)
        self._require(self.convention in ("others", "all"), "convention 'others' or 'all'", self.convention)
        self._require(0.0 < self.spread < float("inf"), "a spread above 0", self.spread)
        self._require(self.kind != "human" or bool(self.key), "a label set, as in 'human:worse'", self.key)
        either = (self.matrix is None) != (self.path is None)
        self._require(self.kind != "matrix" or either, "a matrix or the path of one", "none or both")
        square = self.matrix is None or (len(rows) > 0 and all(len(row) == len(rows) for row in rows))
        self._require(square, "a matrix of K rows with K entries", [len(row) for row in rows])
        stochastic = all(min(row) >= 0 and abs(sum(row) - 1) < 1e-6 for row in rows)
        self._require(stochastic, "rows of numbers >= 0 that sum to 1", [round(sum(row), 6) for row in rows])
        self._require(len(set(sources)) == len(sources), "one confusable class per class", self.class_map)

    def _require(self, condition: bool, expected: str, got: object) -> None:
        if not condition:
            raise ConfigError(explain(expected, repr(got), ACCEPTED))

    def _normalise(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("rate", float(self.rate))
        put("spread", float(self.spread))
        if self.matrix is not None:
            rows = self.matrix.tolist() if hasattr(self.matrix, "tolist") else self.matrix
            put("matrix", tuple(tuple(float(v) for v in row) for row in rows))
        if self.class_map is not None:
            pairs = self.class_map.items() if isinstance(self.class_map, Mapping) else self.class_map
            put("class_map", tuple(sorted((operator.index(a), operator.index(b)) for a, b in pairs)))
        if self.path is not None:
            put("path", str(self.path))

    # -- text and files ----------------------------------------------------------------------------
    @classmethod
    @named_errors
    def parse(cls, text: str, *, seed: int | None = None, path: str | Path | None = None) -> NoiseSpec:
        """Reads the short form: ``none``, ``symmetric:0.4``, ``asymmetric:0.4@seed=3``, ``human:worse@path=FILE``.

        Args:
            text: ``KIND[:RATE or label set][@name=value,...]``. Names are seed, convention, spread, map
                (``7-1/2-7``), rows (``0.9:0.1/0.2:0.8``) and path, which comes last. ``str(spec)`` is the inverse.
            seed: replaces the text's seed, if given.
            path: replaces the text's path, if given.

        Raises:
            ConfigError: not of that form; the message shows the accepted forms.
        """
        fields = parse_fields(text, _RATED)
        if seed is not None:
            fields["seed"] = seed
        if path is not None:
            fields["path"] = str(path)
        return cls(**fields)

    def __str__(self) -> str:
        """The text form of :meth:`parse`, without values that equal the default."""
        head = self.kind
        if self.kind in _RATED:
            head += f":{self.rate:g}" if float(f"{self.rate:g}") == self.rate else f":{self.rate!r}"
        elif self.key:
            head += f":{self.key}"
        options = []
        if self.seed:
            options.append(f"seed={self.seed}")
        if self.convention != "others":
            options.append(f"convention={self.convention}")
        if self.spread != 0.1:
            options.append(f"spread={self.spread!r}")
        if self.class_map is not None:
            options.append("map=" + "/".join(f"{a}-{b}" for a, b in self.class_map))
        if self.matrix is not None:
            options.append("rows=" + "/".join(":".join(repr(v) for v in row) for row in self.matrix))
        if self.path is not None:
            options.append(f"path={self.path}")
        return head + ("@" + ",".join(options) if options else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: kind, rate, seed, version, and values that differ from the default."""
        values = dataclasses.asdict(self)
        default = {f.name: f.default for f in dataclasses.fields(self)}
        always = {"kind", "rate", "seed", "version"}
        return {k: v for k, v in values.items() if k in always or v != default[k]}

    @classmethod
    @named_errors
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key, or a value that does not fit.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if "kind" not in values or not set(values) <= known:
            got = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(explain(f"a kind, and keys out of {', '.join(sorted(known))}", got, ACCEPTED))
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the spec as JSON (atomically replaced)."""
        atomic_write(path, sealed_json({"format": _FORMAT, "spec": self.to_dict()}))

    @classmethod
    def load(cls, path: str | Path) -> NoiseSpec:
        """Reads the spec from a file of :meth:`save` or :meth:`NoisyLabels.save`.

        Raises:
            FileFormatError: missing, or not such a file.
            ConfigError: of another version, or with values that do not fit.
        """
        return cls.from_dict(_read_description(path)["spec"])

    # -- noise -------------------------------------------------------------------------------------
    @named_errors
    def apply(
        self,
        labels: Tensor,
        num_classes: int,
        images: Images | None = None,
        *,
        dataset: str | None = None,
        class_names: Sequence[str] | None = None,
        source_index: Tensor | None = None,
        source_rank: Tensor | None = None,
        source_paths: Sequence[str] | None = None,
    ) -> NoisyLabels:
        """Puts the noise on true labels. Draws from a CPU generator of its own.

        Args:
            labels: integers [N] in [0, K), the true labels.
            num_classes: number of classes K.
            images: float [N, C, H, W] in [0, 1], for instance noise. Normalised images would give other labels.
            dataset: name of the dataset, for the class map of asymmetric noise.
            class_names: names of the K classes: an image folder of CIFAR-10 is recognised by them, and label files may
                hold them.
            source_index: int64 [N], position of each sample in the published order, for human noise.
            source_rank: int64 [N], rank of each sample in its class, for human noise.
            source_paths: N file names below the dataset's top, for human noise. See
                :func:`tad_plugin.data.noise.label_files.human_labels` for the order of precedence.

        Raises:
            InvalidLabelsError: labels out of range or of a wrong type.
            ConfigError: fewer than 2 classes, a matrix or map for other classes, no images, no path, no class map.
            FileFormatError, StateMismatchError, UnknownNameError: see
                :func:`tad_plugin.data.noise.label_files.human_labels`.
        """
        true = check_labels(labels, num_classes)
        if self.kind == "human":
            if self.path is None:
                do = "Add the file, as in 'human:worse@path=FILE' (on the command line: --labels FILE)"
                raise ConfigError(explain("a path of a label file for human noise", "none", do))
            noisy = human_labels(
                self.path,
                self.key or "",
                true,
                num_classes,
                source_index=source_index,
                source_rank=source_rank,
                source_paths=source_paths,
                class_names=class_names,
            )
        else:
            generator = torch.Generator().manual_seed(self.seed)
            noisy = self._flip(true.cpu(), num_classes, images, dataset, class_names, generator).to(true.device)
        return NoisyLabels.of(self, noisy, true, num_classes)

    def _flip(
        self,
        true: Tensor,
        num_classes: int,
        images: Images | None,
        dataset: str | None,
        class_names: Sequence[str] | None,
        generator: torch.Generator,
    ) -> Tensor:
        if self.kind == "none":
            return true.clone()
        if num_classes < 2:
            raise ConfigError(explain("at least 2 classes for label noise", str(num_classes), "Use noise 'none'"))
        if self.kind == "symmetric":
            include_self = self.convention == "all"
            return flips.symmetric(true, self.rate, num_classes, include_self=include_self, generator=generator)
        if self.kind == "pair":
            mapping = {c: (c + 1) % num_classes for c in range(num_classes)}
            return flips.by_map(true, self.rate, mapping, generator=generator)
        if self.kind == "asymmetric":
            mapping = dict(self.class_map) if self.class_map else asymmetric_map(dataset, num_classes, class_names)
            if not all(0 <= c < num_classes for pair in mapping.items() for c in pair):
                got = ", ".join(f"{a}-{b}" for a, b in mapping.items())
                raise ConfigError(explain(f"a map between classes in [0, {num_classes})", got, "Correct the map"))
            return flips.by_map(true, self.rate, mapping, generator=generator)
        if self.kind == "matrix":
            rows = self.matrix if self.matrix is not None else read_matrix(str(self.path))
            checked = NoiseSpec("matrix", matrix=rows).matrix or ()
            if len(checked) != num_classes:
                got = f"{len(checked)} rows"
                raise ConfigError(explain(f"a matrix for {num_classes} classes", got, "Give one row per class"))
            return flips.by_matrix(true, torch.tensor(checked, dtype=torch.float64), generator=generator)
        if images is None:
            raise ConfigError(explain("images for instance-dependent noise", "none", "Pass the samples' images"))
        return flips.instance_dependent(true, images, self.rate, num_classes, spread=self.spread, generator=generator)


def _read_description(path: str | Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("spec"), dict):
        do = "Pass the file that NoiseSpec.save or NoisyLabels.save wrote"
        raise FileFormatError(explain(f"a JSON file of format {_FORMAT!r}", f"{path} without it", do))
    return content
