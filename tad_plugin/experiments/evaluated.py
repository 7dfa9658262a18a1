"""What ``tad-plugin evaluate`` evaluates: the file of a synthetic set, or a run folder with its own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tad_plugin.errors import FileFormatError, explain
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.flags import NOT_FOR_EVALUATION
from tad_plugin.experiments.folder import RunFolder

__all__ = ["evaluated"]


def evaluated(config: RunConfig, path: str | Path) -> tuple[RunConfig, Path]:
    """The settings of an evaluation and the file of the synthetic set.

    In a run folder, settings that are not given are those of the run: its dataset, networks and epochs.

    Args:
        config: the settings given.
        path: the file of a synthetic set, or a run folder.

    Raises:
        FileFormatError: a folder without a run.
    """
    path = Path(path)
    if not path.is_dir():
        return config, path
    file = path / "synthetic.safetensors"
    if not file.is_file():
        do = "Pass a finished run folder, or the file of a synthetic set"
        raise FileFormatError(explain(f"{file.name} in {path}", "no such file", do))
    run = RunFolder(path).config()
    default = RunConfig()
    names = {f.name for f in dataclasses.fields(RunConfig)} - set(NOT_FOR_EVALUATION) - {"baseline", "seed", "device"}
    taken = {n: run[n] for n in names if n in run and getattr(config, n) == getattr(default, n)}
    return dataclasses.replace(config, **taken), file
