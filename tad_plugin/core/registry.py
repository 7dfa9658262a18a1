"""Methods found by name through the entry-point group ``tad_plugin.methods``.

Our methods are registered in the same way as those of other packages. If a package names a Callback in that group,
``attach("its-name")`` finds it without a change here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tad_plugin.core.callback import Callback
from tad_plugin.errors import ConfigError, InvalidInputError, MissingExtraError, explain, unknown_name
from tad_plugin.utils.seeds import method_seed

__all__ = ["GROUP", "available_methods", "load_method", "make_callbacks", "method_names"]

GROUP = "tad_plugin.methods"


def _entries() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=GROUP)}


def available_methods() -> list[str]:
    """Names of all registered methods, sorted; "none" is not among them."""
    return sorted(_entries())


def load_method(name: str) -> type[Callback]:
    """The Callback class registered as ``name``.

    Raises:
        UnknownNameError: no such method.
        ConfigError: the entry point cannot be imported, or does not name a Callback.
    """
    entries = _entries()
    if name not in entries:
        if not entries:
            do = "Install the package (pip install -e .); it is not enough to put it on the path"
            raise ConfigError(explain(f"the entry points of group {GROUP!r}", "none", do))
        raise unknown_name("method", name, ["none", *entries])
    try:
        cls = entries[name].load()
    except MissingExtraError:
        raise
    except (ImportError, AttributeError) as error:
        expected = f"the method {name!r} to be importable from {entries[name].value!r}"
        do = "Install or repair the package that provides it"
        raise ConfigError(explain(expected, f"{type(error).__name__}: {error}", do)) from error
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        do = f"Correct the entry point {entries[name].value!r}"
        raise ConfigError(explain(f"a Callback class behind the method {name!r}", repr(cls), do))
    return cls


def method_names(method: str) -> list[str]:
    """ "a+b" -> ["a", "b"]; "none" or "" -> []. The names are not checked. Raises InvalidInputError for no text."""
    if not isinstance(method, str):
        raise InvalidInputError(explain("a method's name", repr(method), 'Pass "none", "tad" or another name'))
    return [] if method in ("none", "") else [n.strip() for n in method.split("+")]


def make_callbacks(method: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0) -> list[Callback]:
    """The callbacks of "none", "a", "a+b"..., in the order given.

    Args:
        method: names joined by "+", or "none".
        settings: method name -> its settings. Only names in ``method``, and "scorer", are allowed.
        seed: with its position it seeds the generator of each callback.

    Raises:
        UnknownNameError: an unknown method.
        ConfigError: unknown settings, or a method named twice.
    """
    names = method_names(method)
    if "none" in names:
        raise ConfigError(explain('"none" alone', repr(method), "Leave it out, or remove the other methods"))
    if len(set(names)) != len(names):
        raise ConfigError(explain("each method once", repr(method), "Remove the repetition"))
    settings = dict(settings or {})
    extra = sorted(map(str, set(settings) - set(names) - {"scorer"}))
    if extra:
        expected, got = f"settings for {', '.join([*names, 'scorer'])}", f"settings for {', '.join(extra)}"
        raise ConfigError(explain(expected, got, "Remove them, or add the method"))
    return [load_method(n).from_settings(settings.get(n), seed=method_seed(seed, i)) for i, n in enumerate(names)]
