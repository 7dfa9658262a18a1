from __future__ import annotations

import inspect

import pytest
import torch

from tad_plugin import errors
from tad_plugin.errors import LackOfMemoryError, TadPluginError, TadPluginWarning, explain, missing_extra, unknown_name
from tad_plugin.utils.machine import named_memory_error

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def test_all_names_everything_public() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == errors.__name__
    }
    assert set(errors.__all__) == defined
    assert list(errors.__all__) == sorted(errors.__all__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_class_has_one_of_the_two_roots_and_keeps_its_message(cls: type[Exception]) -> None:
    assert issubclass(cls, TadPluginWarning) != issubclass(cls, TadPluginError)
    assert str(cls(explain("a", "b", "Do c"))) == "Expected a, but got b. Do c."
    assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.InvalidLabelsError, ValueError),
        (errors.EmptyClassError, errors.InvalidInputError),
        (errors.NonFiniteError, ArithmeticError),
        (errors.UnknownNameError, KeyError),
        (errors.MissingExtraError, ImportError),
        (errors.ResumeError, ValueError),
        (errors.ConvergenceWarning, UserWarning),
    ],
)
def test_ordinary_except_clauses_catch_ours(cls: type[Exception], builtin: type[BaseException]) -> None:
    assert issubclass(cls, builtin)


def test_explain_ends_with_one_full_stop() -> None:
    assert explain("x", "y", "Do it.") == explain("x", "y", "Do it") == "Expected x, but got y. Do it."


def test_unknown_name_suggests_the_closest_and_lists_all() -> None:
    message = str(unknown_name("dataset", "cifar1O", ["digits", "cifar10", "svhn"]))
    assert message == "Expected a dataset out of cifar10, digits, svhn, but got 'cifar1O'. Did you mean 'cifar10'."


def test_unknown_name_without_a_close_one_says_what_to_check() -> None:
    message = str(unknown_name("method", "zzzz", ["tad", "iwd"]))
    assert "'zzzz'" in message and "iwd, tad" in message and "spelling" in message


def test_unknown_name_error_prints_without_the_quotes_of_a_key_error() -> None:
    assert str(errors.UnknownNameError("plain words")) == "plain words"
    assert str(errors.UnknownNameError()) == ""


def test_missing_extra_names_package_purpose_and_command() -> None:
    message = str(missing_extra("sklearn", "reproduce", "the digits dataset"))
    assert "'sklearn'" in message and "the digits dataset" in message
    assert "pip install 'tad_plugin[reproduce]'" in message


def test_a_lack_of_memory_has_a_name() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert isinstance(named_memory_error(caught.value), LackOfMemoryError)
    assert isinstance(named_memory_error(MemoryError()), LackOfMemoryError)
    assert named_memory_error(RuntimeError("shapes")) is None and named_memory_error(ValueError("memory")) is None
