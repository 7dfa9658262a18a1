"""Stops commands at random moments by random signals, and lets the same commands go on to their ends.

    python -m tests.kills --kills 200                # about ten minutes on an idle machine
    python -m tests.kills --kills 5 --only compare   # one command; --seed draws other moments

All loops, the training of experts and comparisons with two workers are stopped. After each signal no process may be
left, and the status must tell which signal it was. In the end every file must be that of a command that was not
stopped: the same bytes, or for JSON the same values but for times, memory and hashes of other files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tad_plugin.utils.files import read_json
from tad_plugin.utils.seals import unsealed_json
from tests.processes import BOUND, members, wait_until
from tests.warm import Process, start_program

RUN = (
    "--dataset digits --per_class 12 --noise symmetric:0.4 --ipc 1 --width 4 --eval_epochs 1 --eval_runs 1 "
    "--candidates 2 --device cpu --checkpoint_seconds 0.0"
)
METHODS = {
    "tad": {"warmup": 1, "history": 2},
    "scorer": {"epochs": 3, "width": 4, "batch_size": 32},
    "iwd": {"every": 2, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2},
}
TRAJECTORIES = (
    "--lr_img 10.0 --iterations 6 --loop.syn_steps 2 --loop.expert_epochs 1 --loop.max_start_epoch 3 "
    '--loop.lr_teacher 0.02 --loop.lr_lr 1e-5 --loop.experts {"experts":2,"batch_train":16,"lr":0.1,"momentum":0.5}'
)


def methods(*names: str) -> str:
    return "--methods " + json.dumps({name: METHODS[name] for name in names}).replace(" ", "")


#: the commands without --out
COMMANDS = {
    "dm": f"distill --arm tad+iwd --iterations 10 --loop.batch_real 8 {methods(*METHODS)}",
    "idm": f"distill --baseline idm --arm tad --iterations 7 --loop.batch_real 8 --loop.max_networks 3 "
    f"--loop.train_steps 2 --loop.batch_train 16 {methods('tad', 'scorer')}",
    "dc": f"distill --baseline dc --arm iwd --iterations 5 --loop.batch_real 8 --loop.outer 3 --loop.inner 2 "
    f"{methods('iwd')}",
    "dsa": "distill --baseline dsa --arm noisy --iterations 6 --loop.batch_real 8 --loop.outer 3 --loop.inner 2",
    "mtt": f"distill --baseline mtt --arm tad+iwd {TRAJECTORIES} {methods('tad', 'iwd')}",
    "datm": f"distill --baseline datm --arm iwd {TRAJECTORIES} --loop.init real --loop.threshold 10.0 --loop.lr_y 0.1 "
    f"--loop.ema_decay 0.9 {methods('iwd')}",
    "experts": f"experts --arm tad --epochs 3 --experts 3 --batch_train 16 --lr 0.1 --jobs 2 {methods('tad')}",
    "compare": f"compare --arms noisy,tad --seeds 1 --iterations 8 --loop.batch_real 8 --jobs 2 --pictures false "
    f"{methods('tad', 'scorer')}",
    "compare mtt": f"compare --baseline mtt --arms noisy,tad --seeds 1 --jobs 2 --pictures false {TRAJECTORIES} "
    f"{methods('tad')}",
}
FOR_EXPERTS = "--dataset digits --per_class 12 --noise symmetric:0.4 --width 4 --device cpu --checkpoint_seconds 0.0"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
#: entries that tell how long something took, how much memory it had, or the hash of a file with such entries
PASSING = re.compile(r"seconds|memory|command|sha256|files")
#: files of every run that are not compared: checkpoints and tables hold times, locks the process
SKIPPED = re.compile(r"(^|/)(checkpoint/.*|table\.(txt|md)|output|\.lock.*)$")


def arguments(name: str, out: Path) -> list[str]:
    """The command line of a name of ``COMMANDS``."""
    given = COMMANDS[name].split()
    return [*given, *(FOR_EXPERTS if given[0] == "experts" else RUN).split(), "--out", str(out)]


def launch(name: str, out: Path, forks: bool) -> Process:
    return start_program("tad_plugin.cli", *arguments(name, out), output=out.parent / "output", forks=forks)


def lasting(value: Any) -> Any:
    """A JSON value without entries that differ from run to run."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if not PASSING.search(k)}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """What is compared, by the path of each file."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if SKIPPED.search(name):
            continue
        if path.suffix == ".json":
            found[name] = json.dumps(lasting(read_json(path)))
        elif path.suffix == ".jsonl":
            found[name] = [json.dumps(lasting(unsealed_json(line))) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


class Kills:
    """Stops commands; ``counts`` and ``wrong`` tell what happened.

    Args:
        folder: for all files.
        seed: of the draws.
        fresh: share of starts whose workers are fresh interpreters, as a user's are, instead of forks.
    """

    def __init__(self, folder: Path, seed: int, fresh: float) -> None:
        self.folder, self.random, self.fresh = folder, random.Random(seed), fresh
        self.whole: dict[str, tuple[dict[str, Any], float]] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0

    def uncut(self, name: str) -> tuple[dict[str, Any], float]:
        """Contents and seconds of the command that is not stopped."""
        if name not in self.whole:
            began, out = monotonic(), self._place(name) / "out"
            process = launch(name, out, forks=True)
            assert process.wait() == 0, (out.parent / "output").read_text()
            self.whole[name] = contents(out), monotonic() - began
        return self.whole[name]

    def _place(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name.replace(" ", "-"), dir=self.folder))

    def stop(self, name: str, kills: int) -> int:
        """Stops a command up to ``kills`` times and lets it end; returns how many signals it got."""
        expected, seconds = self.uncut(name)
        out, done = self._place(name) / "out", 0
        for _ in range(kills):
            number, group = self.random.choice(SIGNALS), self.random.random() < 0.5
            delay = self.random.uniform(0.0, 0.8 * seconds)
            forks = self.random.random() >= self.fresh
            at = f"{name}, {number.name} to the {'group' if group else 'process'} after {delay:.2f} s"
            process = launch(name, out, forks)
            if not forks:  # such workers import for seconds first
                wait_until(lambda: process.poll() is not None or len(list(out.rglob("*.json*"))), 120)  # noqa: B023
            sleep(0.05 + delay)
            if process.poll() is not None:
                self._expect(process.wait() == 0, at, f"status {process.wait()} before the signal", out)
                break
            self._signal(process, number, group)
            began = monotonic()
            while members(process.pid) and monotonic() - began < BOUND:
                sleep(0.01)
            self.slowest = max(self.slowest, monotonic() - began)
            left = members(process.pid)
            self._expect(not left, at, f"{len(left)} processes left", out)
            if left:
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            at_its_end = status == -number != -signal.SIGKILL and (out / "results.json").exists()
            if status == 0 or at_its_end:  # nothing was left to stop but the interpreter
                break
            self._expect(status == STATUS[number], at, f"status {status}", out)
            done += 1
            self.counts[f"{name}: {number.name}"] += 1
        process = launch(name, out, forks=True)
        status = process.wait()
        self._expect(status == 0, name, f"the last start ended with {status}", out)
        found = contents(out)
        for path in sorted(set(expected) | set(found)):
            self._expect(expected.get(path) == found.get(path), name, f"{path} differs or is not in both", out)
        if not any(line.startswith(name) for line in self.wrong):
            shutil.rmtree(out.parent)
        return done

    @staticmethod
    def _signal(process: Process, number: int, group: bool) -> None:
        # A terminal sends Ctrl-C to the whole group. A group that is killed whole has nothing to leave behind.
        if number == signal.SIGINT or group:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)

    def _expect(self, right: bool, at: str, what: str, out: Path) -> None:
        printed = (out.parent / "output").read_text()
        # Python tells of an exception that a destructor or a hook of fork() lost; the package raises it again later.
        lost = r"^Exception ignored in.*\nTraceback.*\n(?:[ \t]*.*\n)*?\S*(?:Terminated|Interrupt).*\n"
        if "Traceback" in re.sub(lost, "", printed, flags=re.MULTILINE) and "Traceback" not in what:
            self.wrong.append(f"{at}: a traceback, see {out.parent}:\n{printed[-2000:]}")
        if not right:
            self.wrong.append(f"{at}: {what}, see {out.parent}")


def run(kills: int, seed: int = 0, only: str = "", fresh: float = 0.0, folder: Path | None = None) -> Kills:
    """Stops commands in turn, up to six times each, until ``kills`` signals were sent."""
    names = [name for name in COMMANDS if only in ("", name)]
    place = Path(tempfile.mkdtemp(prefix="kills", dir=folder))
    found, done, turn = Kills(place, seed, fresh), 0, 0
    while done < kills and not len(found.wrong) > 20:
        done += found.stop(names[turn % len(names)], min(kills - done, found.random.choice((2, 4, 6))))
        turn += 1
        print(f"{done} signals, {turn} commands ended, wrong: {found.wrong[-1:]}", file=sys.stderr, flush=True)
    if not found.wrong:
        shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *COMMANDS])
    parser.add_argument("--fresh", type=float, default=0.05, help="share of starts whose workers are no forks")
    values = parser.parse_args()
    found = run(values.kills, values.seed, values.only, values.fresh)
    for name, count in sorted(found.counts.items()):
        print(f"{name:24}{count:5}")
    for line in dict.fromkeys(found.wrong):
        print(line)
    signals = sum(found.counts.values())
    print(f"{signals} signals, at most {found.slowest:.1f} s until no process was left, {len(found.wrong)} wrong")
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
