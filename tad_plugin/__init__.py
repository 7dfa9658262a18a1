"""tad_plugin: dataset distillation on imperfect real data, by trust (TAD) and influence (IWD)."""

from __future__ import annotations

from tad_plugin.callback import Callback, Match, Observer, Segment
from tad_plugin.data.noise import NoiseSpec
from tad_plugin.errors import StateMismatchError, TadPluginError, TadPluginWarning
from tad_plugin.hook import Hook, add_arguments, attach
from tad_plugin.iwd.method import IWD
from tad_plugin.state import SampleState
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
]
