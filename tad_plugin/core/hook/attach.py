"""attach(): makes the hook of a training script from labels, images and a method's name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tad_plugin.core.diagnostics import InfluenceDiagnostics, SplitDiagnostics
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.hook.images import as_images, is_dataset
from tad_plugin.core.hook.indexed import IndexedDataset
from tad_plugin.core.hook.wiring import WiringCheck
from tad_plugin.core.observer import Observer
from tad_plugin.core.registry import make_callbacks, method_names
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.data.labels import integers_of
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.origin import Origin
from tad_plugin.data.real import RealData
from tad_plugin.data.samples import labels_of
from tad_plugin.errors import ConfigError, InvalidInputError, explain
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.files import read_json, read_yaml
from tad_plugin.utils.image_store import Images, ImageStore
from tad_plugin.utils.machine import check_device
from tad_plugin.utils.seeds import check_seed
from tad_plugin.utils.settings import build_config
from tad_plugin.utils.torch_modes import default_modes
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["add_arguments", "attach", "attach_dataset"]


@named_errors
@default_modes()
def attach(
    method: str | None = None,
    *,
    labels: Tensor | Sequence[int] | None = None,
    data: Tensor | np.ndarray | ImageStore | Sequence[Any] | Dataset[Any] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | str | Path | None = None,
    true_labels: Tensor | Sequence[int] | None = None,
    dataset: str = "",
    ipc: int | None = None,
    noise_rate: float | None = None,
    noise: NoiseSpec | str | None = None,
    verdict: str | Path | None = None,
    origin: Origin | None = None,
    trains_on_real: bool = False,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    observers: Sequence[Observer] = (),
    log: Callable[[dict[str, Any]], None] | None = None,
    args: argparse.Namespace | None = None,
    progress: bool = False,
    start: bool = True,
    scoring_transform: Callable[[Any], Any] | None = None,
    draw: str = "uniform",
    iterations: int | None = None,
    announce: bool = True,
) -> Hook:
    """Makes the hook of a training script: ``hook = attach("tad", labels=..., data=..., num_classes=10, seed=0)``.

    Args:
        method: "none", a registered method, or several joined by "+" in the order they act ("tad+iwd"). "check" decides
            nothing: it tells whether the loop uses the hook as a method needs it (``core/hook/wiring.py``).
        labels: observed labels of all real samples, integers [N]. A dataset given as ``data`` that has ``targets`` or
            ``labels`` tells them itself.
        data: normalised images [N,C,H,W] or [N,H,W] (a tensor, array or list; other real dtypes become float32), or a
            map-style dataset of (image, label) or of mappings. A dataset is read once, or in batches whenever a method
            asks if its images take more than 1 GiB. "none" reads no dataset. Images of any size: an ``ImageStore`` of
            8-bit pixels with their mean and std, whose pixels may be an ``np.memmap``. An ``np.memmap`` stays in its
            file, and 8-bit arrays stay 8-bit where they would take more than 2 GiB as float32.
        num_classes: K; by default the largest label + 1.
        seed: seeds the generators of the hook, the scorer and each method. The global generators are never touched.
        config: method name -> settings (and "scorer" -> settings of the plugin's scorer), or a YAML/JSON file of it.
        true_labels: integers [N] if they are known; used by oracles and for logging only.
        dataset: name of the dataset, for label-preserving augmentation of the scorer.
        ipc: images per class of the synthetic set. At least that many samples per class stay trusted.
        noise_rate: nominal share of wrong labels if the experiment set it; only the pruning rivals read it.
        noise: "kind:rate" corrupts ``labels`` first, for experiments. ``labels`` are then the true labels.
            ``hook.loader`` and ``hook.criterion`` train on the corrupted labels even under "none".
        verdict: file of a verdict made elsewhere, for the method "verdict", which it chooses if no method is given.
        origin: names of the samples, for a verdict; by default their positions are the only names.
        trains_on_real: the loop trains networks on the real data through ``hook.loader``, ``hook.criterion`` and
            ``hook.epoch_end``. Then the plugin trains no scorer of its own.
        state: state file. If it exists it is loaded, and nothing is scored again. ``hook.finish()`` writes it.
        device: device of the networks, if the images are on another one. Images and state then move there, if a
            method is on. By default everything stays on the images' device.
        observers: read-only watchers.
        log: receives each log record (a dict).
        args: a namespace with the flags of :func:`add_arguments`; explicit arguments win over it.
        progress: show a progress bar while the scorer trains.
        start: False leaves ``hook.start()`` to the caller (resuming loops).
        scoring_transform: how a dataset's image is made for scoring, without augmentation. It takes the place of the
            dataset's ``transform``; if it has none, it is applied to the image that the dataset gives.
        draw: "uniform" weights losses. "weighted" draws by weight instead, in ``hook.sample`` and the samplers, and
            weights no loss; draws are then with replacement.
        iterations: updates of the synthetic set that the loop will make. IWD fits its schedule to a short run.
        announce: ``hook.finish()`` prints a line for each method.

    Returns:
        The Hook; with "none" every handle is an identity.

    Raises:
        InvalidLabelsError, EmptyClassError, InvalidInputError: bad labels, data, seed, number of classes or device.
        UnknownNameError, ConfigError: unknown method, unknown or missing settings.
        FileFormatError: ``config`` cannot be read, or ``state`` is not a whole state file.
        StateMismatchError: ``state`` belongs to other data, other methods or other settings.

    Warns:
        TadPluginWarning: images that are not normalised.
    """
    if args is not None:
        method = method if method is not None else getattr(args, "tad_method", None)
        config = config if config is not None else (getattr(args, "tad_config", "") or None)
        state = state if state is not None else (getattr(args, "tad_state", "") or None)
        noise = noise if noise is not None else (getattr(args, "tad_noise", "") or None)
        verdict = verdict if verdict is not None else (getattr(args, "tad_verdict", "") or None)
    method = "none" if method is None else method
    if verdict is not None and method == "none":
        method = "verdict"
    if labels is None:
        labels = labels_of(data) if is_dataset(data) else None
    if labels is None:
        do = "Pass labels=labels_all, in the order of the dataset"
        raise InvalidInputError(explain("`labels` of all real samples", "none", do))
    if draw not in ("uniform", "weighted"):
        do = 'Pass "uniform" or "weighted"'
        raise InvalidInputError(explain('`draw` "uniform" or "weighted"', repr(draw), do))
    iterations = None if iterations is None else check_whole("iterations", iterations, 1)
    seed = check_seed(seed)
    # Copies: writing into the caller's labels later changes nothing here.
    observed = integers_of(labels).clone()
    true_labels = None if true_labels is None else integers_of(true_labels, "true_labels").clone()
    if num_classes is None:
        num_classes = int(observed.max()) + 1 if observed.numel() else 1
    spec = _spec(noise)
    corrupted = spec is not None and spec.kind != "none"
    names = method_names(method)
    # "none" looks at no image of a dataset, unless the noise depends on them.
    needed = (bool(names) and names != ["check"]) or (spec is not None and spec.kind == "instance")
    images = as_images(data, len(observed), read=needed, transform=scoring_transform, seed=seed)
    # Images [N,0] stand for "labels only". All else that is known still reaches the methods.
    shown = images if images is not None else torch.zeros(observed.numel(), 0, device=observed.device)
    # RealData checks images and labels, and nothing after it checks them again.
    real = RealData(shown, observed, num_classes, None if corrupted else true_labels, dataset, noise_rate, ipc)
    real.origin = origin
    if spec is not None and corrupted:
        _corrupt(real, spec, images)
    settings = _with_verdict(_read_config(config), verdict, names)
    if "check" in names and len(names) > 1:
        raise ConfigError(explain('"check" alone', repr(method), "Check the loop first, then attach the methods"))
    callbacks = make_callbacks("none" if names == ["check"] else method, settings, seed=seed)
    if names == ["check"]:
        callbacks = [WiringCheck()]
    where = None if device is None else check_device(device)
    if where is not None and images is not None and callbacks:
        _move(real, where)
    watchers = list(observers)
    if callbacks and real.true_labels is not None:
        watchers += [SplitDiagnostics(), InfluenceDiagnostics()]
    hook = Hook(
        SampleState.of(real),
        real,
        callbacks,
        method=method,
        seed=seed,
        trains_on_real=trains_on_real,
        scorer=build_config(ScorerConfig, settings.get("scorer"), "the scorer"),
        observers=watchers,
        log=log,
        state_path=state,
        corrupted=corrupted,
        draw=draw,
        iterations=iterations,
        source=data if is_dataset(data) else None,
        scoring_transform=scoring_transform,
        announce=announce,
    )
    if state is not None and Path(state).exists():
        hook.adopt(state)
    if start:
        hook.start(progress=progress)
    return hook


def attach_dataset(method: str | None, data: Any, **settings: Any) -> tuple[IndexedDataset, Hook]:
    """The dataset with indices, and its hook: ``attach(method, data=data, ...)`` and ``hook.dataset(data)`` in one.

    ``train_set, hook = attach_dataset("tad", train_set, scoring_transform=plain)`` stands before the DataLoader. Its
    batches then end with their indices, and ``hook.loss(logits, labels, idx)`` is their weighted loss.

    Args:
        method: as in :func:`attach`.
        data: a map-style dataset of all samples.
        settings: further arguments of :func:`attach`.
    """
    hook = attach(method, data=data, **settings)
    return hook.dataset(data), hook


def _spec(noise: NoiseSpec | str | None) -> NoiseSpec | None:
    if noise is None or isinstance(noise, NoiseSpec):
        return noise
    if not isinstance(noise, str):
        do = 'Pass a NoiseSpec or text such as "symmetric:0.4"'
        raise InvalidInputError(explain("`noise` as text or a NoiseSpec", repr(noise), do))
    return NoiseSpec.parse(noise)


def _corrupt(real: RealData, spec: NoiseSpec, images: Images | None) -> None:
    """Puts label noise on ``real``, whose labels become the true labels."""
    noisy = spec.apply(real.labels, real.num_classes, images=images, dataset=real.dataset or None)
    real.true_labels, real.labels = real.labels, noisy.labels.to(real.labels.device)
    if real.noise_rate is None and spec.kind not in ("human", "matrix"):
        real.noise_rate = spec.rate


def _move(real: RealData, device: torch.device) -> None:
    real.images, real.labels = real.images.to(device), real.labels.to(device)
    if real.true_labels is not None:
        real.true_labels = real.true_labels.to(device)


def _with_verdict(settings: Mapping[str, Any], verdict: str | Path | None, names: list[str]) -> Mapping[str, Any]:
    """The settings, with the file of a verdict."""
    if verdict is None:
        return settings
    if "verdict" not in names:
        got, do = f"the method {'+'.join(names)!r}", f"Use {'+'.join(['verdict', *names])!r}, or leave the file out"
        raise ConfigError(explain("the method 'verdict', because a file of one is given", got, do))
    return {**settings, "verdict": {**settings.get("verdict", {}), "file": str(verdict)}}


def _read_config(config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    if not isinstance(config, str | Path):
        got = type(config).__name__
        raise ConfigError(explain("`config` as a mapping or a YAML or JSON file", got, "Pass method -> settings"))
    # YAML 1.1 reads the JSON number 1e-3 as text.
    values = (read_json if Path(config).suffix == ".json" else read_yaml)(config)
    if values is None:
        return {}
    if not isinstance(values, dict):
        got = f"{type(values).__name__} in {config}"
        raise ConfigError(explain("a mapping of method -> settings", got, "See the README's example"))
    return values


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags that :func:`attach` reads to a script's parser, and returns it.

    They are ``--tad_method``, ``--tad_config``, ``--tad_state``, ``--tad_noise`` and ``--tad_verdict``.
    """
    group = parser.add_argument_group("tad_plugin")
    group.add_argument(
        "--tad_method", type=str, default="none", help='"none", "tad", "iwd", "tad+iwd" or another registered method'
    )
    group.add_argument("--tad_config", type=str, default="", help="YAML or JSON file: method -> settings")
    group.add_argument("--tad_state", type=str, default="", help="state file: read if it exists, written at the end")
    group.add_argument("--tad_noise", type=str, default="", help='corrupt the labels first, e.g. "symmetric:0.4"')
    about = 'file of a verdict on the samples (csv, json, npz, pt), for the method "verdict"'
    group.add_argument("--tad_verdict", type=str, default="", help=about)
    return parser
