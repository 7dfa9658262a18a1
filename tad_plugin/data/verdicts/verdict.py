"""What a file of verdicts means for the samples of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import label_digest
from tad_plugin.data.noise.named_labels import NamedLabels, plain_path
from tad_plugin.data.origin import ORDERS, Origin
from tad_plugin.data.splits import rank_in_class
from tad_plugin.data.verdicts.table import ACCEPTED, Table, plain_name, read_table
from tad_plugin.errors import ConfigError, FileFormatError, StateMismatchError, explain

__all__ = ["MEANINGS", "Verdict", "read_verdict"]

MEANINGS = ("keep", "drop", "labels", "weights", "quality", "difficulty", "verdict")
"""What a column can mean: samples to keep, or to drop (a mask, or a list of indices); corrected labels; weights; a
score of which high values are good, or bad; words as in suspects.csv."""

_NAMES: dict[str, tuple[str, ...]] = {
    "verdict": ("verdict",),
    "drop": ("is_label_issue", "is_issue", "label_issue", "drop", "remove", "noisy", "is_noisy", "mislabelled"),
    "keep": ("keep", "kept", "mask", "keep_mask", "clean_mask", "trusted", "is_clean", "selected"),
    "labels": ("corrected_label", "corrected_labels", "corrected", "new_label", "new_labels", "label", "labels"),
    "weights": ("weight", "weights", "sample_weight", "importance"),
    "quality": ("label_quality", "label_score", "quality", "self_confidence", "confidence", "trust"),
    "difficulty": ("loss", "el2n", "grand", "forgetting", "forgetting_events", "difficulty"),
}
_GIVEN = ("given_label", "given_labels", "observed_label", "observed_labels", "noisy_label")
_PROPOSED = ("proposed", "proposed_label", "predicted_label")
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "1.0": True, "0.0": False}
_VERDICTS = ("keep", "relabel", "drop", "unsure")


@dataclass(frozen=True, eq=False)
class Verdict:
    """A judgement of N samples.

    Attributes:
        kept: bool [N], the samples that take part.
        target: int64 [N], the labels they are used with.
        weight: float32 [N], >= 0; ones where the file has no weights.
        trust: float32 [N] in [0, 1]: the quality scores of the file, or None.
        meaning: what the deciding column means, one of :data:`MEANINGS`.
    """

    kept: Tensor
    target: Tensor
    weight: Tensor
    trust: Tensor | None
    meaning: str


def read_verdict(
    path: str | Path,
    observed: Tensor,
    num_classes: int,
    origin: Origin | None = None,
    *,
    order: str = "",
    means: str = "",
    column: str = "",
    share: float = 0.0,
) -> Verdict:
    """Reads a file of verdicts for the samples of a run.

    A file names its samples by path, by index, or by its order. Held-out samples and samples that the run leaves out
    may be in it, and are passed over; every sample of the run must be. Columns are known by their names. With
    is_label_issue, cleanlab's other columns decide nothing. The verdict "unsure" leaves a sample out, as "drop" does.

    Args:
        path: see :func:`tad_plugin.data.verdicts.table.read_table`.
        observed: int64 [N], the labels that the run sees.
        num_classes: K.
        origin: names of the samples; by default they are a dataset of their own.
        order: one of :data:`tad_plugin.data.origin.ORDERS`; needed where the file names no samples, and where an index
            could be a place in several of them. An index column without it is a place in the published order.
        means: one of :data:`MEANINGS`; needed where names do not tell it.
        column: the column that decides, where there are several.
        share: of each class that is kept, in (0, 1]; needed for scores.

    Returns:
        The verdict, with tensors on ``observed``'s device.

    Raises:
        FileFormatError: not one of the accepted forms, or ambiguous; the message lists them.
        StateMismatchError: the file is about other data: another number of samples, other labels, a sample missing.
        ConfigError: a setting with an unknown value, or one that is missing.
    """
    for name, value, known in (("order", order, ORDERS), ("verdict_means", means, MEANINGS)):
        if value and value not in known:
            raise ConfigError(explain(f"--{name} out of {', '.join(known)}", repr(value), "Correct it"))
    table, own = read_table(path), observed.cpu()
    origin = Origin.plain(len(own)) if origin is None else origin
    if table.label_hash and len(table) == len(own) and table.label_hash != label_digest(own):
        raise _other(table, "labels with the hash in the file", "others")
    name, meaning = _deciding(table, means, column, len(own), num_classes, origin)
    reader = _Reader(table, own, num_classes, origin)
    values = table.columns[name]
    if meaning in ("keep", "drop") and _is_index_list(table, values, origin, order):
        kept = _listed(table, values, origin, order) == (meaning == "keep")
        found = Verdict(kept, own, torch.ones(len(own)), None, meaning)
    else:
        rows = _rows(table, origin, order)
        reader.check_given(rows, meaning, name)
        found = reader.decide(name, meaning, rows, share)
    return Verdict(
        found.kept.to(observed.device),
        found.target.to(observed.device),
        found.weight.to(observed.device),
        None if found.trust is None else found.trust.to(observed.device),
        meaning,
    )


# which column decides


def _deciding(table: Table, means: str, column: str, n: int, classes: int, origin: Origin) -> tuple[str, str]:
    """(name, meaning) of the column that decides."""
    if column:
        name = plain_name(column)
        if name not in table.columns:
            got = f"{column!r}, and {', '.join(table.columns) or 'no names'} in {table.source}"
            raise ConfigError(explain("--verdict_column with a column of the file", got, "Correct it"))
        meaning = means or next((m for m, names in _NAMES.items() if name in names), "")
        return name, meaning or _ambiguous(table, f"a column {column!r} whose name does not tell")
    if len(table.columns) == 1:
        (name,) = table.columns
        known = next((m for m, names in _NAMES.items() if name in names), "")
        return name, means or known or _meaning_of(table, list(table.columns[name]), classes, origin)
    found = {m: [n for n in names if n in table.columns] for m, names in _NAMES.items()}
    for first in ("verdict", "drop"):  # their companions decide nothing
        if len(found[first]) == 1 and means in ("", first):
            return found[first][0], first
    chosen = [(name, m) for m, names in found.items() for name in names if means in ("", m)]
    if len(chosen) != 1:
        got = "columns " + ", ".join(name for name, _ in chosen) if chosen else f"columns {', '.join(table.columns)}"
        _ambiguous(table, f"{got}, of which {'several' if chosen else 'none'} could decide", "--verdict_column NAME")
    return chosen[0]


def _meaning_of(table: Table, values: list[Any], classes: int, origin: Origin) -> str:
    """What values without a telling name mean, where their kind leaves no doubt."""
    whole = all(type(value) is int for value in values)
    names = set(origin.class_names or ())
    if values and all(isinstance(value, str) and value in names for value in values):
        return "labels"
    lengths = {origin.length(order)[0] for order in ORDERS}
    listed = table.paths is None and table.index is None and len(values) not in lengths
    if whole and not listed and all(0 <= value < classes for value in values):
        return "labels"
    kinds = "true or false" if all(isinstance(v, bool) for v in values) else "whole numbers" if whole else "numbers"
    return _ambiguous(table, f"{len(values)} {kinds} without a name")


def _ambiguous(table: Table, got: str, flag: str = "--verdict_means MEANING") -> str:
    do = f"Add {flag} (out of {', '.join(MEANINGS)})" if "means" in flag else f"Add {flag}"
    expected = f"one meaning of {table.source}"
    raise FileFormatError(explain(expected, got, f"{do}. {ACCEPTED}"))


def _other(table: Table, expected: str, got: str) -> StateMismatchError:
    do = "Use the verdict on this dataset, with the same noise, --per_class and label files"
    return StateMismatchError(explain(f"{expected}, in {table.source}", got, do))


# which row is whose


def _settled(table: Table, origin: Origin, order: str, what: str) -> str:
    if order or origin.one_order:
        return order or "given"
    do = f"Add --order out of {', '.join(ORDERS)}: the dataset's, that of all training samples, or the run's"
    raise FileFormatError(explain(f"the order of {what} in {table.source}", "none", f"{do}. {ACCEPTED}"))


def _rows(table: Table, origin: Origin, order: str) -> Tensor:
    """The record int64 [N] of each sample."""
    if table.paths is not None and origin.paths is not None:
        place = {path: i for i, path in enumerate(table.paths)}
        found = [place.get(plain_path(path), -1) for path in origin.paths]
    elif table.index is not None:
        order = order or ("given" if origin.one_order else "published")
        length, exact = origin.length(order)
        if exact and max(table.index) >= length:
            raise _other(table, f"indices below {length}", str(max(table.index)))
        at = {index: i for i, index in enumerate(table.index)}
        found = [at.get(position, -1) for position in origin.positions(order).tolist()]
    elif table.paths is not None:
        raise _other(table, "an index for each sample, because these have no file names", "paths")
    else:
        if not order:
            do = f"Add --order out of {', '.join(ORDERS)}: the dataset's, that of all training samples, or the run's"
            got = "neither paths nor indices"
            raise FileFormatError(explain(f"the order of the samples in {table.source}", got, f"{do}. {ACCEPTED}"))
        length, exact = origin.length(order)
        if len(table) < length or (exact and len(table) > length):
            expected = f"{'' if exact else 'at least '}{length} entries, in the order {order!r}"
            raise _other(table, expected, str(len(table)))
        return origin.positions(order)
    if -1 in found:
        first = found.index(-1)
        who = f"sample {first}" if origin.paths is None else repr(origin.paths[first])
        raise _other(table, "a record for every sample", f"none for {found.count(-1)} of {len(found)}, first {who}")
    return torch.tensor(found)


def _is_index_list(table: Table, values: Sequence[Any], origin: Origin, order: str) -> bool:
    """Whether values are positions of samples, and not one truth value for each."""
    if table.paths is not None or table.index is not None or not all(type(value) is int for value in values):
        return False
    # One 0 or 1 for each sample repeats itself; positions do not.
    return len(set(values)) == len(values)


def _listed(table: Table, values: Sequence[int], origin: Origin, order: str) -> Tensor:
    """Bool [N]: the samples whose positions are listed."""
    order = _settled(table, origin, order, "the indices")
    length, exact = origin.length(order)
    low, high = min(values), max(values)
    if low < 0 or (exact and high >= length):
        raise _other(table, f"indices from 0 to {length - 1}", f"{low} to {high}")
    return torch.isin(origin.positions(order), torch.tensor(list(values)))


# what the rows say


class _Reader:
    """The columns of a table as tensors over the samples of a run."""

    def __init__(self, table: Table, observed: Tensor, num_classes: int, origin: Origin) -> None:
        self.table, self.observed, self.num_classes, self.origin = table, observed, num_classes, origin

    def labels(self, name: str, rows: Tensor, where: Tensor | None = None) -> Tensor:
        """A column of class names or numbers, int64 [N]; outside ``where`` (bool [N]) the observed labels."""
        column, chosen = self.table.columns[name], rows if where is None else rows[where]
        if not len(chosen):
            return self.observed.clone()
        values = [column[i] for i in chosen.tolist()]
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
        known = NamedLabels(self.table.source, {}, {name or "values": values})
        found = known.labels(name or "values", self.num_classes, self.origin.class_names)
        if where is None:
            return found
        target = self.observed.clone()
        target[where] = found
        return target

    def numbers(self, name: str, rows: Tensor, *, least: float = -math.inf) -> Tensor:
        """A column of finite numbers, float64 [N]."""
        column, found = self.table.columns[name], []
        for i in rows.tolist():
            try:
                value = float(column[i])
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value) or value < least:
                bound = "finite numbers" if least == -math.inf else f"finite numbers from {least:g}"
                raise FileFormatError(
                    explain(f"{bound} under {name!r} in {self.table.source}", repr(column[i]), ACCEPTED)
                )
            found.append(value)
        return torch.tensor(found, dtype=torch.float64)

    def truth(self, name: str, rows: Tensor) -> Tensor:
        """A column of true and false, bool [N]."""
        column = self.table.columns[name]
        found = [_WORDS.get(str(column[i]).strip().lower()) for i in rows.tolist()]
        if None in found:
            got = repr(column[int(rows[found.index(None)])])
            raise FileFormatError(explain(f"true or false under {name!r} in {self.table.source}", got, ACCEPTED))
        return torch.tensor(found, dtype=torch.bool)

    def check_given(self, rows: Tensor, meaning: str, deciding: str) -> None:
        """Compares the labels that were judged with the observed ones, where the file has them."""
        names = [name for name in _GIVEN if name in self.table.columns]
        if meaning == "verdict" and "label" in self.table.columns:
            names.append("label")
        for name in names:
            if name != deciding and (wrong := int((self.labels(name, rows) != self.observed).sum())):
                raise _other(self.table, f"the observed labels under {name!r}", f"{wrong} of {len(rows)} that differ")

    def decide(self, name: str, meaning: str, rows: Tensor, share: float) -> Verdict:
        """The verdict of one column."""
        n = len(rows)
        kept, target, weight = torch.ones(n, dtype=torch.bool), self.observed, torch.ones(n)
        if meaning == "verdict":
            kept, target = self._words(name, rows)
        elif meaning in ("keep", "drop"):
            kept = self.truth(name, rows) == (meaning == "keep")
        elif meaning == "labels":
            target = self.labels(name, rows)
            self._check_agreement(target)
        elif meaning == "weights":
            weight = self.numbers(name, rows, least=0.0).float()
            kept = weight > 0
        else:
            kept = self._best(self.numbers(name, rows), share, lowest=meaning == "difficulty")
        return Verdict(kept, target, weight, self._trust(rows), meaning)

    def _words(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        words = [str(self.table.columns[name][i]).strip().lower() for i in rows.tolist()]
        if wrong := next((word for word in words if word not in _VERDICTS), None):
            expected = f"{', '.join(_VERDICTS)} under {name!r} in {self.table.source}"
            raise FileFormatError(explain(expected, repr(wrong), ACCEPTED))
        moved = torch.tensor([word == "relabel" for word in words])
        proposed = next((name for name in _PROPOSED if name in self.table.columns), None)
        if bool(moved.any()) and proposed is None:
            do = f"Add the new labels as {_PROPOSED[0]!r}"
            raise FileFormatError(explain(f"a column of new labels in {self.table.source}", "none", do))
        target = self.observed if proposed is None else self.labels(proposed, rows, moved)
        return torch.tensor([word in ("keep", "relabel") for word in words]), target

    def _best(self, scores: Tensor, share: float, *, lowest: bool) -> Tensor:
        """Bool [N]: the best share of each observed class, at least one sample."""
        if not 0 < share <= 1:
            do = "Add --verdict_share, for example 0.7, or pass a mask"
            got = f"scores in {self.table.source} and a share of {share:g}"
            raise ConfigError(explain("the share of each class to keep, in (0, 1]", got, do))
        counts = torch.bincount(self.observed, minlength=self.num_classes).tolist()
        quota = torch.tensor([max(1, round(share * count)) for count in counts])
        rank = rank_in_class(scores if lowest else -scores, self.observed, self.num_classes)
        return rank < quota[self.observed]

    def _trust(self, rows: Tensor) -> Tensor | None:
        names = [name for name in _NAMES["quality"] if name in self.table.columns]
        if len(names) != 1:
            return None
        found = self.numbers(names[0], rows).float()
        return found if bool(((found >= 0) & (found <= 1)).all()) else None

    def _check_agreement(self, target: Tensor) -> None:
        """Labels in a wrong order agree with the observed ones by chance alone."""
        n, k = len(target), self.num_classes
        shares = [torch.bincount(labels, minlength=k).double() / n for labels in (target, self.observed)]
        chance = float((shares[0] * shares[1]).sum())
        agreed = float((target == self.observed).float().mean())
        if n >= 20 and agreed <= chance + 3 * math.sqrt(chance * (1 - chance) / n):
            expected = f"labels that agree with the observed ones more often than by chance ({100 * chance:.0f}%)"
            raise _other(self.table, expected, f"{100 * agreed:.0f}%")
