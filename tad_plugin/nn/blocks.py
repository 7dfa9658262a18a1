"""What all bundled networks share: the base class, the options and the layers they choose between.

Layers are built in the order in which they run, with torch's default initialisation, so that the
parameters of a network stand in the same order (and a given seed draws the same values) as in the
field's own definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tad_plugin.errors import ConfigError, explain
from tad_plugin.nn.pooling import HalvingAvgPool, ReluHalvingAvgPool

__all__ = ["ACTIVATIONS", "NORMS", "POOLINGS", "Network", "NetworkOptions"]

NORMS = ("instance", "batch", "group", "layer", "none")
POOLINGS = ("avg", "max", "none")
ACTIVATIONS = ("relu", "sigmoid", "leaky")

_GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The checked arguments of :func:`tad_plugin.nn.networks.make_network`, as a builder receives them.

    Attributes:
        in_channels: image channels C.
        num_classes: number of logits K.
        image_size: (height, width) in pixels.
        width: channels of a ConvNet's layers, hidden units of an MLP; for the other networks 128 stands for
            their usual channel counts and another value scales all of them.
        depth: blocks of a ConvNet, linear layers of an MLP; not used by the other networks.
        norm: one of ``NORMS``, or None for the network's own default.
        pooling: one of ``POOLINGS``; ConvNet only.
        activation: one of ``ACTIVATIONS``.

    Raises:
        ConfigError: a number below 1 or a name that does not exist.
    """

    in_channels: int
    num_classes: int
    image_size: tuple[int, int]
    width: int = 128
    depth: int = 3
    norm: str | None = None
    pooling: str = "avg"
    activation: str = "relu"

    def __post_init__(self) -> None:
        height, width = self.image_size
        numbers = {
            "in_channels": self.in_channels,
            "num_classes": self.num_classes,
            "image_size": min(height, width),
            "width": self.width,
            "depth": self.depth,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(explain(f"`{name}` of at least 1", str(value), f"Pass a positive `{name}`"))
        choices = {"norm": NORMS, "pooling": POOLINGS, "activation": ACTIVATIONS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (name == "norm" and value is None):
                raise ConfigError(
                    explain(f"`{name}` out of {', '.join(known)}", repr(value), f"Pass one of these as `{name}`")
                )

    def scaled(self, channels: int) -> int:
        """A usual channel count, scaled by ``width / 128`` and at least 1."""
        return max(1, channels * self.width // 128)

    @property
    def stem_padding(self) -> int:
        """Pixels that the first convolution pads on each side beyond what keeps the size: 2 for 28x28 grey images.

        The field turns MNIST into 32x32 this way. Grey images of another size are not enlarged.
        """
        return 2 if self.in_channels == 1 and self.image_size == (28, 28) else 0


class Network(nn.Module):
    """A classifier made of ``features`` (images to maps) and ``classifier`` (one linear layer).

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
        """Features, float [B, D], of images [B, C, H, W]: what the last linear layer reads."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float [B, K], of images [B, C, H, W]."""
        return self.classifier(self.embed(x))


class LayerBuilder:
    """Lays convolutional layers one after another and keeps count of channels and map size."""

    def __init__(self, network: str, options: NetworkOptions, default_norm: str) -> None:
        self.network = network
        self.options = options
        self.norm_name = default_norm if options.norm is None else options.norm
        self.channels = options.in_channels
        self.size = options.image_size
        self.layers: list[nn.Module] = []

    @property
    def feature_dim(self) -> int:
        """Length of the flattened output of the layers laid so far."""
        return self.channels * self.size[0] * self.size[1]

    def sequential(self) -> nn.Sequential:
        """The layers laid so far."""
        return nn.Sequential(*self.layers)

    def conv(self, channels: int, kernel: int) -> None:
        """A convolution that keeps the map's size, except the first one of 28x28 grey images."""
        padding = kernel // 2 + (self.options.stem_padding if not self.layers else 0)
        self.layers.append(nn.Conv2d(self.channels, channels, kernel_size=kernel, padding=padding))
        self.channels = channels
        grown = 2 * padding - kernel + 1
        self.size = (self.size[0] + grown, self.size[1] + grown)

    def norm(self) -> None:
        """The normalisation layer, if any."""
        layer = norm_layer(self.norm_name, self.channels, self.size, self.network, self.options)
        if layer is not None:
            self.layers.append(layer)

    def activation(self) -> None:
        """The activation function."""
        self.layers.append(activation_layer(self.options.activation))

    def pool(self, kind: str) -> None:
        """2x2 pooling with stride 2, if any.

        Raises:
            ConfigError: nothing would be left of the map.
        """
        if kind == "none":
            return
        if min(self.size) < 2:
            raise too_small(self.network, self.options, "a pooling layer would be left without pixels")
        if kind == "max":
            self.layers.append(nn.MaxPool2d(2, 2))
        elif self.layers and isinstance(self.layers[-1], nn.ReLU):
            # In its place, so that parameters keep the names that they have in the field's networks.
            self.layers[-1] = nn.Identity()
            self.layers.append(ReluHalvingAvgPool())
        else:
            self.layers.append(HalvingAvgPool())
        self.size = (self.size[0] // 2, self.size[1] // 2)


def activation_layer(name: str) -> nn.Module:
    """The activation called ``name``; "leaky" has a negative slope of 0.01."""
    if name == "sigmoid":
        return nn.Sigmoid()
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(negative_slope=0.01)


def norm_layer(
    name: str, channels: int, size: tuple[int, int], network: str, options: NetworkOptions
) -> nn.Module | None:
    """The normalisation called ``name`` for maps [B, channels, *size], or None for "none".

    Raises:
        ConfigError: groups that do not divide the channels, or maps of one pixel where instance norm gives zero.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "layer":
        return nn.LayerNorm([channels, *size])
    if name == "instance":
        # A group of one value is its own mean: the output would be the same for every image, and the network dead.
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
    """The error for images that a network of this depth cannot take."""
    height, width = options.image_size
    depth = f" of depth {options.depth}" if network == "convnet" else ""
    return ConfigError(
        explain(
            f"images large enough for {network}{depth}",
            f"{height}x{width} pixels: {why}",
            "Lower the depth, enlarge the images, or choose another network, norm or pooling",
        )
    )
