"""Per-sample derivatives of the loss: gradients, and inner products with one direction. [ours]

:func:`per_sample_gradients` stores a gradient of P numbers per sample. Most influences need only its inner product
with one vector u. That is the directional derivative of the loss along u: one forward-mode pass computes it for a
whole batch and stores no gradient (:func:`per_sample_directional`). Both work in chunks that fit a memory budget. The
chunk size does not change the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from tad_plugin.errors import InvalidInputError, MemoryBudgetError, explain
from tad_plugin.nn.derivatives.vectors import (
    LossFunction,
    cross_entropy,
    flatten,
    pushed_forward,
    require_finite,
    unflatten,
)
from tad_plugin.utils.arguments import finite_result, named_errors
from tad_plugin.utils.image_store import Images

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "Parameters",
    "activation_bytes",
    "as_parameters",
    "per_sample_directional",
    "per_sample_gradient_chunks",
    "per_sample_gradients",
    "require_independent_samples",
]

DEFAULT_MEMORY_BUDGET = 2**30
"""Default memory of one chunk in bytes, beside the network and the data: 1 GiB."""

# On a CPU larger chunks do not fit the cache: one chunk of 1,000 samples took 1.5 times as long as chunks of 256.
_CPU_CHUNK = 256

Parameters = Mapping[str, Tensor]
"""Parameters by name, as ``dict(network.named_parameters())``; P entries in all."""


def as_parameters(network: nn.Module, values: Parameters | Tensor | None = None) -> dict[str, Tensor]:
    """The trainable parameters of a network by name, detached, with its own values or others.

    Args:
        network: network with the names, the order and the shapes. Only parameters with ``requires_grad`` count.
        values: other values, by name or as a flat vector [P]; None takes the network's own.

    Raises:
        InvalidInputError: the network has no trainable parameter, or the values do not fit its parameters.
    """
    own = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    if not own:
        raise InvalidInputError(
            explain("a network with trainable parameters", "none", "Call network.requires_grad_(True)")
        )
    if values is None:
        return own
    if isinstance(values, Tensor):
        return dict(zip(own, unflatten(values.detach(), tuple(own.values())), strict=True))
    wrong = [name for name in own if name not in values or values[name].shape != own[name].shape]
    wrong += [name for name in values if name not in own]
    if wrong:
        got = f"another name or shape for {', '.join(wrong[:3])}"
        raise InvalidInputError(
            explain("one tensor for each trainable parameter", got, "Take them from the same network")
        )
    return {name: values[name].detach() for name in own}


def require_independent_samples(network: nn.Module) -> None:
    """Checks that the loss of a sample depends neither on the rest of its batch nor on chance.

    Raises:
        InvalidInputError: a batch norm in train mode or without running statistics, a norm that would update running
            statistics, or an active dropout. The message names the module.
    """
    for name, module in network.named_modules():
        if isinstance(module, _NormBase):
            uses_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            if uses_batch or (module.training and module.track_running_stats):
                raise InvalidInputError(
                    explain(
                        "a network in which each sample has a loss and a gradient of its own",
                        f"{name} ({type(module).__name__}) with statistics of the whole batch",
                        "Call network.eval() for running statistics, or use instance or group norm",
                    )
                )
        elif isinstance(module, _DropoutNd) and module.training and module.p > 0:
            got = f"{name} ({type(module).__name__}) in train mode"
            raise InvalidInputError(explain("a deterministic network", got, "Call network.eval()"))


def activation_bytes(network: nn.Module, image: Tensor, parameters: Parameters | None = None) -> int:
    """Bytes that the forward pass of one sample stores for the backward pass; measured with one pass.

    Args:
        network: any network; its parameters are not counted.
        image: one image [C, H, W].
        parameters: parameters by name; None takes the network's own.
    """
    values = {name: p.clone().requires_grad_() for name, p in as_parameters(network, parameters).items()}
    known = {p.untyped_storage().data_ptr() for p in (*values.values(), *network.parameters(), *network.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.func.functional_call(network, values, (image.detach()[None].clone(),)).sum()
    return sum(sizes.values())


@named_errors
def per_sample_gradient_chunks(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    *,
    parameters: Parameters | Tensor | None = None,
    loss_fn: LossFunction = cross_entropy,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Iterator[tuple[slice, Tensor]]:
    """Computes the gradient of each sample's loss in the parameters, one chunk at a time.

    Args:
        network: images -> logits [B, K]; must treat samples independently (see :func:`require_independent_samples`).
        images: [N, C, H, W], on the network's device.
        labels: int64 [N] or probabilities [N, K].
        parameters: point to differentiate at, by name or flat [P]; None takes the network's parameters.
        loss_fn: (logits [B, K], labels [B] or [B, K]) -> [B].
        memory_budget: bytes for one chunk. A sample takes 2 P numbers (its gradient and a flat copy) and twice its
            stored activations. On a CPU a chunk has at most 256 samples.

    Yields:
        (positions, gradients [b, P] in the order and dtype of the parameters).

    Raises:
        InvalidInputError: lengths differ, or samples depend on each other.
        MemoryBudgetError: a single sample does not fit the budget.
    """
    values = _prepare(network, images, labels, parameters)
    chunk = _chunk_size(network, values, images, memory_budget, gradients=True)

    def loss(parts: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(network, parts, (image[None],)), label[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for start in range(0, len(images), chunk):
        part = slice(start, min(start + chunk, len(images)))
        found = gradients(values, images[part], labels[part])
        yield part, torch.cat([found[name].reshape(part.stop - part.start, -1) for name in values], dim=1)


@named_errors
@finite_result
def per_sample_gradients(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    *,
    parameters: Parameters | Tensor | None = None,
    loss_fn: LossFunction = cross_entropy,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes all gradients of :func:`per_sample_gradient_chunks` at once: [N, P].

    The budget limits one chunk. The result takes N * P numbers more.
    """
    chunks = per_sample_gradient_chunks(
        network, images, labels, parameters=parameters, loss_fn=loss_fn, memory_budget=memory_budget
    )
    return torch.cat([gradients for _, gradients in chunks])


@named_errors
@finite_result
def per_sample_directional(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    direction: Parameters | Tensor,
    *,
    parameters: Parameters | Tensor | None = None,
    loss_fn: LossFunction = cross_entropy,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes <grad l_i, u>, the inner product of each sample's gradient with a direction, in forward mode.

    One pass per chunk, with u as the tangent of the parameters, gives the derivative of all losses along u. No gradient
    is formed.

    Args:
        network: images -> logits [B, K]; must treat samples independently (see :func:`require_independent_samples`).
        images: [N, C, H, W], on the network's device.
        labels: int64 [N] or probabilities [N, K].
        direction: u, by name or flat [P].
        parameters: point to differentiate at, by name or flat [P]; None takes the network's parameters.
        loss_fn: (logits [B, K], labels [B] or [B, K]) -> [B].
        memory_budget: bytes for one chunk. A sample counts with twice its stored activations, which is an upper bound:
            forward mode stores none.

    Returns:
        [N], in the dtype of the parameters.

    Raises:
        InvalidInputError: lengths or shapes differ, or samples depend on each other.
        MemoryBudgetError: a single sample does not fit the budget.
        NonFiniteError: a product is NaN or infinite.
    """
    values = _prepare(network, images, labels, parameters)
    tangents = as_parameters(network, direction)
    chunk = _chunk_size(network, values, images, memory_budget, gradients=False)
    found = []
    for start in range(0, len(images), chunk):
        x, y = images[start : start + chunk], labels[start : start + chunk]

        def losses(parts: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss_fn(torch.func.functional_call(network, parts, (x,)), y)

        with torch.no_grad():
            found.append(pushed_forward(losses, (values,), (tangents,)))
    return require_finite(
        torch.cat(found), "directional derivatives", "Check the images, the network and the direction"
    )


def _prepare(
    network: nn.Module, images: Images, labels: Tensor, parameters: Parameters | Tensor | None
) -> dict[str, Tensor]:
    if len(images) != len(labels) or len(images) == 0:
        got = f"{len(images)} images and {len(labels)} labels"
        raise InvalidInputError(explain("as many images as labels, at least one", got, "Pass one label per image"))
    require_independent_samples(network)
    return as_parameters(network, parameters)


def _chunk_size(
    network: nn.Module, values: dict[str, Tensor], images: Images, memory_budget: int, *, gradients: bool
) -> int:
    needed = 2 * activation_bytes(network, images[0], values) + images[0].numel() * images.element_size()
    if gradients:
        flat = flatten(values)
        needed += 2 * flat.numel() * flat.element_size()
    if needed > memory_budget:
        raise MemoryBudgetError(
            explain(
                f"a memory budget of at least {needed} bytes (one sample)",
                f"{memory_budget} bytes",
                "Raise memory_budget, or use a smaller network or smaller images",
            )
        )
    chunk = max(1, memory_budget // needed)
    return min(chunk, _CPU_CHUNK) if images.device.type == "cpu" else chunk
