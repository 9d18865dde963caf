"""What else than its label may tell a clip apart: how it was recorded, how long it is, who speaks.

Where clips of one label were recorded otherwise than those of another, a model can answer right
without hearing what the label means. A feature is such a confound if it goes with the labels more
closely than with labels dealt out at random.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ..workbench.page import Page
from ..workbench.results import Results
from ..workbench.settings import ExperimentConfig

NUMBERS = {"duration_s": "s", "rms_dbfs": "dBFS"}
CATEGORIES = ("sample_rate", "channels", "codec", "speaker")
LEVEL = 0.05
"""Of the test of all features together; each is tested at its share (Bonferroni)."""
N_DEALS = 2000
MOST_SHOWN = 5


class Confound(NamedTuple):
    """A feature that goes with the labels."""

    feature: str
    p: float
    """Share of random deals of the labels that go with it as closely, the observed one included."""
    found: str
    """What it is for each label."""


def confounds(
    clips: pd.DataFrame, label: str, *, seed: int, without: Sequence[str] = ()
) -> pd.DataFrame:
    """The features of clips that tell their labels apart, a row for each (`Confound`).

    Args:
        clips: a row per clip, with some of the columns `NUMBERS` and `CATEGORIES`.
        label: column of the label; a feature of the same name is not tested.
        seed: of the deals.
        without: features that cannot tell it, such as a level that was made equal.
    """
    present = [name for name in (*NUMBERS, *CATEGORIES) if name in clips and name != label]
    varying = [name for name in present if clips[name].nunique() > 1 and name not in without]
    codes = clips[label].factorize()[0].astype(np.int64)
    rng = np.random.default_rng(seed)
    deals = np.stack([codes, *(rng.permutation(codes) for _ in range(N_DEALS))])
    found = []
    for name in varying:
        scores = _ranks(clips[name]) if name in NUMBERS else _indicators(clips[name])
        fit = _between(scores, deals)
        p = float((fit >= fit[0] - 1e-9).mean())  # the observed deal is one of them
        if p <= LEVEL / len(varying):
            found.append(Confound(name, p, _described(clips, name, label)))
    return pd.DataFrame(found, columns=Confound._fields)


def _ranks(values: pd.Series) -> Float[np.ndarray, "clip 1"]:
    ranks = values.fillna(values.min()).rank()  # digital silence has no level, and is the quietest
    return ((ranks - ranks.mean()) / (ranks.std(ddof=0) or 1)).to_numpy(np.float64)[:, None]


def _indicators(values: pd.Series) -> Float[np.ndarray, "clip value"]:
    """Each value's presence, so scaled that sums over labels make Pearson's χ²."""
    there = pd.get_dummies(values.astype(str)).to_numpy(np.float64)
    return (there - there.mean(0)) / np.sqrt(there.mean(0))


def _between(
    scores: Float[np.ndarray, "clip value"], deals: Int[np.ndarray, "deal clip"]
) -> Float[np.ndarray, " deal"]:
    """Sum of squares between labels: Kruskal and Wallis' H for ranks, χ² for indicators."""
    total = np.zeros(len(deals))
    for code in range(int(deals.max()) + 1):
        chosen = deals == code
        total += ((chosen @ scores) ** 2).sum(1) / chosen.sum(1)
    return total


def _described(clips: pd.DataFrame, feature: str, label: str) -> str:
    parts = []
    for name, values in clips.groupby(label, sort=False)[feature]:
        if feature in NUMBERS:
            parts.append(f"{name} {values.median():.3g} {NUMBERS[feature]}")
        else:
            counts = values.value_counts()
            parts.append(f"{name} {counts.index[0]} in {counts.iloc[0]} of {len(values)}")
    rest = [f"{len(parts) - MOST_SHOWN} other labels"] if len(parts) > MOST_SHOWN else []
    return ", ".join([*parts[:MOST_SHOWN], *rest])


def confound_table(
    run: Results[Any], label: str, *, without: Sequence[str] = ()
) -> tuple[str, pd.DataFrame]:
    """The summary ``confounds`` of a run's ``manifest``; see `confounds`."""
    return "confounds", confounds(run["manifest"], label, seed=run.config.seed, without=without)


def confounded(table: pd.DataFrame, config: ExperimentConfig) -> dict[str, bool]:
    """The reason against a claim that the voice's label does something, where more than it differs.

    Bundled models and clips are no exception in what they list; but what these models were trained
    to hear, level and pace included, is known, so that it is no reason there.
    """
    verb = "goes" if len(table) == 1 else "go"
    is_reason = len(table) > 0 and not config.is_calibration
    return {f"{', '.join(table.feature)} {verb} with the labels too": is_reason}


def add_confounds(page: Page, table: pd.DataFrame, config: ExperimentConfig) -> None:
    """Says what else than their label may give the clips away."""
    if table.empty:
        page.note(
            f"Of what was measured ({', '.join((*NUMBERS, *CATEGORIES))}, as far as it is known), "
            "nothing goes with the labels more closely than chance would have it."
        )
        return
    page.table("Confounds: what goes with the labels, and may give the clips away", table)
    if not config.is_calibration:
        page.note(
            "A model may answer right, or be moved by another clip, by these alone. No claim that "
            "they could explain is made from this run.",
            is_warning=True,
        )
