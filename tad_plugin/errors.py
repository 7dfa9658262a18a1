"""The named exceptions and warnings of tad_plugin.

Every message says what was expected, what was given, and what to do. :func:`explain` builds it.
Exceptions also inherit the built-in class that a caller would expect (``ValueError``, ``ImportError``...), so ordinary
``except`` clauses work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DisconnectedGraphError",
    "DiskSpaceError",
    "EmptyClassError",
    "FileFormatError",
    "FileWriteError",
    "FolderInUseError",
    "InvalidInputError",
    "InvalidLabelsError",
    "LackOfMemoryError",
    "MemoryBudgetError",
    "MissingExtraError",
    "NoHeldOutError",
    "NonFiniteError",
    "NotEnoughSamplesError",
    "PatchError",
    "PreprocessingMismatchError",
    "ResumeError",
    "StateMismatchError",
    "TadPluginError",
    "TadPluginWarning",
    "UnimodalClassWarning",
    "UnknownNameError",
    "WiringError",
    "explain",
    "missing_extra",
    "suggestion",
    "unknown_name",
]


def explain(expected: str, got: str, do: str) -> str:
    """A message of the form ``Expected ..., but got .... <what to do>.``"""
    return f"Expected {expected}, but got {got}. {do.rstrip('.')}."


class TadPluginError(Exception):
    """Base of every error of this package."""


class InvalidInputError(TadPluginError, ValueError):
    """An argument has a wrong type, shape, length or range."""


class InvalidLabelsError(InvalidInputError):
    """Labels are out of range, of a wrong type, or of a wrong length."""


class EmptyClassError(InvalidInputError):
    """A class has no sample where at least one is needed."""


class NotEnoughSamplesError(InvalidInputError):
    """A class has fewer samples than an operation needs."""


class NonFiniteError(TadPluginError, ArithmeticError):
    """A loss, gradient or influence is NaN or infinite."""


class UnknownNameError(TadPluginError, KeyError):
    """A method, dataset, network, baseline or arm of that name does not exist."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class ConfigError(TadPluginError, ValueError):
    """A configuration has an unknown key or a value that does not fit."""


class MissingExtraError(TadPluginError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class FileFormatError(TadPluginError, ValueError):
    """A file is truncated, corrupt, of another format or of another version."""


class StateMismatchError(TadPluginError, ValueError):
    """A saved state belongs to other data, methods or settings."""


class PreprocessingMismatchError(TadPluginError, ValueError):
    """Synthetic and test images were normalised or whitened differently."""


class ResumeError(TadPluginError, ValueError):
    """A run folder was written by another configuration than the one that resumes it."""


class PatchError(TadPluginError, ValueError):
    """A patch does not fit a checkout."""


class WiringError(TadPluginError, AssertionError):
    """The wiring check found that a loop does not use the hook as a method needs it."""


class DisconnectedGraphError(TadPluginError, ValueError):
    """A loss does not depend on the tensor in which it is differentiated."""


class NoHeldOutError(TadPluginError, ValueError):
    """An influence target needs held-out real samples and there are none."""


class ConvergenceError(TadPluginError, ArithmeticError):
    """An iterative solver stopped without reaching its tolerance."""


class MemoryBudgetError(TadPluginError, ValueError):
    """A memory budget is too small for a single sample."""


class LackOfMemoryError(TadPluginError, MemoryError):
    """There is not enough memory for a tensor."""


class DiskSpaceError(TadPluginError, OSError):
    """The disk has no room for a file."""


class FileWriteError(TadPluginError, OSError):
    """A file or folder cannot be written: no permission, a read-only disk, a name that is too long."""


class FolderInUseError(TadPluginError, RuntimeError):
    """Another process is working in a folder; the message names it."""


class TadPluginWarning(UserWarning):
    """Base of every warning of this package."""


class UnimodalClassWarning(TadPluginWarning):
    """The losses of a class show no two groups; its threshold was replaced."""


class ConvergenceWarning(TadPluginWarning):
    """An iterative solver stopped early; its result is usable but less exact."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "Did you mean 'x'" for the known name that is closest to ``name``; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown ``kind`` called ``name``, with the closest known name.

    Args:
        kind: the kind of thing ("method", "dataset", "arm or method").
        name: the name that was not found.
        known: all names that exist; a name may occur twice.
    """
    names = sorted(set(known))
    # Only methods come from other packages.
    do = "Check the spelling, or install the package that provides it" if "method" in kind else "Take one of these"
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    expected = f"{article} {kind} out of {', '.join(names)}"
    return UnknownNameError(explain(expected, repr(name), suggestion(name, names) or do))


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for an optional ``package`` that is not installed.

    Args:
        package: the import name that failed.
        extra: the extra of tad_plugin that brings it.
        purpose: a noun phrase that says what needs it.
    """
    expected, do = (
        f"the package {package!r}, which {purpose} needs",
        f"Install it with: pip install 'tad_plugin[{extra}]'",
    )
    return MissingExtraError(explain(expected, "an environment without it", do))
