"""DC: gradient matching (Zhao, Mopuri & Bilen, ICLR 2021), and DSA, the same under Siamese augmentation (ICML 2021).

A random network is drawn and then followed while it learns from the synthetic set. At each point of that way the
gradient of its loss on a batch of real images of a class is matched by the gradient on the class's synthetic images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, BaselineConfig, check_batch, check_loss, draw_class
from tad_plugin.distill.gradient_distance import gradient_distance, matched_parameters
from tad_plugin.distill.real_gradient import weighted_gradient, weighted_gradient_graph
from tad_plugin.errors import ConfigError, explain
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.derivatives.mean_gradient import mean_gradient
from tad_plugin.nn.networks import reinitialise
from tad_plugin.nn.passes import pass_size

__all__ = ["DC", "DSA", "LOOPS", "PRESETS", "DCConfig", "DSAConfig"]

LOOPS: dict[int, tuple[int, int]] = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Published loop counts: IPC -> (updates of the images per network, epochs of the network between two of them)."""

# How the weight of a real sample gets its derivative, where a method asks for one.
_DERIVATIVES = {"forward": weighted_gradient, "graph": weighted_gradient_graph}
# Real images per class from which a batch norm takes its statistics; the published value.
_NORM_IMAGES = 16


@dataclass
class DCConfig(BaselineConfig):
    """Settings of DC; the defaults are the published ones (``PRESETS``), but for the number of iterations.

    One iteration is one update of the images. The published run draws 1,000 networks and updates the images ``outer``
    times on each, so it has 1,000 x ``outer`` iterations.

    Attributes:
        lr_img: learning rate of the images.
        init: "noise" (DC) or "real" (DSA).
        augment: "none" (DC) or a Siamese strategy (DSA).
        batch_real: real images per class and iteration; a smaller class gives all it has.
        batch_train: synthetic images per step of the network.
        momentum: of the images' SGD.
        lr_net: learning rate of the network's plain SGD on the synthetic set.
        outer: updates of the images on one network; 0 takes the published count, which some IPC have (``LOOPS``).
        inner: epochs of the network on the synthetic set between two updates; 0 takes the published count.
        distance: "layerwise" (called "ours" in the field), "mse" or "cosine".
        weight_derivative: how a method that asks for it gets the derivative in the real samples' weights: "forward"
            (a forward-mode pass) or "graph" (a graph of the real gradient, third order). The same numbers.
    """

    lr_img: float = 0.1
    init: str = "noise"
    augment: str = "none"
    batch_real: int = 256
    batch_train: int = 256
    momentum: float = 0.5
    lr_net: float = 0.01
    outer: int = 0
    inner: int = 0
    distance: str = "layerwise"
    weight_derivative: str = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("batch_real", 1), ("batch_train", 1), ("outer", 0), ("inner", 0)):
            if getattr(self, name) < low:
                raise ConfigError(explain(f"{name} of at least {low}", str(getattr(self, name)), "Correct the setting"))
        if not self.lr_net > 0:
            raise ConfigError(explain("lr_net above 0", str(self.lr_net), "Correct the setting"))
        if self.weight_derivative not in _DERIVATIVES:
            expected = f"weight_derivative out of {', '.join(_DERIVATIVES)}"
            raise ConfigError(explain(expected, repr(self.weight_derivative), "Correct the setting"))
        gradient_distance(self.distance)
        # A network that is used for one update is never trained.
        if self.ipc not in LOOPS and not (self.outer == 1 or (self.outer and self.inner)):
            expected = f"an IPC with published loop counts ({', '.join(map(str, LOOPS))})"
            do = "Set both, e.g. --loop.outer 10 --loop.inner 50"
            raise ConfigError(explain(expected, f"{self.ipc}, with outer {self.outer} and inner {self.inner}", do))

    @property
    def loops(self) -> tuple[int, int]:
        """(outer, inner) with the published counts in place of zeros."""
        outer, inner = LOOPS.get(self.ipc, (0, 0))
        return self.outer or outer, self.inner or inner


@dataclass
class DSAConfig(DCConfig):
    """Settings of DSA: DC's, from real images and under the dataset's Siamese augmentation.

    Attributes:
        init: see DC.
        augment: DSA strategy; "auto" is the dataset's own.
    """

    init: str = "real"
    augment: str = "auto"


def _published(own: dict[str, Any]) -> dict[int, dict[str, Any]]:
    shared = {"lr_img": 0.1, "momentum": 0.5, "lr_net": 0.01, "batch_real": 256, "batch_train": 256, "width": 128}
    return {
        ipc: {"ipc": ipc, "iterations": 1000 * outer, "outer": outer, "inner": inner, **shared, **own}
        for ipc, (outer, inner) in LOOPS.items()
    }


PRESETS: dict[str, dict[int, dict[str, Any]]] = {
    "dc": _published({"init": "noise", "augment": "none"}),
    "dsa": _published({"init": "real", "augment": "auto"}),
}
"""Published settings: ``DCConfig(**PRESETS["dc"][10])``, ``DSAConfig(**PRESETS["dsa"][10])``."""


def _run_settings(name: str) -> dict[int, dict[str, Any]]:
    """The same as fields of RunConfig, for ``--loop.preset published``."""
    own = ("iterations", "lr_img", "width")
    return {
        ipc: {**{k: given[k] for k in own}, "loop": {k: v for k, v in given.items() if k not in (*own, "ipc")}}
        for ipc, given in PRESETS[name].items()
    }


class DC(Baseline):
    """Gradient matching. The state between two iterations includes the network and how far it has learned."""

    name: ClassVar[str] = "dc"
    Config: ClassVar[type[BaselineConfig]] = DCConfig
    preset: ClassVar[Mapping[str, Any]] = {"lr_img": 0.1}
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {"published": _run_settings("dc")}
    evaluation: ClassVar[Mapping[str, Any]] = {"augment": "none"}

    def __init__(
        self, config: DCConfig, data: RealData, hook: Hook | None, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img, momentum=config.momentum)
        self.augmentation = Augmentation.configured(config.augment, data.dataset)
        self.distance = gradient_distance(config.distance)
        self.outer, self.inner = config.loops
        # Redrawn in place for each new network; until the first iteration it stands for none.
        self.network = self.fresh_network(torch.Generator().manual_seed(0)).train()
        self.network_optimizer = torch.optim.SGD(self.network.parameters(), lr=config.lr_net)
        self.parameters = matched_parameters(self.network, config.distance)
        self._chunk = pass_size(data.images, config.width)
        self._norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm)]

    def step(self, iteration: int) -> Mapping[str, Any]:
        """One update of the images; see :class:`Baseline`.

        Raises:
            EmptyClassError, NotEnoughSamplesError: see :func:`tad_plugin.distill.baseline.check_batch`.
            NonFiniteError: the matching loss is NaN or infinite.
        """
        images, ipc = self.synthetic.images, self.config.ipc
        self._advance_network(iteration)
        # Only a method that differentiates the loss needs it with its graph. For all others each class's part is
        # differentiated, and its graph freed, before the next one is built: the same bits in a fraction of the memory.
        keep = self.hook is not None and self.hook.wants_graph()
        gradient, losses = torch.zeros_like(images), []
        for c in range(self.data.num_classes):
            own = images[c * ipc : (c + 1) * ipc]
            loss = self._class_loss(c, own)
            if not keep:
                (gradient[c * ipc : (c + 1) * ipc],) = torch.autograd.grad(loss, own)
            losses.append(loss if keep else loss.detach())
        total = torch.stack(losses).sum()
        check_loss(total.detach(), iteration)
        if self.hook is not None:
            self.hook.before_update(
                total,
                images,
                self.network,
                labels=self.synthetic.labels,
                kind="gradient",
                fresh_network=self.fresh_network,
                distance=self.distance,
            )
        # By images alone: backward() would also work out the gradient in the network, which nobody reads.
        images.grad = torch.autograd.grad(total, images)[0] if keep else gradient
        self.optimizer.step()
        return {"loss": float(total.detach())}

    def _class_loss(self, c: int, own: Tensor) -> Tensor:
        """Distance between the gradients of class c's real batch and of its synthetic images ``own``."""
        indices = self._draw(c, self.config.batch_real)
        transform = self._siamese(len(indices))

        def batch() -> tuple[Tensor, Tensor]:
            targets = self.data.labels[indices] if self.hook is None else self.hook.targets(indices)
            return transform(self.data.images[indices]), targets

        weights = self.hook.weights(indices) if self.hook is not None and self.hook.enabled else None
        # The bits of the baseline while nothing is weighted: a weighted sum would round differently.
        plain = weights is None or bool((weights == 1).all())
        real = mean_gradient(
            self.network, self.parameters, *batch(), None if plain else weights, chunk_size=self._chunk
        )
        if weights is not None and weights.requires_grad:
            derivative = _DERIVATIVES[self.config.weight_derivative]
            real = derivative(real, self.network, self.parameters, batch, weights, chunk_size=self._chunk)
        labels = torch.full((len(own),), c, device=own.device)
        loss = F.cross_entropy(self.network(transform(own)), labels)
        return self.distance(torch.autograd.grad(loss, self.parameters, create_graph=True), real)

    def _draw(self, c: int, n: int) -> Tensor:
        indices = draw_class(self.hook, self.data, c, n, self.generator)
        # Statistics of a batch norm are content with fewer.
        check_batch(self.config, c, len(indices), n if n == self.config.batch_real else 1)
        return indices

    def _siamese(self, count: int) -> Callable[[Tensor], Tensor]:
        """One augmentation draw, for the real and the synthetic images of a class alike."""
        if not self.augmentation.strategies:
            return lambda images: images
        shape = self.data.images.shape
        draw = self.augmentation.draw(
            count, (shape[-2], shape[-1]), generator=self.generator, siamese=True, device=self.data.images.device
        )
        return lambda images: self.augmentation.apply(images, draw)

    # -- the network ---------------------------------------------------------------------------------
    def _advance_network(self, iteration: int) -> None:
        """A new network every ``outer`` iterations; in between the same one, trained on the synthetic set as it is."""
        self.network.train()
        if iteration % self.outer == 0:
            reinitialise(self.network, self.generator)
        else:
            self._train_network()
        if self._norms:
            # A few synthetic images make poor statistics, so they are taken from real ones and held.
            drawn = [self._draw(c, _NORM_IMAGES) for c in range(self.data.num_classes)]
            with torch.no_grad():
                self.network(self.data.images[torch.cat(drawn)])
            for norm in self._norms:
                norm.eval()

    def _train_network(self) -> None:
        """``inner`` epochs of SGD on the synthetic set; each image augmented on its own where the baseline augments."""
        images, labels = self.synthetic.images.detach(), self.synthetic.labels
        parameters = list(self.network.parameters())
        # A batch norm takes its statistics from the whole batch.
        chunk = self.config.batch_train if self._norms else self._chunk
        for _ in range(self.inner):
            order = torch.randperm(len(images), generator=self.generator).to(images.device)
            for part in order.split(self.config.batch_train):
                batch = images[part]
                if self.augmentation.strategies:
                    batch = self.augmentation(batch, generator=self.generator)
                found = mean_gradient(self.network, parameters, batch, labels[part], chunk_size=chunk)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient
                self.network_optimizer.step()
        self.network.zero_grad(set_to_none=True)

    # -- resume --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """See :class:`Baseline`; with the network as it has learned, and both optimisers."""
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "network": self.network.state_dict(),
            "network_optimizer": self.network_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Baseline`."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.network.load_state_dict(state["network"])
        self.network_optimizer.load_state_dict(state["network_optimizer"])


class DSA(DC):
    """DC with Siamese augmentation: one draw per class for its real and its synthetic images."""

    name: ClassVar[str] = "dsa"
    Config: ClassVar[type[BaselineConfig]] = DSAConfig
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {"published": _run_settings("dsa")}
    evaluation: ClassVar[Mapping[str, Any]] = {}
