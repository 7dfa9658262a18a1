"""The report of a grid: Markdown, and one self-contained HTML page with pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tad_plugin.errors import FileFormatError, explain
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.grid.curves import plot_noise_rates
from tad_plugin.experiments.grid.runner import GRID_FILE
from tad_plugin.experiments.grid.statistics import GridRow, grid_rows
from tad_plugin.experiments.grid.tables import (
    grid_markdown,
    grid_tables,
    plain_markdown,
    published_table,
    ways_table,
)
from tad_plugin.experiments.launch import Task
from tad_plugin.experiments.report.marks import MARKED, marks_note
from tad_plugin.experiments.report.page import (
    arm_meanings,
    data_uri,
    distinct,
    glossary,
    least_width,
    render,
    versions_line,
)
from tad_plugin.experiments.report.pictures import draw_comparison
from tad_plugin.utils.files import atomic_write, read_json, read_yaml
from tad_plugin.utils.write_errors import writing_to

__all__ = ["finished_tasks", "is_grid", "write_report"]


def is_grid(folder: str | Path) -> bool:
    """True if ``folder`` was made by ``tad-plugin reproduce``."""
    return (Path(folder) / GRID_FILE).is_file()


def write_report(folder: str | Path, out: str | Path = "") -> list[Path]:
    """Writes ``report.md`` and ``report.html`` from the results of a grid.

    Args:
        folder: folder of the grid.
        out: folder for the report; that of the grid by default.

    Returns:
        The files.

    Raises:
        FileFormatError: no grid, or one without results.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    folder = Path(folder)
    out = Path(out) if out else folder
    if not is_grid(folder) or not (folder / "results.json").is_file():
        do = "Pass the --out of tad-plugin reproduce after a run has finished"
        raise FileFormatError(explain(f"{GRID_FILE} and results.json in {folder}", "no such files", do))
    grid, results = read_json(folder / GRID_FILE)["grid"], read_json(folder / "results.json")
    if not results:
        raise FileFormatError(
            explain(f"results in {folder}", "none", "Run tad-plugin reproduce until a run has finished")
        )
    rows = grid_rows(results)
    with writing_to(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = _pictures(folder, out / "pictures", results, rows)
    title = f"{grid['name']}, size {grid['size']}"
    sections = [
        ("Results", grid_markdown(rows)),
        ("The public scripts beside the bundled loops", plain_markdown(ways_table(rows))),
        (
            "Published figures, whose settings differ from those above",
            plain_markdown(published_table(grid["published"])),
        ),
    ]
    sections = [(name, text) for name, text in sections if text]
    markdown, page = out / "report.md", out / "report.html"
    atomic_write(markdown, _markdown(title, grid, sections, rows, results, pictures, out))
    atomic_write(page, _page(title, grid, rows, results, pictures))
    return [markdown, page]


def _markdown(
    title: str,
    grid: Mapping[str, Any],
    sections: Sequence[tuple[str, str]],
    rows: Sequence[GridRow],
    results: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
    out: Path,
) -> str:
    lines = [f"# {title}", "", str(grid["question"]), ""]
    for name, text in sections:
        lines += [f"## {name}", "", text, ""]
    lines += [
        _note(rows),
        "",
        "## Columns",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in _glossary(rows).items()),
        "",
    ]
    lines += [f"![{caption}]({path.relative_to(out).as_posix()})" for caption, path in pictures.items()]
    lines += ["", "## How it was made", "", *(f"    {c}" for c in _commands(results)), ""]
    lines += [f"- {line}" for line in _versions(results)]
    return "\n".join(lines) + "\n"


def _page(
    title: str,
    grid: Mapping[str, Any],
    rows: Sequence[GridRow],
    results: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
) -> str:
    return render(
        "grid.html.j2",
        title=title,
        question=grid["question"],
        note=_note(rows),
        tables=grid_tables(rows),
        ways=ways_table(rows),
        published=grid["published"],
        glossary=_glossary(rows),
        arms=arm_meanings(row.arm for row in rows),
        pictures=[(caption, data_uri(path), least_width(path)) for caption, path in pictures.items()],
        commands=_commands(results),
        versions=_versions(results),
    )


def _glossary(rows: Sequence[GridRow]) -> dict[str, str]:
    return glossary(grid_tables(rows))


def _note(rows: Sequence[GridRow]) -> str:
    return f"{marks_note(row.arm for row in rows)} {MARKED}".strip()


def _commands(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return distinct(str(r["command"]) for r in results if r.get("command"))


def _versions(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return distinct(versions_line(r["versions"]) for r in results if r.get("versions"))


def _pictures(
    folder: Path, place: Path, results: Sequence[Mapping[str, Any]], rows: Sequence[GridRow]
) -> dict[str, Path]:
    """Accuracy against the noise rate, and the pictures of each cell's bundled runs. Caption -> file."""
    found: dict[str, Path] = {}
    for cell in dict.fromkeys(str(r["cell"]) for r in results):
        own = [row for row in rows if row.key.cell == cell]
        rates = place / f"{cell}-noise.svg"
        if plot_noise_rates(own, rates):
            found[f"{cell}: accuracy against the rate of wrong labels"] = rates
        bundled = [dict(r) for r in results if r["cell"] == cell and r["way"] == "bundled"]
        if len({str(r["noise"].get("text")) for r in bundled}) == 1:
            tasks = finished_tasks(folder / "runs" / cell / "bundled")
            found |= {f"{cell}: {name}": path for name, path in draw_comparison(bundled, tasks, place / cell).items()}
    return found


def finished_tasks(folder: Path) -> list[Task]:
    """The finished bundled runs below a folder, from their configurations."""
    fields = {f.name for f in dataclasses.fields(RunConfig)}
    tasks = []
    for path in sorted(folder.rglob("config.yaml")):
        if all((path.parent / name).exists() for name in ("results.json", "synthetic.safetensors")):
            said = read_yaml(path)
            config = RunConfig(**{key: value for key, value in said.items() if key in fields})
            tasks.append(Task(str(said["arm"]), config, path.parent))
    return tasks
