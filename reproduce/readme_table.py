"""Writes the table of results in README.md from the files in reproduce/results. Takes a second.

python reproduce/readme_table.py            # rewrites the part between the marks in README.md
python reproduce/readme_table.py --check    # only says whether it is up to date (exit status 1 if not)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from tad_plugin.experiments.report.marks import leaders
from tad_plugin.experiments.report.tables import Row, summarise
from tad_plugin.utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "digits-symmetric-0.4", "cifar10-1k-symmetric-0.4", "cifar10-1k-human-worse", "baselines-cifar10",
    "trajectories-cifar10",
)  # fmt: skip
ARMS = {
    "noisy": "noisy", "tad": "TAD", "iwd": "IWD", "loss-prune": "loss-prune †",
    "clean-then-distil": "clean-then-distil", "oracle": "oracle \\*", "clean": "clean \\*",
}  # fmt: skip
PART = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)


def line(rows: list[Row]) -> str:
    """One line of the table: the rows of one setting."""
    first = rows[0]
    means = {row.arm: row.last.mean for row in rows if row.last is not None}
    cells = [f"{means[arm]:.1f}" if arm in means else "-" for arm in ARMS]
    known = [row for row in rows if row.last is not None and row.arm in ARMS]
    best = leaders([(row.arm, row.arm, row.last.mean, row.last.std, row.seeds) for row in known if row.last])
    cells = [f"**{cell}**" if arm in best else cell for arm, cell in zip(ARMS, cells, strict=True)]
    data = "CIFAR-10" if "cifar10" in first.dataset else first.dataset
    seeds = max(row.seeds for row in rows)
    return f"| {data}, {first.noise}, {first.baseline.upper()} | {first.ipc} | {seeds} | {' | '.join(cells)} |"


def table(folder: Path = ROOT / "reproduce" / "results") -> str:
    """The whole table in Markdown."""
    settings: dict[tuple[object, ...], list[Row]] = {}
    for name in FILES:
        for row in summarise(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))):
            settings.setdefault((name, *row.group, row.ipc), []).append(row)
    head = f"| data, label noise, loop | IPC | seeds | {' | '.join(ARMS.values())} |"
    return "\n".join([head, "|---|" + "--:|" * (2 + len(ARMS)), *(line(rows) for rows in settings.values())]) + "\n"


def main() -> int:
    """Rewrites or checks README.md. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = PART.sub(lambda _: table(), old)
    if parser.parse_args().check:
        print("up to date" if new == old else "README.md has another table; run reproduce/readme_table.py")
        return int(new != old)
    atomic_write(readme, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
