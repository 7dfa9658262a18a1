"""Trust-aware diversion (TAD): the pure functions that split, recalibrate and steady.

``mixture`` fits the losses of all classes, ``threshold`` divides the samples, ``reliability`` finds new
labels for untrusted ones, ``consistency`` steadies the scorer's training.
"""

from tad_plugin.tad.calibration import Calibration, calibrate_threshold
from tad_plugin.tad.consistency import TemporalEnsemble, consistency_loss, ramp_up
from tad_plugin.tad.geometry import class_anchors, ledoit_wolf, mahalanobis, principal_axes, whitened_measures
from tad_plugin.tad.mixture import ClassMixture, MixtureInit, fit_class_mixture
from tad_plugin.tad.proposals import Reliability, fit_temperature, propose, reliability
from tad_plugin.tad.threshold import Division, divide

__all__ = [
    "Calibration",
    "ClassMixture",
    "Division",
    "MixtureInit",
    "Reliability",
    "TemporalEnsemble",
    "calibrate_threshold",
    "class_anchors",
    "consistency_loss",
    "divide",
    "fit_class_mixture",
    "fit_temperature",
    "ledoit_wolf",
    "mahalanobis",
    "principal_axes",
    "propose",
    "ramp_up",
    "reliability",
    "whitened_measures",
]
