"""The verbs for checkouts of public codebases: ``tad-plugin patch`` and ``tad-plugin run``.

They need only the core packages, not the extras.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tad_plugin.errors import ConfigError, explain
from tad_plugin.upstream import patch as patching
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import SWITCHES, needed_switches

__all__ = ["ABOUT", "VERBS"]

ABOUT = {
    "patch": "Add the few lines of the hook to a checkout of a public codebase, or remove them.",
    "run": "Run a script of a (patched or unmodified) checkout on a current machine.",
}


def _patch(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tad-plugin patch",
        description=f"{ABOUT['patch']} Files are identified by their sha256; other content is refused.",
    )
    parser.add_argument(
        "action",
        choices=["apply", "check", "reverse", "status"],
        help="add the lines; check if they can be added; remove them bit for bit; show the condition of the files",
    )
    parser.add_argument("repo", help="name of the patch: a folder of patches/, such as dm")
    parser.add_argument("path", help="folder of the checkout")
    parser.add_argument("--patches", default=None, help="folder of the patches; those of tad_plugin by default")
    values = parser.parse_args(arguments)
    patch = patching.load_patch(values.repo, values.patches)
    if values.action == "status":
        found = patching.status(patch, values.path)
        print(f"{patch.name}: {found.condition} (commit {found.commit or 'unknown'}, for {patch.commit})")
        for file in patch.files:
            print(f"  {file.path}: {found.files[file.path]}, {file.added} lines")
    elif values.action == "check":
        patching.check(patch, values.path)
        lines = ", ".join(f"{file.added} lines to {file.path}" for file in patch.files)
        print(f"{patch.name}: can be applied: {lines}")
    else:
        change = patching.apply if values.action == "apply" else patching.reverse
        for place in change(patch, values.path):
            print(f"{'patched' if values.action == 'apply' else 'restored'} {place}")
    return 0


def _run(arguments: Sequence[str]) -> int:
    switches = "\n".join(f"  {s.name:12} {s.about}" for s in SWITCHES.values())
    parser = argparse.ArgumentParser(
        prog="tad-plugin run",
        usage="tad-plugin run --upstream PATH [options] -- SCRIPT.py [its arguments]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{ABOUT['run']}\nThe working directory is the folder of the script."
        f"\n\nSwitches. One is on if script and machine need it, and is then printed:\n{switches}",
    )
    parser.add_argument("--upstream", required=True, metavar="PATH", help="folder of the checkout")
    parser.add_argument(
        "--seed", type=int, default=None, help="make the run repeatable: fixed seeds, and a clock that counts calls"
    )
    parser.add_argument("--with", dest="on", default="", metavar="A,B", help="switches to force on")
    parser.add_argument("--without", dest="off", default="", metavar="A,B", help="switches to force off")
    given = list(arguments)
    if "--" not in given:
        values = parser.parse_args(given)  # --help ends here
        do = "Write: tad-plugin run --upstream PATH -- SCRIPT.py [its arguments]"
        raise ConfigError(explain("a script after --", f"none with --upstream {values.upstream}", do))
    split = given.index("--")
    values, rest = parser.parse_args(given[:split]), given[split + 1 :]
    if not rest:
        raise ConfigError(explain("a script after --", "nothing", "Name a script of the checkout"))
    script = Script.find(values.upstream, rest[0])
    on = needed_switches(script, _names(values.on), _names(values.off))
    for switch in on:
        print(f"tad-plugin run: switch {switch.name}: {switch.about}", file=sys.stderr)
    try:
        return run_script(script, rest[1:], switches=on, seed=values.seed)
    except KeyboardInterrupt:
        print("tad-plugin run: interrupted", file=sys.stderr)
        return 130


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


VERBS: dict[str, Callable[[Sequence[str]], int]] = {"patch": _patch, "run": _run}
"""Verb -> function that takes the arguments after the verb and returns the exit status."""
