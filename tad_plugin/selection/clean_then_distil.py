"""Clean first, then distil: cross-validated confident learning (Northcutt et al., JAIR 2021) by cleanlab."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tad_plugin.core.callback import Callback
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.data.splits import dealt_evenly
from tad_plugin.errors import ConfigError, NotEnoughSamplesError, explain, missing_extra
from tad_plugin.selection.ranking import keep_lowest, train_logits
from tad_plugin.utils.settings import build_config

__all__ = ["CleanThenDistil", "CleanThenDistilConfig"]

FILTERS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")


@dataclass
class CleanThenDistilConfig:
    """Settings of the cleaning.

    Attributes:
        folds: cross-validation folds; each sample is judged by a network that has not seen it.
        filter_by: cleanlab's rule: prune_by_noise_rate, prune_by_class, both, confident_learning, predicted_neq_given.
        scorer: settings of each fold's network.
    """

    folds: int = 4
    filter_by: str = "prune_by_noise_rate"
    scorer: ScorerConfig = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        if isinstance(self.scorer, dict):
            self.scorer = build_config(ScorerConfig, self.scorer, "the networks")
        if self.folds < 2:
            raise ConfigError(explain("at least 2 folds", str(self.folds), "Correct the setting"))
        if self.filter_by not in FILTERS:
            raise ConfigError(
                explain(f"filter_by out of {', '.join(FILTERS)}", repr(self.filter_by), "Choose one of them")
            )


class CleanThenDistil(Callback):
    """Removes the samples that confident learning calls mislabelled, then distils the rest with the observed labels."""

    name: ClassVar[str] = "clean-then-distil"
    rival: ClassVar[bool] = True
    Config: ClassVar[type] = CleanThenDistilConfig
    needs_images: ClassVar[bool] = True

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains one network per fold and cleans.

        Raises:
            NotEnoughSamplesError: a class has fewer samples than there are folds.
            MissingExtraError: cleanlab is not installed.
        """
        try:
            from cleanlab.filter import find_label_issues
        except ImportError as error:
            raise missing_extra("cleanlab", "reproduce", "the method 'clean-then-distil'") from error
        config: CleanThenDistilConfig = self.config
        smallest = int(torch.bincount(state.observed, minlength=state.num_classes).min())
        if smallest < config.folds:
            raise NotEnoughSamplesError(
                explain(f"at least {config.folds} samples in each class", str(smallest), "Use fewer folds or more data")
            )
        fold = dealt_evenly(state.observed, state.num_classes, config.folds, self.generator)
        logits = torch.zeros(len(state), state.num_classes, device=state.device)
        seed = int(self.generator.initial_seed())
        for k in range(config.folds):
            train = (fold != k).nonzero().flatten()
            held = fold == k
            logits[held] = train_logits(data, dataclasses.replace(config.scorer), seed=seed + 101 * k, on=train)[-1][
                held
            ]
        probabilities = logits.double().softmax(1)
        issues = find_label_issues(
            state.observed.cpu().numpy(), probabilities.cpu().numpy(), filter_by=config.filter_by, n_jobs=1
        )
        kept = ~torch.as_tensor(issues, device=state.device)
        confidence = probabilities.gather(1, state.observed[:, None]).squeeze(1).float()
        # A class that was cleaned away keeps as many of its most confident samples as the synthetic set needs.
        kept |= keep_lowest(-confidence, state.observed, state.num_classes, 1e-9, minimum=data.ipc or 1)
        state.update(trusted=kept, trust=confidence.clamp(0, 1))
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()))
