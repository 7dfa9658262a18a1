"""load_dataset: splits, statistics, sources, and noise over a whole dataset."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.data.datasets import DataSplits, load_dataset, stratified_holdout
from tad_plugin.data.noise.class_maps import CIFAR10_CLASSES
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.preprocessing import KNOWN_STATISTICS, Preprocessing, channel_statistics
from tad_plugin.data.sources import DATASETS, read_source
from tad_plugin.errors import (
    ConfigError,
    EmptyClassError,
    FileFormatError,
    InvalidInputError,
    MissingExtraError,
    NotEnoughSamplesError,
    StateMismatchError,
    UnknownNameError,
)
from tests.data.files import png, write


def test_digits(global_rng_untouched: None) -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    found = load_digits()
    assert (data.num_classes, data.shape, data.name) == (10, (1, 8, 8), "digits")
    assert (len(data.train_labels), len(data.holdout_labels), len(data.test_labels)) == (1297, 145, 355)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    both = [(data.train_images, data.train_labels, data.source_index)]
    both.append((data.holdout_images, data.holdout_labels, data.holdout_source_index))
    for images, labels, index in both:
        back = data.preprocessing.inverse(images)[:, 0].numpy() * 16
        np.testing.assert_allclose(back, found.images[index.numpy()], atol=1e-4)
        assert np.array_equal(labels.numpy(), found.target[index.numpy()])
    used = torch.cat([data.source_index, data.holdout_source_index])
    assert len(used.unique()) == 1442
    rest = np.setdiff1d(np.arange(1797), used.numpy())
    np.testing.assert_allclose(
        data.preprocessing.inverse(data.test_images)[:, 0].numpy() * 16, found.images[rest], atol=1e-4
    )
    assert abs(float(data.train_images.mean())) < 0.02 and abs(float(data.train_images.std()) - 1) < 0.02
    assert "train=1297" in repr(data)


def test_digits_statistics_are_those_of_the_training_part() -> None:
    raw = read_source("digits", None, per_class=None, image_size=None, download=False)
    for known, computed in zip(KNOWN_STATISTICS["digits"], channel_statistics(raw.train, raw.scale), strict=True):
        assert known[0] == round(computed[0], 4)


def test_holdout_is_stratified_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    kept, held = stratified_holdout(labels, 3, 0.1, seed=0)
    assert torch.bincount(labels[held]).tolist() == [5, 3, 1]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(83))
    assert torch.equal(held, held.sort().values)
    assert torch.equal(stratified_holdout(labels, 3, 0.1, seed=0)[1], held)
    assert not torch.equal(stratified_holdout(labels, 3, 0.1, seed=1)[1], held)
    assert len(stratified_holdout(labels, 3, 0.0, seed=0)[1]) == 0
    with pytest.raises(NotEnoughSamplesError, match="class 0"):
        stratified_holdout(torch.tensor([0, 1, 1]), 2, 0.1, seed=0)


def test_options_of_the_digits() -> None:
    whole = load_dataset("digits", per_class=20, holdout=0)
    assert torch.bincount(whole.train_labels).tolist() == [20] * 10
    assert whole.holdout_images.shape == (0, 1, 8, 8) and len(whole.holdout_labels) == 0
    raw = read_source("digits", None, per_class=None, image_size=None, download=False)
    expected = torch.cat([raw.index[raw.train_labels == c][:20] for c in range(10)]).sort().values
    assert torch.equal(whole.source_index, expected)
    large = load_dataset("digits", per_class=3, holdout=0, image_size=16)
    assert large.shape == (1, 16, 16) == large.holdout_images.shape[1:] == large.train_images.shape[1:]
    with pytest.raises(NotEnoughSamplesError, match="1000"):
        load_dataset("digits", per_class=1000)
    other = load_dataset("digits", per_class=20, seed=1)
    assert not torch.equal(other.source_index, load_dataset("digits", per_class=20).source_index)


def test_zca_does_not_depend_on_the_split(generator: torch.Generator) -> None:
    a, b = (load_dataset("digits", zca=True, seed=seed) for seed in (0, 1))
    a.preprocessing.check_same(b.preprocessing)
    assert a.preprocessing.zca is not None and a.preprocessing.mean == (0.0,)
    again = load_dataset("digits", preprocessing=a.preprocessing, seed=1)
    assert torch.equal(again.train_images, b.train_images)
    pixels = a.preprocessing.inverse(a.test_images)
    plain = load_dataset("digits")
    torch.testing.assert_close(pixels, plain.preprocessing.inverse(plain.test_images), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"per_class": 0}, InvalidInputError, "per_class"),
        ({"image_size": 0}, InvalidInputError, "image_size"),
        ({"holdout": 1.0}, InvalidInputError, "holdout"),
        ({"holdout": -0.1}, InvalidInputError, "holdout"),
        ({"holdout": float("nan")}, InvalidInputError, "holdout"),
        ({"zca": True, "preprocessing": Preprocessing((0.5,), (0.5,))}, ConfigError, "ZCA"),
        ({"preprocessing": Preprocessing((0.5,) * 3, (0.5,) * 3)}, InvalidInputError, "3"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset("digits", **keywords)


def test_unknown_names_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="'cifar10'"):
        load_dataset("cifar-10")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"tad_plugin\[reproduce\]"):
        load_dataset("digits")


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "digits"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileFormatError, match=name if name != "tinyimagenet" else "train"):
        load_dataset(name, tmp_path, download=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_torchvision_sources(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attributes that torchvision's classes have, without their files."""
    import torchvision

    k = 100 if name == "cifar100" else 10
    rng = np.random.default_rng(0)
    hwc = {part: rng.integers(0, 256, (n * k, 32, 32, 3), dtype=np.uint8) for part, n in ((True, 4), (False, 2))}
    targets = {part: [i % k for i in range(len(hwc[part]))] for part in hwc}

    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        return SimpleNamespace(data=hwc[train], targets=targets[train], classes=[f"c{i}" for i in range(k)])

    def svhn(root: str, split: str, download: bool) -> SimpleNamespace:
        part = split == "train"
        return SimpleNamespace(data=hwc[part].transpose(0, 3, 1, 2), labels=np.array(targets[part]))

    monkeypatch.setattr(torchvision.datasets, name.upper(), svhn if name == "svhn" else cifar)
    data = load_dataset(name, holdout=0.25, per_class=3 if k == 100 else None, download=False)
    assert data.shape == (3, 32, 32) and data.num_classes == k == len(data.class_names)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in KNOWN_STATISTICS[name])
    pixels = hwc[True].transpose(0, 3, 1, 2)[data.source_index.numpy()]
    np.testing.assert_allclose(data.train_images.numpy(), (pixels / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(
        data.test_images.numpy(), (hwc[False].transpose(0, 3, 1, 2) / 255 - mean) / std, atol=1e-5
    )
    assert data.train_labels.tolist() == [int(i) % k for i in data.source_index]
    assert data.source_rank is None


def tiny(classes: tuple[str, ...] = ("n01", "n02"), listed: str | None = None) -> dict[str, bytes]:
    top = "tiny-imagenet-200"
    files = {f"{top}/train/{c}/images/{c}_{i}.JPEG": png(10 * k + i) for k, c in enumerate(classes) for i in range(4)}
    files |= {f"{top}/val/images/val_{i}.JPEG": png(100 + i) for i in range(2)}
    text = "val_0.JPEG\tn02\t0\t0\t5\t5\nval_1.JPEG\tn01\t0\t0\t5\t5\n" if listed is None else listed
    return {**files, f"{top}/val/val_annotations.txt": text.encode()}


@pytest.mark.parametrize("place", ["", "tiny-imagenet-200.zip"])
def test_tiny_imagenet(tmp_path: Path, place: str) -> None:
    write(tmp_path / place, tiny())
    for root in (tmp_path, tmp_path / (place or "tiny-imagenet-200")):
        data = load_dataset("tinyimagenet", root, holdout=0.25)
        assert data.class_names == ("n01", "n02") and data.name == "tinyimagenet"
        assert data.test_labels.tolist() == [1, 0] and data.preprocessing.mean == (0.485, 0.456, 0.406)
        back = data.preprocessing.inverse(data.test_images)[:, 0, 0, 0] * 255
        assert back.round().tolist() == [100, 101]
        assert torch.bincount(data.train_labels).tolist() == [3, 3]


def test_tiny_imagenet_that_is_broken(tmp_path: Path) -> None:
    for i, (listed, error) in enumerate(
        [
            ("val_0.JPEG\tn02\t0\nval_1.JPEG\tn02\t0\n", EmptyClassError),
            ("val_0.JPEG\tn09\t0\n", FileFormatError),
            ("val_7.JPEG\tn01\t0\n", FileFormatError),
            ("val_0.JPEG\n", FileFormatError),
        ]
    ):
        with pytest.raises(error):
            load_dataset("tinyimagenet", write(tmp_path / f"{i}.zip", tiny(listed=listed)))
    rest = {k: v for k, v in tiny().items() if "annotations" not in k}
    with pytest.raises(FileFormatError, match="val_annotations"):
        load_dataset("tinyimagenet", write(tmp_path / "rest.zip", rest))


def folder(classes: tuple[str, ...] = ("a", "b"), n: int = 10, test: str = "test") -> dict[str, bytes]:
    files = {f"train/{c}/{i:04}.png": png(20 * k + i) for k, c in enumerate(classes) for i in range(n)}
    return files | {f"{test}/{c}/{i:04}.png": png(50 + k) for k, c in enumerate(classes) for i in range(2)}


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path: Path, test: str) -> None:
    write(tmp_path / "my.zip", folder(test=test))
    data = load_dataset(f"folder:{tmp_path / 'my.zip'}", holdout=0.2)
    assert data.name == "folder:my" and data.class_names == ("a", "b") and data.shape == (3, 6, 6)
    reds = np.array([*range(10), *range(20, 30)]) / 255
    assert data.preprocessing.mean[0] == pytest.approx(reds.mean()) and data.preprocessing.std[0] == pytest.approx(
        reds.std()
    )
    assert data.source_rank is not None and data.holdout_source_rank is not None
    pixels = (data.preprocessing.inverse(data.train_images)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(pixels, data.train_labels * 20 + data.source_rank)
    assert len(data.holdout_labels) == 4 and len(data.test_labels) == 4


def test_a_relative_folder_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here" / "my.zip", folder())
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "here"))
    reference = load_dataset(f"folder:{tmp_path / 'here' / 'my.zip'}")
    for name in ("folder:my.zip", "folder:./my.zip", "folder:~/my.zip"):
        data = load_dataset(name, tmp_path / "root")
        assert data.name == "folder:my" and torch.equal(data.train_images, reference.train_images)
    with pytest.raises(FileFormatError, match=re.escape(str(tmp_path / "here" / "absent"))):
        load_dataset("folder:absent", tmp_path / "root")
    write(tmp_path / "here" / "tiny", tiny())
    assert load_dataset("tinyimagenet", "~/tiny").num_classes == 2


def test_the_summary_names_what_was_passed_over(tmp_path: Path) -> None:
    files = folder() | {"train/a/x.txt": b"-", "train/b/README": b"-", "other/a/0.png": png(0), "val/a/0.png": png(0)}
    data = load_dataset(f"folder:{write(tmp_path / 'f', files | {'train/b/9000.gif': png(1)})}", holdout=0.2)
    assert data.skipped == {".txt": 1, "no suffix": 1, "below other/": 1, "below val/": 1}
    text = data.summary()
    for part in ("folder:f", "21 training", "4 held out", "4 test", "2 classes", "smallest class a with 10", ".txt 1"):
        assert part in text
    assert "skipped 4" in text and "no suffix 1" in text and "below other/ 1" in text and "channel" not in text
    assert "skipped" not in load_dataset("digits").summary()


def test_a_constant_channel_becomes_zero_and_is_named(tmp_path: Path) -> None:
    def blue(value: int) -> bytes:
        return png(np.full((4, 4, 3), (9, value, 200), dtype=np.uint8))

    files = {f"{split}/{c}/{i}.png": blue(40 * i) for split in ("train", "test") for c in "ab" for i in range(4)}
    data = load_dataset(f"folder:{write(tmp_path / 'f.zip', files)}", holdout=0)
    assert data.constant_channels == (0, 2) and data.preprocessing.std[::2] == (1.0, 1.0)
    assert data.train_images[:, ::2].abs().max() < 1e-6 and float(data.train_images[:, 1].std()) > 0.9
    assert "channel 0, 2" in data.summary()


def test_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    files = folder() | {"train/a/0100.png": png(3, (9, 7))}
    name = f"folder:{write(tmp_path / 'f.zip', files)}"
    with pytest.raises(InvalidInputError, match="--image_size"):
        load_dataset(name)
    assert load_dataset(name, image_size=5).shape == (3, 5, 5)


def test_folder_errors(tmp_path: Path) -> None:
    only = {k: v for k, v in folder().items() if k.startswith("train")}
    assert not load_dataset(f"folder:{write(tmp_path / 'a.zip', only)}").tested
    lacking = {k: v for k, v in folder().items() if not k.startswith("test/b")}
    with pytest.raises(EmptyClassError, match="b"):
        load_dataset(f"folder:{write(tmp_path / 'b.zip', lacking)}")
    with pytest.raises(NotEnoughSamplesError, match="11"):
        load_dataset(f"folder:{write(tmp_path / 'c.zip', folder())}", per_class=11)
    with pytest.raises(NotEnoughSamplesError):
        load_dataset(f"folder:{tmp_path / 'c.zip'}", per_class=1)
    with pytest.raises(EmptyClassError, match="b"):
        place = write(tmp_path / "d", {k: v for k, v in folder().items() if not k.startswith("train/b")})
        (place / "train" / "b").mkdir()
        load_dataset(f"folder:{place}")
    with pytest.raises(FileFormatError, match="other/"):
        load_dataset(f"folder:{write(tmp_path / 'e.zip', only | {'other/a/0.png': png(0)})}")
    with pytest.raises(FileFormatError, match="absent"):
        load_dataset(f"folder:{tmp_path / 'absent'}")


def test_noise_does_not_depend_on_the_holdout(tmp_path: Path) -> None:
    def observed(data: DataSplits, spec: NoiseSpec) -> dict[int, int]:
        train, held = data.apply_noise(spec)
        pairs = list(zip(data.source_index.tolist(), train.labels.tolist(), strict=True))
        assert torch.equal(train.true_labels, data.train_labels)
        assert train.realised_rate == float((train.labels != data.train_labels).double().mean())
        if held is None:
            assert len(data.holdout_labels) == 0
        else:
            pairs += zip(data.holdout_source_index.tolist(), held.labels.tolist(), strict=True)
        return dict(pairs)

    for text in ("symmetric:0.4", "asymmetric:0.4", "instance:0.4"):
        spec = NoiseSpec.parse(text)
        reference = observed(load_dataset("digits", holdout=0), spec)
        for keywords in ({"holdout": 0.1}, {"holdout": 0.3, "seed": 5}, {"holdout": 0.1, "zca": True}):
            assert observed(load_dataset("digits", **keywords), spec) == reference  # type: ignore[arg-type]


def test_human_labels_of_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = rng.permutation(np.repeat([0, 1], 10))
    worse = rng.integers(0, 2, 20)
    np.savez(tmp_path / "h.npz", clean=clean, worse=worse)
    data = load_dataset(f"folder:{write(tmp_path / 'a.zip', folder())}", per_class=8, holdout=0.25)
    train, held = data.apply_noise(NoiseSpec.parse("human:worse", path=tmp_path / "h.npz"))
    assert held is not None and data.source_rank is not None
    for c, rank, label in zip(data.train_labels, data.source_rank, train.labels, strict=True):
        assert int(label) == worse[np.flatnonzero(clean == int(c))[int(rank)]]
    np.savez(tmp_path / "short.npz", clean=clean[:9], worse=worse[:9])
    with pytest.raises(StateMismatchError):
        data.apply_noise(NoiseSpec.parse("human:worse", path=tmp_path / "short.npz"))


CLEAN = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], 20))
WORSE = np.random.default_rng(2).integers(0, 3, 60)
RANK = np.array([int((CLEAN[:i] == c).sum()) for i, c in enumerate(CLEAN)])
KINDS = ("ant", "bee", "cat")


def named(name: Any, left_out: frozenset[int] = frozenset()) -> dict[str, bytes]:
    """A folder of 60 images whose red value is the position in the published order; ``name`` gives the file name."""
    files = {f"train/{KINDS[c]}/{name(i)}.png": png(i) for i, c in enumerate(CLEAN) if i not in left_out}
    return files | {f"test/{c}/0.png": png(0) for c in KINDS}


def check_labels_of(data: DataSplits, noise: NoiseSpec, expected: np.ndarray = WORSE) -> None:
    """Each image, known by its red value, has its own label."""
    train, held = data.apply_noise(noise)
    assert held is not None
    for images, labels in ((data.train_images, train.labels), (data.holdout_images, held.labels)):
        at = (data.preprocessing.inverse(images)[:, 0, 0, 0] * 255).round().long().numpy()
        assert labels.tolist() == expected[at].tolist()


@pytest.fixture
def arrays(tmp_path: Path) -> NoiseSpec:
    np.savez(tmp_path / "labels.npz", clean=CLEAN, worse=WORSE)
    return NoiseSpec.parse("human:worse", path=tmp_path / "labels.npz")


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        (lambda i: f"{RANK[i]:04}", ()),
        (lambda i: f"{RANK[i]}", ()),
        (lambda i: f"{RANK[i]}", tuple(i for i in range(60) if RANK[i] in (3, 7))),
        (lambda i: f"{i}", ()),
        (lambda i: f"{i:05}", (4, 40)),
        (lambda i: f"{i}_{KINDS[CLEAN[i]]}", (0, 59)),
        (lambda i: f"{KINDS[CLEAN[i]]}_{i:05}", ()),
    ],
    ids=["ranks", "unpadded ranks", "deleted", "positions", "deleted positions", "INDEX_class", "class_INDEX"],
)
def test_names_that_give_the_place_of_an_image(
    tmp_path: Path, arrays: NoiseSpec, name: Any, left_out: tuple[int, ...]
) -> None:
    place = write(tmp_path / "f.zip", named(name, frozenset(left_out)))
    check_labels_of(load_dataset(f"folder:{place}", holdout=0.2), arrays)
    check_labels_of(load_dataset(f"folder:{place}", holdout=0.2, per_class=10), arrays)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        (lambda i: f"{RANK[i] + 1}", ()),
        (lambda i: f"{RANK[i]}", (int(np.flatnonzero(CLEAN == 1)[0]),)),
        (lambda i: f"{i + 1}", ()),
        (lambda i: f"{i + 1}", (59,)),
        (lambda i: f"img{RANK[i]}", ()),
        (lambda i: f"{RANK[i]}_{KINDS[CLEAN[i]]}", ()),
        (lambda i: hashlib.sha256(bytes([i])).hexdigest(), ()),
        (lambda i: f"{int(hashlib.sha256(bytes([i])).hexdigest(), 16)}", ()),
    ],
    ids=["ranks from 1", "no 0", "positions from 1", "from 1, cut", "img7", "RANK_class", "hash", "decimal hash"],
)
def test_names_that_do_not_give_it_are_an_error_and_a_file_of_names_helps(
    tmp_path: Path, arrays: NoiseSpec, name: Any, left_out: tuple[int, ...]
) -> None:
    data = load_dataset(f"folder:{write(tmp_path / 'f.zip', named(name, frozenset(left_out)))}", holdout=0.2)
    with pytest.raises(StateMismatchError, match="0007.png.*40217_cat.png.*CSV"):
        data.apply_noise(arrays)
    lines = [f"train/{KINDS[c]}/{name(i)}.png,{WORSE[i]}" for i, c in enumerate(CLEAN)]
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *lines]))
    check_labels_of(data, NoiseSpec.parse("human:label", path=tmp_path / "l.csv"))


def test_positions_from_1_in_a_file_sorted_by_class_are_noticed(tmp_path: Path) -> None:
    """The first images of each class agree with their neighbours' clean labels: a shift by one cannot be excluded."""
    clean = np.sort(CLEAN)
    np.savez(tmp_path / "l.npz", clean=clean, worse=WORSE)
    spec = NoiseSpec.parse("human:worse", path=tmp_path / "l.npz")
    for first in (0, 1):
        files = {f"train/{KINDS[c]}/{i + first}.png": png(i) for i, c in enumerate(clean)}
        files |= {f"test/{c}/0.png": png(0) for c in KINDS}
        place = write(tmp_path / f"{first}.zip", files)
        if first == 0:
            check_labels_of(load_dataset(f"folder:{place}", holdout=0.2), spec)
        for per_class in (None, 10) if first else ():
            with pytest.raises(StateMismatchError):
                load_dataset(f"folder:{place}", holdout=0.2, per_class=per_class).apply_noise(spec)


def test_cifar10_as_jpeg(shared_data: Path) -> None:
    """The real zip: layout, the class map by class names, and human labels by rank."""
    archive, labels = shared_data / "cifar10-jpeg-mini.zip", shared_data / "cifar10n-labels.npz"
    if not (archive.is_file() and labels.is_file()):
        pytest.skip(f"needs {archive.name} and {labels.name} in {shared_data}")
    data = load_dataset(f"folder:{archive}", per_class=100)
    assert data.class_names == CIFAR10_CLASSES and data.shape == (3, 32, 32)
    assert (len(data.train_labels), len(data.holdout_labels), len(data.test_labels)) == (900, 100, 1000)
    train, held = data.apply_noise(NoiseSpec.parse("human:worse", path=labels))
    assert held is not None and 0.3 < train.realised_rate < 0.5
    with np.load(labels) as file:
        at = {(int(c), int(r)): i for i, (c, r) in enumerate(zip(file["clean"], file["rank_in_class"], strict=True))}
        for c, r, label in zip(data.train_labels.tolist(), data.source_rank.tolist(), train.labels, strict=True):  # type: ignore[union-attr]
            assert int(label) == int(file["worse"][at[c, r]])
    flipped = data.apply_noise(NoiseSpec.parse("asymmetric:0.4"))[0]
    untouched = [0, 1, 6, 7, 8]
    assert flipped.matrix.diagonal()[untouched].tolist() == [1.0] * 5 and 0.15 < flipped.realised_rate < 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_images() -> None:
    here, there = load_dataset("digits"), load_dataset("digits", device="cuda")
    assert there.train_images.is_cuda and there.source_index.is_cuda
    assert torch.equal(there.train_images.cpu(), here.train_images)
    spec = NoiseSpec("instance", 0.4)
    assert there.apply_noise(spec)[0].digest == here.apply_noise(spec)[0].digest
