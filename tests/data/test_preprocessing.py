"""Preprocessing: arithmetic, identity, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tad_plugin.data.preprocessing import Preprocessing, channel_statistics
from tad_plugin.data.whitening import fit_zca
from tad_plugin.errors import FileFormatError, InvalidInputError, PreprocessingMismatchError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(200, 3, 4, 4, generator=generator)


@pytest.fixture
def whitening(images: torch.Tensor) -> Preprocessing:
    return Preprocessing((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), fit_zca(images))


def test_same_bits_as_torchvision(images: torch.Tensor) -> None:
    from torchvision.transforms.functional import normalize

    ours = Preprocessing(MEAN, STD)(images)
    assert torch.equal(ours, torch.stack([normalize(x, list(MEAN), list(STD)) for x in images]))


def test_inverse(images: torch.Tensor, whitening: Preprocessing) -> None:
    for pre in (Preprocessing(MEAN, STD), whitening):
        torch.testing.assert_close(pre.inverse(pre(images)), images, atol=1e-4, rtol=0)
    far = Preprocessing(MEAN, STD).inverse(torch.full((1, 3, 2, 2), 9.0))
    assert float(far.min()) > 1  # unclamped


def test_zca_comes_after_the_normalisation(images: torch.Tensor, whitening: Preprocessing) -> None:
    assert whitening.zca is not None
    plain = Preprocessing(whitening.mean, whitening.std)
    assert torch.equal(whitening(images), whitening.zca(plain(images)))


def test_differentiable_and_dtype(images: torch.Tensor, whitening: Preprocessing) -> None:
    x = images[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing(MEAN, STD), x)
    y = images[:3].clone().requires_grad_()
    (grad,) = torch.autograd.grad(whitening.inverse(y).sum(), y)
    assert bool(torch.isfinite(grad).all())


def test_header_round_trip(tmp_path: Path, images: torch.Tensor, whitening: Preprocessing) -> None:
    for pre in (Preprocessing(MEAN, STD), whitening):
        extra = {"images": images, **pre.tensors()}
        save_file(extra, tmp_path / "s.safetensors", metadata={"h": json.dumps(pre.to_header())})
        again = Preprocessing.from_header(
            json.loads(json.dumps(pre.to_header())), load_file(tmp_path / "s.safetensors")
        )
        again.check_same(pre)
        assert again.fingerprint() == pre.fingerprint() == pre.to_header()["fingerprint"]
        assert torch.equal(again(images), pre(images))


def test_every_difference_shows_in_the_fingerprint(images: torch.Tensor, whitening: Preprocessing) -> None:
    plain = Preprocessing(whitening.mean, whitening.std)
    variants = [
        whitening,
        plain,
        Preprocessing((0.1, 0.2, 0.30001), plain.std),
        Preprocessing(plain.mean, (0.5, 0.6, 0.70001)),
        Preprocessing(plain.mean, plain.std, fit_zca(images[:100])),
    ]
    assert len({v.fingerprint() for v in variants}) == len(variants)
    for other in variants[1:]:
        with pytest.raises(PreprocessingMismatchError) as error:
            whitening.check_same(other)
        for part in (
            whitening.fingerprint(),
            other.fingerprint(),
            "mean 0.1000, 0.2000",
            "no ZCA" if other.zca is None else "ZCA",
        ):
            assert part in str(error.value)


def test_broken_headers(whitening: Preprocessing) -> None:
    header, tensors = whitening.to_header(), whitening.tensors()
    changed = {**tensors, "preprocessing/zca_mean": tensors["preprocessing/zca_mean"] + 1}
    cut = {**tensors, "preprocessing/zca_mean": tensors["preprocessing/zca_mean"][:-1]}
    for head, extra in [
        (header, {}),
        (header, changed),
        (header, cut),
        ({**header, "mean": [0.0, 0.0, 0.0]}, tensors),
        ({**header, "std": [0.0, 1.0, 1.0]}, tensors),
        ({**header, "mean": None}, tensors),
        ({**header, "mean": [str(v) for v in header["mean"]]}, tensors),
        ({**header, "mean": [10**400] * 3}, tensors),
        ({**header, "std": "123"}, tensors),
        ({**header, "zca": 1}, tensors),
        ({**header, "fingerprint": None}, tensors),
        ({"mean": [0.0]}, tensors),
    ]:
        with pytest.raises(FileFormatError):
            Preprocessing.from_header(head, extra)


def test_bad_values_and_images(images: torch.Tensor) -> None:
    nothing: tuple[float, ...] = ()
    for mean, std in [(MEAN, STD[:2]), (MEAN, (1.0, 1.0, 0.0)), ((float("nan"),), (1.0,)), (nothing, nothing)]:
        with pytest.raises(InvalidInputError, match="mean .*, std "):
            Preprocessing(mean, std)
    pre = Preprocessing(MEAN, STD)
    for bad in (images[0], images[:, :1], (images * 255).to(torch.uint8)):
        for call in (pre, pre.inverse):
            with pytest.raises(InvalidInputError, match="3, H, W"):
                call(bad)


def test_statistics_against_numpy(generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (5000, 2, 3, 5), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 100
    mean, std = channel_statistics(images, 255.0)
    reference = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), rtol=1e-12)
