"""Settings: types, bounds, nested settings, rules over several fields, and what messages name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from tad_plugin.errors import ConfigError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.utils.settings import Settings, build_config, setting


@dataclass
class Inner(Settings):
    prefix: ClassVar[str] = "inner."
    rate: float = setting(0.5, above=0, below=1)


@dataclass
class Outer(Settings):
    prefix: ClassVar[str] = "outer."
    count: int = setting(3, at_least=1)
    share: float = setting(0.1, at_least=0, at_most=1)
    limit: float | None = setting(None, above=2)
    low: int = setting(0, below=5)
    half: float = setting(0.5, above=0, at_most=0.5)
    most: float = setting(0.0, at_most=7)
    mode: str = setting("fast", one_of=("fast", "exact"))
    name: str = ""
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    free: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (1, 1)

    def check(self) -> None:
        self.require(
            self.count <= 10 or self.mode == "fast", "count of at most 10 in mode 'exact'", self.count, "Lower"
        )


@dataclass(frozen=True, kw_only=True)
class Frozen(Settings):
    size: int = setting(at_least=1)
    inner: Inner = dataclasses.field(default_factory=Inner)


GOOD: list[dict[str, Any]] = [
    {},
    {"count": 1, "share": 0.0, "limit": 2.5, "low": -(10**9), "half": 0.5, "most": 7.0},
    {"count": np.int64(4), "share": np.float32(0.5), "limit": None, "most": 1},
    {"mode": "exact", "name": "x", "on": True, "free": {"a": object()}, "size": [1, 2]},
    {"count": 11},
]


@pytest.mark.parametrize("values", GOOD)
def test_values_inside_their_bounds_are_taken(values: dict[str, Any]) -> None:
    made = Outer(**values)
    assert all(getattr(made, name) == value for name, value in values.items())
    assert build_config(Outer, values, "the test") == made


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("count", 0, "of at least 1"),
        ("share", -0.1, "in [0, 1]"),
        ("share", 1.1, "in [0, 1]"),
        ("limit", 2, "above 2"),
        ("low", 5, "below 5"),
        ("half", 0.0, "in (0, 0.5]"),
        ("half", 0.6, "in (0, 0.5]"),
        ("most", 7.5, "of at most 7"),
        ("mode", "slow", "out of fast, exact"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_field_bound_and_value(name: str, value: Any, bound: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer(**{name: value})
    assert f"outer.{name} {bound}, but got {value!r}." in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1.0), ("count", "3"), ("count", True), ("count", None), ("count", math.nan),
        ("share", "0.1"), ("share", False), ("share", math.nan), ("share", math.inf), ("share", -math.inf),
        ("limit", math.inf), ("limit", "none"), ("most", -math.inf),
        ("mode", 3), ("mode", None), ("name", 3), ("on", 1), ("on", "true"),
        ("inner", 3), ("inner", None), ("maybe", "x"), ("free", [1]), ("free", None),
    ],
)  # fmt: skip
def test_a_value_of_another_type_and_an_infinite_one_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer(**{name: value})
    assert f"outer.{name} as " in str(caught.value) and repr(value) in str(caught.value)


def test_nested_settings_come_from_a_mapping_and_are_checked() -> None:
    made = Outer(inner={"rate": 0.25}, maybe={})  # type: ignore[arg-type]
    assert made.inner == Inner(0.25) and made.maybe == Inner()
    for name in ("inner", "maybe"):
        with pytest.raises(ConfigError, match=r"inner\.rate in \(0, 1\), but got 1"):
            Outer(**{name: {"rate": 1}})
        with pytest.raises(ConfigError, match=rf"outer\.{name}.* rate.*speed"):
            Outer(**{name: {"speed": 1}})


def test_rules_over_several_fields() -> None:
    with pytest.raises(ConfigError, match=r"outer\.count of at most 10 .* got 11\. Lower"):
        Outer(count=11, mode="exact")


def test_frozen_settings_and_required_fields() -> None:
    made = Frozen(size=2, inner={"rate": 0.25})  # type: ignore[arg-type]
    assert made.inner.rate == 0.25 and dataclasses.replace(made, size=3).size == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.size = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="size of at least 1, but got 0"):
        Frozen(size=0)
    with pytest.raises(ConfigError, match="size"):
        build_config(Frozen, {}, "the test")


@pytest.mark.parametrize("values", [[1], "count", 3])
def test_only_a_mapping_is_built_from(values: Any) -> None:
    with pytest.raises(ConfigError, match="the test"):
        build_config(Outer, values, "the test")


def test_unknown_names_are_listed_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, {"cuont": 1, "count": 1, "modus": ""}, "the test")
    assert "count, free, half" in str(caught.value) and "cuont, modus" in str(caught.value)
    assert build_config(Outer, None, "the test") == Outer()


@dataclass
class Foreign:
    """A dataclass of another package, with its own check."""

    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("negative")


def test_a_foreign_dataclass_is_built_as_well() -> None:
    assert build_config(Foreign, {"rate": 1.0}, "the test") == Foreign(1.0)
    with pytest.raises(ConfigError, match="rate='x'"):
        build_config(Foreign, {"rate": "x"}, "the test")


@pytest.mark.parametrize("value", [2**64, -(10**400)])
def test_whole_numbers_that_no_machine_counts_are_named(value: int) -> None:
    for name in ("iterations", "eval_lr", "eval_runs"):
        with pytest.raises(ConfigError, match=name):
            RunConfig(**{name: value})
    assert RunConfig(seed=2**64 - 1).seed == 2**64 - 1
