"""The run folder: configuration, log, checkpoints and results of one run.

    config.yaml      the resolved configuration; a run resumes only with the same one
    log.jsonl        one JSON object per line
    experts/         replay buffer, if the run trains its own experts
    checkpoint/      two slots, A and B, written in turn, so that one complete checkpoint always exists
    results.json     written last: a folder that has it is done. It names the sha256 of the files that belong to it
    .lock, .lock.pid who is working in the folder

After a kill, the same command continues the run from its newest checkpoint, and the log from the line at which that
checkpoint was taken.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tad_plugin.errors import FileFormatError, ResumeError, TadPluginWarning, explain
from tad_plugin.experiments.lock import LOCK_FILES, claimed_folder
from tad_plugin.experiments.strict_json import content_digest, strict
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import atomic_write, file_digest, plain, read_json, read_yaml, remove_temporaries, yaml_text
from tad_plugin.utils.seals import sealed_json, sealed_yaml, unsealed_json
from tad_plugin.utils.write_errors import check_path, writing_to

__all__ = ["RunFolder"]

_ABSENT = "(not set)"


class RunFolder:
    """The folder of one run. It is made by the first write, or by :meth:`claimed`.

    Args:
        path: the folder.
        overwrite: remove configuration, log, checkpoints and results of an earlier run. Other files, such as pictures,
            stay until they are written again. A run that others may be working on is cleared inside :meth:`claimed`.

    Raises:
        InvalidInputError: a path that cannot exist.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = check_path(path, "--out")
        self.checkpoints = CheckpointSlots(self.path / "checkpoint")
        if overwrite:
            self.clear()

    @contextmanager
    def claimed(self) -> Iterator[RunFolder]:
        """Makes the folder and keeps other processes out of it, for the length of a with block.

        If the block fails before anything was kept that a later run could resume from, the files of this attempt are
        removed, so that a corrected command can follow in the same folder.

        Raises:
            FolderInUseError: another process is working in it; the message has its number.
            InvalidInputError, FileWriteError, DiskSpaceError: it cannot be made.
        """
        with claimed_folder(self.path):
            before = self._files()
            try:
                yield self
            except BaseException:
                self._undo(before)
                raise

    def _files(self) -> set[Path]:
        return {p for p in self.path.rglob("*") if p.is_file()}

    def _undo(self, before: set[Path]) -> None:
        """Removes the files of an attempt that added nothing from which a run goes on, and no other files.

        Configuration, log and half of a checkpoint are nothing without more.
        """
        locks = {self.path / name for name in LOCK_FILES}
        added = self._files() - before - locks
        half = {p for p in added if p.parent == self.checkpoints.path and not p.with_suffix(".json").exists()}
        useless = half | {p for p in added if p in (self.config_path, self.log_path) or p.name.startswith(".tmp-")}
        if added != useless or before & {self.config_path, self.results_path}:
            return
        for path in useless:
            path.unlink(missing_ok=True)
        if self.checkpoints.path.is_dir() and not any(self.checkpoints.path.iterdir()):
            self.checkpoints.path.rmdir()

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
        if not self.path.exists():
            return
        self.results_path.unlink(missing_ok=True)
        self.checkpoints.clear()
        self.log_path.unlink(missing_ok=True)
        self.config_path.unlink(missing_ok=True)
        remove_temporaries(self.path)
        if self.checkpoints.path.is_dir() and not any(self.checkpoints.path.iterdir()):
            self.checkpoints.path.rmdir()

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

    def config_digest(self, config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> str:
        """Sha256 (hex) of a configuration without the keys of ``ignore``, as results hold it."""
        return content_digest({key: value for key, value in strict(config).items() if key not in ignore})

    def check_config(
        self,
        config: Mapping[str, Any],
        expected: Mapping[str, Any],
        files: Collection[str] = (),
        *,
        ignore: Collection[str] = (),
        repair: bool = True,
    ) -> dict[str, Any] | None:
        """Compares an existing folder with a configuration before anything runs.

        A finished run whose configuration, results or files were lost or exchanged is not done: its results are
        removed with a TadPluginWarning, and the run goes on from its last checkpoint.

        Args:
            config: the resolved configuration.
            expected: values that the results must have, such as arm and seed.
            files: see :meth:`finished`.
            ignore: see :meth:`write_config`.
            repair: run again what was lost or exchanged; False makes it an error.

        Returns:
            The results if the run is finished; else None.

        Raises:
            ResumeError: another configuration; or checkpoints whose configuration is lost.
            FileFormatError: a finished run is not whole and ``repair`` is False.
        """
        there = self.config_path.exists()
        if there:
            self.write_config(config, ignore=ignore)
        digest = self.config_digest(config, ignore=ignore)
        results, reason = self.finished({**expected, "config_sha256": digest}, files)
        if results is not None and not there and results.get("config_sha256") == digest:
            self.write_config(config)
        elif not there and (self.is_done() or any(self.checkpoints.path.glob("*.json"))):
            do = "Put it back, choose another --out, or start over there with --overwrite"
            raise ResumeError(explain(f"config.yaml beside what a run left in {self.path}", "none", do))
        if results is None and reason:
            if not repair:
                do = f"Put it back, start over there with --overwrite, or remove {self.path}"
                raise FileFormatError(explain(f"a finished run in {self.path}", reason, do))
            do = "What is missing is run again"
            warnings.warn(explain(f"a finished run in {self.path}", reason, do), TadPluginWarning, stacklevel=3)
            self.results_path.unlink()
        return results

    # log

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one record (see :func:`strict`) to log.jsonl as one sealed line, without buffering.

        Raises:
            DiskSpaceError, FileWriteError: it cannot be written.
        """
        rest = sealed_json(strict(record), line=True).encode("utf-8")
        with writing_to(self.log_path):
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.log_path, "ab", buffering=0) as file:
                while rest:  # a full disk can take a part of a line; the next call then fails
                    rest = rest[file.write(rest) :]

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
                raise _unreadable(self.log_path, f"line {number} as it was written", str(error)) from error
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

    def write_results(self, results: Mapping[str, Any], files: Collection[str] = ()) -> None:
        """Writes results.json (see :func:`strict`) with its seal, which makes the run done.

        Args:
            results: the results.
            files: names of files in the folder that belong to them. Their sha256 are written under "files".
        """
        found = strict(results)
        if files:
            found["files"] = {name: file_digest(self.path / name) for name in files}
        atomic_write(self.results_path, sealed_json(found))

    def results(self) -> dict[str, Any]:
        """The contents of results.json.

        Raises:
            FileFormatError: there is none, it is not a JSON object, or it was changed after it was written.
        """
        results = read_json(self.results_path)
        if not isinstance(results, dict):
            raise _unreadable(self.results_path, "a JSON object", f"a {type(results).__name__}")
        return results

    def finished(self, expected: Mapping[str, Any], files: Collection[str] = ()) -> tuple[dict[str, Any] | None, str]:
        """The results of a finished run, if they and their files are whole.

        Args:
            expected: values that the results must have, such as arm and seed.
            files: files that must exist, for results of versions that did not name any.

        Returns:
            The results, or None with the reason in words; ("", None) where the run is not done.
        """
        if not self.is_done():
            return None, ""
        try:
            results = self.results()
        except FileFormatError as error:
            return None, str(error)
        for key, value in expected.items():
            if results.get(key, value) != value:  # earlier versions wrote fewer keys
                return None, f"results.json is of {key} {results.get(key)!r}, not {value!r}"
        for name, digest in results.get("files", dict.fromkeys(files)).items():
            path = self.path / name
            if not path.is_file():
                return None, f"{name} is missing"
            if digest is not None and file_digest(path) != digest:
                return None, f"{name} is not the file that the results were written with"
        return results, ""

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
            expected = f"{length} bytes in {self.log_path}, as when the checkpoint was taken"
            message = explain(expected, f"{size}", "The run continues, but records are missing from its log")
            warnings.warn(message, TadPluginWarning, stacklevel=3)


def _unreadable(path: Path, expected: str, got: str) -> FileFormatError:
    do = "Restore the file, or start the run over with --overwrite"
    return FileFormatError(explain(f"{expected} in {path}", got, do))


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and (tree or not prefix):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (bool(a == b) and isinstance(a, bool) == isinstance(b, bool))
