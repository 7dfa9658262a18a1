"""Settings: dataclasses whose fields declare their bounds. One way to build and check them, one message.

@dataclass
class MyConfig(Settings):
    prefix: ClassVar[str] = "mine."
    rate: float = setting(0.1, above=0)
    mode: str = setting("fast", one_of=("fast", "exact"))
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tad_plugin.errors import ConfigError, explain

__all__ = ["Settings", "build_config", "setting"]

_BOUNDS = "tad_plugin.bounds"


@dataclass(frozen=True)
class _Bounds:
    """What a number or a name must satisfy; None for no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[Any, ...] | None = None

    def hold(self, value: Any) -> bool:
        if self.one_of is not None:
            return value in self.one_of
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.one_of is not None:
            return f"out of {', '.join(map(str, self.one_of))}"
        low = self.at_least if self.at_least is not None else self.above
        high = self.at_most if self.at_most is not None else self.below
        if low is not None and high is not None:
            opening, closing = "(["[self.at_least is not None], ")]"[self.at_most is not None]
            return f"in {opening}{low}, {high}{closing}"
        if low is not None:
            return f"of at least {low}" if self.at_least is not None else f"above {low}"
        return f"of at most {high}" if self.at_most is not None else f"below {high}"


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Collection[Any] | None = None,
) -> Any:
    """A field of a :class:`Settings` dataclass with its default and its bounds.

    Args:
        default: the value where nothing is said.
        at_least: smallest number allowed.
        above: number that the value must exceed.
        at_most: largest number allowed.
        below: number that the value must stay below.
        one_of: the values allowed; no other bound counts then.
    """
    bounds = _Bounds(at_least, above, at_most, below, None if one_of is None else tuple(one_of))
    return dataclasses.field(default=default, metadata={_BOUNDS: bounds})


@dataclass
class Settings:
    """Base of every settings dataclass.

    Creating one checks each field: its type (bool, int, float, str, dict, or another Settings, which may be given as
    a mapping), that a number is finite, and the bounds that :func:`setting` declared. Rules that concern several
    fields stand in :meth:`check`.
    """

    #: stands before a field's name in messages, for example "scorer."
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping) and (nested := _nested(hints[field.name])) is not None:
                value = build_config(nested, value, f"`{self.prefix}{field.name}`")
                object.__setattr__(self, field.name, value)
            expected = _wrong_type(hints[field.name], value)
            if expected is not None:
                self.require(False, f"{field.name} as {expected}", repr(value))
            bounds = _declared_bounds(type(self), field.name)
            if bounds is not None and value is not None and not bounds.hold(value):
                self.require(False, f"{field.name} {bounds}", repr(value))
        self.check()

    def check(self) -> None:
        """Override it for rules that concern several fields, and call ``super().check()`` first."""

    def require(self, condition: bool, expected: str, got: object, do: str = "Correct the setting") -> None:
        """Raises ConfigError unless ``condition``; ``expected`` begins with the name of the setting."""
        if not condition:
            raise ConfigError(explain(f"{self.prefix}{expected}", str(got), do))


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _declared_bounds(cls: type, name: str) -> _Bounds | None:
    """Bounds of a field. A subclass that changes only its default keeps those of its base."""
    fields = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((f.metadata[_BOUNDS] for f in fields if f is not None and _BOUNDS in f.metadata), None)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows: int | None -> (int, NoneType)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (typing.get_origin(hint) or hint,)


def _nested(hint: Any) -> type[Settings] | None:
    return next((t for t in _members(hint) if isinstance(t, type) and issubclass(t, Settings)), None)


def _wrong_type(hint: Any, value: Any) -> str | None:
    """None where the value is of the hinted type, else what was expected. Hints of other types allow everything."""
    allowed = _members(hint)
    names: list[str] = []
    for t in allowed:
        if t is bool:
            good, name = isinstance(value, bool), "true or false"
        elif t is int:
            good, name = isinstance(value, numbers.Integral) and not isinstance(value, bool), "a whole number"
        elif t is float:
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            good, name = number and math.isfinite(value), "a finite number"
        elif t is str:
            good, name = isinstance(value, str), "text"
        elif t is dict:
            good, name = isinstance(value, Mapping), "a mapping"
        elif t is type(None):
            good, name = value is None, "nothing"
        elif isinstance(t, type) and issubclass(t, Settings):
            good, name = isinstance(value, t), "a mapping of settings"
        else:
            return None
        if good:
            return None
        names.append(name)
    return " or ".join(names)


def build_config(cls: type, values: Mapping[str, Any] | None, owner: str) -> Any:
    """An instance of the settings dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass whose fields have defaults, usually a :class:`Settings`.
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
    except TypeError as error:  # a foreign dataclass that compares a value of another type
        given = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise ConfigError(
            explain(f"settings of {owner} of the right types", given, f"Correct them: {error}")
        ) from error
