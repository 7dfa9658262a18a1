"""What every bundled baseline shares: initialisation, the step loop with resume, evaluation and results.

A baseline is one file: a settings dataclass and a class with ``step(iteration)``. See ``dm.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import ConfigError, EmptyClassError, NonFiniteError, NotEnoughSamplesError, explain, unknown_name
from tad_plugin.nn.networks import default_depth, make_network

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineConfig",
    "Place",
    "baseline_class",
    "check_batch",
    "check_loss",
    "class_pool",
    "draw_class",
    "fresh_network",
    "initial_images",
]


@dataclass
class BaselineConfig:
    """Settings that every baseline has.

    Attributes:
        ipc: synthetic images per class.
        iterations: steps of the synthetic set.
        lr_img: learning rate of the images.
        init: "real" (usable real images) or "noise".
        width: channels of the ConvNet that is matched on.
        depth: its blocks; 0 takes 3 (2 for images under 16 pixels).
        norm: its normalisation.
        augment: DSA strategy; "auto" is the dataset's own, "none" switches it off.
        full_batches: a class with fewer usable real samples than its batch is an error; by default it gives all it has.
    """

    ipc: int = 10
    iterations: int = 200
    lr_img: float = 1.0
    init: str = "real"
    width: int = 128
    depth: int = 0
    norm: str = "instance"
    augment: str = "auto"
    full_batches: bool = False

    #: what ``init`` may be
    inits: ClassVar[tuple[str, ...]] = ("real", "noise")

    def __post_init__(self) -> None:
        for name, low in (("ipc", 1), ("iterations", 0), ("width", 1), ("depth", 0)):
            if getattr(self, name) < low:
                raise ConfigError(explain(f"{name} of at least {low}", str(getattr(self, name)), "Correct the setting"))
        if self.init not in self.inits:
            raise ConfigError(explain(f"init out of {', '.join(self.inits)}", repr(self.init), "Correct the setting"))


@dataclass(frozen=True)
class Place:
    """Where a run does the work that comes before the synthetic set (:meth:`Baseline.prepare`).

    Attributes:
        folder: the run folder.
        seed: of that work.
        preprocessing: of the real images.
        every: seconds between its checkpoints.
        progress: show progress bars.
        log: receives log records.
        experts: a buffer that is there already (trajectory matching); None trains the run's own.
    """

    folder: Path
    seed: int = 0
    preprocessing: Preprocessing | None = None
    every: float = 20.0
    progress: bool = False
    log: Callable[[dict[str, Any]], None] | None = None
    experts: Path | None = None


class Baseline:
    """One distillation algorithm. Subclasses make the synthetic set in ``__init__`` and improve it in :meth:`step`.

    Args:
        config: the settings.
        data: the real data.
        hook: the seam to the methods, or None for the plain loop without any.
        synthetic: the starting set; the baseline updates ``self.synthetic`` in place.
        generator: CPU generator of every draw of the loop.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    #: the loop trains networks on the real data through the hook, so the plugin's own scorer is not needed
    trains_on_real: ClassVar[bool] = False
    #: what its protocol puts in the place of a dataset's preset where the user says nothing (fields of RunConfig)
    preset: ClassVar[Mapping[str, Any]] = {}
    #: settings of the evaluation that its protocol fixes (fields of EvaluateConfig)
    evaluation: ClassVar[Mapping[str, Any]] = {}
    #: published settings by name and IPC, fields of RunConfig; the loop's setting "preset" names one
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {}

    def __init__(
        self, config: Any, data: RealData, hook: Hook | None, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        self.config = config
        self.data = data
        self.hook = hook
        self.synthetic = synthetic
        self.generator = generator

    @classmethod
    def published(cls, name: str, ipc: int) -> Mapping[str, Any]:
        """The preset ``name`` for an IPC. Raises UnknownNameError, or ConfigError for an IPC that it does not have."""
        if name not in cls.presets:
            raise unknown_name("preset", name, list(cls.presets))
        if ipc not in cls.presets[name]:
            known = ", ".join(map(str, cls.presets[name]))
            do = "Leave the preset out, or take one of these with --ipc"
            raise ConfigError(explain(f"an IPC out of {known} for the preset {name!r}", str(ipc), do))
        return cls.presets[name][ipc]

    @classmethod
    def check_images(cls, config: Any, images: Tensor) -> None:
        """Raises ConfigError where the settings cannot serve real images [N,C,H,W] of this size; before any work."""

    @classmethod
    def prepare(cls, config: Any, data: RealData, hook: Hook, place: Place) -> Any:
        """Work that comes before the synthetic set and can be resumed; what it returns goes to the constructor.

        None where there is none. Called on resume as well.
        """
        return None

    @classmethod
    def discard(cls, folder: Path) -> None:
        """Removes from a run folder what :meth:`prepare` left there, for a run that starts over."""

    @classmethod
    def initial_images(
        cls, config: Any, data: RealData, hook: Hook | None, generator: torch.Generator, prepared: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Starting images and labels; see :func:`initial_images`. ``prepared`` comes from :meth:`prepare`."""
        return initial_images(config, data, hook, generator)

    @property
    def expert_seconds(self) -> float:
        """Seconds spent in training networks before the distillation (:meth:`prepare`), so far as is known."""
        return 0.0

    def step(self, iteration: int) -> Mapping[str, Any]:
        """One update of the synthetic set; returns what is worth logging (at least ``loss``)."""
        raise TypeError(
            explain(f"{type(self).__name__} to define step()", "a class without it", "Override Baseline.step")
        )

    def result(self) -> SyntheticSet:
        """The synthetic set as it is now, detached."""
        return self.synthetic.detached()

    def fresh_network(self, generator: torch.Generator) -> nn.Module:
        """A newly drawn network of the kind that is matched on."""
        return fresh_network(self.config, self.data, generator)

    def state_dict(self) -> dict[str, Any]:
        """Synthetic tensors, optimiser and generator."""
        return {
            "images": self.synthetic.images.detach(),
            "labels": self.synthetic.labels.detach(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict` in place, so that optimisers keep their tensors."""
        with torch.no_grad():
            self.synthetic.images.copy_(state["images"])
            self.synthetic.labels.copy_(state["labels"])
        self.generator.set_state(state["generator"].cpu())


BASELINES: dict[str, str] = {
    "dm": "tad_plugin.distill.dm:DM",
    "dc": "tad_plugin.distill.dc:DC",
    "dsa": "tad_plugin.distill.dc:DSA",
    "idm": "tad_plugin.distill.idm:IDM",
    "mtt": "tad_plugin.distill.mtt:MTT",
    "datm": "tad_plugin.distill.datm:DATM",
}
"""Bundled baselines: name -> "module:class", imported when asked for."""


def baseline_class(name: str) -> type[Baseline]:
    """The bundled baseline called ``name``. Raises UnknownNameError."""
    from importlib import import_module

    if name not in BASELINES:
        raise unknown_name("baseline", name, list(BASELINES))
    module, _, cls = BASELINES[name].partition(":")
    found: type[Baseline] = getattr(import_module(module), cls)
    return found


def fresh_network(config: BaselineConfig, data: RealData, generator: torch.Generator) -> nn.Module:
    """A newly drawn network of the kind that a loop with these settings matches on."""
    c, h, w = (int(v) for v in data.images.shape[1:])
    return make_network(
        "convnet",
        in_channels=c,
        num_classes=data.num_classes,
        image_size=(h, w),
        width=config.width,
        depth=config.depth or default_depth(h, w),
        norm=config.norm,
        generator=generator,
        device=data.images.device,
    )


def class_pool(hook: Hook | None, data: RealData, c: int) -> Tensor:
    """Usable indices of class c: the hook's pool, or every sample with that label."""
    return hook.pool(c) if hook is not None else (data.labels == c).nonzero().flatten()


def draw_class(hook: Hook | None, data: RealData, c: int, n: int, generator: torch.Generator) -> Tensor:
    """Up to n indices of class c without replacement: the same draw with and without a hook."""
    if hook is not None:
        return hook.sample(c, n, generator)
    pool = class_pool(None, data, c)
    return pool[torch.randperm(len(pool), generator=generator)[:n].to(pool.device)]


def check_batch(config: BaselineConfig, c: int, found: int, wanted: int) -> None:
    """Whether the ``found`` usable real samples of class c make a batch of ``wanted``.

    Raises:
        EmptyClassError: there is none.
        NotEnoughSamplesError: there are fewer than wanted, and the settings ask for full batches.
    """
    if not found:
        do = "Remove the class, or use data that has it"
        raise EmptyClassError(explain(f"a real sample of class {c}", "none", do))
    if config.full_batches and found < wanted:
        do = "Lower batch_real, or leave full_batches off: such a class then gives all it has"
        raise NotEnoughSamplesError(explain(f"{wanted} usable samples of class {c} for a batch", str(found), do))


def initial_images(
    config: BaselineConfig, data: RealData, hook: Hook | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Starting images [K*IPC,C,H,W], class after class, and their labels int64.

    Raises:
        NotEnoughSamplesError: a class has fewer usable samples than IPC.
    """
    k, device = data.num_classes, data.images.device
    labels = torch.arange(k, device=device).repeat_interleave(config.ipc)
    if config.init == "noise":
        shape = (k * config.ipc, *data.images.shape[1:])
        return torch.randn(shape, generator=generator).to(device), labels
    rows = []
    for c in range(k):
        indices = draw_class(hook, data, c, config.ipc, generator)
        if len(indices) < config.ipc:
            ways = ["Lower the IPC (--ipc)"]
            if "noise" in config.inits:
                ways.append('start from noise (init "noise"; --loop.init noise)')
            if hook is not None and hook.enabled:
                ways.append("let the method trust more of the class")
            do = ", or ".join(ways)
            expected = f"at least IPC = {config.ipc} usable samples of class {c}"
            raise NotEnoughSamplesError(explain(expected, str(len(indices)), do))
        rows.append(data.images[indices])
    return torch.cat(rows).clone(), labels


def check_loss(loss: Tensor, iteration: int, parts: Sequence[str] = ()) -> None:
    """Raises NonFiniteError if a matching loss is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            explain(
                "a finite matching loss",
                f"{float(loss)} at iteration {iteration}{' in ' + ', '.join(parts) if parts else ''}",
                "Lower lr_img; the last checkpoint of the run is intact",
            )
        )
