"""The role of an arm in a comparison, read from its methods: pictures and tables name no method."""

from __future__ import annotations

from tad_plugin.core.callback import Callback
from tad_plugin.core.registry import load_method, method_names
from tad_plugin.errors import UnknownNameError
from tad_plugin.experiments.arms import parse_arm

__all__ = ["has_own_method", "knows_truth", "methods_of", "told_rate"]


def methods_of(arm: str) -> list[type[Callback]]:
    """Returns the methods of an arm; none if the arm is not registered here, as in results from another machine."""
    try:
        return [load_method(name) for name in method_names(parse_arm(arm).method)]
    except UnknownNameError:
        return []


def knows_truth(arm: str) -> bool:
    """True if the arm is given the true labels: it is a reference, not a competitor."""
    return arm == "clean" or any(method.needs_true_labels for method in methods_of(arm))


def has_own_method(arm: str) -> bool:
    """True if the arm has a method that is not a rival, that is, not there only to compare with."""
    return any(not method.rival for method in methods_of(arm))


def told_rate(arm: str) -> bool:
    """True if the arm is told how many labels are wrong, which a user would have to guess."""
    return any(method.told_rate for method in methods_of(arm))
