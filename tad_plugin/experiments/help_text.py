"""The short help of the command line: the flags that most people need, at most 40 lines."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from tad_plugin.core.registry import available_methods, load_method
from tad_plugin.distill.baseline import baseline_names
from tad_plugin.errors import unknown_name
from tad_plugin.utils.settings import bounds_text

__all__ = ["LINES", "methods_text", "short_help"]

LINES = 40
"""Most lines of a short help."""

_WIDTH = 118
_FIRST = (
    "--arm", "--arms", "--dataset", "--noise", "--baseline", "--ipc", "--iterations", "--seeds", "--seed", "--out",
    "--jobs", "--experts", "--epochs", "--fix", "--to", "--format", "--size", "--images", "--checkouts", "--verdict",
    "--labels", "--device", "--eval_network", "--methods", "--loop", "--width", "--per_class", "--image_size",
    "--overwrite", "--pictures", "--launcher", "--shared", "--config",
)  # fmt: skip


def short_help(parser: Any, verbs: dict[str, Any]) -> str:
    """Usage, description and the first flags of a parser, or its verbs, in at most ``LINES`` lines.

    Args:
        parser: an argparse parser.
        verbs: name -> parser, for the top level; empty for a verb.
    """
    usage = parser.format_usage().strip().splitlines()[0]
    lines = [usage, "", *(parser.description or "").rstrip().splitlines()]
    if verbs:
        lines += ["", "Verbs:"]
        lines += [_line(name, (sub.description or "").splitlines()[0]) for name, sub in verbs.items()]
        return "\n".join([*lines, "", "tad-plugin VERB --help tells more."]) + "\n"
    actions = [a for a in parser._actions if a.help != "==SUPPRESS=="]
    placed = [a for a in actions if not a.option_strings and a.metavar != "CONFIG"]
    named = {a.option_strings[-1]: a for a in actions if a.option_strings}
    named = {flag: a for flag, a in named.items() if not flag.startswith(("--print_", "--help", "--loop.help"))}
    order = sorted(named, key=lambda f: (not named[f].required, _FIRST.index(f) if f in _FIRST else len(_FIRST)))
    body = [_line(str(a.dest), a.help or "") for a in placed]
    room = LINES - len(lines) - len(body) - 4
    body += [_line(flag, _explained(named[flag])) for flag in order[:room]]
    rest = len(order) - min(room, len(order))
    end = f"{rest} more flags: {usage.split()[1]} {parser_verb(usage)} --help_all" if rest else "--help_all tells more."
    return "\n".join([*lines, "", *body, "", end]) + "\n"


def parser_verb(usage: str) -> str:
    """The verb in a usage line: "usage: tad-plugin distill ..." -> "distill"."""
    words = usage.split()
    return words[2] if len(words) > 2 else ""


def _explained(action: Any) -> str:
    text = " ".join(str(action.help or "").replace("%%", "%").split())
    if action.required:
        return f"{text} (required)"
    default = action.default
    return text if default in (None, "", [], {}) or "default" in text else f"{text} ({default})"


def _line(name: str, text: str) -> str:
    line = f"  {name:18} {' '.join(text.split())}"
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3].rstrip() + "..."


def methods_text(name: str = "") -> str:
    """What is registered: all methods with their settings and the baselines, or one method explained.

    Args:
        name: of a method; "" lists all.

    Raises:
        UnknownNameError: no method of that name.
    """
    if not name:
        lines = []
        for each in available_methods():
            cls = load_method(each)
            lines.append(f"{each}: {(cls.__doc__ or '').strip().splitlines()[0]}")
            for field in dataclasses.fields(cls.Config) if cls.Config is not None else ():
                default = field.default if field.default is not dataclasses.MISSING else "..."
                lines.append(f"    {field.name} = {default!r}")
        return "\n".join([*lines, f"baselines: {', '.join(baseline_names())}"])
    if name not in available_methods():
        raise unknown_name("method", name, available_methods())
    cls = load_method(name)
    lines = [f"{name}: {inspect.getdoc(cls)}", ""]
    if cls.Config is None:
        return "\n".join([*lines, "It has no settings."])
    about = inspect.getdoc(cls.Config) or ""
    explained = dict(re.findall(r"^    (\w+): ((?:.|\n        )+)", about, re.MULTILINE))
    lines.append(f"""Settings, as in --methods '{{"{name}": {{"{dataclasses.fields(cls.Config)[0].name}": ...}}}}':""")
    for field in dataclasses.fields(cls.Config):
        default = field.default if field.default is not dataclasses.MISSING else "..."
        bounds = bounds_text(cls.Config, field.name)
        span = f"; {bounds}" if bounds else ""
        lines += [f"  {field.name} = {default!r}{span}", f"      {' '.join(explained.get(field.name, '').split())}"]
    return "\n".join(lines)
