"""Networks by name, drawn from a generator.

These are the networks of the public codebases: the ConvNet of dataset condensation (Zhao et al., ICLR 2021), and
AlexNet, VGG11, ResNet-18 and MLP for small images. Order and initialisation of the parameters are the same too, so
parameters saved by those codebases can be loaded by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tad_plugin.errors import InvalidInputError, explain, unknown_name
from tad_plugin.nn.architectures import alexnet, mlp, resnet18, resnet18ap, vgg11
from tad_plugin.nn.blocks import LayerBuilder, Network, NetworkOptions
from tad_plugin.utils.transfers import host_twin, place, upload

__all__ = ["NETWORKS", "convnet", "default_depth", "make_network", "reinitialise", "seeded"]


def convnet(options: NetworkOptions) -> Network:
    """ConvNet: ``depth`` blocks of 3x3 convolution, norm, activation and 2x2 pooling, then one linear layer.

    The default norm is instance norm, as a group norm with one channel per group, scale and shift. The first
    convolution pads grey images of 28x28 to 32x32.

    Raises:
        ConfigError: with pooling, a side of the images is below 2^depth pixels.
    """
    build = LayerBuilder("convnet", options, default_norm="instance")
    for _ in range(options.depth):
        build.conv(options.width, 3)
        build.norm()
        build.activation()
        build.pool(options.pooling)
    return Network(build.sequential(), build.feature_dim, options.num_classes)


NETWORKS: dict[str, Callable[[NetworkOptions], nn.Module]] = {
    "convnet": convnet,
    "mlp": mlp,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "resnet18": resnet18,
    "resnet18ap": resnet18ap,
}
"""Builders by name. They may draw from the global generator: :func:`make_network` calls them inside :func:`seeded`."""


@contextmanager
def seeded(generator: torch.Generator, devices: Iterable[torch.device | str | int] = ()) -> Iterator[int]:
    """Context for code that draws from the global generators: seeds them, and restores them afterwards.

    The seed of torch's global CPU generator, and of those of the CUDA ``devices``, is one number drawn from
    ``generator``. Yields that number. Other CUDA generators are not touched, and CUDA is not started for them.

    Args:
        generator: source of the seed: exactly one draw, on any device.
        devices: CUDA devices that the code draws on.
    """
    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=generator.device))
    cuda = [torch.device("cuda", d) if isinstance(d, int) else torch.device(d) for d in devices]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield seed


def default_depth(height: int, width: int) -> int:
    """Blocks of a ConvNet for images of this size: 3, or 2 if a side is under 16 pixels (too small for three)."""
    return 3 if min(height, width) >= 16 else 2


def make_network(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int | tuple[int, int],
    width: int = 128,
    depth: int = 3,
    norm: str | None = None,
    pooling: str = "avg",
    activation: str = "relu",
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Draws a network with ``forward(x) -> logits [B, K]`` and ``embed(x) -> features [B, D]``.

    The parameters are drawn on the CPU, so they have the same bits on every device.

    Args:
        name: a key of ``NETWORKS``: convnet, mlp, alexnet, vgg11, resnet18 or resnet18ap.
        in_channels: image channels C.
        num_classes: number of classes K.
        image_size: height and width in pixels, or one number for both.
        width: channels of the ConvNet, hidden units of the MLP. In the other networks 128 gives the usual numbers of
            channels; other values scale them in proportion.
        depth: blocks of the ConvNet, linear layers of the MLP; ignored by the other networks.
        norm: instance, batch, group (4 groups), layer or none. None takes the usual norm: none in alexnet, instance
            norm in the other convolutional networks. The MLP never has a norm.
        pooling: avg, max or none; ConvNet only.
        activation: relu, sigmoid or leaky.
        generator: source of the parameters (one draw, a seed).
        device: device of the network.

    Returns:
        A float32 module in training mode with the integer attributes ``feature_dim`` (D) and ``num_classes``.

    Raises:
        UnknownNameError: there is no network of that name.
        ConfigError: an option is unknown or does not fit, or the images are too small for the network.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, list(NETWORKS))
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    options = NetworkOptions(
        in_channels=in_channels,
        num_classes=num_classes,
        image_size=size,
        width=width,
        depth=depth,
        norm=norm,
        pooling=pooling,
        activation=activation,
    )
    with seeded(generator):
        network = NETWORKS[name](options)
    return place(network, device)


def reinitialise(network: nn.Module, generator: torch.Generator) -> None:
    """Redraws all parameters in place, and resets running statistics and gradients.

    For the networks of this module the result has the same bits as :func:`make_network` with the same generator
    state, on every device and in every float type. Training mode and ``requires_grad`` do not change.

    Args:
        network: any module in which every layer with parameters has ``reset_parameters()``.
        generator: source of the parameters (one draw, a seed).

    Raises:
        InvalidInputError: a layer with parameters lacks ``reset_parameters()``; nothing was changed.
    """
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
            raise InvalidInputError(
                explain(
                    "every layer with parameters to have reset_parameters()",
                    f"{type(module).__name__} at {name or 'the top'!r} without it",
                    "Give the layer that method, or build a new network instead",
                )
            )
    # Draws depend on device, float type and memory layout. So other networks are redrawn through a copy on the CPU.
    native = all(
        p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in network.parameters()
    )
    target = network if native else host_twin(network)
    with seeded(generator):
        for module in target.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    if target is not network:
        drawn, own = _resettable(target), _resettable(network)
        with torch.no_grad():
            for tensor, values in zip(own, upload(drawn, own[0].device), strict=True):
                tensor.copy_(values)
    network.zero_grad(set_to_none=True)


def _resettable(network: nn.Module) -> list[torch.Tensor]:
    """Parameters, and the buffers of layers that reset themselves, in a fixed order."""
    layers = [m for m in network.modules() if callable(getattr(m, "reset_parameters", None))]
    return [t for m in layers for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
