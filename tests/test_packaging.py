"""The package as it is installed, and the scripts that set it up."""

from __future__ import annotations

import ast
import configparser
import fnmatch
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tad_plugin
from tad_plugin.core.callback import Callback
from tests import ROOT
from tests.test_layout import MODULES

PACKAGE = ROOT / "tad_plugin"
OPTIONAL = ("cleanlab", "jinja2", "jsonargparse", "matplotlib", "pandas", "ray", "sklearn", "tqdm", "yaml")
SCRIPTS = ("tests/run.sh", "tests/wheel.sh", "reproduce/quickstart.sh", "reproduce/setup_env.sh", ".ci/run")


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# what is declared


def test_requirements_have_lower_bounds_and_no_upper_ones(config: configparser.ConfigParser) -> None:
    core = lines(config["options"]["install_requires"])
    needed = {"torch", "torchvision", "kornia", "scipy", "numpy", "safetensors", "filelock"}
    assert {line.split(">=")[0] for line in core} == needed
    extras = config["options.extras_require"]
    assert set(extras) == {"reproduce", "cluster", "parquet", "test"}
    for line in core + [line for extra in extras.values() for line in lines(extra)]:
        assert line.count(">=") == 1 and not any(sign in line for sign in ("<", "==", "~=", "!=")), line


def test_version_changelog_and_citation_agree(config: configparser.ConfigParser) -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    newest = next(line for line in changes if line.startswith("## ")).split()[1]
    assert newest == citation["version"] == config["metadata"]["version"] == tad_plugin.__version__
    papers = {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]}
    assert papers >= {"2502.05027", "2510.27253"}  # TAD, IWD; those of the loops follow
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])


def test_every_entry_point_names_something_that_exists(config: configparser.ConfigParser) -> None:
    points = config["options.entry_points"]
    methods = dict(tuple(map(str.strip, line.split("="))) for line in lines(points["tad_plugin.methods"]))
    assert set(methods) == {"tad", "iwd", "oracle", "loss-prune", "el2n", "clean-then-distil", "random", "verdict"}
    for target in methods.values():
        module, name = target.split(":")
        cls = getattr(importlib.import_module(module), name)
        assert isinstance(cls, type) and issubclass(cls, Callback), target
    (script,) = lines(points["console_scripts"])
    module, name = script.split("=")[1].strip().split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_folder_with_code_is_a_package() -> None:
    for path in MODULES.values():
        assert (path.parent / "__init__.py").exists(), path.parent


def test_every_data_file_is_installed(config: configparser.ConfigParser) -> None:
    patterns = lines(config["options.package_data"]["tad_plugin"])
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            name = path.relative_to(PACKAGE).as_posix()
            assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    assert (PACKAGE / "py.typed").exists()


def test_every_patch_is_installed(config: configparser.ConfigParser) -> None:
    assert config["options.data_files"]["share/tad_plugin/patches"] == "patches/README.md"
    for folder in sorted(p for p in (ROOT / "patches").iterdir() if p.is_dir()):
        place = f"share/tad_plugin/patches/{folder.name}"
        assert config["options.data_files"][place] == f"patches/{folder.name}/*"


# imports


def test_everything_imports_without_the_extras() -> None:
    """An optional package is imported where it is used, so that the core alone is enough for everything else."""
    code = f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


HEAVY = (
    "IPython", "PIL", "cleanlab", "jinja2", "jsonargparse", "kornia", "matplotlib", "pandas", "pyarrow", "ray", "scipy",
    "sklearn", "tensorboard", "torchvision", "transformers", "wandb", "yaml",
)  # fmt: skip


def test_import_tad_plugin_is_light() -> None:
    """``import tad_plugin`` loads nothing that only the command line, reports and readers need."""
    code = f"""
import sys
import torch
before = set(sys.modules)
import tad_plugin
new = set(sys.modules) - before
print(*sorted(name for name in new if name.split(".")[0] in {HEAVY!r}))
late = ("experiments", "cli", "upstream", "distill", "evaluate", "selection")
print(*sorted(name for name in new if name.startswith(tuple(map("tad_plugin.".__add__, late)))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_package_that_is_imported_is_declared(config: configparser.ConfigParser) -> None:
    """Each third-party package that the code names is a requirement or in an extra, under its import name."""
    called = {"scikit-learn": "sklearn", "PyYAML": "yaml", "jsonargparse[signatures]": "jsonargparse"}
    extras = [line for extra in config["options.extras_require"].values() for line in lines(extra)]
    declared = [line.split(">=")[0] for line in [*lines(config["options"]["install_requires"]), *extras]]
    known = {called.get(name, name) for name in declared} | {"tad_plugin", "PIL"}  # torchvision needs Pillow
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
                found |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    assert not found - known - set(sys.stdlib_module_names)


# the source archive


def test_the_source_archive_holds_what_the_readme_uses(tmp_path: Path) -> None:
    """Every file of the repository but hidden settings: tests with their folders, reproduce/, patches/, the texts."""
    skipped = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "runs", "data", "build", "dist", "venv", "wt")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("tad_plugin", "tests", "reproduce", "patches"):
            own = (
                skipped if path.name != "tad_plugin" and path.name != "tests" else shutil.ignore_patterns("__pycache__")
            )
            shutil.copytree(path, copy / path.name, ignore=own)
        elif path.is_file() and (not path.name.startswith(".")):
            shutil.copy(path, copy)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(copy).as_posix()
        for path in copy.rglob("*")
        if path.is_file() and ".egg-info" not in str(path) and path.suffix != ".pyc"
    }
    assert not wanted - names
    assert {"CHANGELOG.md", "CITATION.cff", "reproduce/quickstart.sh", "tests/run.sh", "patches/dm/dm.patch"} <= names


# scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if script != "reproduce/setup_env.sh":  # that one is sourced
        text = (ROOT / script).read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
        assert os.access(ROOT / script, os.X_OK)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the set-up script, and an active environment whose pip only records its calls."""
    repository = tmp_path / "some where" / "repository"  # a path with a blank must work
    (repository / "reproduce").mkdir(parents=True)
    shutil.copy(ROOT / "reproduce" / "setup_env.sh", repository / "reproduce")
    for name in ("setup.cfg", "pyproject.toml"):
        (repository / name).write_text("[metadata]\n")
    fake_python(repository / "environment" / "bin" / "python")
    return repository


def fake_python(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(
        f"""#!/usr/bin/env bash
if [ "${{1:-}} ${{2:-}}" = "-m pip" ]; then
    echo "$PWD $*" >>"$PIP_CALLS"
    exit "${{PIP_STATUS:-0}}"
fi
exec "{sys.executable}" "$@"
"""
    )
    path.chmod(0o755)


def set_up(repository: Path, *extras: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = repository.parent / "calls"
    calls.write_text("")
    command = f'set -euo pipefail; source "$1/reproduce/setup_env.sh"; setup_env {" ".join(extras)}; command -v python'
    variables = {"PATH": os.environ["PATH"], "PIP_CALLS": str(calls), "VIRTUAL_ENV": str(repository / "environment")}
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(repository)],
        cwd="/",
        env={k: v for k, v in {**variables, **environment}.items() if v},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, lines(calls.read_text())


def test_pip_runs_only_when_something_changed(repository: Path) -> None:
    done, calls = set_up(repository, "reproduce", "test")
    assert done.returncode == 0, done.stderr
    assert calls == [f"{repository} -m pip install --disable-pip-version-check -e .[reproduce,test]"]
    assert lines(done.stdout)[-1] == str(repository / "environment" / "bin" / "python")
    assert set_up(repository, "reproduce", "test")[1] == []
    assert set_up(repository, "reproduce")[1] == []  # a part of what is installed
    assert len(set_up(repository, "cluster")[1]) == 1  # an extra that is not
    (repository / "setup.cfg").write_text("[metadata]\nname = x\n")
    assert len(set_up(repository, "reproduce")[1]) == 1
    assert set_up(repository, "reproduce")[1] == []
    assert len(set_up(repository, "reproduce", "test")[1]) == 1  # "test" was installed under the old setup.cfg


def test_a_failed_install_is_reported_and_tried_again(repository: Path) -> None:
    done, _ = set_up(repository, "reproduce", PIP_STATUS="1")
    assert done.returncode == 1 and "error: Expected pip to install tad_plugin[reproduce]" in done.stderr
    assert len(set_up(repository, "reproduce")[1]) == 1


def test_a_broken_active_environment_is_named(repository: Path) -> None:
    done, _ = set_up(repository, "reproduce", VIRTUAL_ENV=str(repository / "absent"))
    assert done.returncode == 1 and "VIRTUAL_ENV" in done.stderr


def path_with(folder: Path, version: str, modules_there: bool) -> str:
    """A PATH on which every python has the version given, beside the few tools that the script needs."""
    folder.mkdir()
    for tool in ("bash", "cat", "dirname", "mkdir"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    old = "sys.version_info" if version < "3.1" else "nothing of the kind"
    missing = "ensurepip" if not modules_there else "nothing of the kind"
    (folder / "python3").write_text(
        f'#!/usr/bin/env bash\n[ "$1" = --version ] && {{ echo "Python {version}"; exit 0; }}\n'
        f'case "$*" in *"{old}"*|*"{missing}"*) exit 1;; esac\nexit 0\n'
    )
    (folder / "python3").chmod(0o755)
    return str(folder)


def test_without_a_python_that_fits_the_message_says_what_to_install(repository: Path) -> None:
    old = path_with(repository.parent / "old", "3.09", True)
    done, _ = set_up(repository, "reproduce", VIRTUAL_ENV="", PATH=old)
    assert done.returncode == 1 and "Expected Python 3.10 or newer on PATH, but got Python 3.09" in done.stderr
    bare = path_with(repository.parent / "bare", "3.12", False)
    done, _ = set_up(repository, "reproduce", VIRTUAL_ENV="", PATH=bare)
    assert done.returncode == 1 and "apt install python3-venv" in done.stderr
    assert not (repository / ".venv").exists()


@pytest.mark.parametrize("status", [0, 1, 5])
def test_continuous_integration_passes_on_how_the_tests_ended(tmp_path: Path, status: int) -> None:
    for folder in (".ci", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "tests" / "run.sh").write_text(f'test "$PWD" = "{tmp_path}" && exit {status}\n')
    assert subprocess.run(["bash", str(tmp_path / ".ci" / "run")], cwd="/").returncode == status


def test_a_failing_step_fails_the_whole_check(tmp_path: Path) -> None:
    """run.sh with a stand-in for each tool: each must run, and the first failure must end it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "reproduce").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    stand_in = f'REPOSITORY="{tmp_path}"\nsetup_env() {{ echo "setup $*"; }}\n'
    (tmp_path / "reproduce" / "setup_env.sh").write_text(stand_in)
    python = tmp_path / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nshift\necho "$*"\n[ "${FAIL:-}" != "$1" ]\n')
    python.chmod(0o755)

    def check(fail: str) -> tuple[int, list[str], str]:
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAIL": fail}
        command = ["bash", str(tmp_path / "tests" / "run.sh"), "tests/nn", "-k", "a b"]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, [line.split()[0] for line in lines(done.stdout)], done.stdout

    status, steps, output = check("")
    assert (status, steps) == (0, ["setup", "ruff", "mypy", "pytest"])
    assert "setup reproduce test\n" in output and output.endswith(" tests/nn -k a b\n")
    assert check("pytest")[0] != 0
    assert check("mypy")[:2] == (1, ["setup", "ruff", "mypy"])
    assert check("ruff")[:2] == (1, ["setup", "ruff"])
