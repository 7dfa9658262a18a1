"""MLP, AlexNet, VGG11 and ResNet-18 in the small-image variants of the public codebases.

The builders draw from the global generator, as torch's layers do. Call them through
:func:`tad_plugin.nn.networks.make_network`, which restores that generator.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.nn.blocks import LayerBuilder, Network, NetworkOptions, activation_layer, norm_layer, too_small

__all__ = ["alexnet", "mlp", "resnet18", "resnet18ap", "vgg11"]


def mlp(options: NetworkOptions) -> Network:
    """Multilayer perceptron without norm: ``depth`` linear layers, ``width`` hidden units; usually 3 and 128."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = options.in_channels * options.image_size[0] * options.image_size[1]
    for _ in range(options.depth - 1):
        layers += [nn.Linear(size, options.width), activation_layer(options.activation)]
        size = options.width
    return Network(nn.Sequential(*layers), size, options.num_classes)


def alexnet(options: NetworkOptions) -> Network:
    """AlexNet for small images: five convolutions, three max-pools, one linear layer; by default no norm.

    Raises:
        ConfigError: images are smaller than 8x8 pixels.
    """
    build = LayerBuilder("alexnet", options, default_norm="none")
    for channels, kernel, pooled in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        build.conv(options.scaled(channels), kernel)
        build.norm()
        build.activation()
        if pooled:
            build.pool("max")
    return Network(build.sequential(), build.feature_dim, options.num_classes)


def vgg11(options: NetworkOptions) -> Network:
    """VGG11 with one linear layer; by default with instance norm.

    Raises:
        ConfigError: images are smaller than 32x32 pixels. Grey images of 28x28 are padded to that size.
    """
    build = LayerBuilder("vgg11", options, default_norm="instance")
    for channels, pooled in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        build.conv(options.scaled(channels), 3)
        build.norm()
        build.activation()
        if pooled:
            build.pool("max")
    return Network(build.sequential(), build.feature_dim, options.num_classes)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. Halves the map with a strided convolution or with average pooling."""

    def __init__(
        self,
        network: str,
        options: NetworkOptions,
        channels: tuple[int, int],
        size: tuple[int, int],
        halve: bool,
        pooled: bool,
    ) -> None:
        super().__init__()
        before, after = channels
        stride = 2 if halve and not pooled else 1
        self.size = _halved(size, pooled) if halve else size
        # With average pooling the first norm sees the full map. Only layer norm depends on the size.
        first_size = size if pooled else self.size
        name = options.norm or "instance"

        def norm(map_size: tuple[int, int]) -> nn.Module:
            return norm_layer(name, after, map_size, network, options) or nn.Identity()

        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(first_size)
        self.act1 = activation_layer(options.activation)
        self.pool = nn.AvgPool2d(2, 2) if halve and pooled else nn.Identity()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = norm(self.size)
        self.shortcut = nn.Sequential()
        if halve or before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride=stride, bias=False))
            if halve and pooled:
                self.shortcut.append(nn.AvgPool2d(2, 2))
            self.shortcut.append(norm(self.size))
        self.act2 = activation_layer(options.activation)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.pool(self.act1(self.norm1(self.conv1(x))))))
        return self.act2(out + self.shortcut(x))


def _halved(size: tuple[int, int], pooled: bool) -> tuple[int, int]:
    """Size of the map after a halving block: pooling drops an odd last row, a strided convolution keeps it."""
    return (size[0] // 2, size[1] // 2) if pooled else ((size[0] + 1) // 2, (size[1] + 1) // 2)


class _GlobalMean(nn.Module):
    """Mean over the map, for every size. For images of 32x32 this is the usual 4x4 average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1)


def resnet18(options: NetworkOptions) -> Network:
    """ResNet-18 for small images: 3x3 stem without pooling; by default with instance norm.

    Raises:
        ConfigError: images of 8x8 pixels or less, with instance norm.
    """
    return _resnet18("resnet18", options, pooled=False)


def resnet18ap(options: NetworkOptions) -> Network:
    """ResNet-18 with average pooling in place of strides and of the global mean (``ResNet18_AP`` of the public code).

    Raises:
        ConfigError: images are smaller than 8x8 pixels, or than 16x16 with instance norm.
    """
    return _resnet18("resnet18ap", options, pooled=True)


def _resnet18(name: str, options: NetworkOptions, pooled: bool) -> Network:
    stem = options.scaled(64)
    layers: list[nn.Module] = [nn.Conv2d(options.in_channels, stem, 3, padding=1, bias=False)]
    size, before = options.image_size, stem
    first = norm_layer(options.norm or "instance", stem, size, name, options)
    layers += [first] if first is not None else []
    layers.append(activation_layer(options.activation))
    for stage, channels in enumerate((64, 128, 256, 512)):
        for position in range(2):
            halve = stage > 0 and position == 0
            if halve and pooled and min(size) < 2:
                raise too_small(name, options, "a pooling layer would be left without pixels")
            block = _BasicBlock(name, options, (before, options.scaled(channels)), size, halve, pooled)
            layers.append(block)
            size, before = block.size, options.scaled(channels)
    if pooled:
        return Network(nn.Sequential(*layers), before * size[0] * size[1], options.num_classes)
    return Network(nn.Sequential(*layers, _GlobalMean()), before, options.num_classes)
