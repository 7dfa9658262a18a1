"""Cost of the hook in a patched script that uses weights and scores nothing, in seconds per iteration.

Run ``python reproduce/benchmarks/patch_overhead.py --dm CHECKOUT --mtt CHECKOUT --datm CHECKOUT --idm CHECKOUT``;
prints a table and writes JSON and Markdown. Rows whose checkout is not given are left out.

Each script runs in two processes: unpatched, and patched with ``--tad_method tad --tad_state FILE``. The file trusts
every sample and gives it a random weight, so that every handle of the patch works. The two processes take turns by
iterations, so that a busy machine slows both alike, and draw the same numbers. An iteration ends when the synthetic
images are updated (experts: when a batch has been learned). On a CPU one thread works and seconds are processor time.
On a GPU they are wall time after its queue has run dry. The images are random: no arithmetic depends on what they show.
The aim is a ratio of at most 1.02.

Both processes keep the memory that they free (the variables in KEEP). Otherwise the C library returns it and the system
clears it again, depending on the layout of the heap. That took up to a third of an iteration, and made one of the two
processes slower by up to 26% for as long as it ran. The time inside the patch's handles is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from upstream_iterations import Done, RandomImages

from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.nn.networks import make_network
from tad_plugin.tad.method import TAD
from tad_plugin.upstream.checkout import apply
from tad_plugin.upstream.patch import load_patch
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import needed_switches
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.machine import versions

KEEP = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"}
KEPT = "Both processes keep freed memory, which otherwise costs one of them more by chance."
AIM = 1.02
HANDLES = ("pools", "drawn", "kept", "reweight", "weighted_loss", "matched_gradient", "before_update")
HANDLES += ("student", "begin_segment", "segment_term", "end_segment")
CHECKOUTS = ("dm", "mtt", "datm", "idm")
YAML = """dataset: CIFAR10
model: ConvNetW{width}
ipc: {ipc}
syn_steps: {syn_steps}
batch_syn: 10
expert_epochs: 2
max_start_epoch: 2
Sequential_Generation: False
pix_init: real
lr_img: 1
lr_lr: 0.000000001
threshold: 100.0
zca: False
num_eval: 0
parall_eva: True
Iteration: 10000
data_path: {folder}
buffer_path: {folder}
"""


@dataclass(frozen=True)
class Row:
    """One script: its patch, path and flags, and the number of image updates per iteration."""

    patch: str
    script: str
    flags: str
    experts: bool = False
    updates: int = 1


DM = "--dataset CIFAR10 --ipc {ipc} --batch_real {batch_real} --num_exp 1 --num_eval 0 --Iteration 10000"
DM += " --eval_mode none --data_path {folder} --save_path {folder} --model {model}"
IDM = (
    "--init real --lr_img 0.2 --net_train_real --eval_interval 20000 --mismatch_lambda 0 --net_decay --embed_last 1000"
)
IDM += " --syn_ce --ce_weight 0.5 --train_net_num 1 --model_train_steps 2 --trained_bs 64 --aug"
EXPERTS = "--dataset CIFAR10 --num_experts 1 --train_epochs 1000 --data_path {folder} --buffer_path {folder}/own"
EXPERTS += " --batch_train {batch_train} --model {model}"
ROWS = {
    "dm": Row("dm", "main_DM.py", DM),
    "dc": Row("dm", "main.py", DM + " --method DC"),
    "mtt experts": Row("mtt", "buffer.py", EXPERTS, experts=True),
    "mtt": Row(
        "mtt",
        "distill.py",
        "--dataset CIFAR10 --ipc {ipc} --Iteration 10000 --eval_it 20000 --num_eval 0 --syn_steps {syn_steps}"
        " --expert_epochs 2 --max_start_epoch 2 --lr_img 1 --lr_lr 1e-9"
        " --data_path {folder} --buffer_path {folder} --model {model}",
    ),
    "datm experts": Row(
        "datm", "buffer/buffer_FTD.py", EXPERTS + " --rho_max 0.01 --rho_min 0.01 --alpha 0.3", experts=True
    ),
    "datm": Row("datm", "distill/DATM.py", "--cfg {folder}/settings.yaml"),
    "datm tesla": Row("datm", "distill/DATM_tesla.py", "--cfg {folder}/settings.yaml"),
    "idm": Row("idm", "IDM_cifar10.py", f"{DM} {IDM}", updates=10),
}


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Writes the files that the scripts read: a buffer of experts, DATM's settings, and the state file."""
    network = make_network(
        "convnet", in_channels=3, num_classes=10, image_size=32, width=args.width, generator=torch.Generator()
    )
    generator = torch.Generator().manual_seed(0)
    epochs = [
        [p.detach() + 0.01 * e * torch.randn(p.shape, generator=generator) for p in network.parameters()]
        for e in range(5)
    ]
    buffer = folder / "CIFAR10_NO_ZCA" / f"ConvNetW{args.width}"
    buffer.mkdir(parents=True)
    torch.save([epochs], buffer / "replay_buffer_0.pt")
    values = {**vars(args), "folder": folder}
    (folder / "settings.yaml").write_text(YAML.format(**values))
    labels = torch.tensor(RandomImages().targets)
    state = SampleState(labels, 10)
    state.set_weights("tad", 0.5 + torch.rand(len(labels), generator=generator))
    state.save(folder / "state.safetensors", configs={"tad": TAD().settings()})


def worker(name: str, checkout: str, folder: str, patched: bool, args: argparse.Namespace) -> None:
    """Runs a script; after each iteration it writes the seconds and waits for a line."""
    import torchvision

    torch.set_num_threads(args.threads)
    row, gpu, report = ROWS[name], args.device.startswith("cuda"), sys.stdout
    since, marks, inside = [0.0], [0], [0.0]

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return perf_counter() if gpu or args.threads > 1 else process_time()

    def timed(handle: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **more: Any) -> Any:
            began = now()
            try:
                return handle(*given, **more)
            finally:
                inside[0] += now() - began

        return called

    def boundary(optimizer: Any, *_given: Any) -> None:
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        ours = len(tensors) > 1 if row.experts else len(tensors) == 1 and tensors[0].ndim == 4
        if type(optimizer) is not torch.optim.SGD or not ours:
            return
        marks[0] += 1
        if marks[0] % row.updates == 0:
            print(now() - since[0], inside[0], file=report, flush=True)
            if not sys.stdin.readline():
                raise Done
            since[0], inside[0] = now(), 0.0

    torchvision.datasets.CIFAR10 = RandomImages
    for handle in HANDLES:
        setattr(Hook, handle, timed(getattr(Hook, handle)))
    register_optimizer_step_pre_hook(boundary)
    values = {**vars(args), "folder": folder, "model": f"ConvNetW{args.width}"}
    flags = row.flags.format(**values).split()
    if patched:
        flags += ["--tad_method", "tad", "--tad_state", f"{folder}/state.safetensors"]
    script = Script.find(checkout, row.script)
    with redirect_stdout(sys.stderr), suppress(Done):
        run_script(script, flags, switches=needed_switches(script), seed=0)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one row of the table."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args)
        arms: list[subprocess.Popen[str]] = []
        for arm in ("plain", "patched"):
            root = folder / arm
            shutil.copytree(getattr(args, row.patch), root, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            if arm == "patched":
                apply(load_patch(row.patch), root)
            line = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *sys.argv[1:]]
            line += ["--worker", name, str(root), str(folder), arm]
            environment = {
                **os.environ,
                **KEEP,
                "OMP_NUM_THREADS": str(args.threads),
                "MKL_NUM_THREADS": str(args.threads),
            }
            if args.device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            errors = open(folder / f"{arm}.txt", "w")  # noqa: SIM115 - the process writes to it
            pipe = subprocess.PIPE
            arms.append(
                subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True, bufsize=1)
            )
        times: list[list[tuple[float, float]]] = []
        try:
            for _ in range(args.warmup + args.iterations):
                times.append([_turn(arm, folder) for arm in arms])
        finally:
            for arm in arms:
                arm.communicate()  # closes its input, so that it ends
    plain = [a[0] for a, _ in times[args.warmup :]]
    patched, handles = zip(*(b for _, b in times[args.warmup :]), strict=True)
    ratios = sorted(b / a for a, b in zip(plain, patched, strict=True))
    quarter = len(ratios) // 4
    return {
        "row": name,
        "script": row.script,
        "plain": statistics.median(plain),
        "patched": statistics.median(patched),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "in_handles": None if row.experts else statistics.median(handles),
        "seconds": {"plain": plain, "patched": patched, "in_handles": handles},
    }


def _turn(arm: subprocess.Popen[str], folder: Path) -> tuple[float, float]:
    """Lets a process make one iteration; the first one ends at the first update."""
    assert arm.stdin is not None and arm.stdout is not None
    if arm.poll() is None:
        answer = arm.stdout.readline()
        if answer:
            arm.stdin.write("on\n")
            seconds, inside = answer.split()
            return float(seconds), float(inside)
    said = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.txt")))
    raise SystemExit(f"a script stopped:\n{said}")


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as Markdown."""
    lines = ["| | script | original s | patched s | ratio | quartiles | in handles |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["quartiles"]
        cells = [row["row"], f"`{row['script']}`", f"{row['plain']:.4f}", f"{row['patched']:.4f}"]
        share = "-" if row["in_handles"] is None else f"{100 * row['in_handles'] / row['plain']:.3f}%"
        cells += [f"{row['ratio']:.4f}", f"{low:.3f} - {high:.3f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(args: argparse.Namespace) -> str:
    """The command line, with a placeholder for each checkout."""
    given = [f"--{name} CHECKOUT" for name in CHECKOUTS if getattr(args, name) is not None]
    rest = [shlex.join([f"--{k}", str(v)]) for k, v in settings(args).items()]
    return " ".join(["python reproduce/benchmarks/patch_overhead.py", *given, *rest])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All flags that are not paths."""
    return {k: v for k, v in vars(args).items() if k not in (*CHECKOUTS, "out", "worker")}


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes JSON and Markdown."""
    result = {"settings": settings(args), "rows": rows, "versions": versions(args.device), "command": command(args)}
    atomic_write(args.out, json.dumps(result, indent=1) + "\n")
    shown = ", ".join(f"{k} {v}" for k, v in settings(args).items() if k not in ("rows", "warmup"))
    title = "# The hook in patched scripts: weights only, nothing scored\n\n"
    about = f"Median seconds of an iteration, both scripts taking turns; aim: a ratio of at most {AIM}. {KEPT} {shown}."
    atomic_write(args.out.with_suffix(".md"), title + textwrap.fill(about, 118) + "\n\n" + table(rows) + "\n")


def main() -> None:
    """Measures every script whose checkout is given; prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in CHECKOUTS:
        parser.add_argument(f"--{name}", type=Path, help=f"checkout that the patch {name} is for")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure")
    parser.add_argument("--iterations", type=int, default=20, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before them, including start-up")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--width", type=int, default=128, choices=(32, 64, 128, 256))
    parser.add_argument("--batch_real", type=int, default=64)
    parser.add_argument("--batch_train", type=int, default=256, help="real images per step of an expert")
    parser.add_argument("--syn_steps", type=int, default=5)
    parser.add_argument("--per_class", type=int, default=128, help="real images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "patch_overhead.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    RandomImages.per_class = args.per_class
    if args.worker:
        name, checkout, folder, arm = args.worker
        worker(name, checkout, folder, arm == "patched", args)
        return
    wanted = [name for name in args.rows.split(",") if getattr(args, ROWS[name].patch) is not None]
    if not wanted:
        parser.error("pass at least one checkout: --dm, --mtt, --datm or --idm")
    rows = []
    for name in wanted:
        rows.append(measure(name, args))
        print(table(rows).splitlines()[-1], flush=True)
        write(rows, args)  # write after each row, so that a stopped run keeps its rows


if __name__ == "__main__":
    main()
