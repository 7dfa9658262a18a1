"""The verb ``tad-plugin audit``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.errors import ConfigError, explain
from tad_plugin.experiments.audit.audit import AuditConfig, audit
from tad_plugin.experiments.audit.correct import check_fix, write_corrected
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.flags import check_picture_packages
from tad_plugin.utils.write_errors import check_path

__all__ = ["ABOUT", "NOT_FOR_AUDIT", "add_audit_arguments", "audit_verb"]

ABOUT = "Judge every label of a dataset: a list of suspects with pictures, and a corrected image folder."

_DATA = {"dataset", "root", "per_class", "noise", "labels", "zca", "image_size", "seed", "device"}
NOT_FOR_AUDIT = {f.name for f in dataclasses.fields(RunConfig)} - _DATA
"""Settings of :class:`RunConfig` that an audit does not use."""


def add_audit_arguments(parser: Any) -> None:
    """Adds the flags of ``audit`` that are not those of the data."""
    default = AuditConfig()
    parser.add_argument("--out", type=str, required=True, help="folder for suspects.csv, summary.json and index.html")
    parser.add_argument("--method", type=str, default=default.method, help="whose rule judges the predictions")
    parser.add_argument("--folds", type=int, default=default.folds, help="parts, each judged by the others' networks")
    parser.add_argument("--networks", type=int, default=default.networks, help="networks per part")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="passes; later ones train without suspects")
    parser.add_argument("--epochs", type=int, default=default.scorer.epochs, help="epochs of each network")
    parser.add_argument("--width", type=int, default=default.scorer.width, help="channels of each network")
    parser.add_argument("--fix", type=str, default="", help="link, copy, move or csv: write a corrected dataset")
    parser.add_argument("--to", type=str, default="", help="new folder for the corrected dataset")
    parser.add_argument("--overwrite", type=bool, default=False, help="start over and remove an earlier audit")


def audit_verb(values: Any) -> None:
    """Runs ``tad-plugin audit``."""
    config = RunConfig.from_flags({k: v for k, v in values.as_dict().items() if k in _DATA})
    check_path(values.out, "--out")
    if values.to and not values.fix:
        raise ConfigError(explain("--fix with --to", "none", "Add --fix copy, for example"))
    if values.fix:
        check_fix(values.fix, values.to, config.dataset)
    check_picture_packages()
    scorer = ScorerConfig(epochs=values.epochs, width=values.width)
    settings = AuditConfig(values.method, values.folds, values.networks, values.rounds, scorer)
    found = audit(config, settings, values.out, progress=True, overwrite=values.overwrite)
    counts = found.results["verdicts"]
    print(f"{found.results['samples']:,} samples, about {100 * found.results['noise_rate']:.0f}% wrong labels")
    print(", ".join(f"{word} {count:,}" for word, count in counts.items()))
    if quality := found.results["quality"]:
        print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in quality.items()))
    for name in ("suspects.csv", "summary.json", "index.html"):
        print(Path(values.out) / name)
    if values.fix:
        written = write_corrected(found.rows, config.dataset, values.to, values.fix)
        print(f"{values.to}: " + ", ".join(f"{word} {count:,}" for word, count in written.items()))
