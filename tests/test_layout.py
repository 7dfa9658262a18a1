"""The layout of the package: who may import whom, what stands where, and names that exist."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "tad_plugin"
#: folder or module of the root package -> the others that it may import
ALLOWED: dict[str, set[str]] = {}
for below, names in (
    ("", "errors"),
    ("errors", "utils"),
    ("errors utils", "nn data"),
    ("errors utils nn data", "core"),
    ("errors utils nn data core", "tad iwd selection distill"),
    ("errors utils core", "upstream"),
    ("errors utils nn data core distill", "evaluate"),
    ("errors utils nn data core distill evaluate upstream", "experiments"),
    ("errors utils nn data core distill evaluate experiments upstream", "cli"),
):
    ALLOWED |= {name: set(below.split()) for name in names.split()}
#: the public names come from here
FACE = {"errors", "core", "data", "tad", "iwd"}
#: files that are named and not in the repository: made by runs, or examples; those that patches change come too
ENTRY_POINT_GROUPS = {"tad_plugin.methods", "tad_plugin.baselines"}
ELSEWHERE = {"table.md", "report.md", "load.py", "SCRIPT.py", "a/train.py", "b/train.py"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> list[tuple[str, str]]:
    """(module of ours, name taken from it or "") for every import of a file, also in functions and for types only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (str(node.module), alias.name))
    return [(module, name) for module, name in found if module in MODULES]


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


# arrows


def test_the_root_package_holds_the_layout_and_nothing_else() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert files == {"__init__.py", "errors.py", "evaluate.py", "cli.py", "py.typed"}
    assert folders | {Path(f).stem for f in files if f.endswith(".py")} - {"__init__"} == set(ALLOWED)


def test_arrows_point_down_only() -> None:
    wrong = []
    for name, found in IMPORTS.items():
        here = top(name)
        allowed = FACE if name == "tad_plugin" else ALLOWED[here] | {here}  # KeyError: give the new module a rank
        for target, taken in found:
            version = here == "cli" and (target, taken) == ("tad_plugin", "__version__")
            if top(target) not in allowed and not version:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target, _ in IMPORTS[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


# names


def defined(path: Path) -> set[str]:
    """Names that a module defines itself at its top level."""
    found: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        pending += ast.iter_child_nodes(node)
    return found


def test_each_name_is_imported_from_the_module_that_defines_it() -> None:
    names = {module: defined(path) for module, path in MODULES.items()}
    scripts = [*(ROOT / "reproduce").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    places = {**IMPORTS, **{path.relative_to(ROOT).as_posix(): imports(path) for path in scripts}}
    wrong = []
    for place, found in places.items():
        for module, name in found:
            public = MODULES[module].name == "__init__.py" and place not in MODULES  # for users, scripts and tests
            if name and not public and name not in names[module]:
                wrong.append(f"{place} takes {name} from {module}")
    assert not wrong


def test_public_names_exist_and_are_their_modules_own() -> None:
    for module, path in MODULES.items():
        public = set(getattr(importlib.import_module(module), "__all__", ()))
        if path.name != "__init__.py":
            assert public <= defined(path), f"{module}: {sorted(public - defined(path))}"
        for name in public:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_nothing_shadows_a_module() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            package = importlib.import_module(module)
            for found in pkgutil.iter_modules([str(path.parent)]):
                inner = importlib.import_module(f"{module}.{found.name}")
                assert getattr(package, found.name) is inner, f"{module}.{found.name}"


# files and words


def prose() -> dict[str, str]:
    """All Markdown files and the package's sources, by path."""
    pages = [p for p in ROOT.rglob("*.md") if p.relative_to(ROOT).parts[0] not in (".venv", "venv", "runs", "build")]
    paths = [*MODULES.values(), *(p for p in pages if ".pytest_cache" not in p.parts)]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


PROSE = prose()
PAGES = sorted(name for name in PROSE if name.endswith(".md"))


def test_files_stay_small() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: size for name, size in sizes.items() if size > 400}


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_stay_short(page: str) -> None:
    long, fenced = [], False
    for number, line in enumerate(PROSE[page].splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        code = fenced or line.startswith("    ")
        if len(line) > 120 and not code and not line.startswith("|"):
            long.append(number)
    assert not long


def test_the_files_that_are_named_exist() -> None:
    roots = [p for p in ROOT.iterdir() if p.name in ("tad_plugin", "tests", "reproduce", "patches") or p.is_file()]
    files = [file for p in roots for file in ([p] if p.is_file() else p.rglob("*"))]
    ours = {"/" + p.relative_to(ROOT).as_posix() for p in files if p.suffix in (".py", ".md", ".sh")}
    foreign = set(ELSEWHERE)
    for manifest in (ROOT / "patches").glob("*/manifest.json"):
        foreign |= {name for path in json.loads(manifest.read_text())["files"] for name in (path, Path(path).name)}
    wrong = []
    for place, text in PROSE.items():
        if place == "CHANGELOG.md":  # names what is gone
            continue
        for name in re.findall(r"[\w/-]+\.(?:py|md|sh)\b", text):
            if name not in foreign and not any(path.endswith("/" + name.lstrip("/")) for path in ours):
                wrong.append(f"{place}: {name}")
    assert not wrong


def test_the_modules_that_are_named_exist() -> None:
    wrong = []
    for place, text in PROSE.items():
        if place == "CHANGELOG.md":
            continue
        for name in set(re.findall(r"(?<=[`~])tad_plugin(?:\.[A-Za-z_]\w*)+", text)):
            if name not in ENTRY_POINT_GROUPS and not exists(name):
                wrong.append(f"{place}: {name}")
    assert not wrong


def exists(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if ".".join(parts[:count]) in MODULES:
            found: object = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                if not hasattr(found, part):
                    return False
                found = getattr(found, part)
            return True
    return False


def test_words_that_do_not_belong() -> None:
    for place, text in PROSE.items():
        assert "METHODS.md" not in text, place  # not in this repository
        assert place.endswith(".md") or "hook is None" not in text, place  # a loop always has a hook


def test_the_report_names_no_method() -> None:
    for name, path in MODULES.items():
        if ".report" in name:
            assert not re.search(r"\b(tad|iwd|TAD|IWD)\b(?!-plugin)", path.read_text(encoding="utf-8")), name
