"""What a run's results must say about the machine: versions, peak memory, the command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["command_line", "peak_memory_bytes", "versions"]


def versions(device: str | torch.device = "cpu") -> dict[str, str]:
    """The versions that a figure depends on, and the device's name.

    Returns:
        Keys python, torch, torchvision, numpy, tad_plugin, platform, device. A package that is used from its source
        tree without being installed is "not installed".
    """
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "tad_plugin"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    found["device"] = _device_name(torch.device(device))
    return found


def peak_memory_bytes(device: str | torch.device = "cpu") -> int | None:
    """The most memory held so far, in bytes.

    On a CUDA device: what tensors took of it since the process began or since
    ``torch.cuda.reset_peak_memory_stats``. Elsewhere: the process's resident memory, everything included;
    None where the system does not tell it (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux KiB


def command_line() -> str:
    """The command that started this process, quoted for a shell, with the program's name instead of its path."""
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name, *arguments])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows the processor there
    return platform.processor() or platform.machine()
