"""TAD (trust-aware diversion) as pure functions. README.md describes what each one computes.

``mixture`` fits the losses of all classes, ``threshold`` divides the samples, ``geometry`` and ``feature_model``
measure closeness to class anchors, ``proposals`` finds new labels for untrusted samples, ``calibration`` decides from
which reliability they are recalled, and ``consistency`` steadies the training of the scorer. ``method`` is the
callback.
"""

from tad_plugin.tad.calibration import Calibration, calibrate_threshold
from tad_plugin.tad.consistency import TemporalEnsemble, consistency_loss, ramp_up
from tad_plugin.tad.feature_model import FeatureModel, fit_features
from tad_plugin.tad.geometry import (
    Anchors,
    class_anchors,
    cosine,
    ledoit_wolf,
    mahalanobis,
    principal_axes,
    whitened_measures,
)
from tad_plugin.tad.mixture import ClassMixture, MixtureInit, fit_class_mixture
from tad_plugin.tad.proposals import Reliability, fit_temperature, propose, reliability, reliability_score
from tad_plugin.tad.threshold import Division, divide

__all__ = [
    "Anchors",
    "Calibration",
    "ClassMixture",
    "Division",
    "FeatureModel",
    "MixtureInit",
    "Reliability",
    "TemporalEnsemble",
    "calibrate_threshold",
    "class_anchors",
    "consistency_loss",
    "cosine",
    "divide",
    "fit_class_mixture",
    "fit_features",
    "fit_temperature",
    "ledoit_wolf",
    "mahalanobis",
    "principal_axes",
    "propose",
    "ramp_up",
    "reliability",
    "reliability_score",
    "whitened_measures",
]
