"""Exports the synthetic set of a run: finds it, and tells load.py how the run trained its evaluation networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tad_plugin.data.export import export_set
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.evaluate import EvaluateConfig
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import resolve
from tad_plugin.nn.networks import default_depth

__all__ = ["export_run", "export_verb"]

SYNTHETIC_FILE = "synthetic.safetensors"
"""The synthetic set in a run folder."""


def find_synthetic(path: str | Path) -> Path:
    """The file of a synthetic set: ``path`` itself, or the one in a run folder.

    Raises:
        FileFormatError: nothing is there, or a folder without a synthetic set.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / SYNTHETIC_FILE).is_file():
        return path / SYNTHETIC_FILE
    got = f"a folder without {SYNTHETIC_FILE}" if path.is_dir() else f"nothing at {path}"
    do = "Pass the --out of a finished run of distill, or OUT/ARM/ipcN/seedS of compare"
    if inside := sorted(path.glob(f"*/*/*/{SYNTHETIC_FILE}")):
        do = f"Pass one of its runs, for example {inside[0].parent}"
    raise FileFormatError(explain("a run folder, or the file of a synthetic set", f"{got} ({path})", do))


def export_run(run: str | Path, folder: str | Path, kind: str = "png", *, overwrite: bool = False) -> Path:
    """Exports the synthetic set of a run; see :func:`tad_plugin.data.export.export_set` for formats and errors.

    Args:
        run: run folder, or the file of a synthetic set. With a folder, load.py trains as the run's evaluation did:
            width, epochs, batch size and rates. With a file alone it follows the field's protocol.
        folder: where to write.
        kind: the format.
        overwrite: replace an earlier export in the folder.

    Returns:
        ``folder``.

    Raises:
        FileFormatError: there is no synthetic set, or it is damaged.
    """
    file = find_synthetic(run)
    synthetic = SyntheticSet.load(file)
    return export_set(synthetic, folder, kind, _protocol(file.parent, synthetic), overwrite=overwrite)


def _protocol(folder: Path, synthetic: SyntheticSet) -> dict[str, Any]:
    """How the networks of an evaluation are trained."""
    place = RunFolder(folder)
    found = EvaluateConfig()
    if place.config_path.is_file():
        known = {f.name for f in dataclasses.fields(RunConfig)}
        record = place.config()
        config = RunConfig(**{k: v for k, v in record.items() if k in known and k not in ("device", "methods")})
        found = resolve(config, "noisy").evaluation  # the same for all arms
    height, width = synthetic.images.shape[-2:]
    names = ("width", "epochs", "batch_size", "lr", "momentum", "weight_decay")
    return {**{n: getattr(found, n) for n in names}, "depth": found.depth or default_depth(height, width)}


def export_verb(values: Any) -> None:
    """Runs ``tad-plugin export``."""
    print(export_run(values.run, values.to, values.format, overwrite=values.overwrite))
