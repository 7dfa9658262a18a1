"""Image folders and zips: layout, order, decoding, and what can be wrong with them."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tad_plugin.data import image_folder
from tad_plugin.data.image_folder import class_files, decode
from tad_plugin.data.image_tree import open_tree
from tad_plugin.errors import EmptyClassError, FileFormatError, InvalidInputError, NotEnoughSamplesError
from tests.data.files import png, write

FILES = {
    **{f"train/cat/{i}.png": png(i) for i in (10, 9, 2)},
    **{f"train/ant/{name}.png": png(i) for i, name in enumerate("cab")},
    "test/cat/0.png": png(1),
    "test/ant/deep/er/0.PNG": png(2),
    "train/cat/notes.txt": b"-",
    "train/.DS_Store": b"-",
    "train/.hidden/x.png": png(0),
    "__MACOSX/train/cat/._2.png": b"-",
}


@pytest.mark.parametrize("prefix", ["", "wrapped/"])
@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_listing(tmp_path: Path, place: str, prefix: str) -> None:
    with open_tree(write(tmp_path / place, {prefix + k: v for k, v in FILES.items()})) as tree:
        names, train = class_files(tree, "train")
        assert names == ("ant", "cat")
        assert train.paths == (
            "train/ant/a.png", "train/ant/b.png", "train/ant/c.png",
            "train/cat/2.png", "train/cat/9.png", "train/cat/10.png",
        )  # fmt: skip
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert train.ranks is None and train.skipped == {".txt": 1}
        assert decode(tree, train.paths)[:, 0, 0, 0].tolist()[3:] == [2, 9, 10]
        _, first = class_files(tree, "train", per_class=2)
        assert first.paths == tuple(train.paths[i] for i in (0, 1, 3, 4))
        _, test = class_files(tree, "test", names)
        assert test.paths == ("test/ant/deep/er/0.PNG", "test/cat/0.png")
        with pytest.raises(NotEnoughSamplesError, match="4"):
            class_files(tree, "train", per_class=4)


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {k.removeprefix("train/"): v for k, v in FILES.items() if k.startswith("train/")})
    (tmp_path / "folder").mkdir()
    try:
        os.symlink(tmp_path / "elsewhere", tmp_path / "folder" / "train", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    with open_tree(tmp_path / "folder") as tree:
        assert len(class_files(tree, "train")[1].paths) == 6


def test_pixels_against_pil(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(1100)]  # more than two chunks
    files = {f"train/a/{i:04}.png": png(a) for i, a in enumerate(arrays)}
    with open_tree(write(tmp_path / "x.zip", files)) as tree:
        images = decode(tree, class_files(tree, "train")[1].paths)
    assert images.shape == (1100, 3, 5, 7) and images.dtype == torch.uint8 and images.is_contiguous()
    assert np.array_equal(images.numpy(), np.stack(arrays).transpose(0, 3, 1, 2))


def test_grey_only_if_all_are(tmp_path: Path) -> None:
    with open_tree(
        write(tmp_path / "a", {"train/a/0.png": png(7, mode="L"), "train/a/1.png": png(8, mode="L")})
    ) as tree:
        images = decode(tree, class_files(tree, "train")[1].paths)
        assert images.shape == (2, 1, 6, 6) and images[:, 0, 0, 0].tolist() == [7, 8]
    with open_tree(write(tmp_path / "b", {"train/a/0.png": png(7, mode="L"), "train/a/1.png": png(8)})) as tree:
        images = decode(tree, class_files(tree, "train")[1].paths)
        assert images.shape == (2, 3, 6, 6) and images[0, :, 0, 0].tolist() == [7, 7, 7]


def test_sizes(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 200  # the middle square
    files = {"train/a/0.png": png(5, (8, 8)), "train/a/1.png": png(wide)}
    with open_tree(write(tmp_path / "a", files)) as tree:
        paths = class_files(tree, "train")[1].paths
        with pytest.raises(InvalidInputError, match=r"8x8.*16x8 in .*1\.png.*image_size"):
            decode(tree, paths)
        assert decode(tree, paths, 8)[1].unique().tolist() == [200]
        assert decode(tree, paths, 4).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"nothing to see", "not an image"),
        (png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))[:500], "readable image"),
        (png(np.full((6, 6), 60000, dtype=np.uint16)), "8 bits per channel"),
    ],
)
def test_unreadable_images_are_named(tmp_path: Path, place: str, data: bytes, reason: str) -> None:
    path = write(tmp_path / place, {"train/a/0.png": png(1), "train/a/1.png": data})
    with open_tree(path) as tree, pytest.raises(FileFormatError, match=rf"(?s){reason}.*1\.png|1\.png.*{reason}"):
        decode(tree, class_files(tree, "train")[1].paths)


def test_damaged_zip_member(tmp_path: Path) -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    path = write(tmp_path / "a.zip", {"train/a/0.png": noise})
    data = bytearray(path.read_bytes())
    data[500:600] = bytes(100)
    path.write_bytes(data)
    with open_tree(path) as tree, pytest.raises(FileFormatError, match=r"0\.png"):
        decode(tree, class_files(tree, "train")[1].paths)


def test_wrong_layouts(tmp_path: Path) -> None:
    for place, files, message in [
        ("a", {"cat/0.png": png(0)}, "train.*cat"),
        ("b.zip", {"cat/0.png": png(0)}, "train.*cat"),
        ("c", {"one/train/a/0.png": png(0), "two/train/a/0.png": png(0)}, "one, two"),
    ]:
        with pytest.raises(FileFormatError, match=message), open_tree(write(tmp_path / place, files)):
            pass
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name in ("text.zip", "absent", "empty"):
        with pytest.raises(FileFormatError), open_tree(tmp_path / name):
            pass
    bare = write(tmp_path / "d", {"train/a/x.txt": b"", "train/0.png": png(0)})
    with open_tree(bare) as tree, pytest.raises(FileFormatError, match="train/<class>/"):
        class_files(tree, "train")
    files = {"train/a/0.png": png(0), "train/b/x.txt": b"", "test/a/0.png": png(0), "test/c/0.png": png(0)}
    with open_tree(write(tmp_path / "e", files)) as tree:
        with pytest.raises(EmptyClassError, match="b"):
            class_files(tree, "train")
        with pytest.raises(EmptyClassError, match="b"):
            class_files(tree, "test", ["a", "b", "c"])
        with pytest.raises(FileFormatError, match="c"):
            class_files(tree, "test", ["a"])


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        ({"a": ["0", "01", "10", "2"], "b": ["000", "007"]}, [0, 1, 2, 10, 0, 7]),
        ({"a": ["1", "01", "0"], "b": ["0"]}, None),  # a number twice
        ({"a": ["0", "1"], "b": ["1", "2"]}, None),  # no 0 in b
        ({"a": ["0", "1"], "b": ["0", "x"]}, None),
        ({"a": ["0", "1"], "b": ["0", "9" * 19]}, None),  # a hash
    ],
)
def test_ranks_only_from_numbers_with_a_0_in_every_class(
    tmp_path: Path, names: dict[str, list[str]], ranks: list[int] | None
) -> None:
    files = {f"train/{c}/{name}.png": png(0) for c, group in names.items() for name in group}
    with open_tree(write(tmp_path / "a", files)) as tree:
        found = class_files(tree, "train")[1].ranks
        assert (None if found is None else found.tolist()) == ranks


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_every_format_that_pillow_reads_is_decoded(tmp_path: Path, place: str) -> None:
    image = Image.new("RGB", (6, 6), (40, 80, 120))
    files = {}
    for suffix, name in {".jfif": "JPEG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", "": "PNG",
                         ".avif": "AVIF", ".jp2": "JPEG2000", ".PPM": "PPM"}.items():  # fmt: skip
        if name.upper() in Image.SAVE:
            buffer = io.BytesIO()
            image.save(buffer, name)
            files[f"train/a/{name}{suffix}"] = buffer.getvalue()
    others = {
        "train/a/notes.txt": b"-",
        "train/a/LICENSE": b"text",
        "train/a/page.pdf": b"%PDF",
        "train/loose.png": png(0),
    }
    with open_tree(write(tmp_path / place, files | others)) as tree:
        found = class_files(tree, "train")[1]
        assert set(found.paths) == set(files) and len(files) >= 7
        assert found.skipped == {".txt": 1, "no suffix": 1, ".pdf": 1, "directly in train/": 1}
        pixels = decode(tree, found.paths)
    assert (pixels.int() - torch.tensor([40, 80, 120]).view(1, 3, 1, 1)).abs().max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 8, 3), dtype=np.uint8)
    upright[:8, :4] = 255  # top left
    turns = [
        lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.transpose(1, 0, 2), np.rot90,
        lambda x: np.rot90(x, 2).transpose(1, 0, 2), lambda x: np.rot90(x, -1),
    ]  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation - 1](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.fromarray(stored).save(buffer, kind, exif=exif)
        with open_tree(write(tmp_path / f"{kind}.zip", {"train/a/0.jpg": buffer.getvalue()})) as tree:
            pixels = decode(tree, ["train/a/0.jpg"])
        assert pixels.shape == (1, 3, 16, 8)
        assert (pixels[0].permute(1, 2, 0).int() - torch.from_numpy(upright).int()).abs().max() < 16


def test_an_empty_class_folder_is_an_error_and_no_other_class_moves(tmp_path: Path) -> None:
    place = write(tmp_path / "f", {"train/a/0.png": png(0), "train/c/0.png": png(0), "test/a/0.png": png(0)})
    (place / "train" / "b").mkdir()
    with open_tree(place) as tree, pytest.raises(EmptyClassError, match="b"):
        class_files(tree, "train")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("train/a/0.png", png(0))
        archive.writestr("train/b/", b"")
    with open_tree(tmp_path / "f.zip") as tree, pytest.raises(EmptyClassError, match="b"):
        class_files(tree, "train")


def test_each_file_counts_once_in_its_class(tmp_path: Path) -> None:
    place = write(tmp_path / "f", {"train/a/0.png": png(0), "train/b/0.png": png(1), "train/a/more/1.png": png(2)})
    try:
        os.symlink(place / "train" / "a" / "0.png", place / "train" / "a" / "9.png")
        os.symlink(place / "train" / "a" / "more", place / "train" / "a" / "same")
    except OSError:
        pytest.skip("this system makes no symbolic links")
    with open_tree(place) as tree:
        found = class_files(tree, "train")[1]
    assert found.paths == ("train/a/0.png", "train/a/more/1.png", "train/b/0.png")
    assert found.skipped == {"second link to an image": 2}


def test_bar_is_optional_and_decoding_is_threaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "_BAR_FROM", 0)
    monkeypatch.setattr(image_folder.os, "cpu_count", lambda: 4)
    seen = set()
    original = image_folder._decode_one

    def spy(*args: object) -> object:
        seen.add(threading.get_ident())
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(image_folder, "_decode_one", spy)
    path = write(tmp_path / "a.zip", {f"train/a/{i}.png": png(i % 256, (64, 64)) for i in range(300)})
    with open_tree(path) as tree:
        paths = class_files(tree, "train")[1].paths
        shown = decode(tree, paths)
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)  # as if not installed
        hidden = decode(tree, paths)
    assert torch.equal(shown, hidden) and threading.get_ident() not in seen
