"""Settings: dataclasses whose fields declare their bounds. One way to build and check them, one form of message.

::

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

from tad_plugin.errors import ConfigError, explain, suggestion

__all__ = ["Settings", "bounds_text", "build_config", "setting"]

_BOUNDS = "tad_plugin.bounds"


@dataclass(frozen=True)
class _Bounds:
    """Limits of a number, or the values allowed; None means no limit."""

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
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Collection[Any] | None = None,
) -> Any:
    """A field of a :class:`Settings` dataclass, with its default and its bounds. None is never checked against them.

    Args:
        default: the default value; leave it out for a field that must be given.
        at_least: smallest number allowed.
        above: the number must be larger than this.
        at_most: largest number allowed.
        below: the number must be smaller than this.
        one_of: the values allowed; the other bounds are then ignored.
    """
    bounds = _Bounds(at_least, above, at_most, below, None if one_of is None else tuple(one_of))
    return dataclasses.field(default=default, metadata={_BOUNDS: bounds})


class Settings:
    """Base of every settings dataclass, frozen or not.

    Creating an instance checks each field: its type (bool, int, float, str, dict or another Settings), that a number
    is finite, and the bounds declared with :func:`setting`. A field of a Settings type also accepts a mapping. Fields
    of other types are not checked. Rules over several fields go into :meth:`check`.

    Raises:
        ConfigError: a value of a wrong type or out of its bounds.
    """

    #: stands before a field's name in messages, for example "scorer."
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Mapping) and (nested := _nested(hints[field.name])) is not None:
                value = build_config(nested, value, f"`{self.prefix}{field.name}`")
                object.__setattr__(self, field.name, value)  # also in a frozen dataclass
            expected = _wrong_type(hints[field.name], value)
            if expected is not None:
                self.require(False, f"{field.name} as {expected}", repr(value))
            bounds = _declared_bounds(type(self), field.name)
            if bounds is not None and value is not None and not bounds.hold(value):
                self.require(False, f"{field.name} {bounds}", repr(value))
        self.check()

    def check(self) -> None:
        """Rules over several fields. An override calls ``super().check()`` first."""

    def require(self, condition: bool, expected: str, got: object, do: str = "Correct the setting") -> None:
        """Raises ConfigError unless ``condition``. ``expected`` begins with the name of the setting."""
        if not condition:
            raise ConfigError(explain(f"{self.prefix}{expected}", str(got), do))


def bounds_text(cls: type, name: str) -> str:
    """The declared bounds of a setting in words, such as "in (0, 1]"; "" without any."""
    bounds = _declared_bounds(cls, name)
    return "" if bounds is None or bounds == _Bounds() else str(bounds)


def _declared_bounds(cls: type, name: str) -> _Bounds | None:
    """Bounds of a field. A subclass that changes only its default keeps those of its base."""
    fields = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((f.metadata[_BOUNDS] for f in fields if f is not None and _BOUNDS in f.metadata), None)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types in a hint: int | None -> (int, NoneType)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (typing.get_origin(hint) or hint,)


def _nested(hint: Any) -> type[Settings] | None:
    return next((t for t in _members(hint) if isinstance(t, type) and issubclass(t, Settings)), None)


def _wrong_type(hint: Any, value: Any) -> str | None:
    """What was expected, in words, if ``value`` is not of the hinted type; None if it is, or if nothing is checked."""
    names: list[str] = []
    for member in _members(hint):
        found = _fits(member, value)
        if found is None or found[0]:
            return None
        names.append(found[1])
    return " or ".join(names)


def _fits(member: Any, value: Any) -> tuple[bool, str] | None:
    """Whether ``value`` is of this type, and the type in words; None for a type that is not checked."""
    number = not isinstance(value, bool)  # True counts as 1 in Python, and is a mistake here
    if member in (int, float) and number and isinstance(value, numbers.Integral) and abs(int(value)) >= 2**64:
        return False, "a number below 2**64"
    if member is bool:
        return isinstance(value, bool), "true or false"
    if member is int:
        return number and isinstance(value, numbers.Integral), "a whole number"
    if member is float:
        return number and isinstance(value, numbers.Real) and math.isfinite(value), "a finite number"
    if member is str:
        return isinstance(value, str), "text"
    if member is dict:
        return isinstance(value, Mapping), "a mapping"
    if member is type(None):
        return value is None, "nothing"
    if isinstance(member, type) and issubclass(member, Settings):
        return isinstance(value, member), "a mapping of settings"
    return None


def build_config(cls: type, values: Mapping[str, Any] | None, owner: str) -> Any:
    """Builds the settings dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass, usually a :class:`Settings`. Methods from other packages may bring any dataclass.
        values: some of its fields; None takes the defaults.
        owner: the owner of the settings, for messages.

    Raises:
        ConfigError: not a mapping, an unknown key, a missing one, or a value of a wrong type or range. The message
            lists the known keys if one is unknown.
    """
    if values is not None and not isinstance(values, Mapping):
        do = "Write name: value pairs"
        raise ConfigError(explain(f"a mapping of settings of {owner}", repr(values), do))
    values = dict(values or {})
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        expected = f"settings of {owner} out of {', '.join(sorted(known))}"
        do = suggestion(unknown[0], known) or "Remove or rename the unknown ones"
        raise ConfigError(explain(expected, ", ".join(unknown), do))
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing, or a foreign dataclass fails on a value of another type
        given = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise ConfigError(
            explain(f"settings of {owner} of the right types", given, f"Correct them: {error}")
        ) from error
