"""Shared by all networks: the base class, the options, and the layers.

Layers are built in the order in which they run, with torch's default initialisation. So the parameters have the same
order as in the public codebases, and a seed draws the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tad_plugin.errors import ConfigError, explain
from tad_plugin.nn.pooling import HalvingAvgPool, ReluHalvingAvgPool
from tad_plugin.utils.precision import in_precision
from tad_plugin.utils.settings import Settings, setting

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "POOLINGS",
    "LayerBuilder",
    "Network",
    "NetworkOptions",
    "activation_layer",
    "norm_layer",
    "too_small",
]

NORMS = ("instance", "batch", "group", "layer", "none")
POOLINGS = ("avg", "max", "none")
ACTIVATIONS = ("relu", "sigmoid", "leaky")

_GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Settings):
    """Arguments of a network builder; see :func:`tad_plugin.nn.networks.make_network`.

    Attributes:
        in_channels: image channels C.
        num_classes: number of logits K.
        image_size: (height, width) in pixels.
        width: channels of the ConvNet, hidden units of the MLP; 128 gives the usual channels of the other networks.
        depth: blocks of the ConvNet, linear layers of the MLP; ignored by the other networks.
        norm: one of ``NORMS``; None takes the default of the network.
        pooling: one of ``POOLINGS``; ConvNet only.
        activation: one of ``ACTIVATIONS``.
    """

    in_channels: int = setting(at_least=1)
    num_classes: int = setting(at_least=1)
    image_size: tuple[int, int]
    width: int = setting(128, at_least=1)
    depth: int = setting(3, at_least=1)
    norm: str | None = setting(None, one_of=NORMS)
    pooling: str = setting("avg", one_of=POOLINGS)
    activation: str = setting("relu", one_of=ACTIVATIONS)

    def check(self) -> None:
        """Both sides of the images are at least 1."""
        super().check()
        self.require(min(self.image_size) >= 1, "image_size of at least 1", self.image_size)

    def scaled(self, channels: int) -> int:
        """``channels * width / 128``, rounded down, at least 1."""
        return max(1, channels * self.width // 128)

    @property
    def stem_padding(self) -> int:
        """Extra padding of the first convolution in pixels per side: 2 for grey images of 28x28, else 0.

        The public codebases enlarge MNIST to 32x32 this way. Other grey images are not enlarged.
        """
        return 2 if self.in_channels == 1 and self.image_size == (28, 28) else 0


class Network(nn.Module):
    """A classifier: ``features``, then one linear layer ``classifier``.

    Attributes:
        features: module from images [B, C, H, W] to maps or vectors.
        classifier: the final linear layer, D -> K.
    """

    def __init__(self, features: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(feature_dim, num_classes)

    @property
    def feature_dim(self) -> int:
        """D, the length of an embedding."""
        return self.classifier.in_features

    @property
    def num_classes(self) -> int:
        """K, the number of logits."""
        return self.classifier.out_features

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> features, float [B, D], the input of the last linear layer."""
        return in_precision(lambda images: self.features(images).flatten(1), x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits, float [B, K]."""
        return in_precision(self.classifier, self.embed(x))


class LayerBuilder:
    """Appends layers of a convolutional network and tracks the channels and the size of the map."""

    def __init__(self, network: str, options: NetworkOptions, default_norm: str) -> None:
        self.network = network
        self.options = options
        self.norm_name = default_norm if options.norm is None else options.norm
        self.channels = options.in_channels
        self.size = options.image_size
        self.layers: list[nn.Module] = []

    @property
    def feature_dim(self) -> int:
        """Length of the flattened output of the layers so far."""
        return self.channels * self.size[0] * self.size[1]

    def sequential(self) -> nn.Sequential:
        """The layers so far."""
        return nn.Sequential(*self.layers)

    def conv(self, channels: int, kernel: int) -> None:
        """Appends a convolution. It keeps the size of the map, except for ``stem_padding`` in the first layer."""
        padding = kernel // 2 + (self.options.stem_padding if not self.layers else 0)
        self.layers.append(nn.Conv2d(self.channels, channels, kernel_size=kernel, padding=padding))
        self.channels = channels
        grown = 2 * padding - kernel + 1
        self.size = (self.size[0] + grown, self.size[1] + grown)

    def norm(self) -> None:
        """Appends the normalisation layer, if any."""
        layer = norm_layer(self.norm_name, self.channels, self.size, self.network, self.options)
        if layer is not None:
            self.layers.append(layer)

    def activation(self) -> None:
        """Appends the activation."""
        self.layers.append(activation_layer(self.options.activation))

    def pool(self, kind: str) -> None:
        """Appends 2x2 pooling with stride 2, if any.

        Raises:
            ConfigError: the map is too small.
        """
        if kind == "none":
            return
        if min(self.size) < 2:
            raise too_small(self.network, self.options, "a pooling layer would be left without pixels")
        if kind == "max":
            self.layers.append(nn.MaxPool2d(2, 2))
        elif self.layers and isinstance(self.layers[-1], nn.ReLU):
            # The identity keeps the numbering of the layers, and with it the names of parameters in the public code.
            self.layers[-1] = nn.Identity()
            self.layers.append(ReluHalvingAvgPool())
        else:
            self.layers.append(HalvingAvgPool())
        self.size = (self.size[0] // 2, self.size[1] // 2)


def activation_layer(name: str) -> nn.Module:
    """The activation layer of this name; "leaky" has a negative slope of 0.01."""
    if name == "sigmoid":
        return nn.Sigmoid()
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(negative_slope=0.01)


def norm_layer(
    name: str, channels: int, size: tuple[int, int], network: str, options: NetworkOptions
) -> nn.Module | None:
    """The normalisation layer of this name for maps [B, channels, *size]; None for "none".

    Raises:
        ConfigError: the channels are not divisible by the number of groups, or instance norm would see single pixels.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "layer":
        return nn.LayerNorm([channels, *size])
    if name == "instance":
        # A single value is its own mean: the output would be the same for every image.
        if size == (1, 1):
            raise too_small(network, options, "instance norm over a single pixel gives zero")
        return nn.GroupNorm(channels, channels)
    if name == "group":
        if channels % _GROUPS:
            raise ConfigError(
                explain(
                    f"channels divisible by {_GROUPS} for norm='group'",
                    str(channels),
                    "Pass another width or another norm",
                )
            )
        return nn.GroupNorm(_GROUPS, channels)
    return None


def too_small(network: str, options: NetworkOptions, why: str) -> ConfigError:
    """The error for images that are too small for a network."""
    height, width = options.image_size
    depth = f" of depth {options.depth}" if network == "convnet" else ""
    return ConfigError(
        explain(
            f"images large enough for {network}{depth}",
            f"{height}x{width} pixels: {why}",
            "Lower the depth, enlarge the images, or choose another network, norm or pooling",
        )
    )
