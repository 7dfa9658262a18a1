"""The HTML page of a comparison: one self-contained file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tad_plugin.errors import InvalidInputError, explain, missing_extra
from tad_plugin.experiments.report.tables import (
    NOTE,
    best_rivals,
    cells,
    groups,
    heading,
    summarise,
)

__all__ = ["html_page"]


def html_page(
    results: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, str | Path],
    *,
    title: str = "Dataset distillation on noisy data",
) -> str:
    """One self-contained HTML page: tables, pictures (embedded), how it was made. Light and dark; it loads nothing.

    Args:
        results: dicts as in results.json.
        pictures: caption -> PNG, JPEG or SVG file, in the order wanted.
        title: the page's heading.

    Raises:
        InvalidInputError: as :func:`summarise`, or a picture does not exist or is of another kind.
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "reproduce", "the HTML report") from error
    results = list(results)
    rows = summarise(results)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tad_plugin.experiments.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    tables = []
    for group, members in groups(rows).items():
        best = best_rivals(members)
        header, *body = cells(members)
        lines = [
            {"cells": line, "best": row in best, "first": position == 0 or row.ipc != members[position - 1].ipc}
            for position, (row, line) in enumerate(zip(members, body, strict=True))
        ]
        tables.append({"title": heading(group), "header": header, "lines": lines})
    return environment.get_template("report.html.j2").render(
        title=title,
        note=NOTE,
        tables=tables,
        pictures=[(caption, _data_uri(path)) for caption, path in pictures.items()],
        commands=_distinct(str(result["command"]) for result in results if result.get("command")),
        versions=_distinct(_versions_line(result["versions"]) for result in results if result.get("versions")),
    )


_KINDS: dict[str, Literal["png", "jpeg", "svg+xml"]] = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml",
}  # fmt: skip


def _data_uri(path: str | Path) -> str:
    import base64

    path = Path(path)
    if path.suffix.lower() not in _KINDS or not path.is_file():
        got = f"{path}, which is another kind of file" if path.is_file() else f"{path}, which does not exist"
        raise InvalidInputError(explain("a PNG, JPEG or SVG file", got, "Draw the picture first, or leave it out"))
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:image/{_KINDS[path.suffix.lower()]};base64,{content}"


def _distinct(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _versions_line(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
