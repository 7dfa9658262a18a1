"""Parsing of the command line: plain switches, and close names for verbs, flags and keys that do not exist."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, TadPluginError, explain, missing_extra, suggestion, unknown_name
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.help_text import short_help

__all__ = ["check_given", "flags_of", "parsed", "parser_class", "with_help", "with_switches"]

SWITCHES = {"overwrite", "pictures", "dry_run"} | {
    name
    for config in (RunConfig, ExpertConfig)
    for name, hint in typing.get_type_hints(config).items()
    if hint is bool or bool in typing.get_args(hint)
}
"""Flags that stand for "true" without a value."""

_WORDS = {"true", "false", "yes", "no", "on", "off", "null"}
_OPEN = ("--loop.", "--methods.")


_WHOLE: ContextVar[bool] = ContextVar("whole_help", default=False)
"""True while --help_all is answered."""


def with_help(given: Sequence[str]) -> list[str]:
    """The arguments with --help for --help_all, which then shows all flags."""
    _WHOLE.set("--help_all" in given)
    return ["--help" if word == "--help_all" else word for word in given]


def parser_class() -> Any:
    """jsonargparse's parser, whose errors suggest close names and name flags as the user writes them.

    Raises:
        MissingExtraError: jsonargparse is not installed.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise missing_extra("jsonargparse", "reproduce", "the command line") from error

    class Parser(ArgumentParser):  # type: ignore[misc]
        """Flags are not abbreviated: a misspelt one could be taken for another."""

        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, allow_abbrev=False, **more)

        def format_help(self, *args: Any, **more: Any) -> str:
            """The short help; all flags where --help_all is asked for."""
            if _WHOLE.get():
                return str(super().format_help(*args, **more))
            return short_help(self, _verbs(self))

        def error(self, message: str, ex: Exception | None = None) -> Any:
            """Prints usage and message and ends with status 2."""
            return super().error(helpful(message, flags_of(self)), ex)

    return Parser


def flags_of(parser: Any, verb: str | None = None) -> list[str]:
    """All flags of a parser, or of one of its verbs: ["--out", ...]."""
    if verb is not None:
        return flags_of(_verbs(parser)[verb])
    found = [flag for action in parser._actions for flag in action.option_strings]
    for below in _verbs(parser).values():
        found += flags_of(below)
    return found


def _verbs(parser: Any) -> dict[str, Any]:
    return dict(next((a.choices for a in parser._actions if isinstance(getattr(a, "choices", None), dict)), {}))


def helpful(message: str, flags: Sequence[str]) -> str:
    """A message of the parser with flags as they are written, and with a close name for an unknown key of a file."""
    message = re.sub(
        r"(required: )\w+\.(\w+)", lambda m: m[1] + (f"--{m[2]}" if f"--{m[2]}" in flags else m[2]), message
    )
    unknown = re.search(r"does not accept option '([\w.]+)'", message)
    hint = suggestion(unknown[1], [flag[2:] for flag in flags]) if unknown else ""
    return f"{message}. {hint}" if hint else message


def with_switches(given: Iterable[str]) -> list[str]:
    """Arguments in which a plain switch has its value: ["--overwrite"] -> ["--overwrite", "true"].

    So has a setting of the loop without a value.
    """
    given = list(given)
    found = []
    for i, word in enumerate(given):
        found.append(word)
        after = given[i + 1] if i + 1 < len(given) else "--"
        if (word.removeprefix("--") in SWITCHES and word.startswith("--") and after.lower() not in _WORDS) or (
            word.startswith("--loop.") and "=" not in word and after.startswith("--")
        ):
            found.append("true")
    return found


def check_given(parser: Any, given: Sequence[str]) -> None:
    """Checks the names of the verb and of the flags before they are parsed.

    Raises:
        UnknownNameError: no such verb.
        ConfigError: no such flag; the message suggests the closest.
    """
    if not given or given[0].startswith("-"):
        return
    verb, verbs = given[0], _verbs(parser)
    if verb not in verbs:
        raise unknown_name("verb", verb, verbs)
    known = flags_of(parser, verb)
    for word in given[1:]:
        flag = word.split("=", 1)[0]
        if not re.match(r"--[A-Za-z]", flag) or flag in known or flag.startswith(_OPEN):
            continue
        do = suggestion(flag, known) or f"See: tad-plugin {verb} --help"
        if flag in flags_of(parser) and not difflib.get_close_matches(flag, known, n=1, cutoff=0.85):
            do = f"Leave it out: it would have no effect on {verb}"
        raise ConfigError(explain(f"a flag of {verb}", flag, do))


def parsed(parser: Any, given: Sequence[str]) -> Any:
    """The values of a command line. Mistakes that the parser knows end the program with status 2.

    Raises:
        ConfigError: the parser fails in another way, as jsonargparse does on some files and values.
    """
    try:
        return parser.parse_args(list(given))
    except (TadPluginError, OSError, MemoryError):
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        do = f"Correct the flags or the file of --config. See: tad-plugin {given[0]} --help"
        raise ConfigError(explain("arguments that can be read", got, do)) from error
