"""Shared style of all pictures: colours, fonts, and a figure that changes no global state.

An SVG follows the reader's light or dark mode: its greys are variables, which a rule in the file sets for each mode.

Each picture has its own Figure object, so no window is opened and no display is needed. The colours are those of Okabe
and Ito, which colour-blind readers can tell apart. Line styles and markers differ as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tad_plugin.errors import InvalidInputError, explain, missing_extra
from tad_plugin.utils.files import atomic_save

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "LIGHT",
    "ORANGE",
    "PAPER",
    "PURPLE",
    "TEXT",
    "VERMILLION",
    "legend_above",
    "picture",
]

BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#A8518A"
GREY, LIGHT = "#5F6871", "#C9D0D7"
TEXT, GRID, PAPER = "#1B1F24", "#E6E9EC", "#FFFFFF"
_DARK = {TEXT: "#E4E8EC", GRID: "#2B333C", PAPER: "#14181D", GREY: "#A3AEB9", LIGHT: "#48525D", BLUE: "#4FA9DE"}
"""Colour of a picture -> what it is in dark mode. All others are readable on both."""
SUFFIXES = (".png", ".svg", ".pdf")
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures look the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "text.color": TEXT,  # not black: matplotlib writes no colour for black text, so that nothing could change it
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "savefig.dpi": 150,
    "svg.hashsalt": "tad_plugin",  # the same picture gives the same file
}


@contextmanager
def picture(path: str | Path, *, tight: bool = False) -> Iterator[Any]:
    """Yields a matplotlib Figure to draw on, and writes it to ``path`` (atomically) at the end.

    Args:
        path: picture to write.
        tight: if True, the caller places the axes and the picture is cut to its contents; otherwise matplotlib places
            the axes.

    Raises:
        InvalidInputError: the suffix is not .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "reproduce", "a picture") from error
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInputError(
            explain(f"a picture's path that ends in {', '.join(SUFFIXES)}", str(path), "Rename the picture")
        )
    with rc_context(_STYLE):
        figure = Figure(layout=None if tight else "constrained")
        yield figure
        cut: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08} if tight else {}
        # without the date the same picture gives the same file
        dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())

        def save(temporary: Path) -> None:
            figure.savefig(temporary, metadata=dated, **cut)
            if path.suffix.lower() == ".svg":
                text = temporary.read_text(encoding="utf-8")
                temporary.write_text(_with_dark_mode(text), encoding="utf-8", newline="\n")

        atomic_save(path, save)


def _with_dark_mode(svg: str) -> str:
    """Makes the colours in ``_DARK`` variables, which follow the reader's mode."""
    names = {light.lower(): f"--c{index}" for index, light in enumerate(_DARK)}
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: f"var({names[c]})" if (c := found[0]) in names else c, svg)
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{names[colour.lower()]}:{instead};" for colour, instead in _DARK.items())
    rule = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + rule + svg[start:]


def legend_above(axis: Any, **options: Any) -> None:
    """Adds a one-line legend above the right end of the axes, next to the title, where it covers no data."""
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(axis.get_legend_handles_labels()[1]),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.8,
        **options,
    )
