"""Seals: every single bit of a sealed file, and what is accepted without one."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.errors import FileFormatError
from tad_plugin.utils.files import read_json, read_yaml
from tad_plugin.utils.seals import (
    check_archive,
    save_sealed,
    sealed_json,
    sealed_yaml,
    unsealed_json,
    unsealed_yaml,
)

VALUES = {"a": [1, 2.5, None], "text": "ä, }", "nested": {"seal": "x"}, "nan": float("inf")}
TREE = [torch.arange(5.0), {"a": 1}]


def flips(whole: bytes, step: int = 1) -> Any:
    for bit in range(0, 8 * len(whole), step):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("line", [False, True])
def test_json_comes_back_and_no_changed_bit_does(line: bool) -> None:
    text = sealed_json(VALUES, line=line)
    assert unsealed_json(text) == VALUES and text.endswith("}\n") and (text.count("\n") == 1) == line
    for changed in flips(text.encode()):
        try:
            found = unsealed_json(changed.decode())
        except ValueError:  # UnicodeDecodeError is one
            continue
        assert found == VALUES  # the last line break


def test_other_json_needs_no_seal() -> None:
    for text in ("{}", "[1]", '"seal"', '{"a": 1}', '{"sha256": "' + "a" * 64 + '"}'):
        unsealed_json(text)
    with pytest.raises(ValueError, match="seal"):
        unsealed_json('{"a": 1, "seal": "' + "a" * 64 + '"}')
    with pytest.raises(ValueError, match="seal"):
        unsealed_json('{"a": 1, "seal": 2}')


def test_yaml_comes_back_and_no_changed_bit_does() -> None:
    yaml = pytest.importorskip("yaml")
    text = sealed_yaml("a: 1\nb: two\n")
    assert unsealed_yaml(text) == text and unsealed_yaml("a: 1\n") == "a: 1\n"
    silent = 0
    for changed in flips(text.encode()):
        try:
            found = yaml.safe_load(unsealed_yaml(changed.decode()))
        except (ValueError, yaml.YAMLError):
            continue
        assert found == {"a": 1, "b": "two"}
        silent += 1
    assert silent < 8 * 65  # in the digits of the seal


def test_archives_come_back_and_no_changed_bit_does(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_sealed(TREE, path)
    check_archive(path)
    save_sealed(TREE, tmp_path / "another.pt")
    assert path.read_bytes() == (tmp_path / "another.pt").read_bytes()
    found = torch.load(path, weights_only=True)
    assert torch.equal(found[0], TREE[0]) and found[1] == TREE[1]  # type: ignore[arg-type]
    whole, unnoticed = path.read_bytes(), 0
    for changed in flips(whole, 11):
        path.write_bytes(changed)
        try:
            check_archive(path)
        except (ValueError, zipfile.BadZipFile, NotImplementedError, OSError):
            continue
        unnoticed += 1
        assert changed[:-82] == whole[:-82]  # the mark of the seal
    assert unnoticed <= 8 * 18 / 11 + 1


def test_an_archive_of_others_is_checked_by_its_own_sums(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.arange(1000.0), path)
    check_archive(path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert float(torch.load(path, weights_only=True).sum()) != 499500.0  # torch does not notice
    with pytest.raises(ValueError, match="checksum"):
        check_archive(path)


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_a_broken_seal_is_named_as_such_and_broken_syntax_as_such(tmp_path: Path, name: str) -> None:
    path, read = tmp_path / name, read_json if name == "a.json" else read_yaml
    whole = sealed_json({"a": 100}) if name == "a.json" else sealed_yaml("a: 100\n")
    path.write_text(whole.replace("100", "101"))
    with pytest.raises(FileFormatError, match="their seal") as caught:
        read(path)
    assert "does not parse" not in str(caught.value) and "correct the file" not in str(caught.value)
    path.write_text("{a: [")
    with pytest.raises(FileFormatError) as caught:
        read(path)
    assert "their seal" not in str(caught.value)
