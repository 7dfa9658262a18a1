"""Facts about the machine for a run's results: versions, device, peak memory, command line."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from tad_plugin.errors import ConfigError, InvalidInputError, LackOfMemoryError, explain

__all__ = [
    "byte_count",
    "check_device",
    "command_line",
    "free_memory_bytes",
    "named_memory_error",
    "peak_memory_bytes",
    "reset_peak_memory",
    "versions",
]

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def check_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        InvalidInputError: no such device, or one without memory ("meta").
    """
    expected, do = "a device of this machine", "Pass 'cpu', or 'cuda' where torch.cuda.is_available()"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(explain(expected, f"{device!r} ({reason})", do)) from error
    if found.type == "meta":
        raise InvalidInputError(explain(expected, repr(str(found)), do))
    return found


def named_memory_error(error: BaseException) -> LackOfMemoryError | None:
    """The named error for a lack of memory, whichever library ran out of it; None for other errors."""
    text = str(error).partition("\n")[0]
    lacking = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    if not lacking and not (isinstance(error, RuntimeError) and "allocate memory" in text):
        return None
    do = "Take fewer or smaller images, a lower width, or smaller batches; the same command goes on"
    return LackOfMemoryError(explain("enough memory", text[:300] or "a MemoryError", do))


def versions(device: str | torch.device = "cpu") -> dict[str, str]:
    """Versions that figures depend on, and the name of the device.

    Returns:
        Keys python, torch, torchvision, numpy, tad_plugin, platform, device. The version of a package that is not
        installed (one used from its source tree) is "not installed".
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
    """Peak memory in bytes since the process began, or since :func:`reset_peak_memory` if that returned True.

    On a CUDA device this is the memory of tensors on it. Elsewhere it is the resident memory of the process, or None
    if the system does not report it (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # The kernel's own peak: that of getrusage cannot be reset.
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
    """Resets :func:`peak_memory_bytes`, so that one process can measure several runs.

    Returns:
        Whether it worked: always on a CUDA device, elsewhere if ``/proc/self/clear_refs`` can be written (Linux).
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


def byte_count(text: str, name: str) -> int:
    """Bytes that a text such as "16GB", "500 MiB" or "4096" says. GB are 10^9 bytes, GiB 2^30.

    Args:
        text: a positive number and a unit.
        name: its flag or argument, for the message.

    Raises:
        ConfigError: another text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ConfigError(explain(f"an amount of memory in {name}", repr(text), "Write for example 16GB or 500MiB"))
    return int(float(found[1]) * unit)


def free_memory_bytes(device: str | torch.device = "cpu") -> int | None:
    """Bytes that a process may hope for on a device; None if the system does not say.

    On a CUDA device what is free now, with what PyTorch holds and does not use. Elsewhere the memory of the machine, or
    the limit of its container, whatever other processes use: so it is the same for every run on a machine.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return min(found, default=None)


def command_line() -> str:
    """The command that started this process, quoted for a shell. The program's folder is left out."""
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
        pass  # not Linux; there the platform module knows the processor
    return platform.processor() or platform.machine()
