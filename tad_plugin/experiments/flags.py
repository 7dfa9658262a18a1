"""Flags that would have no effect, and packages that would be missed late: refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from tad_plugin.core.callback import Callback
from tad_plugin.core.registry import load_method, method_names
from tad_plugin.data.sources import DATASETS
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, explain, missing_extra
from tad_plugin.experiments.config import VERDICT, RunConfig
from tad_plugin.experiments.plan import Plan, resolve
from tad_plugin.experiments.sharing import deciding_arm

__all__ = [
    "NOT_FOR_EVALUATION",
    "check_distill_flags",
    "check_evaluate_flags",
    "check_expert_flags",
    "check_picture_packages",
]

NOT_FOR_EVALUATION = {
    "holdout",
    "noise",
    "labels",
    "zca",
    "ipc",
    "iterations",
    "lr_img",
    "loop",
    "methods",
    "candidates",
    "checkpoint_seconds",
    *VERDICT,
    "precision",
    "compile",
}
"""Settings of :class:`RunConfig` without effect on an evaluation, which takes fresh networks and the set's own
normalisation."""

_DOWNLOADED = tuple(name for name in DATASETS if name != "digits")
_PILOTS = ("pilots", "pilot_epochs", "rounds")


def _require(effect: bool, flag: str, where: str) -> None:
    if not effect:
        got, do = "a command on which it has none", "Leave it out, or correct the command"
        raise ConfigError(explain(f"{flag} where it has an effect: {where}", got, do))


def check_distill_flags(config: RunConfig, arms: Sequence[str], shared: str = "") -> None:
    """Checks the settings of runs of these arms: each that is given must have an effect on at least one of them.

    Raises:
        ConfigError: a setting without effect; the message names its flag.
        UnknownNameError, MissingExtraError: see :func:`tad_plugin.experiments.plan.resolve`.
    """
    plans = [resolve(config, arm) for arm in arms]
    distilling = [plan for plan in plans if plan.arm.distil]
    _check_data(config)
    _check_methods(_method_settings(config), plans)
    for name in ("iterations", "lr_img", "loop"):
        _require(bool(distilling) or not getattr(config, name), f"--{name}", "arms that distil")
    changed = config.candidates != RunConfig.candidates
    chosen = config.holdout > 0 and any(plan.loop.iterations > 0 for plan in distilling)
    _require(chosen or not changed, "--candidates", "with a --holdout above 0, to choose among iterates")
    learned = len(distilling) == len(plans) and all(hasattr(plan.loop, "lr_lr") for plan in plans)
    fixed = config.eval_lr == RunConfig.eval_lr
    _require(fixed or not learned, "--eval_lr", "baselines that do not learn the rate of the evaluation")
    experts = config.loop.get("experts")
    if config.loop.get("buffer"):
        again = any(method.decides_late for plan in plans for method in _methods(plan))
        _require(
            experts is None or again, "--loop.experts", "without --loop.buffer, or where experts are trained again"
        )
    if isinstance(experts, Mapping):
        _check_pilots(set(experts) & set(_PILOTS), plans, "--loop.experts.")
    _require(not shared or any(_shares(plan) for plan in plans), "--shared", "arms that share decisions or experts")


def check_expert_flags(config: RunConfig, experts: ExpertConfig, arm: str) -> None:
    """As :func:`check_distill_flags`, for a run that trains experts."""
    plan = resolve(config, arm)
    _check_data(config)
    _check_methods(_method_settings(config), [plan], scorer=False)
    limits = [name for name in method_names(plan.arm.method) if load_method(name).uses_ipc]
    _require(bool(limits) or config.ipc == RunConfig.ipc, "--ipc", "methods that keep as many samples of each class")
    default = ExpertConfig()
    changed = {name for name in _PILOTS if getattr(experts, name) != getattr(default, name)}
    _check_pilots(changed, [plan], "--")
    _require(experts.rho > 0 or experts.alpha == default.alpha, "--alpha", "with --rho above 0")
    _require(experts.rho > 0 or experts.adaptive == default.adaptive, "--adaptive", "with --rho above 0")


def check_evaluate_flags(config: RunConfig, learning_rate: float | None) -> None:
    """As :func:`check_distill_flags`, for the evaluation of a set with this learned rate (None if it has none)."""
    _check_data(config)
    folder = config.dataset.startswith("folder:")
    _require(folder or not config.per_class, "--per_class", "folder:PATH, whose normalisation comes from these images")
    fixed = config.eval_lr == RunConfig.eval_lr
    _require(fixed or learning_rate is None, "--eval_lr", "sets without a learned rate")


def check_picture_packages(*, page: bool = True) -> None:
    """Raises MissingExtraError if a package of the pictures, or of the ``page``, is not installed."""
    for package, purpose in (("matplotlib", "the pictures"), *([("jinja2", "the HTML page")] if page else [])):
        if find_spec(package) is None:
            error = missing_extra(package, "reproduce", purpose)
            raise type(error)(f"{error} Or leave them out: --pictures false." if page else str(error))


def _check_data(config: RunConfig) -> None:
    given = config.root != RunConfig.root
    kept = config.dataset in _DOWNLOADED or config.dataset.startswith("folder:")
    _require(kept or not given, "--root", f"--dataset {', '.join(_DOWNLOADED)}, or folder:PATH")


def _method_settings(config: RunConfig) -> Mapping[str, Any]:
    given: dict[str, Any] = {"verdict": {}} if any(getattr(config, name) for name in VERDICT) else {}
    return {**config.methods, **given}


def _methods(plan: Plan) -> list[type[Callback]]:
    return [load_method(name) for name in method_names(plan.arm.method)]


def _check_methods(settings: Mapping[str, Any], plans: Sequence[Plan], *, scorer: bool = True) -> None:
    used = {name for plan in plans for name in method_names(plan.arm.method)}
    _require("verdict" in used or "verdict" not in settings, "--verdict", "arms such as verdict or verdict+iwd")
    for name in settings:
        if name != "scorer":
            _require(name in used, f"--methods with settings of {name!r}", "an arm with that method")
    for plan in plans:
        own = scorer and not plan.baseline.trains_on_real
        fields = [getattr(method.Config, "__dataclass_fields__", {}) for method in _methods(plan)]
        if (own and any(m.needs_scorer for m in _methods(plan))) or any("scorer" in known for known in fields):
            return
    _require("scorer" not in settings, "--methods with settings of 'scorer'", "methods that train such a network")


def _check_pilots(given: set[str], plans: Sequence[Plan], prefix: str) -> None:
    used = any(method.needs_scorer for plan in plans for method in _methods(plan))
    for name in sorted(given):
        _require(used, f"{prefix}{name}", "methods that decide on the experts")


def _shares(plan: Plan) -> bool:
    if not plan.arm.distil or plan.buffer:
        return False
    if plan.baseline.trains_on_real and hasattr(plan.loop, "experts"):
        return True
    decided = deciding_arm(plan.name) not in ("clean", "noisy")
    return decided and not plan.methods.get("scorer", {}).get("refresh_every")
