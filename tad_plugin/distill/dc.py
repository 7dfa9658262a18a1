"""DC: gradient matching (Zhao, Mopuri & Bilen, ICLR 2021), and DSA, DC with Siamese augmentation (ICML 2021).

A network is initialised at random and trained on the synthetic set. Along the way, for each class, the gradient of its
loss on the synthetic images is matched to the gradient on a batch of real images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, BaselineConfig, check_loss
from tad_plugin.distill.gradient_distance import DISTANCES, matched_parameters
from tad_plugin.distill.real_gradient import weighted_gradient, weighted_gradient_graph
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.derivatives.mean_gradient import mean_gradient
from tad_plugin.nn.networks import reinitialise
from tad_plugin.nn.passes import pass_size
from tad_plugin.utils.settings import setting
from tad_plugin.utils.transfers import read, upload

__all__ = ["DC", "DSA", "LOOPS", "PRESETS", "DCConfig", "DSAConfig"]

LOOPS: dict[int, tuple[int, int]] = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Published loop counts: IPC -> (updates of the images per network, epochs of the network between two of them)."""

# Ways to differentiate the real gradient in the weights of real samples, for methods that ask for it.
_DERIVATIVES = {"forward": weighted_gradient, "graph": weighted_gradient_graph}
# Real images per class for the statistics of batch norm; the published value.
_NORM_IMAGES = 16


@dataclass
class DCConfig(BaselineConfig):
    """Settings of DC. Except for ``iterations`` the defaults are the published settings (``PRESETS``).

    One iteration is one update of the images. The published run uses 1,000 networks and updates the images ``outer``
    times on each, so it has 1,000 x ``outer`` iterations.

    Attributes:
        lr_img: learning rate of the images.
        init: "noise" (DC) or "real" (DSA).
        augment: "none" (DC) or a Siamese strategy (DSA).
        batch_real: real images per class and iteration; a smaller class gives all its samples.
        batch_train: synthetic images per step of the network.
        momentum: momentum of the images' SGD.
        lr_net: learning rate of the network's plain SGD on the synthetic set.
        outer: updates of the images per network; 0 takes the published count (``LOOPS``), which some IPC have.
        inner: epochs of the network on the synthetic set between two updates; 0 takes the published count.
        distance: "layerwise" (called "ours" in the field), "mse" or "cosine".
        weight_derivative: how the derivative in the weights of the real samples is computed for a method that asks for
            it: "forward" (a forward-mode pass) or "graph" (a graph of the real gradient, third order). Both give the
            same numbers.
    """

    lr_img: float = 0.1
    init: str = "noise"
    augment: str = "none"
    batch_real: int = setting(256, at_least=1)
    batch_train: int = setting(256, at_least=1)
    momentum: float = setting(0.5, at_least=0, below=1)
    lr_net: float = setting(0.01, above=0)
    outer: int = setting(0, at_least=0)
    inner: int = setting(0, at_least=0)
    distance: str = setting("layerwise", one_of=DISTANCES)
    weight_derivative: str = setting("forward", one_of=_DERIVATIVES)

    def check(self) -> None:
        """See :class:`Settings`. An IPC without published loop counts needs its own."""
        # A network that is used for one update only is never trained.
        known = self.ipc in LOOPS or self.outer == 1 or (self.outer and self.inner)
        got = f"{self.ipc}, with outer {self.outer} and inner {self.inner}"
        do = "Set both, for example --loop.outer 10 --loop.inner 50"
        self.require(bool(known), f"ipc with published loop counts ({', '.join(map(str, LOOPS))})", got, do)

    @property
    def loops(self) -> tuple[int, int]:
        """(outer, inner), with zeros replaced by the published counts."""
        outer, inner = LOOPS.get(self.ipc, (0, 0))
        return self.outer or outer, self.inner or inner


@dataclass
class DSAConfig(DCConfig):
    """Settings of DSA: those of DC, but real initial images and Siamese augmentation.

    Attributes:
        init: "real" or "noise".
        augment: DSA strategy; "auto" takes the dataset's.
    """

    init: str = "real"
    augment: str = "auto"


def _published(config: type[DCConfig]) -> dict[int, dict[str, Any]]:
    names = ("lr_img", "momentum", "lr_net", "batch_real", "batch_train", "width", "init", "augment")
    shared = {name: getattr(config, name) for name in names}
    return {
        ipc: {"ipc": ipc, "iterations": 1000 * outer, "outer": outer, "inner": inner, **shared}
        for ipc, (outer, inner) in LOOPS.items()
    }


PRESETS: dict[str, dict[int, dict[str, Any]]] = {"dc": _published(DCConfig), "dsa": _published(DSAConfig)}
"""Published settings: ``DCConfig(**PRESETS["dc"][10])``, ``DSAConfig(**PRESETS["dsa"][10])``."""


def _run_settings(name: str) -> dict[int, dict[str, Any]]:
    """``PRESETS[name]`` as fields of RunConfig, for ``--loop.preset published``."""
    own = ("iterations", "lr_img", "width")
    return {
        ipc: {**{k: given[k] for k in own}, "loop": {k: v for k, v in given.items() if k not in (*own, "ipc")}}
        for ipc, given in PRESETS[name].items()
    }


class RealBatch(NamedTuple):
    """A real batch of one class.

    Attributes:
        indices: int64 [B], on the device of the data.
        transform: its augmentation, which its synthetic images share.
        weights: matching weights float32 [B]; None without a method.
        plain: True if all weights are 1.
    """

    indices: Tensor
    transform: Callable[[Tensor], Tensor]
    weights: Tensor | None = None
    plain: bool = True


class DC(Baseline):
    """Gradient matching. The network and its training state are part of the resume state."""

    name: ClassVar[str] = "dc"
    Config: ClassVar[type[BaselineConfig]] = DCConfig
    preset: ClassVar[Mapping[str, Any]] = {"lr_img": DCConfig.lr_img}
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {"published": _run_settings("dc")}
    evaluation: ClassVar[Mapping[str, Any]] = {"augment": "none"}

    def __init__(
        self, config: DCConfig, data: RealData, hook: Hook, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img, momentum=config.momentum)
        self.augmentation = Augmentation.configured(config.augment, data.dataset)
        self.distance = DISTANCES[config.distance]
        self.outer, self.inner = config.loops
        # Reinitialised in place for each new network; its first parameters are not used.
        self.network = self.fresh_network(torch.Generator().manual_seed(0)).train()
        self.network_optimizer = torch.optim.SGD(self.network.parameters(), lr=config.lr_net)
        self.parameters = matched_parameters(self.network, config.distance)
        self._chunk = pass_size(data.images, config.width)
        self._norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm)]

    def step(self, iteration: int) -> Mapping[str, Any]:
        """One update of the images; see :class:`Baseline`.

        Raises:
            EmptyClassError, NotEnoughSamplesError: see :meth:`Baseline.draw`.
            NonFiniteError: the matching loss is NaN or infinite.
        """
        images, ipc = self.synthetic.images, self.config.ipc
        self._advance_network(iteration)
        # A method that differentiates the loss needs its graph. Otherwise the graph of each class is freed before the
        # next one is built: the same bits in a fraction of the memory.
        keep = self.hook.wants_graph()
        gradient, losses = torch.zeros_like(images), []
        for c, batch in enumerate(self._batches()):
            own = images[c * ipc : (c + 1) * ipc]
            loss = self._class_loss(c, own, batch)
            if not keep:
                (gradient[c * ipc : (c + 1) * ipc],) = torch.autograd.grad(loss, own)
            losses.append(loss if keep else loss.detach())
        total = torch.stack(losses).sum()
        value = check_loss(total.detach(), iteration)
        self.hook.before_update(
            total,
            images,
            self.network,
            labels=self.synthetic.labels,
            kind="gradient",
            fresh_network=self.fresh_network,
            distance=self.distance,
        )
        # Only with respect to the images: backward() would also compute the unused gradient of the network.
        images.grad = torch.autograd.grad(total, images)[0] if keep else gradient
        self.optimizer.step()
        return {"loss": value}

    def _batches(self) -> list[RealBatch]:
        """One real batch per class. Indices and weights of all classes are moved together."""
        drawn, transforms = [], []
        for c in range(self.data.num_classes):
            drawn.append(self.draw_on_host(c, self.config.batch_real))
            transforms.append(self._siamese(len(drawn[-1])))
        indices = self.hook.state.placed(drawn)
        if not self.hook.enabled:
            return [RealBatch(i, t) for i, t in zip(indices, transforms, strict=True)]
        weights = [self.hook.weights(i) for i in indices]
        # A plain mean while all weights are 1, for the bits of the baseline: a weighted sum rounds differently.
        plain = read(*((w.detach() == 1).all() for w in weights))
        parts = zip(indices, transforms, weights, map(bool, plain), strict=True)
        return [RealBatch(*part) for part in parts]

    def _class_loss(self, c: int, own: Tensor, given: RealBatch) -> Tensor:
        """Distance between the gradients of a real batch of class c and of its synthetic images ``own``."""
        transform, weights = given.transform, given.weights

        def batch() -> tuple[Tensor, Tensor]:
            return transform(self.data.images[given.indices]), self.hook.targets(given.indices)

        real = mean_gradient(
            self.network, self.parameters, *batch(), None if given.plain else weights, chunk_size=self._chunk
        )
        if weights is not None and weights.requires_grad:
            derivative = _DERIVATIVES[self.config.weight_derivative]
            real = derivative(real, self.network, self.parameters, batch, weights, chunk_size=self._chunk)
        labels = torch.full((len(own),), c, device=own.device)
        loss = F.cross_entropy(self.network(transform(own)), labels)
        return self.distance(torch.autograd.grad(loss, self.parameters, create_graph=True), real)

    def _siamese(self, count: int) -> Callable[[Tensor], Tensor]:
        """One augmentation draw, shared by the real and the synthetic images of a class."""
        if not self.augmentation.strategies:
            return lambda images: images
        shape = self.data.images.shape
        draw = self.augmentation.draw(
            count, (shape[-2], shape[-1]), generator=self.generator, siamese=True, device=self.data.images.device
        )
        return lambda images: self.augmentation.apply(images, draw)

    # -- the network ---------------------------------------------------------------------------------
    def _advance_network(self, iteration: int) -> None:
        """Reinitialises the network every ``outer`` iterations; otherwise trains it on the current synthetic set."""
        self.network.train()
        if iteration % self.outer == 0:
            reinitialise(self.network, self.generator)
        else:
            self._train_network()
        if self._norms:
            # Few synthetic images give poor statistics. They are computed on real images and frozen.
            drawn = [self.hook.draw(c, _NORM_IMAGES, self.generator) for c in range(self.data.num_classes)]
            with torch.no_grad():
                self.network(self.data.images[self.hook.state.placed([torch.cat(drawn)])[0]])
            for norm in self._norms:
                norm.eval()

    def _train_network(self) -> None:
        """``inner`` epochs of SGD on the synthetic set, with a separate augmentation draw for each image."""
        images, labels = self.synthetic.images.detach(), self.synthetic.labels
        parameters = list(self.network.parameters())
        # Batch norm needs the whole batch in one pass for its statistics.
        chunk = self.config.batch_train if self._norms else self._chunk
        for _ in range(self.inner):
            order = torch.randperm(len(images), generator=self.generator)
            for part in upload(order.split(self.config.batch_train), images.device):
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
        """See :class:`Baseline`; adds the network and both optimisers."""
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
    """DC with Siamese augmentation: one draw per class, shared by its real and synthetic images."""

    name: ClassVar[str] = "dsa"
    Config: ClassVar[type[BaselineConfig]] = DSAConfig
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {"published": _run_settings("dsa")}
    evaluation: ClassVar[Mapping[str, Any]] = {}
