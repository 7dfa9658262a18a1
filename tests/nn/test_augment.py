from __future__ import annotations

import pytest
import torch

from tad_plugin.errors import ConfigError, InvalidInputError
from tad_plugin.nn.augment import DEFAULT_STRATEGY, STRATEGIES, Augmentation, Draw, default_strategy
from tests.checkouts import import_upstream, upstream_draw

BOTH_MODES = pytest.mark.parametrize("mode", ["S", "M"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 5, size: tuple[int, int] = (16, 16), channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, *size, generator=generator(9))


IDENTITY = {
    "color": {"brightness": 0.0, "saturation": 1.0, "contrast": 1.0},
    "crop": {"crop": (0, 0)},
    "flip": {"flip": False},
    "scale": {"scale": (1.0, 1.0)},
    "rotate": {"rotate": 0.0},
}


@pytest.mark.parametrize("strategy", IDENTITY)
@pytest.mark.parametrize("align_corners", [False, True])
def test_identity_draw(strategy, align_corners):
    draw = Draw.of(strategy, **IDENTITY[strategy])
    assert torch.allclose(Augmentation(align_corners=align_corners).apply(images(), draw), images(), atol=1e-5)


@pytest.mark.parametrize("strategy", ["", "none", "None"])
def test_no_strategy_returns_the_images_and_draws_nothing(strategy):
    augmentation, mine, x = Augmentation(strategy), generator(), images()
    draw = augmentation.draw(5, 16, generator=mine, siamese=True)
    assert augmentation.apply(x, draw) is x
    assert torch.equal(mine.get_state(), generator().get_state())


@BOTH_MODES
def test_one_siamese_draw_fits_real_and_synthetic(mode):
    augmentation = Augmentation(mode=mode)
    x = images()
    for seed in range(12):
        draw = augmentation.draw(5, 16, generator=generator(seed), siamese=True)
        together = augmentation.apply(x, draw)
        # The same for every sample: each image alone, and any other batch size, gets the same treatment.
        assert torch.allclose(together[:2], augmentation.apply(x[:2], draw), atol=1e-6)
        assert torch.allclose(together[3:4], augmentation.apply(x[3:4], draw), atol=1e-6)
        same = augmentation.draw(1, (16, 16), generator=generator(seed), siamese=True)
        assert draw.same_as(same)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_draws_differ_between_samples(strategy):
    augmentation = Augmentation(strategy)
    x = images(1).expand(40, -1, -1, -1)
    out = augmentation(x, generator=generator())
    assert out.shape == x.shape
    distinct = len({tuple(o.flatten().tolist()) for o in out})
    assert distinct == 2 if strategy == "flip" else distinct > 15


@BOTH_MODES
@pytest.mark.parametrize("siamese", [False, True])
def test_the_generator_decides_and_no_other(mode, siamese, global_rng_untouched):
    augmentation, x = Augmentation(mode=mode), images()
    runs = [augmentation(x, generator=generator(seed), siamese=siamese) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@BOTH_MODES
@pytest.mark.parametrize("siamese", [False, True])
def test_a_batch_of_one(mode, siamese):
    augmentation, mine, x = Augmentation(mode=mode), generator(), images(1).requires_grad_()
    for _ in range(12):
        augmentation(x, generator=mine, siamese=siamese).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_single_mode_picks_one_evenly_and_multiple_takes_all():
    mine = generator()
    draws = [Augmentation().draw(1, 16, generator=mine, siamese=True).strategies for _ in range(600)]
    assert {len(d) for d in draws} == {1}
    counts = [draws.count((s,)) for s in STRATEGIES]
    assert sum(counts) == 600 and min(counts) > 60  # 100 expected each; 60 is 4.4 standard deviations below
    everything = Augmentation("rotate_crop", "M").draw(1, 16, generator=mine, siamese=True)
    assert everything.strategies == ("rotate", "crop")


def test_numbers_fill_their_ranges():
    draw = Augmentation(mode="M").draw(4000, (16, 12), generator=generator(), siamese=False)
    v = draw.values
    ranges = {
        "brightness": (-0.5, 0.5),
        "saturation": (0.0, 2.0),
        "contrast": (0.5, 1.5),
        "scale": (1 / 1.2, 1.2),
        "rotate": (-0.2617994, 0.2617994),
    }
    for name, (low, high) in ranges.items():
        assert low <= v[name].min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < v[name].max() <= high, name
    assert [v["crop"].amin(0).tolist(), v["crop"].amax(0).tolist()] == [[-2, -2], [2, 2]]
    assert [v["cutout"].amin(0).tolist(), v["cutout"].amax(0).tolist()] == [[0, 0], [16, 12]]
    assert 0.45 < v["flip"].float().mean() < 0.55
    assert {name: value.dtype for name, value in v.items() if name in ("flip", "crop")} == {
        "flip": torch.bool,
        "crop": torch.int64,
    }


def test_composition_is_differentiable_twice():
    augmentation = Augmentation(mode="M")
    draw = augmentation.draw(2, 6, generator=generator(), siamese=True)
    x = images(2, (6, 6)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augmentation.apply(x, draw), (x,))
    assert torch.autograd.gradgradcheck(lambda x: augmentation.apply(x, draw) ** 2, (x,))


@BOTH_MODES
@pytest.mark.parametrize("siamese", [False, True])
def test_a_stored_draw_comes_back(mode, siamese, tmp_path):
    draw = Augmentation(mode=mode).draw(3, 16, generator=generator(), siamese=siamese)
    torch.save(draw.state_dict(), tmp_path / "draw.pt")
    again = Draw.from_state_dict(torch.load(tmp_path / "draw.pt", weights_only=True))
    assert draw.same_as(again) and again.same_as(draw)
    other = Augmentation(mode=mode).draw(3, 16, generator=generator(5), siamese=siamese)
    assert not draw.same_as(other)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"strategy": "color_corp"}, "'corp'"),
        ({"strategy": "color__crop"}, "''"),
        ({"strategy": "crop_color_crop"}, "crop_color_crop"),
        ({"mode": "X"}, "mode.*'X'"),
        ({"prob_flip": 1.5}, "prob_flip.*1.5"),
        ({"ratio_scale": 0.5}, "ratio_scale.*0.5"),
        ({"ratio_rotate": float("nan")}, "ratio_rotate.*nan"),
        ({"ratio_cutout": -0.1}, "ratio_cutout.*-0.1"),
    ],
)
def test_settings_that_do_not_fit(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Augmentation(**arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("shear",), "'shear'"),
        (("crop",), "crop"),
        (("flip", {"flip": True, "rotate": 0.1}), "rotate"),
        (("crop", {"crop": 3}), r"crop.*\[2\]"),
        (("color", {"siamese": False, "brightness": [0, 0], "saturation": [1], "contrast": [1]}), r"\[1, 2\]"),
    ],
)
def test_explicit_draws_that_do_not_fit(arguments, words):
    strategies = [a for a in arguments if isinstance(a, str)]
    values = next((a for a in arguments if isinstance(a, dict)), {})
    with pytest.raises(ConfigError, match=words):
        Draw.of(*strategies, **values)


def test_images_that_do_not_fit():
    augmentation = Augmentation("flip")
    draw = augmentation.draw(3, 16, generator=generator(), siamese=False)
    with pytest.raises(InvalidInputError, match="3 .*flip.* 5"):
        augmentation.apply(images(5), draw)
    with pytest.raises(InvalidInputError, match=r"\[3, 16, 16\]"):
        augmentation.apply(images(5)[0], draw)


def test_default_strategies():
    assert DEFAULT_STRATEGY == "color_crop_cutout_flip_scale_rotate"
    assert default_strategy("cifar10") == default_strategy("folder") == DEFAULT_STRATEGY
    for digits in ("digits", "mnist", "svhn", "MNIST", "SVHN"):
        assert default_strategy(digits) == "color_crop_cutout_scale_rotate"


def upstream_functions(codebase: str):
    return import_upstream(codebase, "utils.py", missing=("kornia", "tqdm"))


@pytest.mark.filterwarnings("ignore")  # the public code's own
@pytest.mark.parametrize("codebase", ["dm", "mtt"])
@pytest.mark.parametrize("siamese", [True, False])
@pytest.mark.parametrize("strategy", [*STRATEGIES, DEFAULT_STRATEGY])
@pytest.mark.parametrize("size, channels", [((32, 32), 3), ((28, 28), 1), ((9, 14), 3)])
def test_same_images_as_the_public_code_for_the_same_draw(codebase, siamese, strategy, size, channels):
    theirs = upstream_functions(codebase)
    param = theirs.ParamDiffAug()
    x = images(5, size, channels)
    for mode in "SM":
        param.aug_mode = mode
        augmentation = Augmentation(strategy, mode, align_corners=codebase == "mtt")
        for seed in (0, 1, 7, 123, 4567):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                expected = theirs.DiffAugment(x, strategy, seed=seed if siamese else -1, param=param)
            draw = upstream_draw(augmentation, size, seed=seed, n=len(x), siamese=siamese)
            assert torch.allclose(augmentation.apply(x, draw), expected, atol=1e-5), (mode, seed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH_MODES
@pytest.mark.parametrize("siamese", [False, True])
def test_images_on_a_gpu_with_a_generator_on_the_cpu(mode, siamese):
    augmentation, x = Augmentation(mode=mode), images()
    for seed in range(12):
        here = augmentation(x, generator=generator(seed), siamese=siamese)
        there = augmentation(x.cuda(), generator=generator(seed), siamese=siamese)
        assert there.is_cuda and torch.allclose(here, there.cpu(), atol=1e-4)
