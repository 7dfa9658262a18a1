"""Clean first, then distil: cross-validated confident learning (Northcutt et al., JAIR 2021) by cleanlab."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tad_plugin.core.scorer import ScorerConfig, train_logits
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.data.splits import dealt_evenly
from tad_plugin.errors import NotEnoughSamplesError, explain, missing_extra
from tad_plugin.selection.ranking import keep_lowest
from tad_plugin.selection.rival import Rival
from tad_plugin.utils.settings import Settings, setting

__all__ = ["CleanThenDistil", "CleanThenDistilConfig"]

_FILTERS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")


@dataclass
class CleanThenDistilConfig(Settings):
    """Settings of the cleaning.

    Attributes:
        folds: cross-validation folds; each sample is judged by a network that was not trained on it.
        filter_by: rule of cleanlab: prune_by_noise_rate, prune_by_class, both, confident_learning, predicted_neq_given.
        scorer: settings of the network of each fold.
    """

    prefix: ClassVar[str] = "clean-then-distil."

    folds: int = setting(4, at_least=2)
    filter_by: str = setting("prune_by_noise_rate", one_of=_FILTERS)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)


class CleanThenDistil(Rival):
    """Removes the samples that confident learning finds mislabelled; the loop distils the rest."""

    name: ClassVar[str] = "clean-then-distil"
    Config: ClassVar[type] = CleanThenDistilConfig
    needs_images: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("cleanlab",)
    config: CleanThenDistilConfig

    @classmethod
    def judge(cls, probabilities: Tensor, observed: Tensor, num_classes: int) -> Tensor:
        """See :class:`Callback`: confident learning flags samples; the probability of the label orders them.

        Raises:
            MissingExtraError: cleanlab is not installed.
        """
        issues = _issues(probabilities, observed, CleanThenDistilConfig.filter_by)
        own = probabilities.gather(1, observed[:, None]).flatten().float()
        return torch.where(issues, own / 2, (1 + own) / 2)

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains one network per fold and cleans.

        Raises:
            NotEnoughSamplesError: a class has fewer samples than there are folds.
            MissingExtraError: cleanlab is not installed.
        """
        folds, observed, k = self.config.folds, state.observed, state.num_classes
        smallest = int(torch.bincount(observed, minlength=k).min())
        if smallest < folds:
            expected = f"at least {folds} samples in each class"
            raise NotEnoughSamplesError(explain(expected, str(smallest), "Use fewer folds or more data"))
        fold = dealt_evenly(observed, k, folds, self.generator)
        logits = torch.zeros(len(state), k, device=state.device)
        for number in range(folds):
            held = fold == number
            train = (~held).nonzero().flatten()
            found = train_logits(data, self.config.scorer, seed=self.network_seed(number), on=train)[-1]
            logits[held] = found[held]
        probabilities = logits.double().softmax(1)
        issues = _issues(probabilities, observed, self.config.filter_by)
        confidence = probabilities.gather(1, observed[:, None]).squeeze(1).float()
        # A class that was cleaned away keeps its most confident samples, as many as the synthetic set needs.
        spared = keep_lowest(-confidence, observed, k, 1e-9, data.ipc or 1)
        self.keep(state, ~issues | spared, trust=confidence)


def _issues(probabilities: Tensor, observed: Tensor, filter_by: str) -> Tensor:
    """The samples that cleanlab finds mislabelled, bool [N]. Raises MissingExtraError."""
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise missing_extra("cleanlab", "reproduce", "the method 'clean-then-distil'") from error
    found = find_label_issues(
        observed.cpu().numpy(), probabilities.double().cpu().numpy(), filter_by=filter_by, n_jobs=1
    )
    return torch.as_tensor(found, device=observed.device)
