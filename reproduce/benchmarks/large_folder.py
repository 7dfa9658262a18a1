#!/usr/bin/env python3
"""Memory of a large image folder that is loaded, divided by TAD and distilled by DM; and of images of 224x224 pixels.

    python reproduce/benchmarks/large_folder.py --images cifar10-jpeg.zip --out large_folder.json

Makes a folder of ``--copies`` copies of ``--per_class`` CIFAR-10 images per class, enlarged to ``--side`` pixels and
saved as JPEG, beside 20 test images per class. Each part then runs in a process of its own. Memory is above what the
process held after its imports, and is read every 20 ms from /proc/self/status (Linux):

- "anonymous" counts what belongs to the process: the heap, and shared memory.
- "resident" counts in addition the mapped pages of files. The kernel takes them away when it needs room, and they are
  there once for all processes that map them.

"times_the_pixels" divides by the bytes of the 8-bit pixels of all images, training and test.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from PIL import Image

from tad_plugin.core.hook.attach import attach
from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.image_folder import class_files
from tad_plugin.data.image_tree import open_tree
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dm import DM, DMConfig
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tad_plugin.nn.passes import memory_budget
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import byte_count, command_line, versions

TEST_PER_CLASS = 20


def make_folder(source: Path, folder: Path, *, per_class: int, copies: int, side: int) -> int:
    """Writes the folder ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. Returns the bytes of the JPEG files."""
    written = 0
    with open_tree(source) as tree:
        for split, count, times in (("train", per_class, copies), ("test", TEST_PER_CLASS, 1)):
            for name in class_files(tree, split, per_class=count)[1].paths:
                with Image.open(io.BytesIO(tree.read(name))) as image:
                    buffer = io.BytesIO()
                    image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                for copy in range(times):
                    path = folder / Path(name).with_name(f"{Path(name).stem}-{copy}.jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    written += path.write_bytes(buffer.getvalue())
    return written


# -- measuring ---------------------------------------------------------------------------------------
def held() -> dict[str, int]:
    """Bytes that the process holds now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    anonymous = found["RssAnon"] + found["RssShmem"]
    return {"anonymous": anonymous, "resident": anonymous + found["RssFile"]}


class Watch:
    """The highest memory in each stage, above that at the start."""

    def __init__(self) -> None:
        self.base, self.stages = held(), dict[str, dict[str, float]]()
        self._now: dict[str, float] | None = None
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            now, found = self._now, held()
            for kind, value in found.items():
                if now is not None:
                    now[kind] = max(now[kind], float(value - self.base[kind]))
            sleep(0.02)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs ``work`` as a stage and returns its result."""
        self._now = {"anonymous": 0.0, "resident": 0.0}
        began = perf_counter()
        result = work()
        self.stages[name] = {"seconds": perf_counter() - began, **self._now}
        self._now = None
        return result


def summary(watch: Watch, splits: DataSplits) -> dict[str, Any]:
    """The stages and the highest of them, in MiB, and relative to the 8-bit pixels."""
    count = len(splits.train_labels) + len(splits.holdout_labels) + len(splits.test_labels)
    pixels = count * splits.shape[0] * splits.shape[1] * splits.shape[2]
    peak = {kind: max(stage[kind] for stage in watch.stages.values()) for kind in ("anonymous", "resident")}
    mib = {name: {k: round(v / 2**20, 1) if k != "seconds" else round(v, 1) for k, v in stage.items()}
           for name, stage in watch.stages.items()}  # fmt: skip
    return {
        "images": count,
        "shape": list(splits.shape),
        "pixels_mib": round(pixels / 2**20, 1),
        "storage": type(splits.train_images).__name__,
        "base_mib": {kind: round(v / 2**20, 1) for kind, v in watch.base.items()},
        "stages_mib": mib,
        "times_the_pixels": {kind: round(v / pixels, 3) for kind, v in peak.items()},
    }


# -- what is measured --------------------------------------------------------------------------------
def distilled(splits: DataSplits, method: str, watch: Watch, arguments: argparse.Namespace) -> None:
    """Divides the data and distils them, as a run does."""
    noisy, _ = splits.apply_noise(NoiseSpec.parse("symmetric:0.4"))
    scorer = {"epochs": arguments.epochs, "width": 4, "batch_size": 32}
    config = {"scorer": scorer, "tad": {"warmup": 1, "history": 1}} if method == "tad" else {}
    hook = attach(
        method,
        labels=noisy.labels,
        data=splits.train_images,
        num_classes=splits.num_classes,
        config=config,
        dataset="cifar10",
        ipc=1,
        start=False,
    )
    assert hook.data is not None
    watch.stage("divided" if method == "tad" else "attached", hook.start)
    generator = torch.Generator().manual_seed(0)
    settings = DMConfig(ipc=1, iterations=arguments.iterations, width=arguments.width, batch_real=arguments.batch_real)

    def distil() -> SyntheticSet:
        images, labels = initial_images(settings, hook.data, hook, generator)
        synthetic = SyntheticSet(images, labels, splits.num_classes, splits.preprocessing)
        loop = DM(settings, hook.data, hook, synthetic, generator)
        for iteration in range(arguments.iterations):
            loop.step(iteration)
        return loop.result()

    synthetic = watch.stage("distilled", distil)
    evaluation = EvaluateConfig(width=arguments.width, epochs=1, runs=1)
    test = (splits.test_images, splits.test_labels)
    watch.stage("evaluated", lambda: evaluate(synthetic, test, evaluation, generator=generator))


def part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process."""
    folder = f"folder:{arguments.folder}"
    watch = Watch()
    if name == "folder":
        load = {"holdout": 0.0}
    else:
        load = {"holdout": 0.0, "image_size": 224, "per_class": 4, "storage": "uint8"}
    splits = watch.stage("loaded", lambda: load_dataset(folder, **load))
    if name == "folder":
        del splits
        splits = watch.stage("loaded again", lambda: load_dataset(folder, **load))
        distilled(splits, "tad", watch, arguments)
        return summary(watch, splits)
    arguments.width, arguments.iterations, arguments.batch_real = 128, 1, 4
    with memory_budget(byte_count(arguments.memory_budget, "--memory_budget")):
        distilled(splits, "none", watch, arguments)
    return {**summary(watch, splits), "memory_budget": arguments.memory_budget, "width": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or zip of CIFAR-10 JPEG images")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--work", type=Path, help="folder for the images; by default a temporary one")
    parser.add_argument("--per_class", type=int, default=600, help="different images per class")
    parser.add_argument("--copies", type=int, default=10, help="copies of each image")
    parser.add_argument("--side", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the scorer")
    parser.add_argument("--iterations", type=int, default=3, help="iterations of DM")
    parser.add_argument("--width", type=int, default=32, help="channels of the network that DM matches on")
    parser.add_argument("--batch_real", type=int, default=64, help="real images per class in an iteration")
    parser.add_argument("--memory_budget", default="16GB", help="budget of the large images")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(part(arguments.part, arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.work or Path(scratch)) / "images"
        found: dict[str, Any] = {"command": command_line(), "versions": versions()}
        if not folder.exists():
            sizes = {"per_class": arguments.per_class, "copies": arguments.copies, "side": arguments.side}
            found["jpeg_bytes"] = make_folder(arguments.images, folder, **sizes)
        for name in ("folder", "large images"):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", name, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    atomic_write(arguments.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
