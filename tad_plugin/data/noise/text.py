"""The short text form of a noise spec (``symmetric:0.4@seed=3``), and matrices from files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tad_plugin.errors import ConfigError, FileFormatError, explain

__all__ = ["ACCEPTED", "parse_fields", "read_matrix"]

ACCEPTED = (
    "Accepted are: none, symmetric:0.4, symmetric:0.4@convention=all, asymmetric:0.4, asymmetric:0.4@map=7-1/2-7,"
    " pair:0.4, instance:0.4@spread=0.1, matrix@path=FILE.npy, matrix@rows=0.9:0.1/0.2:0.8, human:worse@path=FILE;"
    " each with @seed=3, options separated by commas, path last"
)
_LARGEST = 256 * 2**20
_OPTIONS = {"seed", "convention", "spread", "map", "rows"}


def parse_fields(text: str, rated: Collection[str]) -> dict[str, Any]:
    """The fields of a noise spec from its text form; ``rated`` are the kinds whose argument is a rate.

    Raises:
        ConfigError: not of that form.
    """

    def bad(expected: str, got: object) -> ConfigError:
        return ConfigError(explain(expected, f"{got!r} in {text!r}", ACCEPTED))

    head, at, tail = text.strip().partition("@")
    kind, colon, argument = head.partition(":")
    fields: dict[str, Any] = {"kind": kind}
    if kind in rated:
        try:
            fields["rate"] = float(argument)
        except ValueError:
            raise bad(f"a rate after '{kind}:'", argument) from None
    elif kind == "human":
        fields["key"] = argument or None
    elif colon and kind in ("none", "matrix"):  # an unknown kind is named by NoiseSpec
        raise bad(f"nothing after {kind!r}", argument)
    # A path may hold commas and equals signs, so it comes last.
    before, has_path, path = tail.partition("path=") if tail.startswith("path=") else _split_path(tail)
    if has_path:
        fields["path"] = path
    items = [item for item in before.split(",") if item]
    if at and not items and not has_path:
        raise bad("options after '@'", tail)
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or name not in _OPTIONS:
            raise bad(f"an option name=value with a name out of {', '.join(sorted(_OPTIONS))}, path", item)
        try:
            fields |= _option(name, value)
        except ValueError:
            raise bad(f"a value for {name!r}", value) from None
    return fields


def _split_path(tail: str) -> tuple[str, str, str]:
    before, mark, path = tail.partition(",path=")
    return before, mark, path


def _option(name: str, value: str) -> dict[str, Any]:
    if name == "seed":
        return {"seed": int(value)}
    if name == "spread":
        return {"spread": float(value)}
    if name == "map":
        pairs = [pair.split("-") for pair in value.split("/")]
        return {"class_map": tuple((int(a), int(b)) for a, b in pairs)}
    if name == "rows":
        return {"matrix": tuple(tuple(float(v) for v in row.split(":")) for row in value.split("/"))}
    return {name: value}


def read_matrix(path: str) -> tuple[tuple[float, ...], ...]:
    """A noise matrix [K, K] from a ``.npy`` file (no pickle) or a JSON list of lists; at most 256 MiB.

    Raises:
        FileFormatError: missing, corrupt, too large, or not a matrix of numbers.
    """
    file = Path(os.path.expanduser(path))
    try:
        if not file.is_file():  # a pipe or a device would wait for ever
            raise ValueError("no file")
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size / 2**20:.0f} MiB")
        if path.endswith(".npy"):
            values: Any = np.load(file, allow_pickle=False).tolist()
        else:
            values = json.loads(file.read_text(encoding="utf-8"))
        if not all(type(v) in (int, float) and math.isfinite(v) for row in values for v in row):
            raise TypeError("entries that are no finite numbers")
        return tuple(tuple(float(v) for v in row) for row in values)
    except Exception as error:  # the parsers raise whatever the bytes provoke
        do = "Write it with numpy.save, or as a JSON list of rows"
        raise FileFormatError(explain("a .npy or .json file with a K x K matrix", f"{path}: {error}", do)) from error
