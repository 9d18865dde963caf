"""Summaries of a ``minimal_pairs`` run; what is sampled are groups of pairs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..materials.pair_acceptance import EVERY, Accepted
from ..workbench.controls import FAIL
from ..workbench.intervals import Draws
from ..workbench.results import Results
from .settings import MinimalPairsConfig

PairResults = Results[MinimalPairsConfig]
TABLES = {
    "clips": "a clip, as it sounds, what the audio positions hold, and the answers' scores",
    "depths": "an accepted pair, patched at a place and depth in a direction",
    "heads": "a head of an accepted pair, patched and removed at a place",
    "written": "a clip of an accepted pair, read back from the file that was written",
}
WHO = ("pair", "attribute", "group")
CELLS = ("place", "depth", "value", "toward", "recovery", "noise", "base", "donor")
MAY_LACK = {
    "depths": (*WHO, "direction", *CELLS),
    "heads": (*WHO, "place", "layer", "head", "patched", "ablated", "noise"),
    "written": ("clip", "file", "difference"),
}
"""Tables that a run without an accepted pair leaves empty."""
CURVES = ["attribute", "place", "direction", "depth", "mean", "low", "high", "n", "n_undefined"]
GAPS = ["attribute", "place", "depth", "noising", "denoising", "mean", "low", "high", "n"]
HEAD = ["place", "layer", "head"]
BACKUP = [
    "attribute", *HEAD, "patched", "patched_low", "patched_high", "ablated", "ablated_low",
    "ablated_high", "n_groups", "alone",
]  # fmt: skip


def summarise(run: PairResults, found: Accepted) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    yield "pairs", found.pairs
    yield "acceptance", found.acceptance
    yield "probes", found.probes
    yield "sets", sets_of(found.pairs, found.acceptance)
    yield from effects(run)


def effects(run: PairResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """What the sweeps come to."""
    yield "curves", curves(run["depths"], run.draws)
    yield "gaps", gaps(run["depths"], run.draws)
    yield "backup", backup(run["heads"], run.draws, run.config.min_effect)


def sets_of(pairs: pd.DataFrame, acceptance: pd.DataFrame) -> pd.DataFrame:
    """A row per set: how many pairs are accepted, and which criteria rejected how many."""
    rows = []
    for attribute, some in pairs.groupby("attribute", sort=False):
        failed = acceptance[(acceptance.attribute == attribute) & (acceptance.verdict == FAIL)]
        counts = failed.groupby("criterion", sort=False).pair.agg(list)
        told = [
            f"{criterion} (the set)" if EVERY in of else f"{criterion} ({len(of)})"
            for criterion, of in counts.items()
        ]
        first = some.iloc[0]
        rows.append(
            {
                "attribute": attribute, "family": first.family, "n": len(some),
                "accepted": int(some.accepted.sum()), "groups": some[some.accepted].group.nunique(),
                "rejected_by": ", ".join(told), "label_a": first.label_a, "label_b": first.label_b,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def of(table: pd.DataFrame, attribute: str) -> pd.DataFrame:
    """The rows of one set."""
    return table[table.attribute == attribute].reset_index(drop=True)


def _by_group(
    some: pd.DataFrame, keys: list[str], value: str
) -> tuple[pd.DataFrame, Float[np.ndarray, "group cell"]]:
    """The cells in their order, and the mean of every group in each."""
    wide = some.groupby([*keys, "group"], sort=False)[value].mean().unstack("group", sort=False)
    return wide.index.to_frame(index=False), wide.to_numpy(np.float64).T


def _set_by_set(
    table: pd.DataFrame, columns: list[str], of_set: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """What is made of each set of pairs, one below the other."""
    parts = [
        of_set(some).assign(attribute=attribute)[columns]
        for attribute, some in table.groupby("attribute", sort=False)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def curves(depths: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Mean recovery by place, direction and depth, over groups whose pairs have an effect."""

    def of_set(some: pd.DataFrame) -> pd.DataFrame:
        cells, values = _by_group(some, ["place", "direction", "depth"], "recovery")
        return cells.join(pd.DataFrame(draws.points(values, [*range(len(values))])))

    return _set_by_set(depths, CURVES, of_set)


def gaps(depths: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Noising minus denoising at every place and depth; the band holds for all cells of a set."""
    at = ["place", "depth"]

    def of_set(some: pd.DataFrame) -> pd.DataFrame:
        wide = some.groupby([*at, "group", "direction"], sort=False).recovery.mean()
        wide = wide.unstack("direction").reset_index()
        both = wide.assign(gap=wide.noising - wide.denoising)
        cells, values = _by_group(both, at, "gap")
        found = draws.mean(values, None, "simultaneous")
        cells = cells.assign(mean=found.mean, low=found.low, high=found.high, n=found.n)
        means = both.groupby(at, sort=False)[["noising", "denoising"]].mean()
        return cells.merge(means.reset_index(), on=at)

    return _set_by_set(depths, GAPS, of_set)


def backup(heads: pd.DataFrame, draws: Draws, least: float) -> pd.DataFrame:
    """Every head patched and removed, and whether only one of the two surely moves the answer.

    ``alone`` says which: the band of one lies beyond ± ``least``, that of the other within it.
    Bands hold for all heads and places of a set.
    """

    def of_set(some: pd.DataFrame) -> pd.DataFrame:
        columns, moves, is_idle = dict[str, Any](), dict[str, Any](), dict[str, Any]()
        for name in ("patched", "ablated"):
            cells, values = _by_group(some, HEAD, name)
            found = draws.mean(values, None, "simultaneous")
            columns |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            moves[name] = (found.low > least) | (found.high < -least)
            is_idle[name] = (found.low >= -least) & (found.high <= least)
        alone = np.select(
            [moves["patched"] & is_idle["ablated"], moves["ablated"] & is_idle["patched"]],
            ["patched", "ablated"], "",
        )  # fmt: skip
        return cells.assign(**columns, n_groups=len(values), alone=alone)

    return _set_by_set(heads, BACKUP, of_set)
