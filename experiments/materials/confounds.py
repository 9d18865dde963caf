"""What else than its label may tell a clip apart: how it was recorded, how long it is, who speaks.

Where clips of one label were recorded otherwise than those of another, a model can answer right
without hearing what the label means. A feature is such a confound if it goes with the labels more
closely than with labels dealt out at random.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Real

from hooked_alm.methods.statistics.draws import chunks

from ..workbench.page import Page
from ..workbench.results import Results
from ..workbench.settings import ExperimentConfig

NUMBERS = {"duration_s": "s", "rms_dbfs": "dBFS"}
CATEGORIES = ("sample_rate", "channels", "codec", "speaker")
LEVEL = 0.05
"""Of the test of all features together; each is tested at its share (Bonferroni)."""
N_DEALS = 2000
MOST_SHOWN = 5
Codes = Int[np.ndarray, " clip"]
"""Codes, or values of a feature, as numbers from 0."""


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
    clips = clips[clips[label].notna()]
    present = [name for name in (*NUMBERS, *CATEGORIES) if name in clips and name != label]
    varying = [name for name in present if clips[name].nunique() > 1 and name not in without]
    codes = clips[label].factorize()[0].astype(np.int64)
    features = {
        name: _ranks(clips[name]) if name in NUMBERS else _places(clips[name]) for name in varying
    }
    fits: dict[str, list[np.ndarray]] = {name: [] for name in varying}
    for deals in _deals(codes, seed, features.values()):
        for name, values in features.items():
            fits[name].append((_kruskal if name in NUMBERS else _pearson)(values, deals))
    found = []
    for name in varying:
        fit = np.concatenate(fits[name])
        p = float((fit >= fit[0] - 1e-9).mean())  # the observed deal is one of them
        if p <= LEVEL / len(varying):
            found.append(Confound(name, p, _described(clips, name, label)))
    return pd.DataFrame(found, columns=Confound._fields)


def _deals(
    codes: Codes, seed: int, features: Iterable[np.ndarray]
) -> Iterator[Int[np.ndarray, "deal clip"]]:
    """The labels as they are, then dealt out at random, as many deals at once as memory allows."""
    rng, n_labels = np.random.default_rng(seed), int(codes.max(initial=0)) + 1
    n_cells = n_labels * (1 + int(max((one.max() for one in features), default=0)))
    # Of a clip its label, where that is counted, and its weight; of a cell its count and share.
    for rows in chunks(1 + N_DEALS, 32 * len(codes) + 24 * n_cells):
        deals = range(rows.start, rows.stop)
        yield np.stack([rng.permutation(codes) if deal else codes for deal in deals])


def _ranks(values: pd.Series) -> Float[np.ndarray, " clip"]:
    ranks = values.fillna(values.min()).rank()  # digital silence has no level, and is the quietest
    return ((ranks - ranks.mean()) / (ranks.std(ddof=0) or 1)).to_numpy(np.float64)


def _places(values: pd.Series) -> Codes:
    return values.astype(str).factorize()[0].astype(np.int64)


def _kruskal(
    ranks: Float[np.ndarray, " clip"], deals: Int[np.ndarray, "deal clip"]
) -> Float[np.ndarray, " deal"]:
    """Kruskal and Wallis' H times n / (n − 1), for standardised ranks."""
    sums = _by_label(deals, int(deals[0].max()) + 1, np.tile(ranks, len(deals)))
    return np.asarray((sums**2 / np.bincount(deals[0])).sum(axis=1))


def _pearson(values: Codes, deals: Int[np.ndarray, "deal clip"]) -> Float[np.ndarray, " deal"]:
    """Pearson's χ² of labels and values. A table of counts: every clip may have its own value."""
    n_of_label, n_of_value = np.bincount(deals[0]), np.bincount(values)
    expected = np.outer(n_of_label, n_of_value).ravel() / len(values)
    counts = _by_label(deals * len(n_of_value) + values, len(expected))
    return np.asarray((counts**2 / expected).sum(axis=1) - len(values))


def _by_label(
    cells: Int[np.ndarray, "deal clip"], n_cells: int, weights: np.ndarray | None = None
) -> Real[np.ndarray, "deal cell"]:
    """Clips of every cell, or the sum of their weights, deal by deal."""
    at = (cells + n_cells * np.arange(len(cells))[:, None]).ravel()
    return np.bincount(at, weights, len(cells) * n_cells).reshape(len(cells), n_cells)


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
