"""Random command lines: each ends in a result or in a named error, within five seconds, and prints no NaN.

    python -m tests.fuzz_command_line --calls 1000              # a few minutes
    python -m tests.fuzz_command_line --calls 1 --first 4711    # one line again, with what it prints

Line number i draws everything from a generator seeded with i: a command that is right, and then changes, mostly one or
two. Flags come from the parser itself, so that new ones are tried too. They run in this process; ``--processes N`` runs
every N-th also as a program of its own, which must end with the same status.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tad_plugin.cli import _parser, main
from tad_plugin.experiments.parser import _verbs
from tests import fuzz
from tests.warm import start_program

TINY = "--dataset digits --per_class 12 --width 4 --device cpu"
SHORT = "--eval_epochs 1 --eval_runs 1 --candidates 1 --iterations 1 --noise symmetric:0.4"
SCORER = '{"scorer":{"epochs":1,"width":4,"batch_size":64}}'
SEGMENTS = '--loop.experts {"experts":1,"batch_train":64} --loop.max_start_epoch 1 --loop.expert_epochs 1'

#: right commands; @out is a new folder, @run a finished run with influences
RIGHT = (
    f"distill {TINY} {SHORT} --ipc 1 --arm noisy --out @out",
    f"distill {TINY} {SHORT} --ipc 1 --arm tad --methods {SCORER} --out @out",
    f"distill {TINY} {SHORT} --ipc 1 --baseline dc --loop.outer 1 --loop.inner 1 --arm clean --out @out",
    f"distill {TINY} {SHORT} --ipc 1 --baseline idm --loop.start_networks 1 --loop.train_steps 1 --out @out",
    f"distill {TINY} {SHORT} --ipc 1 --baseline mtt {SEGMENTS} --loop.syn_steps 1 --arm noisy --out @out",
    f"distill {TINY} {SHORT} --ipc 1 --arm iwd --shared @out/shared --out @out/run",
    f"experts {TINY} --experts 1 --epochs 1 --arm noisy --out @out",
    f"compare {TINY} {SHORT} --ipc 1 --arms noisy,random --seeds 1 --pictures false --out @out",
    f"evaluate @run/synthetic.safetensors {TINY.replace('--per_class 12 ', '')} --eval_epochs 1 --eval_runs 1",
    "influence @run --top 1 --out @out",
    "export @run --to @out --format npz",
    "report @run --out @out",
    "reproduce digits --size small --dry_run true --out @out",
    "methods",
    "patch status dm @run",
    "patch apply dm @out --dry_run",
    "run --upstream @run -- main.py",
)

WORDS = (
    "", " ", "nothing", "NoNe", "none", "null", "true", "false", "-", "--", "a,b", ",", "é☃", "x" * 300, "../..",
    "/dev/null", "~", "/", "a\nb", "%s", "{}", "[]", "[1", "{a: 1}", '{"a": {"b": 1}}', '{"tad": 3}', "folder:",
    "folder:/nowhere", "human:worse", "symmetric:nan", "symmetric:2", "symmetric:0.4@seed=x", "instance:0.3",
    "tad+tad", "tad+", "+", "iwd+tad", "mtt", "cuda:7", "batch", "mlp,convnet", "convnet,", "3,3", "0", "1,-1",
    "oracle", "loss-prune", "random", "ray",
)  # fmt: skip
NUMBERS = (
    "-1", "0.5", "1", "2", "7", "1e-9", "-0.0", "nan", "inf", "-inf", "1e308", "1e400", "0x10", "1_0",
    "12345678901234567890", "2147483648", "-9223372036854775809", "4e4", "1e38", "1.0",
)  # fmt: skip
#: settings of which large values, or 0 for a preset, are right and take long
LONG = {
    "iterations",
    "epochs",
    "eval_epochs",
    "eval_runs",
    "experts",
    "pilots",
    "pilot_epochs",
    "width",
    "jobs",
    "size",
}
FEW = ("-1", "0.5", "1", "2", "nan", "inf", "1e308", "-7", "1.0", "12345678901234567890123")
LOOP = (
    "batch_real",
    "augment",
    "norm",
    "init",
    "preset",
    "lr_lr",
    "momentum",
    "outer",
    "threshold",
    "nothing",
    "buffer",
)


class Line:
    """One command line, drawn from a seed."""

    def __init__(self, seed: int, place: Path, run: Path, verbs: dict[str, list[str]]) -> None:
        self.random = random.Random(seed)
        self.out, self.place, self.verbs = place / f"out{seed}", place, verbs
        text = self.random.choice(RIGHT).replace("@out", str(self.out)).replace("@run", str(run))
        self.words = text.split(" ")
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 2, 4))):
            self.change()

    def value(self, flag: str) -> str:
        """Any value; with a bias to the kind that fits."""
        name = flag.lstrip("-").rsplit(".", 1)[-1]
        draw = self.random.random()
        if name in LONG:
            return self.random.choice(FEW if draw < 0.7 else WORDS)
        if draw < 0.1:
            return str(self.place / self.random.choice(("file", "folder", "nowhere/deep", "link")))
        return self.random.choice(NUMBERS if draw < 0.5 else WORDS)

    def change(self) -> None:
        """One change of the line."""
        self.random.choice(
            (self.other_value,) * 4 + (self.new_flag,) * 4 + (self.file, self.drop, self.twist, self.loop)
        )()

    def other_value(self) -> None:
        places = [i for i, word in enumerate(self.words[:-1]) if word.startswith("--")]
        if places:
            i = self.random.choice(places)
            self.words[i + 1] = self.value(self.words[i])

    def new_flag(self) -> None:
        flags = self.verbs.get(self.words[0]) or ["--nothing"]
        flag = self.random.choice(
            flags if self.random.random() < 0.9 else [f for known in self.verbs.values() for f in known]
        )
        value = [self.value(flag)] if self.random.random() < 0.9 else []
        self.words += [f"{flag}={value[0]}"] if value and self.random.random() < 0.3 else [flag, *value]

    def loop(self) -> None:
        name = self.random.choice(LOOP)
        self.words += [f"--loop.{name}", self.value(name)]

    def file(self) -> None:
        keys = [flag.lstrip("-") for flag in self.verbs.get(self.words[0], [])] + ["nothing", "loop", "methods"]
        drawn = {key: self.random.choice((self.value(key), 1, 0.5, None, True, [1], {"a": 1}, {}))
                 for key in self.random.sample(keys, min(2, len(keys)))}  # fmt: skip
        drawn = {k: v for k, v in drawn.items() if k not in LONG or v not in (None, True)}
        text = self.random.choice((json.dumps(drawn), json.dumps(drawn), "a: [", "\0", "- 1", "", "&a [*a]", "é: \t"))
        path = self.place / f"{self.out.name}.yaml"
        path.write_text(text)
        self.words += ["--config", str(path)]

    def drop(self) -> None:
        if len(self.words) > 1:
            del self.words[self.random.randrange(1, len(self.words))]

    def twist(self) -> None:
        i = self.random.randrange(len(self.words))
        word = self.words[i] or "x"
        j = self.random.randrange(len(word))
        self.words[i] = self.random.choice((word[:j] + word[j + 1 :], word[:j] + word[j] + word[j:], word.upper()))


class Fuzzer:
    """Runs command lines in a folder of its own.

    Args:
        place: an empty folder.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.run = place, place / "run"
        (place / "folder").mkdir()
        (place / "file").write_text("no file of ours\n")
        (place / "link").symlink_to(place / "nowhere")
        self.verbs = {
            verb: [flag for action in parser._actions for flag in action.option_strings if flag != "--print_config"]
            for verb, parser in _verbs(_parser()).items()
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            settings = '{"iwd":{"every":1,"early":0,"warmup":0,"held_out":2}}'
            words = f"distill {TINY} {SHORT} --ipc 1 --arm iwd --methods {settings} --out {self.run}".split()
            assert main(words) == 0

    def line(self, seed: int) -> list[str]:
        return Line(seed, self.place, self.run, self.verbs).words

    def one(self, seed: int) -> tuple[str, str]:
        """("0", "2", ... or what went wrong, details) of a line that runs in this process."""
        words = self.line(seed)
        printed, told = io.StringIO(), io.StringIO()
        before = os.getcwd(), torch.get_num_threads(), dict(os.environ)
        os.chdir(self.place / "folder")
        try:
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(told),
                warnings.catch_warnings(),
                fuzz.in_time(fuzz.SECONDS),
            ):
                warnings.simplefilter("ignore")
                status: Any = main(words)
        except SystemExit as error:
            status = error.code
        except fuzz.Late:
            return f"over {fuzz.SECONDS:g} s", repr(words)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            details = f"{words!r}\n    {type(error).__name__}: {str(error)[:300]} at {place.filename}:{place.lineno}"
            return f"raw {type(error).__name__}", details
        finally:
            os.chdir(before[0])
            torch.set_num_threads(before[1])
            os.environ.clear()
            os.environ.update(before[2])
        return self.judged(words, status, printed.getvalue(), told.getvalue())

    @staticmethod
    def judged(words: list[str], status: Any, printed: str, told: str) -> tuple[str, str]:
        details = f"{words!r}\n    {told[-600:]}"
        allowed = (0, 2, *((1,) if words[0] == "compare" else ()), *(range(3, 8) if words[0] == "patch" else ()))
        if status not in allowed:
            return f"status {status}", details
        if "Traceback" in printed + told:
            return "a traceback", details
        if re.search(r"seed \d+: \w+(Error|Exception|Interrupt): ", told):
            return "a raw error of a run", details
        if status == 0 and re.search(r"\bnan\b", printed, re.IGNORECASE):
            return "NaN printed", f"{words!r}\n{printed[-600:]}"
        if status == 2 and not told.strip():
            return "no message", details
        return str(status), details

    def program(self, seed: int) -> int:
        """The status of the line as a program of its own."""
        process = start_program("tad_plugin.cli", *self.line(seed), output=self.place / "output")
        return process.wait()


def run(calls: int, first: int = 0, processes: int = 0, show: bool = False) -> tuple[Counter[str], list[str]]:
    """Runs ``calls`` lines; returns how many ended in which way, and what was wrong."""
    counts, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for seed in range(first, first + calls):
            outcome, details = fuzzer.one(seed)
            counts[outcome] += 1
            if outcome not in tuple(map(str, range(8))):
                wrong.append(f"{seed} {outcome}: {details}")
                print(wrong[-1], file=sys.stderr, flush=True)
            elif show:
                print(outcome, details)
            if processes and seed % processes == 0 and outcome.isdigit():
                other = Fuzzer.program(fuzzer, seed)  # a finished run is told again, so the status is the same
                if str(other) != outcome:
                    wrong.append(f"{seed} status {other} as a program: {details}")
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=100)
    values = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    counts, wrong = run(values.calls, values.first, values.processes, show=values.calls == 1)
    print(f"{values.calls} lines in {math.ceil(time.perf_counter() - began)} s: {dict(counts)}, {len(wrong)} wrong")
    sys.exit(bool(wrong))
