"""Differentiable Siamese augmentation (DSA, Zhao & Bilen, ICML 2021), with the draw kept apart from its use.

A loop draws once and applies the draw to the real and to the synthetic batch, whatever their sizes::

    augmentation = Augmentation(default_strategy("cifar10"))
    draw = augmentation.draw(len(real), 32, generator=generator, siamese=True)
    loss = distance(network.embed(augmentation.apply(real, draw)), network.embed(augmentation.apply(synthetic, draw)))

The operations, their ranges and their rounding are those of the public DSA code; the order in which numbers are
taken from the generator is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import ConfigError, InvalidInputError, explain
from tad_plugin.nn import operations

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Augmentation", "Draw", "default_strategy"]

STRATEGIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
DEFAULT_STRATEGY = "_".join(STRATEGIES)

# What each strategy needs drawn: name -> (dtype, numbers per image).
_FIELDS: dict[str, dict[str, tuple[torch.dtype, int]]] = {
    "color": {"brightness": (torch.float32, 1), "saturation": (torch.float32, 1), "contrast": (torch.float32, 1)},
    "crop": {"crop": (torch.int64, 2)},
    "cutout": {"cutout": (torch.int64, 2)},
    "flip": {"flip": (torch.bool, 1)},
    "scale": {"scale": (torch.float32, 2)},
    "rotate": {"rotate": (torch.float32, 1)},
}
_MIRROR_CHANGES_THE_CLASS = ("digits", "mnist", "svhn")


def default_strategy(dataset: str) -> str:
    """The strategies that suit a dataset: all six, but no flip for digits (digits, mnist, svhn), which it garbles."""
    if dataset.lower() in _MIRROR_CHANGES_THE_CLASS:
        return "_".join(s for s in STRATEGIES if s != "flip")
    return DEFAULT_STRATEGY


@dataclass(frozen=True, eq=False)
class Draw:
    """Everything that was random about one augmentation: apply it as often as wanted, store it, compare it.

    The numbers are those that the functions of :mod:`tad_plugin.nn.operations` take, with a leading length of 1 for
    a Siamese draw (then on the CPU) and n otherwise: ``brightness`` (added), ``saturation`` and ``contrast``
    (factors), ``crop`` (down, right; pixels), ``cutout`` (centre's row, column), ``flip`` (bool), ``scale``
    (horizontal, vertical) and ``rotate`` (radians).

    Attributes:
        strategies: what to apply, in this order.
        siamese: whether the numbers are shared, so that the draw fits a batch of any size.
        values: tensor by name; [n], or [n, 2] for crop, cutout and scale.
    """

    strategies: tuple[str, ...]
    siamese: bool
    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, *strategies: str, siamese: bool = True, **values: Any) -> Draw:
        """A draw from explicit numbers, such as ``Draw.of("crop", crop=(2, -1))``.

        Args:
            strategies: what to apply, in order.
            siamese: True where each value is one image's (a number, or a pair), shared by the batch; False where the
                values are sequences or tensors of n of these.
            values: one for each number that the strategies need, by the names that the class lists.

        Raises:
            ConfigError: an unknown or repeated strategy, or a value missing, superfluous or of the wrong shape.
        """
        fields = {name: spec for s in _checked(strategies) for name, spec in _FIELDS[s].items()}
        if set(fields) != set(values):
            raise ConfigError(
                explain(
                    f"values for {sorted(fields) or 'nothing'}",
                    f"{sorted(values)}",
                    "Give exactly what the strategies need",
                )
            )
        tensors = {}
        for name, (dtype, width) in fields.items():
            tensor = torch.as_tensor(values[name]).to(dtype)
            tensor = tensor.unsqueeze(0) if siamese else tensor
            if tensor.shape[1:] != ((2,) if width == 2 else ()):
                shape = "[2]" if width == 2 else "one number"
                raise ConfigError(
                    explain(f"{name} to be {shape} per image", f"shape {list(tensor.shape)}", "Check `siamese`")
                )
            tensors[name] = tensor
        lengths = {len(t) for t in tensors.values()}
        if len(lengths) > 1:
            raise ConfigError(explain("values of one length", f"lengths {sorted(lengths)}", "Give one value per image"))
        return cls(tuple(strategies), siamese, tensors)

    def state_dict(self) -> dict[str, Any]:
        """Strategies (list of str), siamese (bool) and values (dict of tensors): safe to store with ``torch.save``."""
        return {"strategies": list(self.strategies), "siamese": self.siamese, "values": dict(self.values)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Draw:
        """The inverse of :meth:`state_dict`.

        Raises:
            ConfigError: the values do not fit the strategies.
        """
        values = {name: value[0] if state["siamese"] else value for name, value in state["values"].items()}
        return cls.of(*state["strategies"], siamese=bool(state["siamese"]), **values)

    def same_as(self, other: Draw) -> bool:
        """Whether the other draw is equal to the last bit, wherever its tensors are."""
        if (self.strategies, self.siamese, set(self.values)) != (other.strategies, other.siamese, set(other.values)):
            return False
        return all(torch.equal(value.cpu(), other.values[name].cpu()) for name, value in self.values.items())


@dataclass(frozen=True)
class Augmentation:
    """Which strategies may be drawn, and how strong they are. The defaults are the field's.

    Attributes:
        strategy: names out of ``STRATEGIES`` joined by "_"; "" or "none" for no augmentation.
        mode: "S" picks one strategy per draw, for the whole batch; "M" applies all in the order given.
        prob_flip: probability of a flip.
        ratio_scale: largest stretch r; factors are uniform in [1/r, r].
        ratio_rotate: largest angle in degrees, uniform in both directions.
        ratio_crop_pad: largest shift of the crop as a share of the image's side.
        ratio_cutout: side of the cut-out as a share of the image's side.
        brightness: width b of the uniform shift in [-b/2, b/2], in units of the normalised images.
        saturation: largest factor s, uniform in [0, s].
        contrast: smallest factor c, uniform in [c, 1 + c].
        align_corners: grid convention of scale and rotate: True in MTT's and DATM's code, False in the others'.

    Raises:
        ConfigError: an unknown or repeated strategy, an unknown mode, or a number out of range.
    """

    strategy: str = DEFAULT_STRATEGY
    mode: str = "S"
    prob_flip: float = 0.5
    ratio_scale: float = 1.2
    ratio_rotate: float = 15.0
    ratio_crop_pad: float = 0.125
    ratio_cutout: float = 0.5
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    align_corners: bool = False

    def __post_init__(self) -> None:
        _checked(self.strategies)
        if self.mode not in ("S", "M"):
            raise ConfigError(explain("`mode` 'S' (single) or 'M' (multiple)", repr(self.mode), "Pass one of these"))
        ranges = {
            "prob_flip": (0.0, 1.0),
            "ratio_scale": (1.0, math.inf),
            "ratio_rotate": (0.0, 180.0),
            "ratio_crop_pad": (0.0, 1.0),
            "ratio_cutout": (0.0, 1.0),
            "brightness": (0.0, math.inf),
            "saturation": (0.0, math.inf),
            "contrast": (0.0, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ConfigError(
                    explain(f"`{name}` in [{low:g}, {high:g}]", str(value), f"Pass a `{name}` in that range")
                )

    @classmethod
    def configured(cls, setting: str, dataset: str) -> Augmentation:
        """The augmentation of an ``augment`` setting: "auto" is the dataset's own, "none" or "" none, else by name."""
        return cls(default_strategy(dataset) if setting == "auto" else setting)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The names in ``strategy``, in order; empty for no augmentation."""
        return () if self.strategy.lower() in ("", "none") else tuple(self.strategy.split("_"))

    def draw(
        self,
        n: int,
        image_size: int | tuple[int, int],
        *,
        generator: torch.Generator,
        siamese: bool,
        device: torch.device | str = "cpu",
    ) -> Draw:
        """Draws the strategy (mode "S") and its numbers; without strategies nothing is taken from the generator.

        Args:
            n: number of images B; has no influence on a Siamese draw.
            image_size: height and width in pixels, or one number for both.
            generator: where everything is drawn from.
            siamese: one set of numbers for all images, so that the draw fits real and synthetic batches alike, or a set
                for each of the n images.
            device: where the images are; the numbers of a Siamese draw stay on the CPU all the same, where reading
                them makes no device wait.
        """
        strategies = self.strategies
        if len(strategies) > 1 and self.mode == "S":
            pick = torch.randint(len(strategies), (1,), generator=generator, device=generator.device)
            strategies = (strategies[int(pick)],)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        where = torch.device("cpu") if siamese else torch.device(device)
        values: dict[str, Tensor] = {}
        for strategy in strategies:
            drawn = self._numbers(strategy, 1 if siamese else n, size, generator)
            values.update({name: value.to(where) for name, value in drawn.items()})
        return Draw(strategies, siamese, values)

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """The augmented images, float [B, C, H, W] as given, differentiable in the images to any order.

        Raises:
            InvalidInputError: images that are not 4-D, or a draw made for another number of them.
        """
        if images.ndim != 4:
            raise InvalidInputError(
                explain("images [B, C, H, W]", f"shape {list(images.shape)}", "Add the missing dimensions")
            )
        for name, value in draw.values.items():
            if not draw.siamese and len(value) != len(images):
                raise InvalidInputError(
                    explain(
                        f"{len(value)} images, as {name} was drawn for",
                        str(len(images)),
                        "Draw anew, or with siamese=True",
                    )
                )
        for strategy in draw.strategies:
            images = self._transform(strategy, images, draw.values)
        return images

    def __call__(self, images: Tensor, *, generator: torch.Generator, siamese: bool = False) -> Tensor:
        """Draws and applies at once: images, float [B, C, H, W], each augmented on its own unless ``siamese``."""
        size = (images.shape[-2], images.shape[-1])
        draw = self.draw(len(images), size, generator=generator, siamese=siamese, device=images.device)
        return self.apply(images, draw)

    def _numbers(self, strategy: str, n: int, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """The numbers of one strategy for n images, on the generator's device."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=generator.device)

        def integers(bounds: list[tuple[int, int]]) -> Tensor:
            """int64 [n, 2], each column uniform in its [low, high)."""
            draws = [torch.randint(a, b, (n,), generator=generator, device=generator.device) for a, b in bounds]
            return torch.stack(draws, dim=1)

        if strategy == "color":
            return {
                "brightness": (uniform(n) - 0.5) * self.brightness,
                "saturation": uniform(n) * self.saturation,
                "contrast": uniform(n) + self.contrast,
            }
        if strategy == "crop":
            reach = [_share(side, self.ratio_crop_pad) for side in size]
            return {"crop": integers([(-r, r + 1) for r in reach])}
        if strategy == "cutout":
            # A rectangle of even side has its centre between two pixels, so it has one more place to be in.
            return {"cutout": integers([(0, side + 1 - _share(side, self.ratio_cutout) % 2) for side in size])}
        if strategy == "flip":
            return {"flip": uniform(n) < self.prob_flip}
        if strategy == "scale":
            low, high = 1.0 / self.ratio_scale, self.ratio_scale
            return {"scale": uniform(n, 2) * (high - low) + low}
        return {"rotate": (uniform(n) - 0.5) * (2.0 * math.radians(self.ratio_rotate))}

    def _transform(self, strategy: str, images: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if strategy == "color":
            images = operations.brightness(images, values["brightness"])
            images = operations.saturation(images, values["saturation"])
            return operations.contrast(images, values["contrast"])
        if strategy == "crop":
            return operations.crop(images, values["crop"])
        if strategy == "cutout":
            height, width = images.shape[-2:]
            size = (_share(height, self.ratio_cutout), _share(width, self.ratio_cutout))
            return operations.cutout(images, values["cutout"], size)
        if strategy == "flip":
            return operations.flip(images, values["flip"])
        if strategy == "scale":
            return operations.scale(images, values["scale"], align_corners=self.align_corners)
        return operations.rotate(images, values["rotate"], align_corners=self.align_corners)


def _share(side: int, ratio: float) -> int:
    """``ratio`` of a side in whole pixels, halves rounded up (the field's rounding, not Python's)."""
    return int(side * ratio + 0.5)


def _checked(strategies: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [s for s in strategies if s not in STRATEGIES]
    if unknown:
        raise ConfigError(
            explain(
                f"strategies out of {', '.join(STRATEGIES)}, joined by '_'",
                ", ".join(map(repr, unknown)),
                "Check the spelling, or pass 'none' for no augmentation",
            )
        )
    if len(set(strategies)) < len(strategies):
        raise ConfigError(explain("each strategy once", "_".join(strategies), "Remove the repeated ones"))
    return strategies
