"""The verbs for checkouts of public codebases: ``tad-plugin patch`` and ``tad-plugin run``.

They need only the core packages, not the extras.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tad_plugin.errors import ConfigError, explain
from tad_plugin.upstream.checkout import plan_apply, plan_reverse, status, write_changes
from tad_plugin.upstream.git_folder import head_commit, origin
from tad_plugin.upstream.guide import guide_text, left_lines, preview, status_text
from tad_plugin.upstream.make_patch import write_patch
from tad_plugin.upstream.patch import load_patch, only_files, patches_folder
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import SWITCHES, needed_switches

__all__ = ["ABOUT", "VERBS"]

ABOUT = {
    "patch": "Add the few lines of the hook to a checkout of a public codebase, or remove them.",
    "run": "Run a script of a (patched or unmodified) checkout on a current machine.",
}


_CODES = {
    "patched": 0,
    "patched and edited": 3,
    "unpatched": 4,
    "edited": 5,
    "partly patched": 6,
    "not this repository": 7,
}


def _patch(arguments: Sequence[str]) -> int:
    codes = ", ".join(f"{code} {condition}" for condition, code in _CODES.items())
    parser = argparse.ArgumentParser(
        prog="tad-plugin patch",
        description=f"{ABOUT['patch']} The content of the files decides: other edits, line endings and commits do not "
        "matter where the lines around a place are those of the codebase. All files are changed, or none.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = {
        "apply": "add the lines where lines on both sides match",
        "check": "say if apply would succeed; change nothing",
        "guide": "print for each line the file, the place and what to paste; change nothing",
        "reverse": "remove the lines, found by their content; other edits stay",
        "status": f"show the condition of the files; exit status: {codes}",
        "make": "write a patch from two copies of a codebase, one with the lines put in by hand",
    }
    for action, text in about.items():
        sub = actions.add_parser(action, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("repo", help="name of the patch: a folder of patches/, such as dm")
        sub.add_argument("path", help="folder of the checkout" + (", as it is" if action == "make" else ""))
        sub.add_argument("--patches", default=None, help="folder of the patches; those of tad_plugin by default")
        if action == "make":
            sub.add_argument("--edited", required=True, metavar="PATH", help="a copy of it with the lines of the hook")
            sub.add_argument("--repository", default=None, help="address of the codebase; by default where git got it")
            sub.add_argument("--commit", default=None, help="its commit; by default the checked-out one")
        else:
            sub.add_argument("--files", default="", metavar="A,B", help="only these files of the patch")
        if action in ("apply", "reverse"):
            sub.add_argument("--dry_run", action="store_true", help="show the changes as a diff and make none")
    values = parser.parse_args(arguments)
    if values.action == "make":
        return _make(values)
    patch = only_files(load_patch(values.repo, values.patches), _names(values.files))
    found = status(patch, values.path)
    if values.action == "status":
        print(status_text(patch, found))
        return _CODES[found.condition]
    if values.action == "guide":
        print(guide_text(patch, found))
        return 0
    changes = (plan_reverse if values.action == "reverse" else plan_apply)(patch, values.path)
    if values.action == "check":
        lines = ", ".join(f"{state.file.added - len(state.own)} lines to {state.file.path}" for state in found.files)
        print(f"{patch.name}: can be applied: {lines}")
        return 0
    if values.dry_run:
        print(preview(changes))
    else:
        for place in write_changes(changes):
            print(f"{'patched' if values.action == 'apply' else 'restored'} {place}")
    if values.action == "reverse":
        for line in left_lines(changes):
            print(f"tad-plugin patch: not a line of the patch, left in {line}", file=sys.stderr)
    return 0


def _make(values: argparse.Namespace) -> int:
    repository, commit = values.repository or origin(values.path), values.commit or head_commit(values.path)
    if not repository or not commit:
        flag = "--commit" if repository else "--repository"
        raise ConfigError(explain(flag, f"none, and none in {values.path}/.git", f"Pass {flag}"))
    folder = values.patches or patches_folder()
    for place in write_patch(values.repo, values.path, values.edited, folder, repository=repository, commit=commit):
        print(f"wrote {place}")
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
