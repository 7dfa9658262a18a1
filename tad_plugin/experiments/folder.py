"""The run folder: configuration, log, checkpoints and results of one run.

    config.yaml      the resolved configuration; a run resumes only under the same one
    log.jsonl        one JSON object per line
    experts/         replay buffer of a run of trajectory matching that trains its own experts
    checkpoint/      two slots, A and B, written in turn, so that one whole checkpoint exists at any moment
    results.json     written last: a folder that has it is done

A run that is killed at any moment and started again with the same command continues from its newest checkpoint, and
its log continues from the line at which that checkpoint was taken.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import FileFormatError, InvalidInputError, ResumeError, TadPluginWarning, explain, missing_extra
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import atomic_write, plain, read_json, remove_temporaries
from tad_plugin.utils.machine import command_line, peak_memory_bytes, versions

__all__ = ["RunFolder", "command_line", "peak_memory_bytes", "versions"]

_ABSENT = "(not set)"


class RunFolder:
    """One run's folder, made if it does not exist. One process at a time may write to it.

    Args:
        path: the folder.
        overwrite: removes what an earlier run left there (configuration, log, checkpoints, results); other files,
            such as pictures, stay until they are written again.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                explain(f"a run folder at {self.path}", str(error.strerror or error), "Choose another --out")
            ) from error
        self.checkpoints = CheckpointSlots(self.path / "checkpoint")
        if overwrite:
            self.clear()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def config_path(self) -> Path:
        """Where the configuration is."""
        return self.path / "config.yaml"

    @property
    def log_path(self) -> Path:
        """Where the log is."""
        return self.path / "log.jsonl"

    @property
    def results_path(self) -> Path:
        """Where the results are."""
        return self.path / "results.json"

    def clear(self) -> None:
        """Removes configuration, log, checkpoints and results, the results first: a half-cleared run is not done."""
        self.results_path.unlink(missing_ok=True)
        self.checkpoints.clear()
        self.log_path.unlink(missing_ok=True)
        self.config_path.unlink(missing_ok=True)
        remove_temporaries(self.path)

    # configuration

    def write_config(self, config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> dict[str, Any]:
        """Writes config.yaml, or checks the one that is there.

        Args:
            config: the resolved configuration, nested as wanted; converted with :func:`plain`.
            ignore: dotted keys that may differ on resume because they cannot change the result ("jobs").

        Returns:
            The configuration as it reads back from YAML.

        Raises:
            ResumeError: the folder was written under another configuration; the message lists every differing key
                with both values.
            FileFormatError: the config.yaml that is there is not a YAML mapping.
            MissingExtraError: PyYAML is not installed.
        """
        yaml = _yaml()
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        new: dict[str, Any] = yaml.safe_load(text)
        if not self.config_path.exists():
            atomic_write(self.config_path, text)
            return new
        old = self.config()
        skip = set(ignore)
        there, now = dict(_flatten(old)), dict(_flatten(new))
        differing = [
            f"\n  {key}: there {there.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
            for key in [*there, *(key for key in now if key not in there)]
            if key not in skip and not _same(there.get(key, _ABSENT), now.get(key, _ABSENT))
        ]
        if differing:
            raise ResumeError(
                explain(
                    f"the configuration that {self.path} was written with",
                    f"{len(differing)} key{'s' if len(differing) > 1 else ''} that differ:{''.join(differing)}",
                    "Choose another --out, repeat the command of that run, or start over there with --overwrite",
                )
            )
        return new

    def config(self) -> dict[str, Any]:
        """The configuration that the folder was written with.

        Raises:
            FileFormatError: there is none, or it is not a YAML mapping.
        """
        yaml = _yaml()
        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise _unreadable(self.config_path, "a YAML configuration", str(error)) from error
        if not isinstance(config, dict):
            raise _unreadable(self.config_path, "a YAML mapping", f"a {type(config).__name__}")
        return config

    # log

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one record (see :func:`plain`) to log.jsonl as one line and hands it to the system at once."""
        line = json.dumps(plain(record)) + "\n"
        with open(self.log_path, "ab", buffering=0) as file:
            file.write(line.encode("utf-8"))

    def records(self) -> list[dict[str, Any]]:
        """All records of the log in their order; an unfinished last line, as a kill leaves it, does not count.

        Raises:
            FileFormatError: another line is not JSON; its number is named.
        """
        if not self.log_path.exists():
            return []
        lines = self.log_path.read_bytes().split(b"\n")[:-1]
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise _unreadable(self.log_path, f"JSON in line {number}", str(error)) from error
        return records

    # checkpoints

    def save_checkpoint(self, tree: Any, step: int) -> None:
        """Writes a checkpoint into the slot that does not hold the newest valid one.

        Args:
            tree: nested dicts, lists and tuples of tensors, numbers, strings and None: what
                ``torch.load(weights_only=True)`` can read back.
            step: how many iterations it has seen.

        Raises:
            InvalidInputError: something in the tree could not be read back; its place and type are named.
        """
        self.checkpoints.save(tree, step, log_bytes=self._sync_log())

    def load_checkpoint(self, *, map_location: str | torch.device = "cpu") -> tuple[Any, int] | None:
        """The newest valid checkpoint, and the log cut back to the moment at which it was taken.

        Call it once, before the run goes on: it also removes what a killed process left half written. Where there is
        no checkpoint the run starts over, and so does the log (unless the run is done).

        Args:
            map_location: where the tensors shall be. Generator states must stay on the CPU.

        Returns:
            (tree, step), or None where no checkpoint was ever completed.

        Raises:
            FileFormatError: there are checkpoints, but none of them is whole.
        """
        remove_temporaries(self.path)
        found = self.checkpoints.load(map_location=map_location)
        if found is None:
            if not self.is_done():
                self._cut_log(0)
            return None
        self._cut_log(found.log_bytes)
        return found.tree, found.step

    # results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json (see :func:`plain`); from then on the run is done."""
        atomic_write(self.results_path, json.dumps(plain(results), indent=1) + "\n")

    def results(self) -> dict[str, Any]:
        """What :meth:`write_results` wrote.

        Raises:
            FileFormatError: there is no results.json, or it is not a JSON object.
        """
        results = read_json(self.results_path)
        if not isinstance(results, dict):
            raise _unreadable(self.results_path, "a JSON object", f"a {type(results).__name__}")
        return results

    def is_done(self) -> bool:
        """Whether the run has written its results."""
        return self.results_path.exists()

    # private

    def _sync_log(self) -> int:
        """The log's length in bytes, once those bytes are on the disk."""
        if not self.log_path.exists():
            return 0
        with open(self.log_path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def _cut_log(self, length: int) -> None:
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        if size > length:
            os.truncate(self.log_path, length)
        elif size < length:
            warnings.warn(
                explain(
                    f"{length} bytes in {self.log_path}, as when the checkpoint was taken",
                    f"{size}",
                    "The run goes on, but records are missing from its log",
                ),
                TadPluginWarning,
                stacklevel=3,
            )


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("yaml", "reproduce", "a run's config.yaml") from error
    return yaml


def _unreadable(path: Path, expected: str, got: str) -> FileFormatError:
    return FileFormatError(
        explain(f"{expected} in {path}", got, "Restore the file, or start the run over with --overwrite")
    )


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and (tree or not prefix):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
