"""Compatibility switches: what older scripts need in order to run on a current machine.

A switch changes torch, an import or the environment while the script runs. It never changes the checkout. A switch is
on if the script's sources and this machine need it, and can be forced on or off.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

from tad_plugin.errors import unknown_name
from tad_plugin.upstream import stand_ins
from tad_plugin.upstream.script import Script

__all__ = ["SWITCHES", "Switch", "needed_switches"]


@dataclass(frozen=True)
class Switch:
    """One compatibility switch.

    Attributes:
        name: name on the command line.
        about: one line on what it does and why.
        needed: True if the script needs it on this machine.
        on: makes the context in which the switch is on.
    """

    name: str
    about: str
    needed: Callable[[Script], bool]
    on: Callable[[Script], AbstractContextManager[None]]


def needed_switches(script: Script, on: Sequence[str] = (), off: Sequence[str] = ()) -> list[Switch]:
    """Selects the switches for a script: those it needs and those in ``on``, without those in ``off``.

    Raises:
        UnknownNameError: no switch of that name.
    """
    for name in (*on, *off):
        if name not in SWITCHES:
            raise unknown_name("switch", name, list(SWITCHES))
    return [s for s in SWITCHES.values() if s.name not in off and (s.name in on or s.needed(script))]


def _mentions(script: Script, pattern: str) -> bool:
    return re.search(pattern, script.sources, re.MULTILINE) is not None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _uses_wandb(script: Script) -> bool:
    return _mentions(script, r"^\s*import wandb")


def _wandb_variables(script: Script) -> dict[str, str]:
    """The environment variables that a script with wandb needs if no account is logged in."""
    if not _uses_wandb(script):
        return {}
    if not os.environ.get("WANDB_MODE"):
        return {} if os.environ.get("WANDB_API_KEY") else {"WANDB_MODE": "disabled"}
    # an offline run without a name has none at all, and the scripts make a path of it
    offline = os.environ["WANDB_MODE"] == "offline" and not os.environ.get("WANDB_NAME")
    return {"WANDB_NAME": script.path.stem} if offline else {}


@contextmanager
def _quiet_wandb(script: Script) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, _wandb_variables(script)))
        if not _installed("wandb"):
            stack.enter_context(stand_ins.silent_wandb(script.path.stem))
        yield


_SWITCHES = (
    Switch(
        "cpu",
        "no GPU here: .cuda(), .to('cuda') and device='cuda' leave tensors and modules on the CPU",
        lambda s: not s.gpu and _mentions(s, r"\.cuda\(|[\"']cuda:|device\s*=\s*[\"']cuda[\"']\s*[,)]"),
        lambda _: stand_ins.cpu_only(),
    ),
    Switch(
        "cpu-copies",
        "no GPU here: .cpu() copies, as it does on a GPU (otherwise every saved epoch is the live network)",
        lambda s: not s.gpu and _mentions(s, r"\.cpu\(\)\s+for\b"),
        lambda _: stand_ins.cpu_copies(),
    ),
    Switch(
        "broadcast",
        "t[:] = t[0] copies its right side first: a current torch refuses it for a batch of one (IPC 1 with DSA)",
        lambda s: _mentions(s, r"\b(\w+)\[:\]\s*=\s*\1\[0\]"),
        lambda _: stand_ins.overlapping_assignment(),
    ),
    Switch(
        "wandb",
        "nobody is logged in to wandb: it is disabled (offline runs get a name; a stand-in if it is not installed)",
        lambda s: bool(_wandb_variables(s)) or (_uses_wandb(s) and not _installed("wandb")),
        _quiet_wandb,
    ),
    Switch(
        "scipy",
        "this SciPy has no scipy.ndimage.interpolation any more: an alias of scipy.ndimage",
        lambda s: "scipy.ndimage.interpolation" in s.sources and not _installed("scipy.ndimage.interpolation"),
        lambda _: stand_ins.old_scipy(),
    ),
    Switch(
        "numpy",
        "this NumPy has no numpy.int, numpy.float and numpy.bool any more: the types of Python",
        lambda s: _mentions(s, r"\bnp\.(int|float|bool)\b"),
        lambda _: stand_ins.old_numpy(),
    ),
    Switch(
        "efficientnet",
        "efficientnet_pytorch is not installed: imported by IDC, and an error if its network is used",
        lambda s: _mentions(s, r"^\s*from efficientnet_pytorch") and not _installed("efficientnet_pytorch"),
        lambda _: stand_ins.no_efficientnet(),
    ),
    Switch(
        "torchnet",
        "torchnet is not installed (it needs visdom, which does not build): a stand-in for its ClassErrorMeter",
        lambda s: _mentions(s, r"^\s*import torchnet") and not _installed("torchnet"),
        lambda _: stand_ins.error_meters(),
    ),
    Switch(
        "checkpoints",
        "makes the folder ./checkpoints that the script writes to",
        lambda s: "./checkpoints/" in s.sources and not (s.path.parent / "checkpoints").is_dir(),
        lambda s: stand_ins.folder(s.path.parent / "checkpoints"),
    ),
    Switch(
        "topk",
        "torch.topk returns all values if a fixed number of more is requested (IDM, IPC 1: 2,560 of a class)",
        lambda s: _mentions(s, r"torch\.topk\([^)\n]*\bk=\d{3,}"),
        lambda _: stand_ins.capped_topk(),
    ),
    Switch(
        "checksums",
        "torchvision accepts CIFAR files other than the published ones (a part, JPEG copies); only by --with",
        lambda _: False,
        lambda _: stand_ins.any_checksum(),
    ),
)

SWITCHES: dict[str, Switch] = {switch.name: switch for switch in _SWITCHES}
"""All switches by name."""
