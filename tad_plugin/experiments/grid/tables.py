"""Tables of a grid in Markdown: one for each setting, ways side by side, published figures apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tad_plugin.experiments.grid.statistics import Gain, GridRow
from tad_plugin.experiments.report.marks import leaders, marked
from tad_plugin.experiments.report.tables import Line, Table, markdown_text

__all__ = [
    "COLUMNS",
    "grid_markdown",
    "grid_tables",
    "plain_markdown",
    "published_table",
    "ways_table",
]

_LEFT = ("arm", "gain", "over random")


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def _accuracy(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.1f} ± {spread:.1f}"


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    if gain.low is None or gain.high is None:
        return f"{gain.mean:+.1f}"
    p = "" if gain.p is None else f", p {gain.p:.2g}"
    return f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]{p}"


COLUMNS: dict[str, Callable[[GridRow], str]] = {
    "IPC": lambda row: str(row.key.ipc),
    "arm": lambda row: marked(row.arm),
    "n": lambda row: str(len(row.last)),
    "last": lambda row: _accuracy(row.last),
    "best": lambda row: _accuracy(row.best),
    "gain": lambda row: _gain(row.gain),
    "over random": lambda row: _gain(row.over_random),
    "recovered": lambda row: _number(row.recovered, "{:.0f}%"),
    "s/iter": lambda row: _number(row.seconds_per_iteration, "{:.3g}"),
    "scoring s": lambda row: _number(row.scoring_seconds),
    "memory": lambda row: _number(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, "{:.0f} MiB"),
    "precision": lambda row: _number(row.precision, "{:.2f}"),
    "recall": lambda row: _number(row.recall, "{:.2f}"),
    "AUC": lambda row: _number(row.auc, "{:.2f}"),
}
"""Name of a column -> its text in a row."""


def grid_tables(rows: Sequence[GridRow]) -> list[Table]:
    """One table for each cell, way, baseline, dataset and noise; columns without any figure are left out."""
    groups: dict[tuple[str, ...], list[GridRow]] = {}
    for row in rows:
        key = row.key
        groups.setdefault((key.cell, key.way, key.baseline, key.dataset, key.noise), []).append(row)
    return [_table(group, sorted(members, key=lambda r: r.key.ipc)) for group, members in groups.items()]


def _table(group: tuple[str, ...], members: Sequence[GridRow]) -> Table:
    cell, way, baseline, dataset, noise = group
    texts = [{name: show(row) for name, show in COLUMNS.items()} for row in members]
    kept = [name for name in COLUMNS if any(text[name] != "-" for text in texts)]
    leaders = _leaders(members)
    lines = tuple(
        Line(
            cells=tuple(text[name] for name in kept),
            first=place == 0 or row.key.ipc != members[place - 1].key.ipc,
            best=row in leaders,
        )
        for place, (row, text) in enumerate(zip(members, texts, strict=True))
    )
    noise = "no label noise" if noise == "none" else f"label noise {noise}"
    return Table(f"{cell}: {baseline.upper()} ({way}), {dataset}, {noise}", tuple(kept), lines)


def grid_markdown(rows: Sequence[GridRow]) -> str:
    """The tables in Markdown. The best mean of an IPC, and all within its standard error, are bold."""
    blocks = []
    for table in grid_tables(rows):
        bold = table.header.index("last") if "last" in table.header else -1
        lines = [f"**{markdown_text(table.title)}**", "", "| " + " | ".join(table.header) + " |"]
        lines += ["| " + " | ".join(":--" if name in _LEFT else "--:" for name in table.header) + " |"]
        for line in table.lines:
            cells = [markdown_text(cell) for cell in line.cells]
            if line.best and bold >= 0:
                cells[bold] = f"**{cells[bold]}**"
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "No results."


def _leaders(rows: Sequence[GridRow]) -> list[GridRow]:
    """The best arm of each IPC among those that do not know the true labels, and all within its standard error."""
    found: list[GridRow] = []
    for ipc in {row.key.ipc for row in rows}:
        of_ipc = [row for row in rows if row.key.ipc == ipc and row.last]
        found += leaders([(row, row.arm, row.mean, row.std, len(row.last)) for row in of_ipc])
    return found


def ways_table(rows: Sequence[GridRow]) -> list[list[str]]:
    """Header and lines of a table with the ways bundled, upstream and patched in columns; empty without scripts."""
    ways = [way for way in ("bundled", "upstream", "patched") if any(row.key.way == way for row in rows)]
    if ways in ([], ["bundled"]):
        return []
    table: dict[tuple[str, str, int, str], dict[str, GridRow]] = {}
    for row in rows:
        noise = row.key.noise if row.arm != "clean" else "none"
        table.setdefault((row.key.baseline, noise, row.key.ipc, row.arm), {})[row.key.way] = row
    lines = [["baseline", "noise", "IPC", "arm", *ways]]
    for (baseline, noise, ipc, arm), found in table.items():
        if set(found) != {"bundled"}:
            shown = [_accuracy(found[way].last) if way in found else "-" for way in ways]
            lines.append([baseline, noise, str(ipc), arm, *shown])
    return lines


def published_table(published: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and lines of figures of papers, each with source and setting; empty without any."""
    names = ("baseline", "dataset", "noise", "ipc", "arm", "source", "setting")
    lines = [[f"{float(row['accuracy']):.1f}", *(str(row.get(name) or "") for name in names)] for row in published]
    return [["published", *names], *lines] if lines else []


def plain_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table without marks in Markdown; the first of ``lines`` is its header."""
    if not lines:
        return ""
    shown = [lines[0], ["--"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in shown)
