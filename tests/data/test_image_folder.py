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

from tad_plugin.data import image_folder as imagefolder
from tad_plugin.data.image_folder import class_files, decode, open_tree
from tad_plugin.errors import EmptyClassError, FileFormatError, InvalidInputError, NotEnoughSamplesError


def png(value: int | np.ndarray, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> bytes:
    if isinstance(value, np.ndarray):
        image = Image.fromarray(value)
    else:
        image = Image.new(mode, size, value if mode == "L" else (value, value, value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(place: Path, files: dict[str, bytes]) -> Path:
    """Writes files into a folder, or into a zip if the name ends so."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
    return place


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
        assert train.ranks.tolist() == [0, 1, 2, 2, 9, 10]  # numbers where the names are numbers
        assert decode(tree, train.paths)[:, 0, 0, 0].tolist()[3:] == [2, 9, 10]
        _, first = class_files(tree, "train", per_class=2)
        assert first.paths == tuple(train.paths[i] for i in (0, 1, 3, 4))
        _, test = class_files(tree, "test", names)
        assert test.paths == ("test/ant/deep/er/0.PNG", "test/cat/0.png")
        with pytest.raises(NotEnoughSamplesError, match="per_class = 4"):
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
        ("a", {"cat/0.png": png(0)}, "folder 'train'.*cat"),
        ("b.zip", {"cat/0.png": png(0)}, "folder 'train'.*cat"),
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
    with open_tree(bare) as tree, pytest.raises(FileFormatError, match="images below train/<class>/"):
        class_files(tree, "train")
    files = {"train/a/0.png": png(0), "train/b/x.txt": b"", "test/a/0.png": png(0), "test/c/0.png": png(0)}
    with open_tree(write(tmp_path / "e", files)) as tree:
        with pytest.raises(EmptyClassError, match="none in b"):
            class_files(tree, "train")
        with pytest.raises(EmptyClassError, match="none in b"):
            class_files(tree, "test", ["a", "b", "c"])
        with pytest.raises(FileFormatError, match=r"classes of train/.*c"):
            class_files(tree, "test", ["a"])


def test_duplicate_numbers_fall_back_to_names(tmp_path: Path) -> None:
    with open_tree(write(tmp_path / "a", {"train/a/1.png": png(0), "train/a/01.png": png(1)})) as tree:
        assert class_files(tree, "train")[1].ranks.tolist() == [0, 1]


def test_bar_is_optional_and_decoding_is_threaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefolder, "_BAR_FROM", 0)
    monkeypatch.setattr(imagefolder.os, "cpu_count", lambda: 4)
    seen = set()
    original = imagefolder._decode_one

    def spy(*args: object) -> object:
        seen.add(threading.get_ident())
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(imagefolder, "_decode_one", spy)
    path = write(tmp_path / "a.zip", {f"train/a/{i}.png": png(i % 256, (64, 64)) for i in range(300)})
    with open_tree(path) as tree:
        paths = class_files(tree, "train")[1].paths
        shown = decode(tree, paths)
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)  # as if not installed
        hidden = decode(tree, paths)
    assert torch.equal(shown, hidden) and threading.get_ident() not in seen
