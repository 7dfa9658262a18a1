"""Hook and attach(): what a training script holds.

A script asks the hook which samples to draw, with what weights and targets; the hook asks the methods.
With ``attach("none")`` every handle is an identity that draws no random number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tad_plugin.callback import Callback, CallbackList, Match, Observer, Segment, build_config
from tad_plugin.data.noise import NoiseSpec
from tad_plugin.diagnostics import SplitDiagnostics
from tad_plugin.errors import ConfigError, InvalidInputError, StateMismatchError, explain, missing_extra
from tad_plugin.registry import make_callbacks
from tad_plugin.scorer import RealData, Scorer, ScorerConfig
from tad_plugin.state import SampleState
from tad_plugin.wrappers import BatchIndex, IndexedLoader, TrustedCriterion

__all__ = ["Hook", "add_arguments", "attach"]

C = TypeVar("C")


class Hook:
    """The seam between a loop and the methods. Made by :func:`attach`.

    Attributes:
        state: the SampleState.
        data: the real data, or None if none was given.
        callbacks: the methods.
        enabled: False for ``attach("none")``.
        generator: CPU generator of the hook's own draws.
    """

    def __init__(
        self,
        state: SampleState,
        data: RealData | None,
        callbacks: Sequence[Callback],
        *,
        method: str = "none",
        seed: int = 0,
        trains_on_real: bool = False,
        scorer: ScorerConfig | None = None,
        observers: Sequence[Observer] = (),
        log: Callable[[dict[str, Any]], None] | None = None,
        state_path: str | Path | None = None,
    ) -> None:
        self.state = state
        self.data = data
        self.method = method
        self.callbacks = list(callbacks)
        self.enabled = bool(callbacks)
        self.generator = torch.Generator().manual_seed(seed)
        self.events = CallbackList(self.callbacks, list(observers), log)
        self.trains_on_real = trains_on_real
        self.scorer_config = scorer or ScorerConfig()
        self.scorer: Scorer | None = None
        self.scoring_seconds = 0.0
        self.state_path = state_path
        self.iteration = 0
        self._seed = seed
        self._started = False
        self._index = BatchIndex()
        self._offset: Tensor | None = None
        self._drawn: list[Tensor] = []
        self._ones = torch.ones(1, device=state.device)
        needing = [c.name for c in self.callbacks if c.needs_scorer]
        if needing and data is None and not trains_on_real:
            raise ConfigError(
                explain(
                    f"`data` for the method {needing[0]!r}, which scores the real images",
                    "labels only",
                    "Pass data=images [N,C,H,W], or trains_on_real=True if your loop trains a network through hook.loader and"
                    " hook.criterion",
                )
            )
        blind = [c.name for c in self.callbacks if c.needs_true_labels]
        if blind and (data is None or data.true_labels is None):
            raise ConfigError(
                explain(
                    f"true_labels for the method {blind[0]!r}",
                    "none",
                    "Pass true_labels=..., or use a method that needs none",
                )
            )

    # -- starting ----------------------------------------------------------------------------------
    def start(
        self, *, progress: bool = False, checkpoint: Callable[[], None] | None = None, epochs: int | None = None
    ) -> Hook:
        """Fires on_start and, for methods that need a scorer where the loop trains none, trains the plugin's own.

        :func:`attach` calls it; a loop that resumes calls ``attach(..., start=False)``, loads, then starts.

        Args:
            progress: show a progress bar (needs tqdm).
            checkpoint: called after each scorer epoch.
            epochs: scorer epochs, by default ``scorer.epochs``.
        """
        if not self.enabled:
            return self
        if self.data is None:
            self.data = RealData(torch.zeros(len(self.state), 1), self.state.observed, self.state.num_classes)
        if not self._started:
            began = perf_counter()
            self.events.start(self.state, self.data)
            self.scoring_seconds += perf_counter() - began
            self._started = True
            if checkpoint is not None:
                checkpoint()
        if not self.trains_on_real and any(c.needs_scorer for c in self.callbacks):
            if self.scorer is None:
                self.scorer = self._make_scorer()
            remaining = (self.scorer_config.epochs if epochs is None else epochs) - self.scorer.epoch
            for _ in _progress(range(max(0, remaining)), "scorer", progress):
                self._scorer_epoch()
                if checkpoint is not None:
                    checkpoint()
        return self

    def _make_scorer(self) -> Scorer:
        if self.data is None:
            raise ConfigError(explain("`data` for a scorer", "none", "Pass data=images to attach()"))
        return Scorer(self.data, self.scorer_config, seed=self._seed * 7919 + 13)

    def _scorer_epoch(self) -> None:
        began = perf_counter()
        assert self.scorer is not None
        self.scorer.run_epoch(self.state, self.events)
        self.scoring_seconds += perf_counter() - began

    # -- which samples, what label, how much ---------------------------------------------------------
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
        """For each class the list of usable indices: a drop-in for the public codebases' ``indices_class``."""
        return [p.tolist() for p in self.state.pools()]

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

    def reweight(self, rows: Tensor, indices: Tensor | Sequence[int]) -> Tensor:
        """Rows [B,...] scaled so that a plain mean over them is the weighted mean; the same object when no method is on."""
        if not self.enabled:
            return rows
        if len(rows) != len(indices):
            raise InvalidInputError(
                explain(f"{len(rows)} indices", str(len(indices)), "Pass the indices of exactly these rows")
            )
        return rows * self.weights(indices).to(rows.device).view(-1, *[1] * (rows.ndim - 1))

    # -- a loop that trains networks on the real data ------------------------------------------------
    def loader(self, loader: DataLoader[Any]) -> Any:
        """The loader, made to note which samples each batch holds; the same object when no method is on."""
        return IndexedLoader(loader, self._index, len(self.state)) if self.enabled else loader

    def criterion(self, criterion: C) -> C | TrustedCriterion:
        """The criterion, made weighted and relabelled on batches of :meth:`loader`; the same object when no method is on."""
        if not self.enabled:
            return criterion
        return TrustedCriterion(criterion, self.state, self._index, self.events)  # type: ignore[arg-type]

    def epoch_end(self, network: nn.Module) -> None:
        """After each epoch of a network that the loop trains on the real data."""
        if self.enabled:
            if self.data is None or self.data.images.ndim < 4:
                raise ConfigError(explain("`data` to score with this network", "none", "Pass data=images to attach()"))
            self.events.scorer_epoch(self.state, network, self.data)

    # -- before the synthetic set is updated ---------------------------------------------------------
    def before_update(
        self,
        loss: Tensor,
        synthetic: Tensor | Sequence[Tensor],
        network: nn.Module,
        *,
        labels: Tensor | None = None,
        kind: str = "distribution",
        fresh_network: Callable[[torch.Generator], nn.Module] | None = None,
    ) -> None:
        """Call it after the matching loss is built and before ``backward``; fires on_match and refreshes the scorer.

        Args:
            loss: scalar matching loss with its graph.
            synthetic: the tensors that the loss updates, images first.
            network: the network of this match.
            labels: labels of the synthetic images, int64 [M] or soft [M,K].
            kind: "distribution" or "gradient".
            fresh_network: generator -> another network of this kind.
        """
        if not self.enabled:
            return
        self.events.position(iteration=self.iteration)
        tensors = (synthetic,) if isinstance(synthetic, Tensor) else tuple(synthetic)
        empty = torch.zeros(0, dtype=torch.int64, device=self.state.device)
        indices = torch.cat(self._drawn) if self._drawn else empty
        offset = self._offset if self._offset is not None else torch.zeros(len(self.state), device=self.state.device)
        match = Match(loss, offset, indices, tensors, labels, network, self.iteration, kind, fresh_network)
        self.events.match(self.state, match)
        self._next_iteration()

    def before_segment_update(self, segment: Segment) -> None:
        """As :meth:`before_update`, for trajectory matching; the segment's ``iteration`` is set here."""
        if self.enabled:
            segment.iteration = self.iteration
            self.events.position(iteration=self.iteration)
            self.events.segment(self.state, segment)
            self._next_iteration()

    def wants_graph(self) -> bool:
        """Whether this iteration's weights (or segment target) carry a graph for a method."""
        return self.enabled and self.events.wants_graph(self.iteration)

    def _next_iteration(self) -> None:
        self._offset = None
        self._drawn = []
        self.iteration += 1
        every = self.scorer_config.refresh_every
        if self.scorer is not None and every and self.iteration % every == 0:
            self._scorer_epoch()

    def finish(self) -> None:
        """Fires on_end and, if attach() got a state path, writes the state there."""
        if self.enabled:
            self.events.end(self.state)
        if self.state_path is not None:
            self.save_state(self.state_path)

    # -- files and resume ----------------------------------------------------------------------------
    def save_state(self, path: str | Path) -> None:
        """Writes the SampleState with the methods' settings in its header (atomic)."""
        self.state.save(path, configs={c.name: c.settings() for c in self.callbacks})

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on with the same bits."""
        return {
            "state": self.state.state_dict(),
            "callbacks": self.events.state_dict(),
            "scorer": self.scorer.state_dict() if self.scorer is not None else None,
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
            "started": self._started,
            "scoring_seconds": self.scoring_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; call it before :meth:`start`.

        Raises:
            StateMismatchError: other data. ConfigError: other methods.
        """
        self.state.load_state_dict(state["state"])
        self.events.load_state_dict(state["callbacks"])
        if state["scorer"] is not None:
            self.scorer = self._make_scorer()
            self.scorer.load_state_dict(state["scorer"])
        self.generator.set_state(state["generator"].cpu())
        self.iteration = int(state["iteration"])
        self._started = bool(state["started"])
        self.scoring_seconds = float(state["scoring_seconds"])


def attach(
    method: str | None = None,
    *,
    labels: Tensor | Sequence[int] | None = None,
    data: Tensor | Dataset[Any] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | str | Path | None = None,
    true_labels: Tensor | None = None,
    dataset: str = "",
    ipc: int | None = None,
    noise_rate: float | None = None,
    noise: NoiseSpec | str | None = None,
    trains_on_real: bool = False,
    state: str | Path | None = None,
    observers: Sequence[Observer] = (),
    log: Callable[[dict[str, Any]], None] | None = None,
    args: argparse.Namespace | None = None,
    progress: bool = False,
    start: bool = True,
) -> Hook:
    """Makes the hook of a training script: ``hook = attach("tad", labels=..., data=..., num_classes=10, seed=0)``.

    Args:
        method: "none", a registered method, or several joined by "+" in the order they act ("tad+iwd").
        labels: observed labels of all real samples, integers [N].
        data: normalised images float32 [N,C,H,W], or a map-style dataset of (image, label) that is stacked once.
        num_classes: K; by default the largest label + 1.
        seed: seeds the hook's, the scorer's and each method's own generator. The global ones are never touched.
        config: method name -> settings (and "scorer" -> settings of the plugin's scorer), or a YAML/JSON file of it.
        true_labels: integers [N] where they are known; used by oracles and for logging only.
        dataset: name of the dataset, for label-preserving augmentation of the scorer.
        ipc: images per class of the synthetic set: at least that many samples per class stay trusted.
        noise_rate: nominal share of wrong labels where the experiment set it; only the pruning rivals read it.
        noise: "kind:rate" to corrupt ``labels`` first (they are then taken as the true ones), for controlled experiments.
        trains_on_real: the loop trains networks on the real data through ``hook.loader``/``hook.criterion``/
            ``hook.epoch_end``, so no scorer of the plugin's own is trained.
        state: state file: loaded if it exists (nothing is then scored anew), and written by ``hook.finish()``.
        observers: read-only watchers.
        log: receives each log record (a dict).
        args: a namespace with the flags of :func:`add_arguments`; explicit arguments win over it.
        progress: show a progress bar while the scorer trains.
        start: False leaves ``hook.start()`` to the caller (resuming loops).

    Returns:
        The Hook; with "none" every handle is an identity.

    Raises:
        InvalidLabelsError, EmptyClassError, InvalidInputError: bad labels or data.
        UnknownNameError, ConfigError: unknown method, unknown or missing settings.
        StateMismatchError: ``state`` belongs to other data.
    """
    if args is not None:
        method = method if method is not None else getattr(args, "tad_method", None)
        config = config if config is not None else (getattr(args, "tad_config", "") or None)
        state = state if state is not None else (getattr(args, "tad_state", "") or None)
        noise = noise if noise is not None else (getattr(args, "tad_noise", "") or None)
    method = "none" if method is None else method
    if labels is None:
        raise InvalidInputError(explain("`labels` of all real samples", "none", "Pass labels=labels_all"))
    observed = torch.as_tensor(labels)
    if num_classes is None:
        num_classes = int(observed.max()) + 1 if observed.numel() else 1
    images = _stack(data)
    if noise is not None:
        spec = NoiseSpec.parse(noise) if isinstance(noise, str) else noise
        if spec.kind != "none":
            noisy = spec.apply(observed, num_classes, images=images, dataset=dataset or None)
            true_labels, observed = observed, noisy.labels.to(observed.device)
    else:
        spec = None
    settings = _read_config(config)
    callbacks = make_callbacks(method, settings, seed=seed)
    sample_state = SampleState(observed, num_classes, device=images.device if images is not None else None)
    real = None
    if images is not None:
        if noise_rate is None and spec is not None and spec.kind not in ("none", "human", "matrix"):
            noise_rate = spec.rate
        real = RealData(images, sample_state.observed, num_classes, true_labels, dataset, noise_rate, ipc)
    watchers = list(observers)
    if callbacks and true_labels is not None:
        watchers.append(SplitDiagnostics())
    hook = Hook(
        sample_state,
        real,
        callbacks,
        method=method,
        seed=seed,
        trains_on_real=trains_on_real,
        scorer=build_config(ScorerConfig, settings.get("scorer"), "the scorer"),
        observers=watchers,
        log=log,
        state_path=state,
    )
    if state is not None and Path(state).exists():
        _adopt(hook, Path(state))
    elif start:
        hook.start(progress=progress)
    return hook


def _adopt(hook: Hook, path: Path) -> None:
    """Takes over a saved state: the methods have already decided, so no scorer is trained."""
    header = SampleState.read_header(path)
    mine = {c.name: json.loads(json.dumps(c.settings(), default=str)) for c in hook.callbacks}
    for name, settings in mine.items():
        theirs = header["configs"].get(name)
        if theirs is not None and theirs != settings:
            different = sorted(k for k in {*theirs, *settings} if theirs.get(k) != settings.get(k))
            raise StateMismatchError(
                explain(
                    f"a state written with the same settings of {name!r}",
                    "; ".join(f"{k}: {theirs.get(k)!r} in the file, {settings.get(k)!r} now" for k in different),
                    f"Use the file's settings, or delete {path} to compute it anew",
                )
            )
    loaded = SampleState.load(path, hook.state.observed)
    hook.state.load_state_dict(loaded.state_dict())
    if any(c.name not in header["configs"] for c in hook.callbacks):
        # A method that the file knows nothing of (IWD on top of a saved TAD state) still has to start.
        late = CallbackList([c for c in hook.callbacks if c.name not in header["configs"]])
        if hook.data is not None:
            late.start(hook.state, hook.data)
        for callback in hook.callbacks:
            callback.sink = hook.events.record
    hook.trains_on_real = True
    hook._started = True


def _stack(data: Tensor | Dataset[Any] | None) -> Tensor | None:
    if data is None or isinstance(data, Tensor):
        return data
    try:
        rows = [torch.as_tensor(data[i][0]) for i in range(len(data))]  # type: ignore[arg-type]
        return torch.stack(rows).float()
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise InvalidInputError(
            explain(
                "`data` as a tensor [N,C,H,W] or a map-style dataset of (image, label)",
                f"{type(data).__name__}: {error}",
                "Stack the images first",
            )
        ) from error


def _read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise ConfigError(explain("a YAML or JSON file of settings", f"nothing at {path}", "Check the path"))
    text = path.read_text()
    if path.suffix == ".json":
        values = json.loads(text)
    else:
        try:
            import yaml
        except ImportError as error:
            raise missing_extra("yaml", "reproduce", "a YAML settings file") from error
        values = yaml.safe_load(text) or {}
    if not isinstance(values, dict):
        raise ConfigError(
            explain("a mapping of method -> settings", f"{type(values).__name__} in {path}", "See the README's example")
        )
    return values


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds ``--tad_method``, ``--tad_config``, ``--tad_state`` and ``--tad_noise`` to a script's parser; returns it."""
    group = parser.add_argument_group("tad_plugin")
    group.add_argument(
        "--tad_method", type=str, default="none", help='"none", "tad", "iwd", "tad+iwd" or another registered method'
    )
    group.add_argument("--tad_config", type=str, default="", help="YAML or JSON file: method -> settings")
    group.add_argument("--tad_state", type=str, default="", help="state file: read if it exists, written at the end")
    group.add_argument("--tad_noise", type=str, default="", help='corrupt the labels first, e.g. "symmetric:0.4"')
    return parser


def _progress(items: range, name: str, show: bool) -> Any:
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra("tqdm", "reproduce", "a progress bar") from error
    return tqdm(items, desc=name, leave=False)
