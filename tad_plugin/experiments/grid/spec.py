"""A grid: one question, as a YAML file that names its runs at three sizes.

    question: Does TAD win back what label noise costs?
    sizes:
      smoke:
        settings: {dataset: digits}      # any fields of RunConfig
        noise: ["symmetric:0.4"]
        ipc: [1, 10]
        seeds: [0, 1, 2]
        arms: [clean, noisy, tad]
        cells:
          dm: {}                         # may say again any of the above; its settings are added
          mtt: {ipc: [1], settings: {baseline: mtt, iterations: 50}}
          public: {ways: [upstream, patched], checkout: dm, steps: ["main_DM.py --ipc {ipc}"]}
    published:
      - {baseline: dm, dataset: cifar10, noise: none, ipc: 10, arm: clean, accuracy: 48.9, source: "..."}

The ways of a cell: ``bundled`` runs the loop of this package; ``upstream`` runs the public scripts unmodified;
``patched`` runs them with the hook. reproduce/README.md has the whole format.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tad_plugin.errors import ConfigError, explain, unknown_name
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.grid.conventions import resolve_noise
from tad_plugin.utils.files import read_yaml

__all__ = ["SIZES", "WAYS", "Cell", "Grid", "Published", "read_grid"]

SIZES = ("smoke", "single-gpu", "full")
"""Minutes on two cores; an hour on one GPU; the published settings."""
WAYS = ("bundled", "upstream", "patched")

_SHARED_KEYS = {"settings", "noise", "ipc", "seeds", "arms", "ways", "minutes"}
_CELL_KEYS = _SHARED_KEYS | {"checkout", "steps", "tad_config"}
_RUN_FIELDS = {f.name for f in dataclasses.fields(RunConfig)} - {"ipc", "seed", "noise"}


@dataclass(frozen=True)
class Cell:
    """Runs that differ in way, noise, IPC, seed and arm only.

    Attributes:
        name: as in the file; the name of its folder.
        ways: of ``WAYS``.
        settings: fields of RunConfig, without ipc, seed and noise.
        noise: noise specifications.
        ipc: images per class.
        seeds: the seeds.
        arms: names of arms.
        checkout: name of the public codebase, for the ways "upstream" and "patched".
        steps: command lines of its scripts, run one after another. {ipc}, {seed}, {data} and {folder} are filled in.
        tad_config: settings by method for patched scripts.
        minutes: of one run on two cores, as measured once; None if it was not.
    """

    name: str
    ways: tuple[str, ...]
    settings: Mapping[str, Any]
    noise: tuple[str, ...]
    ipc: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    checkout: str = ""
    steps: tuple[str, ...] = ()
    tad_config: Mapping[str, Any] = field(default_factory=dict)
    minutes: float | None = None

    def config(self, noise: str, ipc: int, seed: int, given: Mapping[str, Any]) -> RunConfig:
        """The settings of one run. ``given`` are those of the command line, which come last."""
        return RunConfig(**{**self.settings, **given, "noise": noise, "ipc": ipc, "seed": seed})


@dataclass(frozen=True)
class Published:
    """A figure of a paper, shown beside measured ones and never mixed with them.

    Attributes:
        baseline, dataset, noise, ipc, arm: as in results.
        accuracy: in percent.
        source: where it is published.
        setting: what differs from our runs, such as the network.
    """

    baseline: str
    dataset: str
    noise: str
    ipc: int
    arm: str
    accuracy: float
    source: str
    setting: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid at one size.

    Attributes:
        name: of its file, without suffix.
        question: in a sentence.
        size: of ``SIZES``.
        cells: its cells.
        published: figures of papers.
    """

    name: str
    question: str
    size: str
    cells: tuple[Cell, ...]
    published: tuple[Published, ...] = ()


def read_grid(path: str | Path, size: str = "smoke", images: str = "") -> Grid:
    """Reads one size of a grid and checks every name in it.

    Args:
        path: the YAML file.
        size: of ``SIZES``; the file need not have all.
        images: image folder, or a zip of one, that takes the place of {images} in the file.

    Raises:
        FileFormatError: the file cannot be read.
        ConfigError, UnknownNameError: an unknown key, size or way, a value of a wrong kind, or {images} without one.
    """
    path = Path(path)
    content = _mapping(read_yaml(path), f"a grid in {path}", {"question", "sizes", "published"})
    sizes = _mapping(content.get("sizes"), f"sizes in {path}", set(SIZES))
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    if size not in sizes:
        do = "Pass one of these to --size, or add it to the file"
        raise ConfigError(explain(f"a size that {path} has ({', '.join(sizes)})", size, do))
    where = f"{path}, size {size}"
    shared = _mapping(_filled(sizes[size], images, where), where, _SHARED_KEYS | {"cells"})
    cells = _mapping(shared.pop("cells", {}), f"cells of {where}", None)
    if not cells:
        raise ConfigError(explain(f"at least one cell in {where}", "none", "Write cells: {dm: {}}"))
    found = tuple(_cell(name, own or {}, shared, f"cell {name!r} of {where}") for name, own in cells.items())
    question = content.get("question", "")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(explain(f"a question in {path}", repr(question), "Write what the grid is to answer"))
    published = tuple(_published(row, path) for row in content.get("published") or ())
    return Grid(path.stem, " ".join(question.split()), size, found, published)


def _cell(name: str, own: Any, shared: Mapping[str, Any], where: str) -> Cell:
    own = _mapping(own, where, _CELL_KEYS)
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise ConfigError(explain("names of cells that a folder can have", repr(name), "Use letters, digits and - _ ."))
    merged = {**shared, **own}
    settings = {**shared.get("settings", {}), **own.get("settings", {})}
    _mapping(settings, f"settings of {where}", _RUN_FIELDS)
    ways = tuple(map(str, _list(merged.get("ways", ["bundled"]), f"ways of {where}")))
    for way in ways:
        if way not in WAYS:
            raise unknown_name("way", way, WAYS)
    scripts = set(ways) - {"bundled"}
    if bool(scripts) != bool(own.get("steps")) or bool(scripts) != bool(own.get("checkout")):
        do = "Write checkout: dm and steps: [...] for the ways upstream and patched, and only there"
        got = f"ways {', '.join(ways)}, checkout {own.get('checkout')!r}, steps {own.get('steps')!r}"
        raise ConfigError(explain(f"a checkout and steps in {where} where public scripts run", got, do))
    for key in ("arms", "ipc", "seeds"):
        if key not in merged:
            raise ConfigError(explain(f"{key} in {where}", "none", f"Write {key} there, or beside cells"))
    minutes = merged.get("minutes")
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise ConfigError(explain(f"minutes above 0 in {where}", repr(minutes), "Write the time of one run"))
    return Cell(
        name,
        ways,
        settings,
        tuple(resolve_noise(str(text)) for text in _list(merged.get("noise", ["none"]), f"noise of {where}")),
        _numbers(merged["ipc"], f"ipc of {where}", 1),
        _numbers(merged["seeds"], f"seeds of {where}", 0),
        tuple(map(str, _list(merged["arms"], f"arms of {where}"))),
        str(own.get("checkout", "")),
        tuple(map(str, own.get("steps", ()))),
        own.get("tad_config", {}),
        None if minutes is None else float(minutes),
    )


def _published(row: Any, path: Path) -> Published:
    fields = {f.name for f in dataclasses.fields(Published)}
    row = _mapping(row, f"published figures in {path}", fields)
    missing = fields - {"setting"} - set(row)
    if missing or not isinstance(row["accuracy"], int | float):
        got = f"one without {', '.join(sorted(missing))}" if missing else repr(row["accuracy"])
        raise ConfigError(explain(f"published figures in {path} with accuracy and source", got, "Complete the row"))
    return Published(**row)


def _filled(value: Any, images: str, where: str) -> Any:
    """``value`` with {images} replaced in all its texts."""
    if isinstance(value, Mapping):
        return {key: _filled(v, images, where) for key, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, images, where) for v in value]
    if isinstance(value, str) and "{images}" in value:
        if not images:
            raise ConfigError(
                explain(f"images for {where}", "none", "Pass --images with an image folder or a zip of it")
            )
        return value.replace("{images}", images)
    return value


def _mapping(value: Any, where: str, known: Iterable[str] | None) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(explain(f"{where} as a mapping of names", type(value).__name__, "See reproduce/README.md"))
    for key in value:
        if known is not None and key not in known:
            raise unknown_name(f"key of {where}", key, sorted(known))
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found or len({str(v) for v in found}) != len(found):
        raise ConfigError(explain(f"{where} with at least one value, each once", repr(value), "Correct the file"))
    return found


def _numbers(value: Any, where: str, least: int) -> tuple[int, ...]:
    found = _list(value, where)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in found):
        raise ConfigError(explain(f"{where} as whole numbers of at least {least}", repr(value), "Correct the file"))
    return tuple(found)
