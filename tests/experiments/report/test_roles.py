"""Roles of arms: read from the methods, so that a method from elsewhere is drawn like the ones here."""

from __future__ import annotations

import pytest

from tad_plugin.experiments.report.comparison import _colour
from tad_plugin.experiments.report.roles import has_own_method, knows_truth, methods_of
from tad_plugin.experiments.report.style import BLUE, GREEN, ORANGE, PURPLE, VERMILLION


@pytest.mark.parametrize(
    ("arm", "truth", "own", "colour"),
    [
        ("clean", True, False, GREEN),
        ("noisy", False, False, VERMILLION),
        ("oracle", True, False, PURPLE),
        ("random", False, False, ORANGE),
        ("random-subset", False, False, ORANGE),
        ("loss-prune", False, False, ORANGE),
        ("el2n", False, False, ORANGE),
        ("clean-then-distil", False, False, ORANGE),
        ("tad", False, True, BLUE),
        ("iwd", False, True, BLUE),
        ("tad+iwd", False, True, BLUE),
        ("not registered here", False, False, ORANGE),
    ],
)
def test_roles_and_colours(arm: str, truth: bool, own: bool, colour: str) -> None:
    assert (knows_truth(arm), has_own_method(arm), _colour(arm)) == (truth, own, colour)


def test_methods_of_an_arm() -> None:
    assert [method.name for method in methods_of("tad+iwd")] == ["tad", "iwd"]
    assert [method.name for method in methods_of("random-subset")] == ["random"]
    assert methods_of("clean") == methods_of("random") == methods_of("not registered here") == []
