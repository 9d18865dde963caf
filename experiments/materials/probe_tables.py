"""The tables of held-out probes, and what is averaged over them.

Source: M-BT-5, M-BT-6.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..workbench.intervals import numbers, prefixed
from ..workbench.results import Results, parts_by
from .clips import SOUNDS
from .kept_features import FEATURES

ProbeResults = Results[Any]
"""Results of an experiment that probes; ``inputs`` name its ``baselines``."""
PROBE_TABLES = {
    **FEATURES,
    "reads": "a clip, and what a probe of other groups reads of it, at a point or of a baseline",
    "fits": "a column at a point, or of a baseline: scores and code length",
    **SOUNDS,
}
KEYS = ["label", "source", "stream", "depth", "point"]
CODES = ["bits", "uniform_bits", "compression"]
Hits = Float[np.ndarray, "clip depth"]


def summarise(run: ProbeResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    reads = run["reads"]
    fits = run["fits"].drop(columns=["accuracy", "sum_off", "leaks", *CODES])
    every = rates(run, reads, "hit", "accuracy").merge(fits, on=KEYS, validate="one_to_one")
    yield "probes", every[every.source != "baseline"]
    yield "baselines", every[every.source == "baseline"]
    own = reads[reads.source == "model"]
    chance = own.groupby(KEYS, sort=False).shuffled_chance.mean().rename("chance").reset_index()
    yield "shuffled", rates(run, own, "shuffled_hit", "accuracy").merge(chance, on=KEYS)
    own = own.assign(selectivity=own.known_hit - own.control_hit)
    parts = own.groupby(KEYS, sort=False)[["known_hit", "control_hit"]].mean().reset_index()
    yield "selectivity", parts.merge(rates(run, own, "selectivity", "selectivity"), on=KEYS)
    yield "mdl", run["fits"][[*KEYS, *CODES]]
    yield "depths", best_depths(run)


def rates(run: ProbeResults, reads: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """Mean over clips of a column, for every probe, with its interval over groups."""
    rows = []
    for names, part in parts_by(reads, *KEYS):
        found = run.draws.row(part[column], part.group.tolist())
        sizes = {"n": found["n"], "n_groups": found["n_clusters"]}
        ends = {name: found["mean"], "low": found["low"], "high": found["high"]}
        rows.append({**names, **ends, **sizes})
    return pd.DataFrame(rows)


def columns_of(run: ProbeResults) -> list[str]:
    """The columns that were read, in their order."""
    return [*dict.fromkeys(run["reads"].label)]


def streams_of(run: ProbeResults) -> list[str]:
    """The streams whose points were read."""
    reads = run["reads"]
    return [*dict.fromkeys(reads[reads.source == "model"].stream)]


def along(
    run: ProbeResults, column: str, stream: str, value: str = "hit", source: str = "model"
) -> tuple[list[int], Hits, list[str]]:
    """Depths of a stream, a value of every clip at each of them, and the clips' groups."""
    reads = run["reads"]
    mine = reads[(reads.label == column) & (reads.stream == stream) & (reads.source == source)]
    if mine.empty:
        return [], np.empty((0, 0)), []
    # Clips in the order of the run, so that columns of several calls can be compared.
    first = mine[mine.depth == mine.depth.min()]
    wide = mine.pivot(index="clip", columns="depth", values=value).loc[first["clip"]]
    return [*map(int, wide.columns)], wide.to_numpy(np.float64), first.group.tolist()


def best_baseline(run: ProbeResults, column: str) -> tuple[str, Float[np.ndarray, " clip"]]:
    """The baseline that reads most, and which clips it reads rightly."""
    reads = run["reads"]
    mine = reads[(reads.label == column) & (reads.source == "baseline")]
    hits = {str(k): part.hit.to_numpy(np.float64) for k, part in mine.groupby("point", sort=False)}
    best = max(hits, key=lambda name: float(hits[name].mean()))
    return best, hits[best]


def most(run: ProbeResults, values: Hits, groups: list[str]) -> dict[str, Any]:
    """The largest mean along the depths (``at``), with ends that hold at all depths at once.

    The depth is chosen by the same clips: only ends of the whole curve stay honest.
    """
    if not values.size or np.isnan(values).any():
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "at": 0}
    found = run.draws.mean(values, groups, band="simultaneous")
    at = int(found.mean.argmax())
    return {**numbers(found, at), "at": at}


def best_depths(run: ProbeResults) -> pd.DataFrame:
    """Of every column and stream, the depth at which most is read, over what groups are drawn."""
    rows = []
    for column in columns_of(run):
        for stream in streams_of(run):
            depths, hits, groups = along(run, column, stream)
            # Its place among the depths, since not every depth need be read.
            found = run.draws.where(hits, groups, lambda means: means.argmax(axis=1).astype(float))
            ends = {"mean": found.at, "low": found.low, "high": found.high}
            at = {k: np.interp(v, range(len(depths)), depths) for k, v in ends.items()}
            rows.append({
                "label": column, "stream": stream, **prefixed("depth", at, ""),
                "accuracy": hits.mean(axis=0).max(),
            })  # fmt: skip
    return pd.DataFrame(rows)
