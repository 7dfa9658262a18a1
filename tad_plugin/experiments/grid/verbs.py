"""The verbs ``tad-plugin reproduce`` and ``tad-plugin report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tad_plugin.errors import FileFormatError, explain
from tad_plugin.experiments.grid.report import finished_tasks, is_grid, write_report
from tad_plugin.experiments.grid.runner import prepare_grid, run_grid
from tad_plugin.experiments.grid.spec import SIZES, read_grid
from tad_plugin.experiments.launch import Failure
from tad_plugin.experiments.report.page import html_page
from tad_plugin.experiments.report.pictures import draw_comparison, run_links
from tad_plugin.experiments.report.tables import markdown_table, summarise
from tad_plugin.utils.files import atomic_write, read_json
from tad_plugin.utils.write_errors import check_path

__all__ = ["ABOUT", "add_report_arguments", "add_reproduce_arguments", "report", "reproduce"]

ABOUT = {
    "reproduce": "Run a whole ablation from a grid file, such as reproduce/tad_cifar10.yaml, and write its report.",
    "report": "Write the report of a grid, or the table and page of a comparison, from its results.",
}


def add_reproduce_arguments(parser: Any) -> None:
    """Adds the flags of ``reproduce``."""
    parser.add_argument("grid", type=str, help="YAML file of the grid")
    parser.add_argument("--size", type=str, default="smoke", help=f"one of {', '.join(SIZES)}")
    parser.add_argument("--out", type=str, default="", help="folder for runs and report (runs/GRID-SIZE)")
    parser.add_argument("--images", type=str, default="", help="image folder or zip for {images} in the grid")
    parser.add_argument("--root", type=str, default="", help="folder of downloaded datasets")
    parser.add_argument("--device", type=str, default="", help="auto, cpu or cuda")
    parser.add_argument("--checkouts", type=str, default="", help="checkouts of public code: dm=PATH,mtt=PATH")
    parser.add_argument("--jobs", type=int | None, default=None, help="runs side by side")
    parser.add_argument("--launcher", type=str, default="local", help='"local", or "ray" for a cluster')
    parser.add_argument("--dry_run", type=bool, default=False, help="check everything, show the runs, and stop")
    parser.add_argument("--overwrite", type=bool, default=False, help="start over")


def add_report_arguments(parser: Any) -> None:
    """Adds the flags of ``report``."""
    parser.add_argument("folder", type=str, help="--out of reproduce or compare")
    parser.add_argument("--out", type=str, default="", help="folder for the report; by default that of the runs")


def reproduce(values: Any) -> int:
    """Runs ``tad-plugin reproduce``. Returns the exit status: 1 if some runs failed."""
    images = "" if not values.images else values.images.removeprefix("folder:")
    grid = read_grid(values.grid, values.size, images)
    out = values.out or f"runs/{grid.name}-{grid.size}"
    check_path(out, "--out")
    given = {name: getattr(values, name) for name in ("root", "device") if getattr(values, name)}
    prepared = prepare_grid(grid, out, given=given, checkouts=values.checkouts)
    print(prepared.describe())
    if values.dry_run:
        return 0
    failures: list[Failure] = []
    options = {"jobs": values.jobs, "launcher": values.launcher, "overwrite": values.overwrite}
    results = run_grid(prepared, **options, failures=failures)
    for failure in failures:
        print(f"tad-plugin: failed: {failure}", file=sys.stderr)
    if results:
        for path in write_report(out):
            print(path)
    if failures:
        do = "the same command tries them again"
        print(f"tad-plugin: {len(failures)} runs failed; tracebacks in {out}/failures.txt; {do}", file=sys.stderr)
    return 1 if failures else 0


def report(values: Any) -> None:
    """Runs ``tad-plugin report``."""
    folder = Path(values.folder)
    if is_grid(folder):
        for path in write_report(folder, values.out):
            print(path)
        return
    source = folder / "results.json"
    if not source.is_file() or not isinstance(results := read_json(source), list):
        do = "Pass the --out of tad-plugin reproduce or compare"
        raise FileFormatError(explain(f"the folder of a grid or a comparison in {folder}", "another", do))
    out = Path(values.out) if values.out else folder
    out.mkdir(parents=True, exist_ok=True)
    tasks = finished_tasks(folder)
    drawn = draw_comparison(results, tasks, out) if tasks else {}
    atomic_write(out / "table.md", markdown_table(summarise(results)) + "\n")
    atomic_write(out / "index.html", html_page(results, drawn, runs=run_links(tasks, out)))
    print(out / "table.md")
    print(out / "index.html")
