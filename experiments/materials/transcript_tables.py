"""What tables of transcripts have in common: error rates, and checks of what is read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..workbench.controls import ROUNDING, Outcome, at_most
from ..workbench.results import Results

OfTranscripts = Results[Any]
"""Results of an experiment that writes clips down."""
ERRORS = ("n", "substitutions", "deletions", "insertions")
"""Counts against the reference."""
ERROR_COLUMNS = tuple(f"reference_{name}" for name in ERRORS)
MOST_NOT_GREEDY = 0.02
"""Share of tokens that one pass over a whole transcript may find less likely than another: steps
that reuse keys and values round differently, and tokens can be as good as level."""
NOWHERE = {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "n_clusters": 0}
"""A rate of nothing."""


def error_counts(table: pd.DataFrame) -> Float[np.ndarray, "clip 2"]:
    """Errors and words of every clip."""
    errors = table[[*ERROR_COLUMNS[1:]]].to_numpy(np.float64).sum(axis=1)
    return np.stack([errors, table.reference_n.to_numpy(np.float64)], axis=1)


def error_rate(run: OfTranscripts, table: pd.DataFrame) -> dict[str, Any]:
    """Errors of some clips over all their words, with an interval; never a mean of clips' rates."""
    return _rated(run, table, error_counts(table), _ratio)


def error_rise(run: OfTranscripts, before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """How far the error rate of the same clips, in the same order, is higher afterwards."""
    both = np.concatenate([error_counts(after), error_counts(before)], axis=1)
    return _rated(run, before, both, lambda means: _ratio(means[:, :2]) - _ratio(means[:, 2:]))


def _rated(
    run: OfTranscripts,
    who: pd.DataFrame,
    counts: Float[np.ndarray, "clip count"],
    find: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    if not counts[:, 1].sum():
        return dict(NOWHERE)
    of = run.config.clusters(who)
    found = run.draws.where(counts, of, find)
    sizes = {"n": len(who), "n_clusters": len({*of})}
    return {"mean": found.at, "low": found.low, "high": found.high, **sizes}


def _ratio(means: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], np.nan)


# --- Controls of what is read by depth


def hears_itself(run: OfTranscripts) -> Outcome:
    """The last depth of the encoder is what the model hears."""
    return at_most(run["checks"].memory, ROUNDING["logit"][run.config.dtype])


def likely_as_itself(run: OfTranscripts) -> Outcome:
    """A transcript is as likely at the last depth as in the model."""
    return at_most(run["checks"].log_p, ROUNDING["logit"][run.config.dtype], "nats")


def is_greedy(run: OfTranscripts) -> Outcome:
    """Tokens of a transcript are those that one pass over it finds likeliest."""
    return at_most(run["checks"].not_greedy.mean(), MOST_NOT_GREEDY, "of the tokens")
