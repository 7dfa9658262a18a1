"""Arguments of public functions: one decorator that names what does not fit."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, NonFiniteError, TadPluginError, explain
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["finite_result", "holds_values", "named_errors"]

P = ParamSpec("P")
R = TypeVar("R")

_RAW = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, ArithmeticError, NotImplementedError)


def named_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public function raise InvalidInputError where its arguments do not fit.

    Tensors, numbers, texts, networks and generators are compared with the annotations before the call. Where PyTorch
    then refuses shapes or dtypes that do not fit together, the message shows those of all arguments. Errors of this
    package, a wrong keyword (TypeError), and a lack of memory pass unchanged.
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def named(*args: P.args, **more: P.kwargs) -> R:
        bound = signature.bind(*args, **more)
        if not hints:
            hints.update(_hints(function))
        for name, value in bound.arguments.items():
            if not _fits(value, hints.get(name, Any)):
                do = f"See the docstring of {function.__name__}"
                wanted = inspect.formatannotation(signature.parameters[name].annotation).strip("'")
                raise InvalidInputError(explain(f"`{name}` as {wanted}", _shown(value), do))
        try:
            return function(*args, **more)
        except (TadPluginError, torch.cuda.OutOfMemoryError):
            raise
        except _RAW as error:
            given = {name: value for name, value in bound.arguments.items() if name not in ("self", "cls")}
            shown = ", ".join(f"{n} {_shown(v)}" for n, v in (given or vars(bound.arguments["self"])).items())
            got = f"{shown} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            do = f"See the docstring of {function.__name__} for shapes, dtypes and ranges"
            raise InvalidInputError(explain("arguments that fit together", got, do)) from error

    return named


def finite_result(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function raise NonFiniteError where its result, a tensor or a tuple of them, holds a NaN."""

    @functools.wraps(function)
    def finite(*args: P.args, **more: P.kwargs) -> R:
        result = function(*args, **more)
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, Tensor) and bool(torch.isnan(part.detach()).any()):
                do = "Look for NaN and very large values in the arguments"
                raise NonFiniteError(explain(f"a finite result of {function.__name__}", "NaN", do))
        return result

    return finite


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function) or {"return": Any}
    except NameError:  # a type that is imported for the checker only
        return {"return": Any}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind that the annotation names; True for kinds that are not compared here."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is int:
        try:
            check_whole("", value, -(2**63), 2**63)
        except InvalidInputError:
            return False
        return True
    if hint is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # NaN is no number that a caller means.
        return (real and value == value) or (isinstance(value, Tensor) and value.ndim == 0)
    if hint is Tensor:
        return isinstance(value, Tensor) and holds_values(value)
    if hint in (str, bool, type(None), nn.Module, torch.Generator, Path):
        return isinstance(value, hint)
    if inspect.isclass(hint) and hint.__module__.startswith("tad_plugin.") and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    origin = typing.get_origin(hint) or hint
    if origin in (tuple, list):
        return isinstance(value, origin)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return True


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int | float | str | type(None)):
        return repr(value)
    return type(value).__name__


def holds_values(tensor: Tensor) -> bool:
    """True for a dense tensor with values. A meta tensor has none, unless it is a subclass that keeps them itself."""
    return tensor.layout == torch.strided and not (tensor.is_meta and type(tensor) in (Tensor, nn.Parameter))
