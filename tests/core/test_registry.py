"""Methods by name: ours and a stranger's, found the same way."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from tad_plugin.core import registry
from tad_plugin.core.callback import Callback
from tad_plugin.core.registry import GROUP, available_methods, load_method, make_callbacks
from tad_plugin.errors import ConfigError, MissingExtraError, UnknownNameError

OURS = {"tad", "iwd", "oracle", "loss-prune", "el2n", "clean-then-distil", "random"}


class Stranger(Callback):
    """Does nothing."""

    name = "stranger"


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("stranger_package")
    module.Stranger, module.number = Stranger, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stranger_package", module)
    added = {
        "stranger": "stranger_package:Stranger",
        "gone": "no_such_package:Thing",
        "lost": "stranger_package:Thing",
        "number": "stranger_package:number",
    }
    mine = registry._entries()
    mine.update({name: EntryPoint(name, value, GROUP) for name, value in added.items()})
    monkeypatch.setattr(registry, "_entries", lambda: mine)


def test_ours_are_registered_and_carry_their_names() -> None:
    assert set(available_methods()) >= OURS
    for name in OURS:
        cls = load_method(name)
        assert issubclass(cls, Callback) and cls.name == name and cls.__doc__


def test_callbacks_come_in_the_order_given_with_settings_and_seeds_of_their_own() -> None:
    a, b = make_callbacks("random + oracle", {"random": {"keep": 0.3}}, seed=5)
    assert (a.name, b.name, a.config.keep) == ("random", "oracle", 0.3)
    assert a.generator.initial_seed() != b.generator.initial_seed()
    again = make_callbacks("random+oracle", seed=5)
    other = make_callbacks("random+oracle", seed=6)
    assert again[0].generator.initial_seed() == a.generator.initial_seed() != other[0].generator.initial_seed()
    assert make_callbacks("none") == make_callbacks("") == []
    make_callbacks("random", seed=2**62)


@pytest.mark.parametrize(
    ("method", "settings", "error", "message"),
    [
        ("tadd", {}, UnknownNameError, "Expected a method out of .*tad.*, but got 'tadd'. Did you mean 'tad'"),
        ("tad++iwd", {}, UnknownNameError, "but got ''"),
        ("random+random", {}, ConfigError, "each method once"),
        ("tad+none", {}, ConfigError, '"none" alone'),
        ("random", {"tad": {}}, ConfigError, "settings for random, scorer, but got some for tad. Remove them"),
        ("random", {"random": {"kep": 1}}, ConfigError, "settings of the method 'random' out of keep, but got kep"),
        ("random", {"random": 3}, ConfigError, "a mapping of settings of the method 'random', but got 3"),
        ("random", {"random": {"keep": "many"}}, ConfigError, "of the right types, but got keep='many'"),
        ("random", {"random": {"keep": 2}}, ConfigError, r"keep in \(0, 1\]"),
        ("oracle", {"oracle": {"x": 1}}, ConfigError, "no settings for 'oracle', but got x"),
    ],
)
def test_mistakes_are_named(method: str, settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_callbacks(method, settings)


def test_a_strangers_method_is_used_like_ours(strangers: None) -> None:
    assert isinstance(make_callbacks("stranger")[0], Stranger)
    assert "stranger" in available_methods()


def test_a_broken_entry_point_is_named(strangers: None) -> None:
    for name, message in (
        ("gone", "the method 'gone' to be importable from 'no_such_package:Thing'.*no_such_package"),
        ("lost", "importable from 'stranger_package:Thing'"),
        ("number", "a Callback class behind the method 'number', but got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_method(name)


def test_a_package_that_is_only_on_the_path_is_told_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict)
    with pytest.raises(ConfigError, match="entry points of group 'tad_plugin.methods', but got none. Install"):
        load_method("tad")


def test_a_missing_extra_of_a_method_keeps_its_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy:
        value = "x:y"

        def load(self) -> Any:
            raise MissingExtraError("install it")

    monkeypatch.setattr(registry, "_entries", lambda: {"needy": Needy()})
    with pytest.raises(MissingExtraError, match="install it"):
        load_method("needy")
