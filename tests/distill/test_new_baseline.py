"""A loop from outside the package, in one file, through a whole comparison."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill import baseline
from tad_plugin.distill.baseline import Baseline, BaselineConfig
from tad_plugin.errors import ConfigError
from tad_plugin.experiments.compare import compare
from tad_plugin.experiments.config import RunConfig
from tad_plugin.utils.settings import setting

# -- what another package would hold -----------------------------------------------------------------


@dataclass
class PixelMeansConfig(BaselineConfig):
    """Settings of the loop below."""

    batch_real: int = setting(16, at_least=1)


class PixelMeans(Baseline):
    """Moves the mean of the synthetic images of each class to the weighted mean of its real images."""

    name: ClassVar[str] = "pixel-means"
    Config: ClassVar[type[BaselineConfig]] = PixelMeansConfig

    def __init__(
        self,
        config: PixelMeansConfig,
        data: RealData,
        hook: Hook,
        synthetic: SyntheticSet,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img)
        self.network = self.fresh_network(torch.Generator().manual_seed(0))

    def step(self, iteration: int) -> Mapping[str, Any]:
        """See :class:`Baseline`."""
        images, loss = self.synthetic.images, torch.zeros((), device=self.data.images.device)
        for c, own in enumerate(images.chunk(self.data.num_classes)):
            indices = self.draw(c, self.config.batch_real)
            real = self.hook.reweight(self.data.images[indices], indices).mean(0)
            loss = loss + (real - own.mean(0)).square().sum()
        self.optimizer.zero_grad()
        self.hook.before_update(
            loss, images, self.network, labels=self.synthetic.labels, fresh_network=self.fresh_network
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def doubt(self) -> str | None:
        """See :class:`Baseline`."""
        return "means are no images"


# -- the comparison ----------------------------------------------------------------------------------

CONFIG = RunConfig(
    baseline="pixel-means",
    per_class=16,
    noise="symmetric:0.4",
    iterations=4,
    lr_img=0.5,
    width=4,
    methods={
        "scorer": {"epochs": 3, "width": 4},
        "tad": {"warmup": 1},
        "iwd": {"every": 2, "warmup": 0, "early": 0, "held_out": 2},
    },
    eval_epochs=2,
    eval_runs=1,
    candidates=1,
    device="cpu",
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("pixel_means")
    package.PixelMeans = PixelMeans  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pixel_means", package)
    entry = EntryPoint("pixel-means", "pixel_means:PixelMeans", baseline.GROUP)
    monkeypatch.setattr(baseline, "entry_points", lambda group: [entry] if group == baseline.GROUP else [])


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
def test_it_is_compared_with_and_without_methods(registered: None, tmp_path: Path) -> None:
    arms = ("clean", "noisy", "oracle", "tad", "iwd")
    results = compare(CONFIG, arms=arms, seeds=[0], ipcs=[1], out=tmp_path, progress=False)
    assert [r["arm"] for r in results] == list(arms) and {r["baseline"] for r in results} == {"pixel-means"}
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(arms)
    found = {arm: SyntheticSet.load(tmp_path / arm / "ipc1" / "seed0" / "synthetic.safetensors").images for arm in arms}
    assert all("means are no images" in r["doubts"] for r in results)
    assert len({images.numpy().tobytes() for images in found.values()}) == len(arms)


def test_its_settings_are_checked_like_those_of_ours(registered: None, tmp_path: Path) -> None:
    config = RunConfig(baseline="pixel-means", loop={"batch_real": 0}, device="cpu")
    with pytest.raises(ConfigError, match="batch_real"):
        compare(config, arms=["noisy"], seeds=[0], ipcs=[1], out=tmp_path, progress=False)
    assert not any(tmp_path.iterdir())
