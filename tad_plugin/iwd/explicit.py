"""Explicit influence: the sample is part of the statistic that the synthetic set is matched to. [ours: README.md, 2]

L(S; w) is the distillation loss with real-sample weights w. M(S) says how good the synthetic set S is (lower =
better). One descent step gives S' = S - eta * grad_S L(S; w). The influence of real sample i is

    I_i = dM(S') / dw_i = -eta * < grad M(S'), d/dw_i grad_S L(S; w) >

**Negative = helpful**: more weight on the sample lowers M. With grad M held fixed, h(w) = < grad M, grad_S L(S; w) >
has dh/dw = -I / eta. One backward pass through h therefore gives the influence of every sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.errors import DisconnectedGraphError, InvalidInputError, explain
from tad_plugin.nn.derivatives.vectors import Tensors, as_tuple, pushed_forward, require_finite
from tad_plugin.utils.arguments import finite_result, named_errors
from tad_plugin.utils.image_store import Images

__all__ = [
    "Embed",
    "class_mean_influence",
    "dm_influence",
    "embedding_directions",
    "explicit_influence",
    "influence",
    "target_direction",
]

Embed = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> features [B, D]."""


@named_errors
def explicit_influence(
    loss: Tensor,
    weights: Tensor,
    synthetic: Tensors,
    target_gradient: Tensors,
    *,
    eta: float | Sequence[float] = 1.0,
    retain_graph: bool = True,
) -> Tensor:
    """Computes the influence of every real sample of a batch on M, through one descent step of S.

    Works for any loss whose graph reaches both ``weights`` and ``synthetic``. The result is exact if
    ``target_gradient`` was taken at S' (after the step). If it was taken at S, the result is correct to first order
    in eta. Momentum changes nothing: the derivative of a step with respect to w stays -eta dg/dw.

    Args:
        loss: L(S; w), a scalar with its graph.
        weights: the leaf tensor [B] that entered the loss, ``requires_grad=True``.
        synthetic: the tensor that the loop updates, or several (images, soft labels, learning rate). A tensor
            that the loss does not depend on contributes nothing; at least one must contribute.
        target_gradient: grad M, one tensor of the same shape for each of ``synthetic``.
        eta: step size of S > 0, or one for each of ``synthetic``. The default 1 gives dM/dw per unit step.
        retain_graph: keep the graph of the loss for the loop's own backward pass.

    Returns:
        dM/dw, [B], detached, in the dtype and on the device of the weights. Negative = helpful.

    Raises:
        DisconnectedGraphError: the loss does not depend on S, or its gradient does not depend on the weights.
        InvalidInputError: weights are not a leaf, or shapes do not fit.
        NonFiniteError: the loss, a gradient or an influence is NaN or infinite.
    """
    if weights.ndim != 1 or not weights.is_leaf or not weights.requires_grad:
        got = f"shape {list(weights.shape)}, is_leaf={weights.is_leaf}, requires_grad={weights.requires_grad}"
        do = "Make it with weights.detach().clone().requires_grad_() before it enters the loss"
        raise InvalidInputError(explain("`weights` as a leaf tensor [B] that requires a gradient", got, do))
    parts = as_tuple(synthetic)
    slopes, rates = _slopes(target_gradient, parts), _rates(eta, len(parts))
    (derivative,) = _mixed_derivative(loss, (weights,), "weights", parts, slopes, rates, retain_graph)
    return derivative


@named_errors
def target_direction(
    loss: Tensor,
    parameters: Tensors,
    synthetic: Tensors,
    target_gradient: Tensors,
    *,
    eta: float | Sequence[float] = 1.0,
    retain_graph: bool = True,
) -> tuple[Tensor, ...]:
    """Computes u = dM(S')/dtheta, theta being the parameters that S is matched to (MTT, DATM).

    The identity of :func:`explicit_influence`, with theta instead of the weights:
    u = -eta * d/dtheta < grad M, grad_S L(S; theta) >. Flattened, u is the ``direction`` of the functions in
    ``implicit``. For the target `matching`, M is L itself and u is dL/dtheta, so this function is not needed.

    Args:
        loss: L(S; theta), a scalar with its graph.
        parameters: the leaf tensor(s) theta that entered the loss, ``requires_grad=True``.
        synthetic: as in :func:`explicit_influence`.
        target_gradient: as in :func:`explicit_influence`.
        eta: step size of S > 0, or one for each of ``synthetic``.
        retain_graph: keep the graph of the loss for the loop's own backward pass.

    Returns:
        One detached tensor for each of ``parameters``, in its shape.

    Raises:
        DisconnectedGraphError: the loss or its gradient does not depend on the parameters.
        InvalidInputError: parameters are not leaves, or shapes do not fit.
        NonFiniteError: the loss, a gradient or a result is NaN or infinite.
    """
    leaves = as_tuple(parameters)
    if not leaves or not all(p.is_leaf and p.requires_grad for p in leaves):
        do = "Make them with .detach().clone().requires_grad_() before they enter the loss"
        raise InvalidInputError(explain("`parameters` as leaf tensors that require a gradient", "others", do))
    parts = as_tuple(synthetic)
    slopes, rates = _slopes(target_gradient, parts), _rates(eta, len(parts))
    return _mixed_derivative(loss, leaves, "target parameters", parts, slopes, rates, retain_graph)


@named_errors
def influence(
    loss_fn: Callable[[Tensor, Any], Tensor],
    weights: Tensor,
    synthetic: Tensors,
    target: Callable[[Any], Tensor],
    *,
    eta: float | Sequence[float] = 1.0,
    target_at: Literal["after", "before"] = "after",
) -> Tensor:
    """Computes explicit influence from two functions, without a distillation loop.

    Args:
        loss_fn: L, (weights [B], synthetic) -> scalar. ``synthetic`` comes in the form given here (tensor or tuple).
        weights: real-sample weights [B] at which the derivative is taken; copied.
        synthetic: the synthetic tensor, or several; copied.
        target: M, synthetic -> scalar.
        eta: step size of S > 0, or one for each of ``synthetic``. The result is multiplied by it.
        target_at: "after" takes grad M at S' = S - eta * grad_S L and gives the exact derivative of M(S').
            "before" takes it at S: no second evaluation point, correct to first order in eta.

    Returns:
        dM/dw, [B], detached. Negative = helpful.

    Raises:
        DisconnectedGraphError: the loss or the target does not depend on S, or the loss not on the weights.
        InvalidInputError: shapes, ``eta`` or ``target_at`` do not fit.
        NonFiniteError: the loss, a gradient or an influence is NaN or infinite.
    """
    if target_at not in ("after", "before"):
        raise InvalidInputError(explain("target_at 'after' or 'before'", repr(target_at), "Pass one of the two"))
    if weights.ndim != 1:
        raise InvalidInputError(explain("weights [B]", f"shape {list(weights.shape)}", "Pass one for each sample"))
    single = isinstance(synthetic, Tensor)
    leaf = weights.detach().clone().requires_grad_()
    parts = tuple(s.detach().clone().requires_grad_() for s in as_tuple(synthetic))
    rates = _rates(eta, len(parts))
    with torch.enable_grad():
        loss = loss_fn(leaf, parts[0] if single else parts)
        where = parts
        if target_at == "after":
            gradients = _gradients(loss, parts, "loss", "synthetic set", create_graph=False)
            where = tuple(
                (s - r * g).detach().requires_grad_() for s, g, r in zip(parts, gradients, rates, strict=True)
            )
        value = target(where[0] if single else where)
        slopes = _gradients(value, where, "target", "synthetic set", create_graph=False)
    (derivative,) = _mixed_derivative(loss, (leaf,), "weights", parts, slopes, rates, retain_graph=False)
    return derivative


@named_errors
@finite_result
def embedding_directions(
    embed: Embed, synthetic: Tensor, synthetic_labels: Tensor, target_gradient: Tensor, num_classes: int
) -> Tensor:
    """Computes v_c, the derivative of the mean embedding of synthetic class c as S moves along grad M.

    One forward-mode pass through ``embed``.

    Args:
        embed: images [B, C, H, W] -> features [B, D], including the loop's augmentation if it has one.
        synthetic: images [M, C, H, W].
        synthetic_labels: int64 [M] in [0, num_classes).
        target_gradient: grad_S M, same shape as ``synthetic``.
        num_classes: K.

    Returns:
        [K, D], detached; zeros for a class without synthetic images.

    Raises:
        InvalidLabelsError: labels out of range or of another length.
        InvalidInputError: shapes do not fit.
    """
    labels = check_labels(synthetic_labels, num_classes, len(synthetic), "synthetic_labels")
    _slopes(target_gradient, (synthetic,))
    return _directions(embed, synthetic, labels, target_gradient, num_classes)


@named_errors
def dm_influence(
    embed: Embed,
    images: Images,
    labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    target_gradient: Tensor,
    num_classes: int,
    *,
    weights: Tensor | None = None,
    normalise: bool = True,
    divisor: float | None = None,
    eta: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Computes the explicit influence of every real sample for a loss of class means (DM, IDM). No backward pass.

    The loss is L = sum_c |mu_c - nu_c(S)|^2, with mu_c the weighted mean of the real embeddings phi_i and nu_c the
    mean of the synthetic ones. Then d/dw_i grad_S L = -2 J_c^T dmu_c/dw_i. With v_c = J_c grad_S M
    (:func:`embedding_directions`):

        I_i = 2 eta / n_c * < v_c, phi_i - mu_c >     ``normalise``: mu_c = sum w_i phi_i / sum w_i, n_c = sum w_i
        I_i = 2 eta / n_c * < v_c, phi_i >            otherwise:     mu_c = sum w_i phi_i / n_c, n_c the count

    This equals :func:`explicit_influence` on the same loss. Terms without real samples (a cross-entropy on S) change
    nothing. A loss that averages over the D features instead of summing is 1/D of this one; put 1/D into ``eta``.

    Args:
        embed: images [B, C, H, W] -> features [B, D], the same function for real and synthetic images.
        images: real images [N, C, H, W]; each passes through ``embed`` once, ``chunk_size`` at a time.
        labels: classes in the loss, int64 [N] in [0, num_classes).
        synthetic: images [M, C, H, W].
        synthetic_labels: int64 [M]. A real sample of a class without synthetic images has influence 0.
        target_gradient: grad_S M, same shape as ``synthetic``.
        num_classes: K.
        weights: current weights [N] >= 0; None for 1.
        normalise: True if the loss divides by the sum of the weights, False if by their number.
            :meth:`SampleState.weights` has mean 1 over a batch's samples of a class, so True fits it.
        divisor: n_c for the scale; None for the n_c above. The ranking inside a class does not depend on it.
        eta: step size of S > 0.
        chunk_size: real images per forward pass.

    Returns:
        dM/dw, [N], detached, in the features' dtype. Negative = helpful.

    Raises:
        InvalidLabelsError: labels out of range or of another length.
        InvalidInputError: shapes, weights or sizes do not fit.
        NonFiniteError: an influence is NaN or infinite.
    """
    labels = check_labels(labels, num_classes, len(images))
    own_labels = check_labels(synthetic_labels, num_classes, len(synthetic), "synthetic_labels")
    _slopes(target_gradient, (synthetic,))
    (rate,) = _rates(eta, 1)
    if chunk_size < 1 or (divisor is not None and not divisor > 0):
        got = f"chunk_size {chunk_size}, divisor {divisor}"
        raise InvalidInputError(explain("chunk_size >= 1 and divisor > 0", got, "Pass positive numbers"))
    if weights is not None and (weights.shape != labels.shape or bool((weights < 0).any())):
        got = f"shape {list(weights.shape)}, smallest {float(weights.min())}"
        raise InvalidInputError(explain(f"weights >= 0 of shape [{len(labels)}]", got, "Pass one per real image"))
    return class_mean_influence(
        embed,
        images,
        labels,
        synthetic,
        own_labels,
        target_gradient,
        num_classes,
        weights=weights,
        normalise=normalise,
        divisor=divisor,
        eta=rate,
        chunk_size=chunk_size,
    )


def class_mean_influence(
    embed: Embed,
    images: Images,
    labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    target_gradient: Tensor,
    num_classes: int,
    *,
    weights: Tensor | None = None,
    normalise: bool = True,
    divisor: float | None = None,
    eta: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """:func:`dm_influence` for arguments that are checked already."""
    directions = _directions(embed, synthetic, synthetic_labels, target_gradient, num_classes)
    with torch.no_grad():
        along = torch.cat(
            [
                (embed(images[start : start + chunk_size]) * directions[labels[start : start + chunk_size]]).sum(1)
                for start in range(0, len(images), chunk_size)
            ]
        )
    w = torch.ones_like(along) if weights is None else weights.detach().to(along)
    zeros = torch.zeros(num_classes, dtype=along.dtype, device=along.device)
    size = zeros.index_add(0, labels, w if normalise else torch.ones_like(w))
    if normalise:
        mean = zeros.index_add(0, labels, w * along) / size
        along = along - mean[labels]
    scale = 2.0 * eta / (size[labels] if divisor is None else divisor)
    return require_finite(
        scale * along, "influences", "Check the images and weights (no class may have only zero weights)"
    )


def _directions(embed: Embed, synthetic: Tensor, labels: Tensor, target_gradient: Tensor, num_classes: int) -> Tensor:
    with torch.no_grad():
        pushed = pushed_forward(embed, (synthetic.detach(),), (target_gradient.detach(),))
    counts = torch.bincount(labels, minlength=num_classes).clamp_min(1).to(pushed.dtype)
    total = torch.zeros(num_classes, pushed.shape[1], dtype=pushed.dtype, device=pushed.device)
    return total.index_add_(0, labels, pushed) / counts[:, None]


def _mixed_derivative(
    loss: Tensor,
    inputs: tuple[Tensor, ...],
    name: str,
    parts: tuple[Tensor, ...],
    slopes: tuple[Tensor, ...],
    rates: tuple[float, ...],
    retain_graph: bool,
) -> tuple[Tensor, ...]:
    """-sum over parts of rate * d/dinputs < slope, grad_part L >."""
    with torch.enable_grad():
        gradients = _gradients(loss, parts, "loss", "synthetic set", create_graph=True)
        terms = [
            r * (g * slope.detach()).sum()
            for g, slope, r in zip(gradients, slopes, rates, strict=True)
            if g.requires_grad
        ]
        found: Sequence[Tensor | None] = [None]
        if terms:
            h = torch.stack([term.reshape(()) for term in terms]).sum()
            found = torch.autograd.grad(h, inputs, retain_graph=retain_graph, allow_unused=True)
    if all(derivative is None for derivative in found):
        do = f"Use the {name} inside the term that compares real with synthetic data, without .detach() or a copy"
        got = f"a gradient that does not depend on the {name}"
        raise DisconnectedGraphError(explain(f"a loss whose synthetic gradient depends on the {name}", got, do))
    full = [torch.zeros_like(x) if d is None else d.neg() for d, x in zip(found, inputs, strict=True)]
    way_out = "Lower the learning rate, or look for NaN in the images and the network"
    # In this order, so that the message names the cause and not what followed from it.
    checked = {"loss": (loss,), "synthetic gradient": gradients, "target gradient": slopes, "influence": full}
    for label, values in checked.items():
        for value in values:
            require_finite(value.detach(), label, way_out)
    return tuple(full)


def _gradients(
    value: Tensor, inputs: tuple[Tensor, ...], name: str, what: str, *, create_graph: bool
) -> tuple[Tensor, ...]:
    if value.ndim != 0:
        raise InvalidInputError(
            explain(f"a scalar {name}", f"shape {list(value.shape)}", "Reduce it with .mean() or .sum()")
        )
    found: Sequence[Tensor | None] = [None] * len(inputs)
    needing = [tensor for tensor in inputs if tensor.requires_grad]
    if value.requires_grad and needing:
        got = iter(torch.autograd.grad(value, needing, create_graph=create_graph, retain_graph=True, allow_unused=True))
        found = [next(got) if tensor.requires_grad else None for tensor in inputs]
    if all(gradient is None for gradient in found):
        do = f"Compute the {name} from the {what} that is passed, without .detach(), and let it require a gradient"
        raise DisconnectedGraphError(
            explain(f"a {name} that depends on the {what}", f"a {name} without it in its graph", do)
        )
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))


def _slopes(target_gradient: Tensors, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The target gradients as a tuple, one in the shape of each part."""
    slopes = as_tuple(target_gradient)
    if len(parts) != len(slopes) or any(s.shape != g.shape for s, g in zip(parts, slopes, strict=True)):
        got = f"{[list(g.shape) for g in slopes]} for {[list(s.shape) for s in parts]}"
        expected = "target_gradient in the shape of each synthetic tensor"
        raise InvalidInputError(explain(expected, got, "Pass grad_S M"))
    return slopes


def _rates(eta: float | Sequence[float], count: int) -> tuple[float, ...]:
    rates = tuple(float(e) for e in eta) if isinstance(eta, Sequence) else (float(eta),) * count
    if len(rates) != count or not all(math.isfinite(r) and r > 0 for r in rates):
        raise InvalidInputError(
            explain(
                f"eta as a finite step size > 0, or {count} of them",
                repr(eta),
                "Pass the learning rate of the synthetic set",
            )
        )
    return rates
