"""Settings: dataclasses built from mappings, checked in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tad_plugin.errors import ConfigError, explain

if TYPE_CHECKING:
    pass

__all__ = ["build_config"]


def build_config(cls: type, values: Mapping[str, Any] | None, owner: str) -> Any:
    """An instance of the settings dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass whose fields have defaults.
        values: some of its fields; None takes the defaults.
        owner: whose settings they are, for messages.

    Raises:
        ConfigError: not a mapping, an unknown key (the known ones are named), or a value of a wrong type or range.
    """
    if values is not None and not isinstance(values, Mapping):
        do = "Write name: value pairs"
        raise ConfigError(explain(f"a mapping of settings of {owner}", repr(values), do))
    values = dict(values or {})
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        expected = f"settings of {owner} out of {', '.join(sorted(known))}"
        raise ConfigError(explain(expected, ", ".join(unknown), "Remove or rename the unknown ones"))
    try:
        return cls(**values)
    except TypeError as error:  # a comparison with a value of another type
        given = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise ConfigError(
            explain(f"settings of {owner} of the right types", given, f"Correct them: {error}")
        ) from error
