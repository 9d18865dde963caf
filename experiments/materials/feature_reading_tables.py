"""The tables of what is read off features of clips, and what is averaged over them.

Source: M-SAE-4, M-SAE-6.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.jackknife import delete_a_group

from ..workbench.intervals import numbers, prefixed
from ..workbench.results import Results, Row, parts_by
from .feature_readings import WHOLE

ReadingResults = Results[Any]
READING_TABLES = {
    "reads": "a group's clips, and how often a column is read with some features, or without them",
    "checks": "a column and features: what vouches for its reading",
    "dci": "features of all clips, or of all but a fold's: how they hold the factors apart",
    "factors": "a factor, and how well and by how many features it is read",
    "factor_errors": "a group's clips, and the error of a factor, over that of knowing its mean",
}
_KIND = ("owner", "kind")
MAY_LACK_FACTORS = {
    "dci": (*_KIND, "fold", "disentanglement", "completeness", "n_codes", "n_read"),
    "factors": (*_KIND, "factor", "r2", "r2_learnt", "completeness", "n_read", "n_clips",
                "unfinished"),
    "factor_errors": (*_KIND, "factor", "group", "n", "value"),
}  # fmt: skip
READ = ["label", "owner", "kind", "how", "ranked", "k"]
MEASURES = ("disentanglement", "completeness")


def reading_table(run: ReadingResults) -> pd.DataFrame:
    """How often columns are read, with intervals over groups of clips."""
    rows = []
    for names, some in parts_by(run["reads"], *READ):
        values, groups = by_clip(some)
        found = run.draws.row(values, groups)
        ends = {"accuracy": found["mean"], "low": found["low"], "high": found["high"]}
        sizes = {"n": found["n"], "n_groups": found["n_clusters"]}
        rows.append({**names, **ends, **sizes})
    return pd.DataFrame(rows)


def held_apart_table(run: ReadingResults) -> pd.DataFrame:
    """Disentanglement and completeness, with jackknife intervals over folds of groups."""
    rows = []
    for (owner, kind), some in run["dci"].groupby([*_KIND], sort=False):
        found: Row = {"owner": owner, "kind": kind}
        for name in MEASURES:
            found |= prefixed(name, jackknifed(*with_and_without(some, name)), "")
        whole = some[some.fold == WHOLE].iloc[0]
        rows.append({**found, "n_codes": whole.n_codes, "n_read": whole.n_read})
    return pd.DataFrame(rows, columns=None if rows else [*_KIND, *MEASURES])


def factor_table(run: ReadingResults) -> pd.DataFrame:
    """Held-out R² of every factor, and their mean, with intervals over groups of clips."""
    rows = []
    for (owner, kind), some in run["factor_errors"].groupby([*_KIND], sort=False):
        for factor, mine in [*some.groupby("factor", sort=False), ("mean of all", some)]:
            values, groups = by_clip(mine)
            found = run.draws.row(1 - values, groups)
            key = {"owner": owner, "kind": kind, "factor": factor}
            rows.append({**key, "r2": found["mean"], "low": found["low"], "high": found["high"],
                         "n_groups": found["n_clusters"]})  # fmt: skip
    table = pd.DataFrame(rows, columns=None if rows else [*_KIND, "factor", "r2"])
    return table.merge(run["factors"].drop(columns="r2"), on=[*_KIND, "factor"], how="left")


def by_clip(some: pd.DataFrame) -> tuple[Float[np.ndarray, " clip"], list[str]]:
    """Each group's mean as often as it has clips, and the groups: their means are the clips'."""
    n = some["n"].to_numpy()
    return np.repeat(some["value"].to_numpy(np.float64), n), [*np.repeat(some["group"], n)]


def with_and_without(some: pd.DataFrame, name: str) -> tuple[float, Float[np.ndarray, " fold"]]:
    """A measure of all clips, and of all but each fold's."""
    values = some.set_index("fold")[name].astype(np.float64)
    return float(values[WHOLE]), values.drop(WHOLE).to_numpy()


def jackknifed(whole: float, without: Float[np.ndarray, " fold"]) -> Row:
    """The measure with its interval."""
    return numbers(delete_a_group(without, whole))
