"""The HTML page of a comparison: one self-contained file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tad_plugin.errors import InvalidInputError, explain, missing_extra
from tad_plugin.experiments.arms import ARMS
from tad_plugin.experiments.doubts import doubt_lines
from tad_plugin.experiments.report.marks import COLUMNS
from tad_plugin.experiments.report.tables import Table, build_tables, notes, summarise

__all__ = ["arm_meanings", "data_uri", "distinct", "glossary", "html_page", "least_width", "render", "versions_line"]

_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml"}


def html_page(
    results: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, str | Path],
    *,
    title: str = "Dataset distillation on noisy data",
    runs: Mapping[str, str] | None = None,
) -> str:
    """Renders one self-contained HTML page: tables, doubts, embedded pictures, commands and versions.

    The page loads nothing from elsewhere and follows the reader's light or dark mode.

    Args:
        results: dicts as in results.json.
        pictures: caption -> PNG, JPEG or SVG file, in the order of the page.
        title: the page's heading.
        runs: name of a run -> its folder, relative to the page; links at the end.

    Raises:
        InvalidInputError: as in :func:`summarise`; or a picture does not exist or is of another kind.
        MissingExtraError: jinja2 is not installed.
    """
    results = list(results)
    rows = summarise(results)
    tables = build_tables(rows)
    return render(
        "report.html.j2",
        title=title,
        note=notes(rows),
        tables=tables,
        glossary=glossary(tables),
        arms=arm_meanings(row.arm for row in rows),
        runs=dict(runs or {}),
        doubts=doubt_lines(results),
        pictures=[(caption, data_uri(path), least_width(path)) for caption, path in pictures.items()],
        commands=distinct(str(result["command"]) for result in results if result.get("command")),
        versions=distinct(versions_line(result["versions"]) for result in results if result.get("versions")),
    )


def glossary(tables: Iterable[Table]) -> dict[str, str]:
    """Column -> its meaning, for the columns that these tables have."""
    header = {name for table in tables for name in table.header}
    return {name: meaning for name, meaning in COLUMNS.items() if name in header}


def arm_meanings(arms: Iterable[str]) -> dict[str, str]:
    """Arm -> what it is; a registered method without an arm of its own, or one that is not installed, says so."""
    return {arm: ARMS[arm].about if arm in ARMS else "a registered method" for arm in distinct(arms)}


def render(template: str, **values: Any) -> str:
    """Fills in one of the templates of this folder. All texts are escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "reproduce", "the HTML report") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tad_plugin.experiments.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(path: str | Path) -> str:
    """A picture as text that a page can hold. Raises InvalidInputError: no PNG, JPEG or SVG file."""
    path = Path(path)
    if path.suffix.lower() not in _KINDS or not path.is_file():
        got = f"{path}, which is another kind of file" if path.is_file() else f"{path}, which does not exist"
        raise InvalidInputError(explain("a PNG, JPEG or SVG file", got, "Draw the picture first, or leave it out"))
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:image/{_KINDS[path.suffix.lower()]};base64,{content}"


def least_width(path: str | Path) -> float:
    """Width in rem under which a picture scrolls instead of shrinking: three quarters of an SVG's own, at least 22."""
    if Path(path).suffix.lower() != ".svg":
        return 22.0
    found = re.search(r'<svg[^>]* width="([0-9.]+)pt"', Path(path).read_text(encoding="utf-8"))
    return max(22.0, round(float(found[1]) * 4 / 3 / 16 * 0.75, 1)) if found else 22.0


def distinct(lines: Iterable[str]) -> list[str]:
    """The lines without repetitions, in order."""
    return list(dict.fromkeys(lines))


def versions_line(versions: Mapping[str, Any]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
