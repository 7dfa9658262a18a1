"""A run of a public codebase: its scripts one after another, unmodified or with the hook, in a copy of the checkout.

The scripts cannot resume. A run that was interrupted begins again with its first step that did not finish.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import ConfigError, TadPluginError, explain
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.grid.script_data import write_torchvision
from tad_plugin.experiments.launch import Task
from tad_plugin.upstream.checkout import apply
from tad_plugin.upstream.patch import load_patch
from tad_plugin.utils.files import atomic_write, read_json
from tad_plugin.utils.machine import command_line, versions
from tad_plugin.utils.workers import raise_if_stopped

__all__ = ["ScriptTask", "accuracy_lines", "filled_step"]

_RESULT = re.compile(r"Evaluate (\d+) random (\S+), mean = ([0-9.]+) std = ([0-9.]+)")
_LEFT_OUT = ("__pycache__", ".git", "result", "results", "data", "logged_files", "buffers")


@dataclass(frozen=True)
class ScriptTask(Task):
    """A run of the public scripts.

    Attributes:
        way: "upstream" (unmodified) or "patched" (with the hook).
        codebase: name of the codebase, which is that of its patch.
        checkout: folder of the checkout; it is copied, never changed.
        steps: command lines of its scripts; {ipc}, {seed}, {data} and {folder} are filled in.
        tad_config: settings by method, for the hook.
        data: folder for the dataset in torchvision's format, made from the dataset of ``config``.
    """

    way: str = "patched"
    codebase: str = ""
    checkout: Path = Path()
    steps: tuple[str, ...] = ()
    tad_config: Mapping[str, Any] = field(default_factory=dict)
    data: Path = Path("data")

    def __str__(self) -> str:
        return f"{self.codebase} {self.way}, {super().__str__()}"

    def absolute(self) -> ScriptTask:
        """See :meth:`Task.absolute`."""
        return dataclasses.replace(
            self, folder=self.folder.resolve(), checkout=self.checkout.resolve(), data=self.data.resolve()
        )

    def execute(self, *, progress: bool, overwrite: bool) -> dict[str, Any]:
        """Runs the steps that are not finished. A finished run returns its results.

        Raises:
            TadPluginError: a script ended with an error, or printed no accuracy.
            ResumeError: the folder holds another run.
        """
        task = self.absolute()
        folder = RunFolder(task.folder)
        with folder.claimed():
            if overwrite:
                folder.clear()
                for step in task.folder.glob("step*"):
                    shutil.rmtree(step) if step.is_dir() else step.unlink()
            record = task._record()
            found = folder.check_config(record, task._identity())
            if found is not None:
                return found
            folder.write_config(record)
            folder.write_results(task._run())
            return folder.results()

    def _record(self) -> dict[str, Any]:
        sources = hashlib.sha256()
        for path in sorted(self.checkout.rglob("*.py")):
            if not any(part in _LEFT_OUT for part in path.relative_to(self.checkout).parts):
                sources.update(path.relative_to(self.checkout).as_posix().encode() + b"\0" + path.read_bytes())
        return {
            "arm": self.arm,
            "way": self.way,
            "codebase": self.codebase,
            "sources": sources.hexdigest(),
            "steps": list(self.steps),
            "tad_config": dict(self.tad_config),
            "dataset": self.config.dataset,
            "per_class": self.config.per_class,
            "noise": self.config.noise,
            "ipc": self.config.ipc,
            "seed": self.config.seed,
        }

    def _identity(self) -> dict[str, Any]:
        return {"arm": self.arm, "ipc": self.config.ipc, "seed": self.config.seed, "way": self.way}

    def _run(self) -> dict[str, Any]:
        dataset = write_torchvision(self.config, self.data)
        checkout = self.folder / "checkout"
        shutil.rmtree(checkout, ignore_errors=True)
        try:
            shutil.copytree(self.checkout, checkout, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
            if self.way == "patched":
                apply(load_patch(self.codebase), checkout)
            seconds = sum(self._once(checkout, number, step) for number, step in enumerate(self.steps))
        finally:
            shutil.rmtree(checkout, ignore_errors=True)
        last = self.folder / f"step{len(self.steps) - 1}.txt"
        found = accuracy_lines(last.read_text(encoding="utf-8", errors="replace"))
        if not found:
            do = "Give the last step an evaluation, so that it prints one"
            raise TadPluginError(explain(f"an accuracy in {last}", "none", do))
        noise = NoiseSpec.parse(self.config.noise, seed=self.config.seed)
        return {
            **self._identity(),
            "baseline": self.config.baseline,
            "dataset": dataset,
            "per_class": self.config.per_class,
            "noise": {"kind": noise.kind, "key": noise.key, "text": self.config.noise, "rate": noise.rate or None},
            "accuracy": {"last": [found[-1]], "best": [max(found)]},
            "total_seconds": seconds,
            "versions": versions("cpu"),
            "command": command_line(),
        }

    def _once(self, checkout: Path, number: int, step: str) -> float:
        """Runs a step unless it is finished. Returns its seconds."""
        log, done = self.folder / f"step{number}.txt", self.folder / f"step{number}.json"
        if not done.exists():
            words = filled_step(step, ipc=self.config.ipc, seed=self.config.seed, data=self.data, folder=self.folder)
            began = perf_counter()
            self._step(checkout, [*words, *self._hook_flags()], log)
            atomic_write(done, json.dumps({"seconds": perf_counter() - began}))
        return float(read_json(done)["seconds"])

    def _hook_flags(self) -> list[str]:
        """Flags of the hook; none without a method and without noise, where the script runs as it is."""
        if self.way == "upstream":
            return []
        arm, flags = parse_arm(self.arm), []
        if arm.method != "none":
            config = self.folder / "tad_config.json"
            atomic_write(config, json.dumps(dict(self.tad_config)))
            flags = ["--tad_method", arm.method, "--tad_config", str(config)]
        if self.config.noise != "none" and not arm.true_labels:
            seeded = (
                self.config.noise if "seed=" in self.config.noise else f"{self.config.noise}@seed={self.config.seed}"
            )
            flags += ["--tad_noise", seeded]
        return [*flags, "--tad_state", str(self.folder / "state.safetensors")] if flags else []

    def _step(self, checkout: Path, words: list[str], log: Path) -> None:
        command = [
            sys.executable, "-m", "tad_plugin.cli", "run", "--upstream", str(checkout), "--seed", str(self.config.seed),
            "--with", "checksums", "--", *words,
        ]  # fmt: skip
        temporary = log.with_suffix(".part")
        with open(temporary, "w", encoding="utf-8") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ.copy())
            try:
                while True:
                    try:
                        code = process.wait(timeout=0.5)
                        break
                    except subprocess.TimeoutExpired:
                        raise_if_stopped()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if code:
            tail = "\n".join(temporary.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
            raise TadPluginError(
                explain(f"{words[0]} of {self.codebase} to finish", f"status {code}", f"See {temporary}")
                + f"\nIts last lines:\n{tail}"
            )
        os.replace(temporary, log)


def filled_step(step: str, *, ipc: int, seed: int, data: Path, folder: Path) -> list[str]:
    """The words of a step, with its places filled in.

    Raises:
        ConfigError: an unknown place, or no script.
    """
    values = {"ipc": str(ipc), "seed": str(seed), "data": str(data), "folder": str(folder)}
    try:
        words = [re.sub(r"\{(\w+)\}", lambda m: values[m[1]], word) for word in shlex.split(step)]
    except (KeyError, ValueError) as error:
        do = f"Use only {', '.join('{' + name + '}' for name in values)}, and quote as in a shell"
        raise ConfigError(explain("a step whose places are known", f"{step!r} ({error})", do)) from None
    if not words or not words[0].endswith(".py"):
        raise ConfigError(explain("a step that begins with a script", repr(step), "Write: main_DM.py --ipc {ipc}"))
    return words


def accuracy_lines(text: str) -> list[float]:
    """The accuracies in percent, in order, that a script of the public codebases printed after its evaluations."""
    return [100 * float(m[3]) if float(m[3]) <= 1 else float(m[3]) for m in _RESULT.finditer(text)]
