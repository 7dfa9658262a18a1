"""A verdict that was made elsewhere and stands in a file: cleanlab, an audit, a pruning score, a list of indices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from tad_plugin.core.callback import Callback
from tad_plugin.core.state import SampleState
from tad_plugin.data.origin import ORDERS
from tad_plugin.data.real import RealData
from tad_plugin.data.verdicts.verdict import MEANINGS, read_verdict
from tad_plugin.errors import ConfigError, NotEnoughSamplesError, StateMismatchError, explain
from tad_plugin.utils.files import file_digest
from tad_plugin.utils.settings import Settings, setting

__all__ = ["FileVerdict", "VerdictConfig"]


@dataclass
class VerdictConfig(Settings):
    """Settings of a verdict from a file; see :func:`tad_plugin.data.verdicts.verdict.read_verdict`.

    Attributes:
        file: the file: csv, json, npz or pt.
        order: order of a file that names no samples: published, train or given.
        means: what unnamed values mean: keep, drop, labels, weights, quality, difficulty or verdict.
        column: the column that decides, where there are several.
        share: of each class that scores keep, in (0, 1]; 0 where the file has no scores.
        sha256: of the file. A run keeps it, so that it does not go on with another verdict; "" takes any.
    """

    prefix: ClassVar[str] = "verdict."

    file: str = ""
    order: str = setting("", one_of=("", *ORDERS))
    means: str = setting("", one_of=("", *MEANINGS))
    column: str = ""
    share: float = setting(0.0, at_least=0, at_most=1)
    sha256: str = ""


class FileVerdict(Callback):
    """Uses the samples that a file keeps, with its labels and its weights."""

    name: ClassVar[str] = "verdict"
    Config: ClassVar[type] = VerdictConfig
    uses_ipc: ClassVar[bool] = False
    config: VerdictConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Reads the file and applies it.

        Raises:
            ConfigError: no file is named.
            FileFormatError, StateMismatchError: see ``read_verdict``; or the file was exchanged.
            NotEnoughSamplesError: it leaves no sample of a class.
        """
        c = self.config
        if not c.file:
            do = "Pass --verdict FILE (--tad_verdict FILE in a patched script, verdict=FILE in attach)"
            raise ConfigError(explain("the file of the method 'verdict'", "none", do))
        path = os.path.expanduser(c.file)
        found = read_verdict(
            path,
            state.observed,
            state.num_classes,
            data.origin,
            order=c.order,
            means=c.means,
            column=c.column,
            share=c.share,
        )
        if c.sha256 and file_digest(path) != c.sha256:
            do = "Put the file back, or start over with --overwrite"
            raise StateMismatchError(explain(f"the contents of {path} as the run found them", "others", do))
        left = torch.bincount(found.target[found.kept], minlength=state.num_classes)
        if int(left.min()) == 0:
            who = int(left.argmin())
            do = "Keep at least one sample of each class, or leave the class out of the data"
            raise NotEnoughSamplesError(explain(f"samples of class {who} that {path} keeps", "none", do))
        state.update(target=found.target, trusted=found.kept, trust=found.trust)
        state.set_weights(self.name, found.weight * found.kept)
        self.report("division", trusted=int(found.kept.sum()), untrusted=int((~found.kept).sum()), file=c.file)
