"""Stand-ins: correct while they are on, and gone afterwards."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch

from tad_plugin.errors import PatchError
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.stand_ins import ClassErrorMeter, any_checksum, capped_topk, cpu_only
from tad_plugin.upstream.switches import needed_switches
from tests.upstream.scripts import needed, script


def test_the_meter_counts_like_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 7, generator=g), torch.randint(0, 7, (n,), generator=g)) for n in (5, 1, 12)]
    hits, errors = ClassErrorMeter(accuracy=True), ClassErrorMeter([3, 1])
    assert hits.n == 0 and hits.value() == [100.0] and errors.value(1) == 0.0
    for scores, labels in batches:
        hits.add(scores, labels)
        errors.add(scores.numpy(), labels.numpy())
    rows = [(s, int(y)) for scores, labels in batches for s, y in zip(scores, labels, strict=True)]
    first = sum(int(s.argmax()) == y for s, y in rows)
    third = sum(y in s.argsort(descending=True)[:3].tolist() for s, y in rows)
    assert hits.n == errors.n == len(rows) == 18
    assert hits.value() == [pytest.approx(100 * first / 18)]
    assert errors.value() == [pytest.approx(100 * (1 - first / 18)), pytest.approx(100 * (1 - third / 18))]
    assert errors.value(3) == errors.value()[1]  # type: ignore[index]
    hits.reset()
    hits.add(torch.tensor([0.0, 1.0]), 1)  # a single sample, as a batch of one squeezed
    assert (hits.n, hits.value(1)) == (1, 100.0)


def test_torchnet_is_stood_in_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        import torch
        import torchnet
        meter = torchnet.meter.ClassErrorMeter(accuracy=True)
        meter.add(torch.eye(2), torch.tensor([0, 0]))
        assert meter.n == 2 and meter.value()[0] == 50
    """
    found = script(tmp_path, text)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert needed(found) == ["torchnet"]
    switches = needed_switches(found)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert needed(found) == []
    monkeypatch.undo()
    before = (sys.modules.get("torchnet"), sys.modules.get("torchnet.meter"))
    assert run_script(found, switches=switches) == 0
    assert before == (sys.modules.get("torchnet"), sys.modules.get("torchnet.meter"))


def test_the_folder_for_checkpoints_is_made_and_an_empty_one_taken_away(tmp_path: Path) -> None:
    found = script(tmp_path, "open('./checkpoints/a', 'w').close()\n", "deep/main.py")
    assert needed(found) == ["checkpoints"]
    with pytest.raises(FileNotFoundError):
        run_script(found)
    assert run_script(found, switches=needed_switches(found)) == 0
    assert (tmp_path / "deep" / "checkpoints" / "a").is_file() and needed(found) == []
    other = script(tmp_path / "other", "'./checkpoints/'\nimport os\nassert os.path.isdir('checkpoints')\n")
    assert run_script(other, switches=needed_switches(other)) == 0
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_the_largest_few_are_all_where_there_are_fewer(tmp_path: Path) -> None:
    text = """
        import torch
        losses = torch.tensor([3.0, 1.0, 2.0])
        assert torch.topk(losses, k=2560, largest=False)[1].tolist() == [1, 2, 0]
        assert torch.topk(losses, 2).values.tolist() == [3, 2]
        assert torch.topk(torch.eye(2), 5, 0).indices.shape == (2, 2)
    """
    found = script(tmp_path, text)
    assert needed(found) == ["topk"] and needed(script(tmp_path / "few", "torch.topk(x, k=5)\n")) == []
    with pytest.raises(RuntimeError):
        run_script(found)
    before = torch.topk
    assert run_script(found, switches=needed_switches(found)) == 0
    assert torch.topk is before
    with capped_topk(), pytest.raises(IndexError):
        torch.topk(torch.zeros(3), 2, dim=4)


def test_files_of_other_contents_are_read_only_where_that_is_asked_for(tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        row = {"data": torch.zeros(1, 3072, dtype=torch.uint8).numpy(), "labels": [0]}
        (folder / name).write_bytes(pickle.dumps(row))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["only"]}))
    with pytest.raises(RuntimeError, match="corrupted"):
        CIFAR10(str(tmp_path))
    with any_checksum():
        assert len(CIFAR10(str(tmp_path), download=True)) == 5
        (folder / "data_batch_3").unlink()
        with pytest.raises(RuntimeError, match="not found"):
            CIFAR10(str(tmp_path))
    found = script(tmp_path, "from torchvision.datasets import CIFAR10\n")
    assert needed(found) == [] and needed(found, on=["checksums"]) == ["checksums"]


def test_tensors_made_on_a_gpu_are_made_on_the_cpu() -> None:
    originals = (torch.tensor, torch.randn)
    like = torch.zeros(2)
    with cpu_only():
        made = [
            torch.tensor([1.0, 2.0], requires_grad=True, device="cuda"),
            torch.randn(size=(2,), dtype=torch.float, device=torch.device("cuda", 0)),
            torch.zeros_like(like, device="cuda:0"),
            torch.arange(2, device="cuda"),
        ]
        assert all(t.device.type == "cpu" and t.shape == (2,) for t in made) and made[0].requires_grad
        assert torch.ones(1, device="meta").device.type == "meta" and torch.ones(1).device.type == "cpu"
    assert (torch.tensor, torch.randn) == originals


def test_device_arguments_need_the_switch(tmp_path: Path) -> None:
    found = script(tmp_path, "def f(n, device='cuda'):\n    return n\n")
    assert "cpu" in needed(found) or found.gpu


def test_old_names_of_numpy_and_a_missing_network(tmp_path: Path) -> None:
    import numpy as np

    text = """
        import numpy as np
        from efficientnet_pytorch import EfficientNet
        assert np.int(2.7) == 2 and np.float is float and np.bool_(True)
        EfficientNet.from_name('efficientnet-b0', num_classes=3)
        """
    found = script(tmp_path, text)
    on = needed_switches(found)
    assert {"numpy", "efficientnet"} <= {s.name for s in on}
    with pytest.raises(PatchError, match="efficientnet_pytorch"):
        run_script(found, switches=on)
    assert not hasattr(np, "int") and "efficientnet_pytorch" not in sys.modules
