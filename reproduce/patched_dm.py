"""Compares the patched public DM script with the bundled loop: noisy labels without a method, and with TAD.

Run ``bash reproduce/patched_dm.sh`` (or this file with ``--help``). The checkout is copied, never changed. Each run is
written when it is finished, and a second start continues with the missing runs.

All arms read the same files: the first images of each class of the given image folder, in torchvision's CIFAR-10
format, which the public script reads. A seed fixes the wrong labels, the same for all arms. The other draws of the
public script follow the seeded mode of ``tad-plugin run``; those of the bundled loop follow its own seed. Each side
uses its own evaluation.

200 iterations move the initial images little, so the accuracy of a run depends on which images were drawn and how many
of them are mislabelled. For this reason the bundled loop also runs from the script's initial images and division.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from tad_plugin.core.diagnostics import split_quality
from tad_plugin.core.hook.attach import attach
from tad_plugin.core.state import SampleState
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.sources import RawSplits, read_source
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.dm import DM, DMConfig
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tad_plugin.experiments.compare import compare
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.grid.script_data import torchvision_folder
from tad_plugin.experiments.report.tables import Row, markdown_table, noise_label, summarise
from tad_plugin.upstream.checkout import apply
from tad_plugin.upstream.patch import load_patch
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.stand_ins import any_checksum
from tad_plugin.upstream.switches import needed_switches
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import versions
from tad_plugin.utils.seeds import generator_of

NOISE = "symmetric:0.4"
ARMS = {"noisy": "none", "tad": "tad"}
SETTING = {
    "per_class": 1000, "ipc": 10, "iterations": 200, "batch_real": 64, "width": 32, "eval_epochs": 300, "eval_runs": 2,
}  # fmt: skip
SCRIPT, BUNDLED, SAME_START = "main_DM.py, patched", "dm", "dm from the script's start"
COMMAND = "bash reproduce/patched_dm.sh cifar10-jpeg.zip DatasetCondensation"


def run_main_dm(checkout: Path, arm: str, seed: int, save: Path, args: argparse.Namespace, **changed: object) -> Path:
    """Runs the patched script and returns its res_*.pt; ``changed`` are flags that differ from those of the study."""
    flags: dict[str, object] = {
        "dataset": "CIFAR10", "model": f"ConvNetW{args.width}", "ipc": args.ipc, "num_exp": 1, "eval_mode": "none",
        "num_eval": args.eval_runs, "epoch_eval_train": args.eval_epochs, "Iteration": args.iterations,
        "batch_real": args.batch_real, "data_path": args.out / "data", "save_path": save,
        "tad_method": ARMS[arm], "tad_noise": f"{NOISE}@seed={seed}", "tad_state": state_file(args, arm, seed),
    }  # fmt: skip
    found = Script.find(checkout, "main_DM.py")
    words = [word for name, value in {**flags, **changed}.items() for word in (f"--{name}", str(value))]
    shutil.rmtree(save, ignore_errors=True)
    save.mkdir(parents=True)
    with open(save / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        code = run_script(found, words, switches=needed_switches(found, on=["checksums"]), seed=seed)
    if code:
        raise SystemExit(f"main_DM.py ended with status {code}; see {save / 'log.txt'}")
    (file,) = save.glob("res_*.pt")
    return file


def state_file(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """The state file of the script's run."""
    place: Path = args.out / "script" / arm / f"seed{seed}.safetensors"
    return place


def result_of(raw: RawSplits, side: str, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The entry of a run in results.json, without its accuracies."""
    state = SampleState.load(state_file(args, arm, seed))
    rate = float((state.observed != raw.train_labels).float().mean())
    split = split_quality(state.observed, state.target, state.trusted, state.trust, raw.train_labels)
    return {
        "arm": arm, "baseline": side, "dataset": raw.name, "per_class": args.per_class, "ipc": args.ipc,
        "iterations": args.iterations, "seed": seed, "split": None if arm == "noisy" else split,
        "noise": {"kind": "symmetric", "rate": NoiseSpec.parse(NOISE).rate, "seed": seed, "realised_rate": rate},
        "versions": versions("cpu"),
    }  # fmt: skip


def script_run(checkout: Path, raw: RawSplits, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the patched script."""
    state_file(args, arm, seed).unlink(missing_ok=True)
    file = run_main_dm(checkout, arm, seed, args.out / "script" / arm / f"seed{seed}", args)
    values = script_accuracies(file)
    return {**result_of(raw, SCRIPT, arm, seed, args), "accuracy": {"last": [100 * v for v in values]}}


def script_accuracies(file: Path) -> list[float]:
    """The accuracies in the script's res_*.pt, in [0, 1]; it saves them as NumPy numbers."""
    scalar: Any = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(float))]):
        (values,) = torch.load(file, weights_only=True)["accs_all_exps"].values()
    return [float(v) for v in values]


def check_torch() -> None:
    """Refuses a torch before 2.5: it cannot read the script's res_*.pt without running code from it."""
    if not hasattr(torch.serialization, "safe_globals"):
        raise InvalidInputError(explain("torch >= 2.5", f"torch {torch.__version__}", "Upgrade torch for this study"))


def same_start_run(checkout: Path, raw: RawSplits, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the bundled loop from the script's initial images and division, so that only the loop's own draws differ."""
    state, save = state_file(args, arm, seed), args.out / "start" / arm / f"seed{seed}"
    # one step of size 0 with the division from the file gives the script's initial images
    file = run_main_dm(checkout, arm, seed, save, args, Iteration=0, num_eval=0, lr_img=0)
    start = torch.load(file, weights_only=True)["data"][0]
    with any_checksum():
        splits = load_dataset("cifar10", args.out / "data", holdout=0.0, download=False)
    observed = SampleState.load(state).observed
    hook = attach(
        ARMS[arm],
        labels=observed,
        data=splits.train_images,
        num_classes=10,
        dataset="cifar10",
        ipc=args.ipc,
        state=state,
    )
    first = SyntheticSet(start[0], start[1], 10, splits.preprocessing, "cifar10", splits.class_names)
    config = DMConfig(ipc=args.ipc, iterations=args.iterations, width=args.width, batch_real=args.batch_real)
    assert hook.data is not None
    loop = DM(config, hook.data, hook, first, generator_of(seed, "loop"))
    for iteration in range(args.iterations):
        loop.step(iteration)
    found = evaluate(
        loop.result(), (splits.test_images, splits.test_labels),
        EvaluateConfig(width=args.width, runs=args.eval_runs, epochs=args.eval_epochs),
        preprocessing=splits.preprocessing, generator=generator_of(seed, "evaluation"),
    )  # fmt: skip
    return {**result_of(raw, SAME_START, arm, seed, args), "accuracy": {"last": list(found.accuracies)}}


def bundled_run(raw: RawSplits, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the bundled loop at the same setting."""
    config = RunConfig(
        baseline="dm", dataset="cifar10", root=str(args.out / "data"), holdout=0.0, candidates=1, noise=NOISE,
        ipc=args.ipc, iterations=args.iterations, width=args.width, loop={"batch_real": args.batch_real},
        eval_epochs=args.eval_epochs, eval_runs=args.eval_runs, device="cpu",
    )  # fmt: skip
    with any_checksum():
        (result,) = compare(config, arms=[arm], seeds=[seed], ipcs=[args.ipc], out=args.out / "bundled", progress=False)
    return {**result, "dataset": raw.name, "per_class": args.per_class}


def summary(results: list[dict[str, Any]]) -> str:
    """The tables, and the gain by TAD on each side, seed by seed."""
    rows = {(row.baseline, row.arm): row for row in summarise(results)}

    def each(baseline: str, arm: str) -> list[float]:
        row: Row | None = rows.get((baseline, arm))
        return list(row.last.per_seed) if row is not None and row.last is not None else []

    lines = [markdown_table(list(rows.values())), ""]
    names = {SCRIPT: SCRIPT, BUNDLED: "bundled loop", SAME_START: "bundled loop from the script's start"}
    for baseline, name in names.items():
        noisy, tad = each(baseline, "noisy"), each(baseline, "tad")
        if noisy and len(noisy) == len(tad):
            gains = [t - n for n, t in zip(noisy, tad, strict=True)]
            shown = ", ".join(f"{n:.1f} -> {t:.1f}" for n, t in zip(noisy, tad, strict=True))
            lines.append(f"- {name}: TAD {statistics.mean(gains):+.1f} points (seed by seed {shown})")
    for arm in ARMS:
        for baseline in (SAME_START, BUNDLED):
            script, bundled = each(SCRIPT, arm), each(baseline, arm)
            if script and len(script) == len(bundled):
                gap = [s - b for s, b in zip(script, bundled, strict=True)]
                shown = ", ".join(f"{value:+.1f}" for value in gap)
                lines.append(f"- {arm}: script minus {names[baseline]} {statistics.mean(gap):+.1f} points ({shown})")
    return "\n".join(lines)


def page(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The Markdown file."""
    v, first = results[0]["versions"], results[0]
    machine = v["device"].split(" Processor")[0]
    real = f"{args.iterations} iterations, {args.batch_real} real images per class"
    evaluation = f"evaluation with {args.eval_runs} networks of {args.eval_epochs} epochs"
    return f"""# Patched main_DM.py and the bundled DM loop, CIFAR-10 1k, {noise_label(first["noise"])}

    {COMMAND}   # seeds as in the table

The first {args.per_class:,} training images of each class and all test images of {first["dataset"]}, in torchvision's
format (JPEG copies of the published files, so accuracies are not those of the published ones).
ConvNet-3 width {args.width}, IPC {args.ipc}, {real}, {evaluation}.
"noisy" is the patched script with `--tad_noise {NOISE}` and no method: the unmodified algorithm on wrong labels.
"{SAME_START}" is the bundled loop from the script's initial images and division: {args.iterations}
iterations move the images little, so a run's accuracy depends on its initial images.
CPU: {machine}, one thread, shared with other jobs (times are upper bounds); Python {v["python"]}, torch {v["torch"]}.
Accuracy in percent: mean over seeds of the mean over networks, +- standard deviation over seeds.

{summary(results)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="image folder of CIFAR-10 or a zip of it: train/<class>/*, test/<class>/*")
    parser.add_argument("checkout", type=Path, help="checkout of DatasetCondensation, unmodified")
    parser.add_argument("--out", type=Path, default=Path("runs/patched_dm"))
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in SETTING.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    check_torch()
    args.out = args.out.resolve()
    torch.set_num_threads(args.threads)
    raw = read_source(
        f"folder:{Path(args.images).resolve()}", None, per_class=args.per_class, image_size=None, download=False
    )
    torchvision_folder(raw, args.out / "data")
    checkout = args.out / "DatasetCondensation"
    if not checkout.exists():
        skip = shutil.ignore_patterns("__pycache__", ".git", "result", "data")
        shutil.copytree(args.checkout, checkout, ignore=skip)
        apply(load_patch("dm"), checkout)
    file = args.out / "results.json"
    results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    setting = {name: getattr(args, name) for name in SETTING}
    if any(r["setting"] != setting for r in results):
        got = f"{results[0]['setting']} in {file}"
        raise InvalidInputError(explain(f"results of {setting}", got, "Choose another --out"))
    done = {(r["baseline"], r["arm"], r["seed"]) for r in results}
    for seed, arm, side in itertools.product(range(args.seeds), ARMS, (SCRIPT, BUNDLED, SAME_START)):
        if (side, arm, seed) in done:
            continue
        began = perf_counter()
        if side == BUNDLED:
            found = bundled_run(raw, arm, seed, args)
        else:
            found = (script_run if side == SCRIPT else same_start_run)(checkout, raw, arm, seed, args)
        results.append({**found, "setting": setting, "seconds": perf_counter() - began, "command": COMMAND})
        print(f"{side}, {arm}, seed {seed}: {found['accuracy']['last']}", file=sys.stderr)
        atomic_write(file, json.dumps(results, indent=1) + "\n")
        atomic_write(args.out / "results.md", page(results, args))
    print(summary(results))


if __name__ == "__main__":
    main()
