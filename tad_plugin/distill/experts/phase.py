"""The expert phase of a run of MTT or DATM: train the run's own experts, or take a buffer that is there.

Real samples act in trajectory matching through the experts alone, so this is where methods that score networks decide
(TAD: one round per epoch), before the initial images are drawn. A method that decides during distillation (IWD's
implicit influence) can act through a second phase only: the same experts, trained anew under the new weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tad_plugin.callback import build_config
from tad_plugin.checkpoints import CheckpointSlots
from tad_plugin.distill.buffers import BufferInfo
from tad_plugin.distill.expertcycle import Experts
from tad_plugin.distill.experts import ExpertConfig, train_experts
from tad_plugin.distill.loop import Place
from tad_plugin.errors import ConfigError, explain
from tad_plugin.hook import Hook
from tad_plugin.scorer import RealData

__all__ = ["PHASES", "expert_config", "expert_phase"]

PHASES = ("experts", "experts-again")
"""Folders of the two phases inside a run folder."""


def expert_config(config: Any) -> ExpertConfig:
    """The settings of a run's own experts: those of the loop's network, and as long as its segments need them.

    Args:
        config: an :class:`tad_plugin.distill.mtt.MTTConfig`; its ``experts`` mapping wins over what follows from it.

    Raises:
        ConfigError: an unknown setting, another network than the loop's, or too few epochs.
    """
    own = {"width": config.width, "depth": config.depth, "norm": config.norm}
    fixed = sorted(set(config.experts) & {*own, "network"})
    if fixed:
        do = "Set width, depth and norm of the loop (--width, --loop.depth, --loop.norm)"
        raise ConfigError(explain("experts of the network that is matched on", f"own {', '.join(fixed)} for them", do))
    needed = config.max_start_epoch + config.expert_epochs
    values = {"epochs": needed, "augment": config.augment, **config.expert_defaults, **config.experts, **own}
    found: ExpertConfig = build_config(ExpertConfig, values, "the experts")
    if found.epochs < needed:
        do = "Lower max_start_epoch or expert_epochs, or train the experts for more epochs"
        raise ConfigError(
            explain(f"experts of max_start_epoch + expert_epochs = {needed} epochs", str(found.epochs), do)
        )
    return found


def expert_phase(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    """The experts of a run, trained into its folder (resumed, or found finished), or read from a buffer.

    Args:
        config: an :class:`tad_plugin.distill.mtt.MTTConfig`.
        data: the real data.
        hook: the seam to the methods, started; None for none. Afterwards the methods that score have decided.
        place: the run's folder and seed.

    Raises:
        ConfigError: settings that do not fit, or a method that scores and a buffer without its decisions.
        StateMismatchError: a buffer of other labels or another network, or a state of other methods.
        InvalidInputError: too few epochs. FileFormatError: a missing or damaged file.
    """
    if config.buffer or place.experts is not None:
        return _given(config, data, hook, place)
    return _trained(config, data, hook, place, PHASES[0], expert_config(config))


def _trained(config: Any, data: RealData, hook: Hook | None, place: Place, name: str, experts: ExpertConfig) -> Experts:
    folder = place.folder / name
    train_experts(
        data,
        experts,
        folder,
        hook=hook,
        seed=place.seed,
        preprocessing=place.preprocessing,
        every=place.every,
        progress=place.progress,
        log=place.log,
    )
    return Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=_seconds(folder))


def _again(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    """The second phase: the same seeds, so that the experts start alike and differ by the weights alone."""
    experts = expert_config(config)
    count = config.second_experts or experts.experts
    return _trained(config, data, hook, place, PHASES[1], dataclasses.replace(experts, experts=count))


def _given(config: Any, data: RealData, hook: Hook | None, place: Place) -> Experts:
    shared = place.experts
    folder, seconds = (Path(config.buffer), 0.0) if shared is None else (shared, _seconds(shared))
    found = Experts.of(folder, again=lambda: _again(config, data, hook, place), seconds=seconds)
    if hook is not None and hook.enabled and not hook.decided:
        _adopt(hook, folder, found.info)
    return found


def _adopt(hook: Hook, folder: Path, info: BufferInfo | None) -> None:
    """Takes over what the methods decided while the experts of a buffer were trained."""
    if info is not None and info.state_file:
        hook.adopt(folder / info.state_file)
    elif scoring := [c.name for c in hook.callbacks if c.needs_scorer]:
        got = f"{folder} without one"
        do = f"Train the experts with the method (tad-plugin experts --arm {hook.method}), or leave --loop.buffer out"
        raise ConfigError(explain(f"a buffer with the state that {', '.join(scoring)} decided on", got, do))
    hook.settle()


def _seconds(folder: Path) -> float:
    saved = CheckpointSlots(folder / "checkpoint").load()
    return float(saved.tree["seconds"]) if saved is not None else 0.0
