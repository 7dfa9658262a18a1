"""Classes that other packages register as entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TypeVar

from tad_plugin.errors import ConfigError, MissingExtraError, explain

__all__ = ["load_class"]

T = TypeVar("T")


def load_class(entry: EntryPoint, base: type[T], kind: str) -> type[T]:
    """The class behind an entry point.

    Args:
        entry: the entry point.
        base: class that it must derive from.
        kind: what it registers, for messages ("baseline").

    Raises:
        ConfigError: it cannot be imported, or is no subclass of ``base``.
        MissingExtraError: it needs an extra that is not installed.
    """
    try:
        found = entry.load()
    except MissingExtraError:
        raise
    except (ImportError, AttributeError) as error:
        expected = f"the {kind} {entry.name!r} to be importable from {entry.value!r}"
        do = "Install or repair the package that provides it"
        raise ConfigError(explain(expected, f"{type(error).__name__}: {error}", do)) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        expected = f"a subclass of {base.__name__} behind the {kind} {entry.name!r}"
        raise ConfigError(explain(expected, repr(found), f"Correct the entry point {entry.value!r}"))
    return found
