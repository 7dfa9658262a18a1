"""IWD: influence of every real sample on the distillation objective, as weights. See METHODS.md section 2.

Pure functions; each says in its docstring what is **[paper]** (arXiv 2510.27253) and what is **[ours]**.
Influence is dM/dw with M a loss of the synthetic set, so **negative = helpful** everywhere.
"""

from __future__ import annotations

from tad_plugin.iwd.explicit import dm_influence, embedding_directions, explicit_influence, influence, target_direction
from tad_plugin.iwd.implicit import SegmentStep, curvature_product, inverse_hessian_influence, unrolled_influence
from tad_plugin.iwd.implicit_segment import segment_influence
from tad_plugin.iwd.scoring import held_out_folds, score_on_network, target_gradient
from tad_plugin.iwd.targets import (
    Fold,
    class_mean_distance,
    cross_fit,
    matching_target,
    validation_gradient,
    validation_target,
)
from tad_plugin.iwd.weighting import (
    RunningScore,
    Temperature,
    effective_sample_size,
    fit_temperature,
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
    "held_out_folds",
    "hessian_vector_product",
    "influence",
    "inverse_hessian_influence",
    "matching_target",
    "per_sample_directional",
    "per_sample_gradient_chunks",
    "per_sample_gradients",
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
