"""Differentiable Siamese augmentation (DSA, Zhao & Bilen, ICML 2021), with separate draw and application.

A loop draws once and applies the draw to the real and to the synthetic batch, of any sizes::

    augmentation = Augmentation(default_strategy("cifar10"))
    draw = augmentation.draw(len(real), 32, generator=generator, siamese=True)
    loss = distance(network.embed(augmentation.apply(real, draw)), network.embed(augmentation.apply(synthetic, draw)))

Operations, ranges and rounding are those of the public DSA code. The order of the draws is ours.
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
from tad_plugin.utils.settings import Settings, setting
from tad_plugin.utils.transfers import upload

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Augmentation", "Draw", "default_strategy"]

STRATEGIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
DEFAULT_STRATEGY = "_".join(STRATEGIES)

# Random numbers of each strategy: name -> (dtype, numbers per image).
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
    """The default strategies of a dataset: all six, without flip for digits, mnist and svhn."""
    if dataset.lower() in _MIRROR_CHANGES_THE_CLASS:
        return "_".join(s for s in STRATEGIES if s != "flip")
    return DEFAULT_STRATEGY


@dataclass(frozen=True, eq=False)
class Draw:
    """The random numbers of one augmentation. A draw can be applied repeatedly, stored and compared.

    The numbers are the arguments of the functions in :mod:`tad_plugin.nn.operations`: ``brightness`` (added),
    ``saturation`` and ``contrast`` (factors), ``crop`` (down, right; pixels), ``cutout`` (row, column of the centre),
    ``flip`` (bool), ``scale`` (horizontal, vertical) and ``rotate`` (radians).

    Attributes:
        strategies: the strategies, in the order of application.
        siamese: True if all images share the numbers, so that the draw fits a batch of any size.
        values: tensors by name, [n], or [n, 2] for crop, cutout and scale. A Siamese draw has n = 1, on the CPU.
    """

    strategies: tuple[str, ...]
    siamese: bool
    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, *strategies: str, siamese: bool = True, **values: Any) -> Draw:
        """Makes a draw from given numbers, such as ``Draw.of("crop", crop=(2, -1))``.

        Args:
            strategies: the strategies, in the order of application.
            siamese: True if each value is one number or pair, shared by the batch; False if it has n of them.
            values: the numbers of the strategies, by name.

        Raises:
            ConfigError: a strategy is unknown or repeated, or a value is missing, superfluous or of a wrong shape.
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
        """Strategies (list of str), siamese (bool) and values (dict of tensors), for ``torch.save``."""
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
        """True if the other draw has the same bits, on any device."""
        if (self.strategies, self.siamese, set(self.values)) != (other.strategies, other.siamese, set(other.values)):
            return False
        return all(torch.equal(value.cpu(), other.values[name].cpu()) for name, value in self.values.items())


@dataclass(frozen=True)
class Augmentation(Settings):
    """The strategies of an augmentation and their strength. The defaults are those of the public code.

    Attributes:
        strategy: names out of ``STRATEGIES`` joined by "_"; "" or "none" for no augmentation.
        mode: "S" picks one strategy per draw, for the whole batch; "M" applies all, in the given order.
        prob_flip: probability of a flip.
        ratio_scale: largest stretch r; factors are uniform in [1/r, r].
        ratio_rotate: largest angle a in degrees; angles are uniform in [-a, a].
        ratio_crop_pad: largest shift of the crop, as a share of the image's side.
        ratio_cutout: side of the cutout, as a share of the image's side.
        brightness: width b of the shift, uniform in [-b/2, b/2], in units of the normalised images.
        saturation: largest factor s; factors are uniform in [0, s].
        contrast: smallest factor c; factors are uniform in [c, 1 + c].
        align_corners: grid convention of scale and rotate: True in the code of MTT and DATM, False in the others.

    Raises:
        ConfigError: a strategy is unknown or repeated, or a setting is out of range.
    """

    strategy: str = DEFAULT_STRATEGY
    mode: str = setting("S", one_of=("S", "M"))
    prob_flip: float = setting(0.5, at_least=0, at_most=1)
    ratio_scale: float = setting(1.2, at_least=1)
    ratio_rotate: float = setting(15.0, at_least=0, at_most=180)
    ratio_crop_pad: float = setting(0.125, at_least=0, at_most=1)
    ratio_cutout: float = setting(0.5, at_least=0, at_most=1)
    brightness: float = setting(1.0, at_least=0)
    saturation: float = setting(2.0, at_least=0)
    contrast: float = setting(0.5, at_least=0)
    align_corners: bool = False

    def check(self) -> None:
        """The strategies are known, and each is named once."""
        super().check()
        _checked(self.strategies)

    @classmethod
    def configured(cls, setting: str, dataset: str) -> Augmentation:
        """The augmentation for the value of a setting ``augment``: "auto" (the dataset's default) or a strategy."""
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
        """Draws a strategy (in mode "S") and its numbers. Without strategies nothing is drawn.

        Args:
            n: number of images B; without effect on a Siamese draw.
            image_size: height and width in pixels, or one number for both.
            generator: source of all draws.
            siamese: True draws one set of numbers for all images, so that the draw fits real and synthetic batches;
                False draws one set for each of the n images.
            device: device of the images. The numbers of a Siamese draw stay on the CPU, so that reading them does not
                wait for a device.
        """
        strategies = self.strategies
        if len(strategies) > 1 and self.mode == "S":
            pick = torch.randint(len(strategies), (1,), generator=generator, device=generator.device)
            strategies = (strategies[int(pick)],)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        values: dict[str, Tensor] = {}
        for strategy in strategies:
            values.update(self._numbers(strategy, 1 if siamese else n, size, generator))
        where = torch.device("cpu") if siamese else torch.device(device)
        if where.type != generator.device.type:
            moved = upload(list(values.values()), where) if generator.device.type == "cpu" else values.values()
            values = dict(zip(values, (value.to(where) for value in moved), strict=True))
        return Draw(strategies, siamese, values)

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Applies a draw to images, float [B, C, H, W]. Differentiable in the images to any order.

        Raises:
            InvalidInputError: the images are not 4-D, or the draw was made for another number of images.
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
        """Draws and applies: images, float [B, C, H, W], each with numbers of its own unless ``siamese``."""
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
            # The centre of an even side lies between two pixels, so it has one more possible position.
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
    """``ratio`` of a side in whole pixels; halves are rounded up, as in the public code."""
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
