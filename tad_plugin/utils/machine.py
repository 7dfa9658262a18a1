"""What a run's results must say about the machine: versions, peak memory, the command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["command_line", "peak_memory_bytes", "reset_peak_memory", "versions"]


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
    """The most memory held since the process began, or since :func:`reset_peak_memory` where that works, in bytes.

    On a CUDA device: what tensors took of it. Elsewhere: the process's resident memory, everything included;
    None where the system does not tell it (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # The kernel's own mark: getrusage does not forget what ran in this process before a reset.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, others KiB


def reset_peak_memory(device: str | torch.device = "cpu") -> bool:
    """Lets :func:`peak_memory_bytes` count from now on, so that one process can measure several runs.

    Returns:
        Whether it could: always on a CUDA device, else where ``/proc/self/clear_refs`` can be written (Linux).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


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
