"""The run folder: configuration, log, checkpoints and results of one run.

    config.yaml      the resolved configuration; a run resumes only with the same one
    log.jsonl        one JSON object per line
    experts/         replay buffer, if the run trains its own experts
    checkpoint/      two slots, A and B, written in turn, so that one complete checkpoint always exists
    results.json     written last: a folder that has it is done

After a kill, the same command continues the run from its newest checkpoint, and the log from the line at which that
checkpoint was taken.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import FileFormatError, InvalidInputError, ResumeError, TadPluginWarning, explain
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import atomic_write, plain, read_json, read_yaml, remove_temporaries, yaml_text
from tad_plugin.utils.seals import sealed_json, sealed_yaml, unsealed_json

__all__ = ["RunFolder"]

_ABSENT = "(not set)"


class RunFolder:
    """The folder of one run, created if it does not exist. One process at a time may write to it.

    Args:
        path: the folder.
        overwrite: remove configuration, log, checkpoints and results of an earlier run. Other files, such as pictures,
            stay until they are written again.

    Raises:
        InvalidInputError: the folder cannot be created.
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
        """Path of config.yaml."""
        return self.path / "config.yaml"

    @property
    def log_path(self) -> Path:
        """Path of log.jsonl."""
        return self.path / "log.jsonl"

    @property
    def results_path(self) -> Path:
        """Path of results.json."""
        return self.path / "results.json"

    def clear(self) -> None:
        """Removes configuration, log, checkpoints and results. Results go first: a half-cleared run is not done."""
        self.results_path.unlink(missing_ok=True)
        self.checkpoints.clear()
        self.log_path.unlink(missing_ok=True)
        self.config_path.unlink(missing_ok=True)
        remove_temporaries(self.path)

    # configuration

    def write_config(self, config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> dict[str, Any]:
        """Writes config.yaml, or compares the existing one with ``config``.

        Args:
            config: the resolved configuration, possibly nested; see :func:`plain`.
            ignore: dotted keys that may differ on resume because they do not change the result ("jobs").

        Returns:
            The configuration as plain values.

        Raises:
            ResumeError: the folder has another configuration; the message lists every differing key with both values.
            FileFormatError: the existing config.yaml is not a YAML mapping.
            MissingExtraError: PyYAML is not installed.
        """
        new: dict[str, Any] = plain(config)
        if not self.config_path.exists():
            atomic_write(self.config_path, sealed_yaml(yaml_text(new)))
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
        """The configuration in config.yaml.

        Raises:
            FileFormatError: there is none, or it is not a YAML mapping.
            MissingExtraError: PyYAML is not installed.
        """
        config = read_yaml(self.config_path)
        if not isinstance(config, dict):
            raise _unreadable(self.config_path, "a YAML mapping", f"a {type(config).__name__}")
        return config

    # log

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one record (see :func:`plain`) to log.jsonl as one sealed line, without buffering."""
        line = sealed_json(plain(record), line=True)
        with open(self.log_path, "ab", buffering=0) as file:
            file.write(line.encode("utf-8"))

    def records(self) -> list[dict[str, Any]]:
        """All records of the log, in order. An unfinished last line, which a kill can leave, is skipped.

        A run that is done has no such line.

        Raises:
            FileFormatError: another line is not JSON or was changed; the message has its number.
        """
        if not self.log_path.exists():
            return []
        *lines, rest = self.log_path.read_bytes().split(b"\n")
        if rest and self.is_done():
            raise _unreadable(self.log_path, "whole lines", f"{len(rest)} bytes after the last one")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(unsealed_json(line.decode("utf-8")))
            except ValueError as error:
                raise _unreadable(self.log_path, f"JSON in line {number}", str(error)) from error
        return records

    def log_bytes(self) -> int:
        """Flushes the log to the disk and returns its length in bytes."""
        if not self.log_path.exists():
            return 0
        with open(self.log_path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    # checkpoints

    def save_checkpoint(self, tree: Any, step: int) -> None:
        """Writes a checkpoint to the slot that does not hold the newest valid one.

        Args:
            tree: nested dicts, lists and tuples of tensors, numbers, strings and None, as
                ``torch.load(weights_only=True)`` reads them.
            step: number of iterations done.

        Raises:
            InvalidInputError: the tree has a value that could not be read back; the message has its place and type.
        """
        self.checkpoints.save(tree, step, log_bytes=self.log_bytes())

    def load_checkpoint(
        self, *, map_location: str | torch.device = "cpu", log_bytes: int = 0
    ) -> tuple[Any, int] | None:
        """Reads the newest valid checkpoint and cuts the log back to the moment at which it was taken.

        Call it once, before the run continues. It also removes half-written files of a killed process. Without a
        checkpoint the log starts over, unless the run is done.

        Args:
            map_location: device of the tensors. Generator states must stay on the CPU.
            log_bytes: length of the log that is kept at least, because work that keeps checkpoints of its own (the
                training of experts) continues from there.

        Returns:
            (tree, step), or None if no checkpoint was completed.

        Raises:
            FileFormatError: there are checkpoints, but all are damaged; or a line of the log is.
        """
        remove_temporaries(self.path)
        found = self.checkpoints.load(map_location=map_location)
        if found is None:
            if not self.is_done():
                self._cut_log(log_bytes)
        else:
            self._cut_log(max(found.log_bytes, log_bytes))
        self.records()  # a damaged line is found before it counts
        return None if found is None else (found.tree, found.step)

    # results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json (see :func:`plain`), which makes the run done."""
        atomic_write(self.results_path, sealed_json(plain(results)))

    def results(self) -> dict[str, Any]:
        """The contents of results.json.

        Raises:
            FileFormatError: there is none, or it is not a JSON object.
        """
        results = read_json(self.results_path)
        if not isinstance(results, dict):
            raise _unreadable(self.results_path, "a JSON object", f"a {type(results).__name__}")
        return results

    def is_done(self) -> bool:
        """True if the run has written its results."""
        return self.results_path.exists()

    # private

    def _cut_log(self, length: int) -> None:
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        if 0 < length <= size and self.log_path.read_bytes()[length - 1 : length] != b"\n":
            raise _unreadable(self.log_path, f"the end of a line at byte {length}", "another character")
        if size > length:
            os.truncate(self.log_path, length)
        elif size < length:
            warnings.warn(
                explain(
                    f"{length} bytes in {self.log_path}, as when the checkpoint was taken",
                    f"{size}",
                    "The run continues, but records are missing from its log",
                ),
                TadPluginWarning,
                stacklevel=3,
            )


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
