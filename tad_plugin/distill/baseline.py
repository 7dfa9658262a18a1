"""The base of all distillation loops: settings, initial images, and the interface that a run uses.

A baseline is one file: a settings dataclass and a class with ``step(iteration)``. See ``dm.py``. A package registers
its own through the entry-point group ``tad_plugin.baselines``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import ConfigError, NonFiniteError, NotEnoughSamplesError, explain, unknown_name
from tad_plugin.nn.networks import default_depth, make_network
from tad_plugin.utils.entry_points import load_class
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.settings import Settings, setting

__all__ = [
    "BASELINES",
    "GROUP",
    "Baseline",
    "BaselineConfig",
    "Place",
    "baseline_class",
    "baseline_names",
    "check_loss",
    "fresh_network",
    "initial_images",
]


@dataclass
class BaselineConfig(Settings):
    """Settings of every baseline.

    Attributes:
        ipc: synthetic images per class.
        iterations: updates of the synthetic set.
        lr_img: learning rate of the images.
        init: "real" (usable real images) or "noise" (standard normal).
        width: channels of the ConvNet on which images are matched.
        depth: blocks of the ConvNet; 0 takes 3 (2 for images under 16 pixels).
        norm: normalisation layer of the ConvNet.
        augment: DSA strategy; "auto" takes the dataset's, "none" switches augmentation off.
        full_batches: raise an error for a class with fewer usable real samples than its batch. By default such a
            class gives all its samples.
    """

    ipc: int = setting(10, at_least=1)
    iterations: int = setting(200, at_least=0)
    lr_img: float = setting(1.0, at_least=0)
    init: str = setting("real", one_of=("real", "noise"))
    width: int = setting(128, at_least=1)
    depth: int = setting(0, at_least=0)
    norm: str = "instance"
    augment: str = "auto"
    full_batches: bool = False


@dataclass(frozen=True)
class Place:
    """Where and how :meth:`Baseline.prepare` works.

    Attributes:
        folder: the run folder.
        seed: seed of the preparation.
        preprocessing: preprocessing of the real images.
        every: seconds between checkpoints.
        progress: show progress bars.
        log: receives log records.
        experts: folder of an existing replay buffer (trajectory matching); None trains the run's own experts.
        begin: called before work starts that keeps checkpoints of its own, so that the run does not go back behind it.
        log_bytes: gives the length of the log; such checkpoints hold it, see :meth:`Baseline.logged`.
    """

    folder: Path
    seed: int = 0
    preprocessing: Preprocessing | None = None
    every: float = 20.0
    progress: bool = False
    log: Callable[[dict[str, Any]], None] | None = None
    experts: Path | None = None
    begin: Callable[[], None] | None = None
    log_bytes: Callable[[], int] | None = None


class Baseline:
    """One distillation algorithm. Subclasses override :meth:`step`, which updates ``self.synthetic`` in place.

    Args:
        config: an instance of :attr:`Config`.
        data: the real data.
        hook: the seam to the methods; ``attach("none", ...)`` gives the plain algorithm.
        synthetic: the initial synthetic set.
        generator: CPU generator of all draws of the loop.
    """

    #: name on the command line
    name: ClassVar[str] = ""
    #: settings class
    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    #: True if the loop trains networks on the real data through the hook, so that no separate scorer is needed
    trains_on_real: ClassVar[bool] = False
    #: True if torch.compile can compile its networks: it differentiates a network once at most
    compiles: ClassVar[bool] = False
    #: Protocol defaults (fields of RunConfig); they override the dataset preset.
    preset: ClassVar[Mapping[str, Any]] = {}
    #: fields of EvaluateConfig that the protocol fixes
    evaluation: ClassVar[Mapping[str, Any]] = {}
    #: published settings by name and IPC (fields of RunConfig); selected by ``loop={"preset": name}``
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {}

    def __init__(
        self, config: Any, data: RealData, hook: Hook, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        self.config = config
        self.data = data
        self.hook = hook
        self.synthetic = synthetic
        self.generator = generator

    @classmethod
    def published(cls, name: str, ipc: int) -> Mapping[str, Any]:
        """The published settings ``name`` for an IPC.

        Raises:
            UnknownNameError: no such preset.
            ConfigError: the preset has no settings for this IPC.
        """
        if name not in cls.presets:
            raise unknown_name("preset", name, list(cls.presets))
        if ipc not in cls.presets[name]:
            known = ", ".join(map(str, cls.presets[name]))
            do = "Remove the preset, or choose one of these with --ipc"
            raise ConfigError(explain(f"an IPC out of {known} for the preset {name!r}", str(ipc), do))
        return cls.presets[name][ipc]

    @classmethod
    def check_images(cls, config: Any, images: Images) -> None:
        """Override it to raise ConfigError if the settings do not fit real images [N,C,H,W]. Called before any work."""

    @classmethod
    def prepare(cls, config: Any, data: RealData, hook: Hook, place: Place) -> Any:
        """Override it for work before the first synthetic image is drawn, such as training experts.

        Also called on resume, so it must continue what it began. The result is passed to :meth:`initial_images` and to
        the constructor as ``prepared``; None means that there is none.
        """
        return None

    @classmethod
    def discard(cls, folder: Path) -> None:
        """Override it to remove what :meth:`prepare` wrote to a run folder. Called when a run starts over."""

    @classmethod
    def logged(cls, folder: Path) -> int:
        """Length of the log in bytes at the last checkpoint that :meth:`prepare` or :meth:`step` wrote by itself.

        Override it if they do. On resume the log is kept up to there, since that work continues from there.
        """
        return 0

    @classmethod
    def initial_images(
        cls, config: Any, data: RealData, hook: Hook, generator: torch.Generator, prepared: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Initial images and labels; see :func:`initial_images`. ``prepared`` is the result of :meth:`prepare`."""
        return initial_images(config, data, hook, generator)

    @property
    def expert_seconds(self) -> float:
        """Seconds spent on training experts; 0 for loops without experts."""
        return 0.0

    def doubt(self) -> str | None:
        """What a user should know of the result before trusting it, as one message; None if nothing is odd."""
        return None

    def step(self, iteration: int) -> Mapping[str, Any]:
        """Updates the synthetic set once. Returns the values to log, at least ``loss``."""
        do = "Override Baseline.step"
        raise TypeError(explain(f"{type(self).__name__} to define step()", "a class without it", do))

    def compile(self) -> None:
        """Override it, with :attr:`compiles`, to compile the matched networks. Called before the first step."""

    def result(self) -> SyntheticSet:
        """A detached copy of the current synthetic set."""
        return self.synthetic.detached()

    def fresh_network(self, generator: torch.Generator) -> nn.Module:
        """A newly initialised network of the architecture that is matched on."""
        return fresh_network(self.config, self.data, generator)

    def draw(self, c: int, n: int) -> Tensor:
        """Indices int64 of up to n usable real samples of class c, without replacement.

        Raises:
            EmptyClassError: the class has no usable sample.
            NotEnoughSamplesError: it has fewer than n, and ``full_batches`` is set.
        """
        return self.hook.state.placed([self.draw_on_host(c, n)])[0]

    def draw_on_host(self, c: int, n: int) -> Tensor:
        """As :meth:`draw`, but the indices are on the CPU. ``hook.state.placed`` moves those of all classes at once."""
        found = self.hook.draw(c, n, self.generator)
        if self.config.full_batches and len(found) < n:
            do = "Lower batch_real, or set full_batches to false: such a class then gives all its samples"
            raise NotEnoughSamplesError(explain(f"{n} usable samples of class {c} for a batch", str(len(found)), do))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume with the same bits: here the synthetic set and the generator."""
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


GROUP = "tad_plugin.baselines"
"""Entry-point group in which other packages register their baselines."""

BASELINES: dict[str, str] = {
    "dm": "tad_plugin.distill.dm:DM",
    "dc": "tad_plugin.distill.dc:DC",
    "dsa": "tad_plugin.distill.dc:DSA",
    "idm": "tad_plugin.distill.idm:IDM",
    "mtt": "tad_plugin.distill.mtt:MTT",
    "datm": "tad_plugin.distill.datm:DATM",
}
"""Bundled baselines: name -> "module:class". Their names cannot be taken by another package."""


def _entries() -> dict[str, EntryPoint]:
    bundled = {name: EntryPoint(name, value, GROUP) for name, value in BASELINES.items()}
    return {e.name: e for e in sorted(entry_points(group=GROUP), key=lambda e: e.name)} | bundled


def baseline_names() -> list[str]:
    """Names of all baselines: the bundled ones, then those that other packages registered."""
    return [*BASELINES, *(name for name in _entries() if name not in BASELINES)]


def baseline_class(name: str) -> type[Baseline]:
    """The baseline called ``name``, imported when asked for.

    Raises:
        UnknownNameError: no such baseline.
        ConfigError: another package registered it, and it cannot be imported or is no Baseline.
    """
    entries = _entries()
    if name not in entries:
        raise unknown_name("baseline", name, baseline_names())
    return load_class(entries[name], Baseline, "baseline")


def fresh_network(config: BaselineConfig, data: RealData, generator: torch.Generator) -> nn.Module:
    """A newly initialised ConvNet with the width, depth and norm of ``config``, on the device of the data."""
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


def initial_images(
    config: BaselineConfig, data: RealData, hook: Hook, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Initial images float [K*IPC,C,H,W], sorted by class, and their labels int64 [K*IPC].

    Raises:
        EmptyClassError: a class has no usable sample.
        NotEnoughSamplesError: a class has fewer usable samples than IPC.
    """
    k, device = data.num_classes, data.images.device
    if config.init == "noise":
        shape = (k * config.ipc, *data.images.shape[1:])
        images = torch.randn(shape, generator=generator).to(device)
        return images, torch.arange(k, device=device).repeat_interleave(config.ipc)
    rows = []
    for c in range(k):
        indices = hook.sample(c, config.ipc, generator)
        if len(indices) < config.ipc:
            ways = ["Lower the IPC (--ipc)", 'start from noise (init "noise"; --loop.init noise)']
            if hook.enabled:
                ways.append("let the method trust more of the class")
            do = ", or ".join(ways)
            expected = f"at least IPC = {config.ipc} usable samples of class {c}"
            raise NotEnoughSamplesError(explain(expected, str(len(indices)), do))
        rows.append(data.images[indices])
    return torch.cat(rows).clone(), torch.arange(k, device=device).repeat_interleave(config.ipc)


def check_loss(loss: Tensor | float, iteration: int) -> float:
    """The value of a matching loss, in one transfer. Raises NonFiniteError if it is NaN or infinite."""
    value = float(loss)
    if not math.isfinite(value):
        do = "Lower lr_img; the last checkpoint of the run is intact"
        raise NonFiniteError(explain("a finite matching loss", f"{value} at iteration {iteration}", do))
    return value
