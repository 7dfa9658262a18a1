"""Runs a script of a public codebase on a current machine, with the few switches that older code needs.

A switch changes torch or the environment while the script runs, never the checkout. Each is off unless the script's
sources and this machine call for it, and can be forced on or off.
"""

from __future__ import annotations

import importlib.util
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import PatchError, explain, unknown_name
from tad_plugin.upstream import stand_ins as standins

__all__ = ["SWITCHES", "Script", "Switch", "needed_switches"]


@dataclass(frozen=True)
class Script:
    """A script of a checkout.

    Attributes:
        root: folder of the checkout, absolute.
        path: the script, absolute.
        sources: text of all its Python files, for :attr:`Switch.needed`.
        gpu: whether this machine has a GPU that torch can use.
    """

    root: Path
    path: Path
    sources: str
    gpu: bool

    @classmethod
    def find(cls, root: str | Path, script: str) -> Script:
        """The script ``script`` (a path inside the checkout ``root``). Raises PatchError where there is none."""
        folder = Path(root).expanduser().resolve()
        path = (folder / script).resolve()
        if not path.is_file():
            do = "Pass the checkout's folder with --upstream, and a path inside it after --"
            raise PatchError(explain(f"the script {script} in {folder}", "no such file", do))
        files = sorted(p for p in folder.rglob("*.py") if _belongs(p, folder))
        text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in (path, *files))
        return cls(folder, path, text, torch.cuda.is_available())


def _belongs(path: Path, root: Path) -> bool:
    """Whether a file is the codebase's own: under ``root``, but in no hidden folder or environment made there."""
    if not path.is_relative_to(root) or path.is_relative_to(Path(__file__).resolve().parent):
        return False
    return not any(p.startswith(".") or p in ("site-packages", "dist-packages") for p in path.relative_to(root).parts)


@dataclass(frozen=True)
class Switch:
    """One compatibility switch.

    Attributes:
        name: on the command line.
        about: what it does.
        needed: whether the script needs it on this machine.
        on: makes the context in which it is on.
    """

    name: str
    about: str
    needed: Callable[[Script], bool]
    on: Callable[[Script], AbstractContextManager[None]]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside; an inherited attribute is inherited again afterwards."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


# -- switches --------------------------------------------------------------------------------------
def _is_cuda(value: Any) -> bool:
    return str(value).startswith("cuda") if isinstance(value, str | torch.device) else False


@contextmanager
def _cpu(_script: Script) -> Iterator[None]:
    def stay(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def move(original: Any) -> Any:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
            kwargs = {k: "cpu" if _is_cuda(v) else v for k, v in kwargs.items()}
            return original(self, *args, **kwargs)

        return to

    with ExitStack() as stack:
        for owner in (torch.Tensor, torch.nn.Module):
            stack.enter_context(_replaced(owner, "cuda", stay))
            stack.enter_context(_replaced(owner, "to", move(owner.to)))
        yield


@contextmanager
def _cpu_copies(_script: Script) -> Iterator[None]:
    original = torch.Tensor.cpu

    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = original(self, *args, **kwargs)
        return moved.clone() if moved.data_ptr() == self.data_ptr() else moved

    with _replaced(torch.Tensor, "cpu", cpu):
        yield


@contextmanager
def _broadcast(_script: Script) -> Iterator[None]:
    original = torch.Tensor.__setitem__

    def setitem(self: torch.Tensor, index: Any, value: Any) -> None:
        base = self if self._base is None else self._base
        if isinstance(value, torch.Tensor) and value._base is base:
            value = value.clone()
        original(self, index, value)

    with _replaced(torch.Tensor, "__setitem__", setitem):
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def _uses_wandb(script: Script) -> bool:
    return re.search(r"^\s*import wandb", script.sources, re.MULTILINE) is not None


def _wandb_values(script: Script) -> dict[str, str]:
    """What is missing from the environment for a script that logs to wandb and has no account to log to."""
    if not _uses_wandb(script):
        return {}
    if not os.environ.get("WANDB_MODE"):
        return {} if os.environ.get("WANDB_API_KEY") else {"WANDB_MODE": "disabled"}
    # Without a name an offline run has none at all, and a path is made of it.
    offline = os.environ["WANDB_MODE"] == "offline" and not os.environ.get("WANDB_NAME")
    return {"WANDB_NAME": script.path.stem} if offline else {}


@contextmanager
def _quiet_wandb(script: Script) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_environment(_wandb_values(script)))
        if not _installed("wandb"):
            stack.enter_context(standins.silent_wandb(script.path.stem))
        yield


def _lacks_old_scipy(script: Script) -> bool:
    return "scipy.ndimage.interpolation" in script.sources and not _installed("scipy.ndimage.interpolation")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def _old_scipy(_script: Script) -> Iterator[None]:
    import scipy.ndimage

    name = "scipy.ndimage.interpolation"
    alias = types.ModuleType(name)
    vars(alias).update({k: v for k, v in vars(scipy.ndimage).items() if not k.startswith("__")})
    with standins.imported({name: alias}):
        yield


_SWITCHES = (
    Switch(
        "cpu",
        "there is no GPU: .cuda() and .to('cuda') leave tensors and modules where they are",
        lambda s: not s.gpu and re.search(r"\.cuda\(|[\"']cuda:", s.sources) is not None,
        _cpu,
    ),
    Switch(
        "cpu-copies",
        "there is no GPU: .cpu() copies, as it does from one (or every saved epoch would be the live network)",
        lambda s: not s.gpu and re.search(r"\.cpu\(\)\s+for\b", s.sources) is not None,
        _cpu_copies,
    ),
    Switch(
        "broadcast",
        "t[:] = t[0] copies its right side first: a current torch refuses it for a batch of one (IPC 1 with DSA)",
        lambda s: re.search(r"\b(\w+)\[:\]\s*=\s*\1\[0\]", s.sources) is not None,
        _broadcast,
    ),
    Switch(
        "wandb",
        "nobody is logged in to wandb: it runs disabled (an offline run gets a name; where it is missing, a stand-in)",
        lambda s: bool(_wandb_values(s)) or (_uses_wandb(s) and not _installed("wandb")),
        _quiet_wandb,
    ),
    Switch(
        "scipy",
        "scipy.ndimage.interpolation is gone from this SciPy: an alias of scipy.ndimage",
        _lacks_old_scipy,
        _old_scipy,
    ),
    Switch(
        "torchnet",
        "torchnet is not installed (it wants visdom, which does not build): a stand-in for its ClassErrorMeter",
        lambda s: re.search(r"^\s*import torchnet", s.sources, re.MULTILINE) is not None and not _installed("torchnet"),
        lambda _: standins.error_meters(),
    ),
    Switch(
        "checkpoints",
        "the folder ./checkpoints that the script writes to is made",
        lambda s: "./checkpoints/" in s.sources and not (s.path.parent / "checkpoints").is_dir(),
        lambda s: standins.folder(s.path.parent / "checkpoints"),
    ),
    Switch(
        "topk",
        "torch.topk gives all there are where a fixed number of more is asked for (IDM, IPC 1: 2,560 of a class)",
        lambda s: re.search(r"torch\.topk\([^)\n]*\bk=\d{3,}", s.sources) is not None,
        lambda _: standins.capped_topk(),
    ),
    Switch(
        "checksums",
        "torchvision takes CIFAR files that are not the published ones (a part of them, JPEG copies); only by --with",
        lambda _: False,
        lambda _: standins.any_checksum(),
    ),
)

SWITCHES: dict[str, Switch] = {switch.name: switch for switch in _SWITCHES}
"""All switches by name."""


def needed_switches(script: Script, on: Sequence[str] = (), off: Sequence[str] = ()) -> list[Switch]:
    """The switches that are on for a script: those it needs and those in ``on``, without those in ``off``.

    Raises:
        UnknownNameError: no switch of that name.
    """
    for name in (*on, *off):
        if name not in SWITCHES:
            raise unknown_name("switch", name, list(SWITCHES))
    return [s for s in SWITCHES.values() if s.name not in off and (s.name in on or s.needed(script))]
