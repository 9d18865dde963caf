"""Summaries of a ``minimal_pairs`` run; what is sampled are groups of pairs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..workbench.controls import FAIL
from ..workbench.intervals import Draws
from ..workbench.results import Results
from .acceptance import EVERY, accept
from .candidates import Material
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


def summarise(run: PairResults, material: Material) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    found = accept(material, run["clips"], run.draws)
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


def curves(depths: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Mean recovery by place, direction and depth, over groups whose pairs have an effect."""
    parts = [pd.DataFrame(columns=CURVES)]
    for attribute, some in depths.groupby("attribute", sort=False):
        cells, values = _by_group(some, ["place", "direction", "depth"], "recovery")
        found = pd.DataFrame(draws.points(values, [*range(len(values))]))
        parts.append(pd.concat([cells, found], axis=1).assign(attribute=attribute)[CURVES])
    return pd.concat(parts if len(parts) == 1 else parts[1:], ignore_index=True)


def gaps(depths: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Noising minus denoising at every place and depth; the band holds for all cells of a set."""
    parts = [pd.DataFrame(columns=GAPS)]
    for attribute, some in depths.groupby("attribute", sort=False):
        keys = ["place", "depth", "group"]
        wide = some.groupby([*keys, "direction"], sort=False).recovery.mean().unstack("direction")
        both = wide.reset_index().assign(gap=wide.noising.to_numpy() - wide.denoising.to_numpy())
        cells, values = _by_group(both, ["place", "depth"], "gap")
        found = draws.mean(values, None, "simultaneous")
        ends = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        means = both.groupby(["place", "depth"], sort=False)[["noising", "denoising"]].mean()
        table = cells.assign(**ends, attribute=attribute).merge(
            means.reset_index(), on=["place", "depth"]
        )
        parts.append(table[GAPS])
    return pd.concat(parts if len(parts) == 1 else parts[1:], ignore_index=True)


def backup(heads: pd.DataFrame, draws: Draws, least: float) -> pd.DataFrame:
    """Every head patched and removed, and whether only one of the two surely moves the answer.

    ``alone`` says which: the band of one lies beyond ± ``least``, that of the other within it.
    Bands hold for all heads and places of a set.
    """
    parts = [pd.DataFrame(columns=BACKUP)]
    for attribute, some in heads.groupby("attribute", sort=False):
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
        about = {"attribute": attribute, "n_groups": len(values), "alone": alone}
        parts.append(cells.assign(**columns, **about)[BACKUP])
    return pd.concat(parts if len(parts) == 1 else parts[1:], ignore_index=True)
