"""One audit in one folder: cross-fitted predictions, verdicts, table, page. It resumes after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tad_plugin.core.callback import Callback
from tad_plugin.core.diagnostics import average_precision
from tad_plugin.core.registry import available_methods, load_method
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.experiments.audit.cross_fit import Part, cross_fit, draw_folds
from tad_plugin.experiments.audit.page import audit_page, shown_samples
from tad_plugin.experiments.audit.table import COLUMNS, summary, suspect_rows
from tad_plugin.experiments.audit.verdicts import Verdicts, decide
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import Plan, resolve
from tad_plugin.utils.csv_file import write_csv
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import command_line, versions
from tad_plugin.utils.progress import bar
from tad_plugin.utils.settings import Settings, setting
from tad_plugin.utils.tensor_file import TensorFile

__all__ = ["Audit", "AuditConfig", "audit", "judging_methods"]

_PART = TensorFile(
    "tad_plugin.audit", "the predictions of a fold", "Remove the file; the fold is trained again", ("probabilities",)
)


@dataclass
class AuditConfig(Settings):
    """Settings of an audit, besides the data.

    Attributes:
        method: the method whose rule judges the cross-fitted predictions.
        folds: parts of the data; each is judged by networks trained on the others.
        networks: networks per fold, whose predictions are averaged.
        rounds: passes; each later one trains without the suspects of the one before.
        scorer: settings of the networks.
    """

    prefix: ClassVar[str] = "audit."

    method: str = "tad"
    folds: int = setting(4, at_least=2)
    networks: int = setting(1, at_least=1)
    rounds: int = setting(2, at_least=1)
    scorer: ScorerConfig = field(default_factory=lambda: ScorerConfig(epochs=15))


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        results: the contents of results.json: the summary, files and versions.
        rows: one for each sample, the most doubtful first.
        probabilities: float32 [N, K], cross-fitted, in the order of the training data.
        observed: int64 [N].
        verdicts: the verdicts.
    """

    results: dict[str, Any]
    rows: list[dict[str, Any]]
    probabilities: Tensor
    observed: Tensor
    verdicts: Verdicts


def judging_methods() -> list[str]:
    """Names of the registered methods that can judge cross-fitted predictions."""
    return [n for n in available_methods() if load_method(n).judge.__func__ is not Callback.judge.__func__]  # type: ignore[attr-defined]


def audit(
    config: RunConfig, settings: AuditConfig, folder: str | Path, *, progress: bool = False, overwrite: bool = False
) -> Audit:
    """Judges every sample of a dataset, or resumes, or reads a finished audit.

    Args:
        config: the data: dataset, root, labels and noise, per_class, image_size, zca, seed, device.
        settings: the other settings.
        folder: output folder.
        progress: show a progress bar.
        overwrite: start over.

    Raises:
        ConfigError, UnknownNameError: a wrong setting.
        NotEnoughSamplesError: a class has fewer samples than there are folds.
        ResumeError: the folder holds something else.
    """
    if settings.method not in judging_methods():
        do = "Pass one of these to --method"
        raise ConfigError(explain(f"a method that judges ({', '.join(judging_methods())})", settings.method, do))
    plan = resolve(dataclasses.replace(config, holdout=0.0), "noisy")
    record = _record(plan, settings)
    place = RunFolder(folder)
    with place.claimed():
        if overwrite:
            place.clear()
            shutil.rmtree(place.path / "folds", ignore_errors=True)
        done = place.check_config(record, {"audit": settings.method}, _FILES, ignore=MAY_DIFFER)
        splits, noisy, _ = load_noisy(plan)
        data = RealData(splits.train_images, noisy.labels, splits.num_classes, dataset=splits.name)
        folds = draw_folds(data.labels, data.num_classes, settings.folds, plan.seed)
        place.write_config(record, ignore=MAY_DIFFER)
        probabilities, verdicts = _judged(data, folds, settings, plan, place.path / "folds", progress)
        names = splits.class_names or tuple(map(str, range(splits.num_classes)))
        rows = suspect_rows(verdicts, data.labels, splits.source_index, names, splits.source_paths)
        if done is None:
            write_csv(rows, COLUMNS, place.path / _FILES[0])
            found = summary(verdicts, data.labels, names)
            atomic_write(place.path / "summary.json", json.dumps(found, indent=1) + "\n")
            chosen = torch.as_tensor(shown_samples(verdicts, data.labels, len(names)), dtype=torch.int64)
            shown = splits.preprocessing.inverse(splits.train_images[chosen])
            pictures = place.path / "pictures"
            pictures.mkdir(exist_ok=True)
            page = audit_page(found, verdicts, data.labels, shown, names, rows, pictures)
            atomic_write(place.path / "index.html", page)
            results = {
                "audit": settings.method,
                "dataset": splits.name,
                "seed": plan.seed,
                **found,
                "quality": _quality(verdicts, data.labels, splits.train_labels) if truth_known(plan) else None,
                "versions": versions(plan.device),
                "command": command_line(),
            }
            place.write_results(results, _FILES)
        return Audit(place.results(), rows, probabilities, data.labels, verdicts)


_FILES = ("suspects.csv", "summary.json", "index.html")


def _record(plan: Plan, settings: AuditConfig) -> dict[str, Any]:
    used = ("dataset", "root", "labels", "noise", "per_class", "image_size", "zca", "seed", "device")
    return {**{k: v for k, v in plan.record.items() if k in used}, "audit": dataclasses.asdict(settings)}


def _judged(
    data: RealData, folds: Tensor, settings: AuditConfig, plan: Plan, folder: Path, progress: bool
) -> tuple[Tensor, Verdicts]:
    method = load_method(settings.method)
    total = settings.rounds * settings.folds * settings.networks
    steps = iter(bar(range(total), "networks", progress))

    def once(part: Part, train: Callable[[], Tensor]) -> Tensor:
        next(steps)
        path = folder / f"{part}.safetensors"
        if path.is_file():
            return _PART.read(path)[1]["probabilities"]
        folder.mkdir(parents=True, exist_ok=True)
        found = train()
        _PART.write(path, {"probabilities": found}, {"part": str(part)})
        return found

    usable = torch.ones_like(data.labels, dtype=torch.bool)
    logs = torch.zeros(len(data), data.num_classes, device=data.labels.device)
    for round in range(settings.rounds):
        options: dict[str, Any] = {"round": round, "networks": settings.networks, "seed": plan.seed, "once": once}
        logs += cross_fit(data, folds, settings.scorer, usable=usable, **options).clamp_min(1e-12).log()
        # The geometric mean of the rounds: the first is too cautious, the later ones are too sure of what they kept.
        probabilities = (logs / (round + 1)).softmax(1)
        trust = method.judge(probabilities, data.labels, data.num_classes)
        assert trust is not None  # judging_methods() have a rule
        verdicts = decide(probabilities, data.labels, trust)
        usable = verdicts.verdict == 0
    next(steps, None)
    return probabilities, verdicts


def _quality(verdicts: Verdicts, observed: Tensor, true: Tensor) -> dict[str, float]:
    """Against known true labels: average precision of the suspects, and label accuracy before and after."""
    label = torch.where(verdicts.verdict == 1, verdicts.proposed, observed)
    left = verdicts.verdict <= 1
    return {
        "average_precision": average_precision(verdicts.doubt, observed != true),
        "label_accuracy_before": float((observed == true).double().mean()),
        "label_accuracy_after": float((label == true)[left].double().mean()),
        "kept_share": float(left.double().mean()),
    }
