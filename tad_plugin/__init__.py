"""tad_plugin: dataset distillation on imperfect real data, by trust (TAD) and influence (IWD)."""

from __future__ import annotations

from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.hook.attach import add_arguments, attach, attach_dataset
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.observer import Observer
from tad_plugin.core.state import SampleState
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import StateMismatchError, TadPluginError, TadPluginWarning
from tad_plugin.iwd.method import IWD
from tad_plugin.tad.method import TAD

__version__ = "0.1.0"

__all__ = [
    "IWD",
    "TAD",
    "Callback",
    "Hook",
    "Match",
    "NoiseSpec",
    "Observer",
    "SampleState",
    "Segment",
    "StateMismatchError",
    "TadPluginError",
    "TadPluginWarning",
    "__version__",
    "add_arguments",
    "attach",
    "attach_dataset",
]
