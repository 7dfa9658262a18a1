"""IWD: weights real samples by their influence on the distillation objective. README.md has the definitions.

These are the public functions. Each says in its docstring what is **[paper]** (arXiv 2510.27253) and what **[ours]**.
Influence is dM/dw, M being a loss of the synthetic set, so **negative = helpful** everywhere.
"""

from __future__ import annotations

from tad_plugin.iwd.explicit import dm_influence, embedding_directions, explicit_influence, influence, target_direction
from tad_plugin.iwd.explicit_gradients import gradient_influence
from tad_plugin.iwd.implicit import SegmentStep, curvature_product, inverse_hessian_influence, unrolled_influence
from tad_plugin.iwd.implicit_segment import segment_influence
from tad_plugin.iwd.running_score import RunningScore
from tad_plugin.iwd.scoring import Fold, cross_fit, held_out_folds, score_on_network
from tad_plugin.iwd.targets import (
    class_mean_distance,
    matching_target,
    target_gradient,
    validation_gradient,
    validation_target,
)
from tad_plugin.iwd.weighting import (
    Temperature,
    effective_sample_size,
    fit_temperature,
    saturate,
    softmax_weights,
    standardise,
    weights_from_scores,
)
from tad_plugin.nn.derivatives.curvature import (
    CGResult,
    conjugate_gradient,
    gauss_newton_vector_product,
    hessian_vector_product,
)
from tad_plugin.nn.derivatives.per_sample import (
    per_sample_directional,
    per_sample_gradient_chunks,
    per_sample_gradients,
)

__all__ = [
    "CGResult",
    "Fold",
    "RunningScore",
    "SegmentStep",
    "Temperature",
    "class_mean_distance",
    "conjugate_gradient",
    "cross_fit",
    "curvature_product",
    "dm_influence",
    "effective_sample_size",
    "embedding_directions",
    "explicit_influence",
    "fit_temperature",
    "gauss_newton_vector_product",
    "gradient_influence",
    "held_out_folds",
    "hessian_vector_product",
    "influence",
    "inverse_hessian_influence",
    "matching_target",
    "per_sample_directional",
    "per_sample_gradient_chunks",
    "per_sample_gradients",
    "saturate",
    "score_on_network",
    "segment_influence",
    "softmax_weights",
    "standardise",
    "target_direction",
    "target_gradient",
    "unrolled_influence",
    "validation_gradient",
    "validation_target",
    "weights_from_scores",
]
