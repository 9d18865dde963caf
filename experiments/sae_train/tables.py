"""Summaries of a ``sae_train`` run; what is sampled are held-out groups, or latents."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..materials.dictionary_partners import PARTNERS, stability_table
from ..workbench.intervals import Draws, numbers, prefixed
from ..workbench.results import Results
from .settings import SAETrainConfig

TrainedResults = Results[SAETrainConfig]
TABLES = {
    "training": "a step of the training of a dictionary, before it changed anything",
    "quality": "a dictionary on the held-out rows, in use or as in training",
    "recovery": "a held-out clip's answer, with a dictionary's reconstructions in it",
    "words": "what is said in a held-out clip, with a dictionary's reconstructions in its place",
    "copies": "a dictionary, and what of it a shuffled copy lacks",
    "partners": "a living latent, and how near its partner in another dictionary is",
}
MAY_LACK = {
    "partners": PARTNERS,
    "recovery": ("clip", "group", "point", "seed", "kl", "kl_mean", "kl_zero", "kl_kept"),
    "words": (
        *("clip", "group", "point", "seed", "n_tokens"),
        *("ce", "ce_clean", "ce_mean", "ce_zero", "ce_kept"),
    ),
}
"""One dictionary has no partners; rows of a store have no answer, few models write words down."""


def summarise(run: TrainedResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    yield "stability", stability_table(run["partners"], run.draws)
    yield "recovered", recovered_table(run["recovery"], run.draws)
    yield "words_recovered", words_table(run["words"], run.draws)
    yield "training_end", end_table(run["training"])


def recovered_table(recovery: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """KL by point, mean over a group's clips and dictionaries, with intervals over groups.

    ``recovered`` is the share of what mean rows lose that reconstructions do not lose,
    1 − KL / KL(mean), of the means over all groups; ``gain`` is KL(mean) − KL.
    """
    rows = []
    for point, some in recovery.groupby("point", sort=False):
        names = ["kl", "kl_mean", "kl_zero"]
        groups = some.groupby("group", sort=False)[names].mean()
        found: dict[str, object] = {"point": point}
        for name in names:
            found |= prefixed(name, numbers(draws.mean(groups[name].to_numpy(np.float64))), "")
        gain = (groups.kl_mean - groups.kl).to_numpy(np.float64)
        found |= prefixed("gain", numbers(draws.mean(gain)), "")
        lost = groups.kl_mean.mean()
        found["recovered"] = 1 - groups.kl.mean() / lost if lost > 0 else np.nan
        rows.append({**found, "n_groups": len(groups), "n_clips": some["clip"].nunique()})
    return pd.DataFrame(rows)


def words_table(words: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Cross-entropy of what is said, by point, as ``recovered_table`` has the answer's KL.

    ``recovered_mean`` and ``recovered_zero`` are (CE − CE(ablated)) / (CE(clean) − CE(ablated)).
    """
    rows = []
    for point, some in words.groupby("point", sort=False):
        names = ["ce_clean", "ce", "ce_mean", "ce_zero"]
        groups = some.groupby("group", sort=False)[names].mean()
        found: dict[str, object] = {"point": point}
        for name in names:
            found |= prefixed(name, numbers(draws.mean(groups[name].to_numpy(np.float64))), "")
        ce = groups.mean()
        for name in ("mean", "zero"):
            lost = ce.ce_clean - ce[f"ce_{name}"]
            found[f"recovered_{name}"] = (ce.ce - ce[f"ce_{name}"]) / lost if lost else np.nan
        rows.append({**found, "n_groups": len(groups), "n_clips": some["clip"].nunique()})
    return pd.DataFrame(rows)


def end_table(training: pd.DataFrame) -> pd.DataFrame:
    """The last step of every dictionary."""
    last = training[training["step"] == training["step"].max()]
    columns = ["point", "source", "seed", "fvu", "l0", "dead", "never_positive", "threshold"]
    return last[columns].reset_index(drop=True)
