"""Checks of the attached methods: against the data, against a state file, and at the end of a run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, StateMismatchError, TadPluginWarning, explain

__all__ = ["check_needs", "finish_lines", "new_methods"]


def check_needs(callback: Callback, data: RealData, trains_on_real: bool) -> None:
    """Raises ConfigError if a method needs images or true labels that ``data`` does not have.

    Images of shape [N,0] stand for "labels only". A loop that trains on real data needs no scorer of the plugin's own.
    """
    scored = callback.needs_scorer and not trains_on_real
    if (callback.needs_images or scored) and not data.images.numel():
        do = "Pass data=images [N,C,H,W]"
        if not callback.needs_images:
            do += (
                " or a dataset, or trains_on_real=True if your loop trains a network with hook.loss (or hook.loader and"
                " hook.criterion) and calls hook.epoch_end"
            )
        expected = f"`data` for the method {callback.name!r}, which looks at the real images"
        raise ConfigError(explain(expected, "labels only", do))
    if callback.needs_true_labels and data.true_labels is None:
        do = "Pass true_labels=..., or use a method that needs none"
        raise ConfigError(explain(f"true_labels for the method {callback.name!r}", "none", do))


def new_methods(
    configs: Mapping[str, Any], callbacks: Sequence[Callback], method: str, path: str | Path
) -> list[Callback]:
    """Checks the settings in a state file against the attached methods.

    Args:
        configs: method name -> settings, as the file's header has them.
        callbacks: the attached methods.
        method: their names, for messages.
        path: the file, for messages.

    Returns:
        The attached methods that the file does not know.

    Raises:
        StateMismatchError: the file is of methods that are not attached, or was written with other settings.
        ConfigError: a method that the file does not know needs a scorer.
    """
    way_out = f"Attach the methods and settings that the file was written with, or delete {path} to compute it again"
    foreign = sorted(set(configs) - {c.name for c in callbacks})
    if foreign:
        got = f"one that {', '.join(foreign)} wrote, in {path}"
        raise StateMismatchError(explain(f"a state of the method {method!r}", got, way_out))
    for callback in callbacks:
        mine = json.loads(json.dumps(callback.settings(), default=str))
        old = configs.get(callback.name, mine)
        if old != mine:
            keys = sorted(k for k in {*old, *mine} if old.get(k) != mine.get(k))
            got = "; ".join(f"{k}: {old.get(k)!r} in the file, {mine.get(k)!r} now" for k in keys)
            expected = f"a state written with the same settings of {callback.name!r}"
            raise StateMismatchError(explain(expected, got, way_out))
    new = [c for c in callbacks if c.name not in configs]
    names = ", ".join(c.name for c in new if c.needs_scorer)
    if configs and names:
        raise ConfigError(explain(f"a state file that {names} helped to write", f"{path} without it", way_out))
    return new


def finish_lines(callbacks: Sequence[Callback], state: SampleState, usage: Usage, *, decided: bool, waits: str) -> str:
    """One line for each method: what it decided, and how often the loop asked.

    Args:
        callbacks: the methods.
        state: the sample state.
        usage: the counts.
        decided: the state came from a file, or the methods were told that they are done.
        waits: why the loop's network was not scored, or "".

    Warns:
        TadPluginWarning: a method that never acted: every sample has its label and weight 1.
    """
    lines = []
    for callback in callbacks:
        acted = decided or callback.acted(state=state)
        what = callback.decision(state=state) if acted else "nothing: every sample keeps its label and weight 1"
        lines.append(f"tad_plugin: {callback.name} decided {what}. Asked: {usage.text()}.")
        if not acted:
            do = callback.acts_when + (f". So far: {waits}" if waits else "")
            got = "none: every sample is trusted with its label and weight 1"
            warnings.warn(explain(f"a decision of {callback.name!r}", got, do), TadPluginWarning, stacklevel=4)
    return "\n".join(lines)
