"""The tables of a ``semantic_vs_prosody`` run -> summary tables with their intervals.

Intervals resample sentences, speakers or clips, as the run's settings say. A *movable* pair is one
whose donor says the target and whose base does not: only there can a patch bring the target (C7).

Source: seed 001; M-001-1 to M-001-8, S-7 and S-11.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import Located
from hooked_alm.methods.statistics.label_scores import (
    WINNERS,
    Delta,
    Labels,
    flip_rates,
    handoff_depth,
    margin,
    target_recovery,
    target_shift,
    wins,
)

from ..materials.clips import SOUNDS
from ..workbench.results import Results, Row
from .settings import SemanticVsProsodyConfig

ProsodyResults = Results[SemanticVsProsodyConfig]
TABLES = {
    "runs": "a clip, and what the model answers",
    "lens": "what the lens reads of a clip at one depth",
    "pairs": "two clips, and what their own runs answer",
    "patches": "a pair's base with one span of one depth replaced by the donor's",
    "control_patches": "a clip whose audio is replaced at one depth by audio that does not say "
    "the target",
    **SOUNDS,
}
MAY_LACK = {"control_patches": ("item", "control", "depth", "prediction")}
FORMS: tuple[Delta, ...] = get_args(Delta)
FIDELITY = ("kl", "agrees", "entropy", "residual_norm", "label_mass", "best_label_rank")


def summarise(run: ProsodyResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    lens, cells = read_lens(run), read_patches(run)
    found = {
        "answers": answers(run),
        "winrate_curve_conflict": (
            {"winner": winner, **row}
            for winner in WINNERS
            for row in _by_depth(run, lens, f"{winner}_wins")
        ),
        "margin_curve_conflict": _by_depth(run, lens, "margin"),
        "lens_fidelity": (
            {"measure": name, **row} for name in FIDELITY for row in _by_depth(run, lens, name)
        ),
        "flip_rates": flips(run, cells),
        "delta_logits": shifts(run, cells),
        "recovery": recoveries(run, cells),
        "handoffs": handoffs(run, cells),
    }
    yield from ((name, pd.DataFrame(rows)) for name, rows in found.items())
    yield "control_flips", control_flips(run, cells)


def pair_types(run: ProsodyResults) -> list[str]:
    """The types of pairs that the run has."""
    return [str(which) for which in run["pairs"].type.unique()]


# --- Intervals


def cluster_labels(run: ProsodyResults, table: pd.DataFrame) -> list[Hashable]:
    """What each row is resampled with; the base's for a pair."""
    column: str = run.config.cluster
    if column == "item" and "item" not in table:
        column = "A"
    return table[column].tolist()


def mean_of(run: ProsodyResults, values: Any, table: pd.DataFrame) -> Row:
    """The mean of a value per row of a table, with its interval."""
    return run.draws.row(values, cluster_labels(run, table))


def first_depth(table: pd.DataFrame) -> pd.DataFrame:
    """A row per clip or pair."""
    return table[table.depth == table.depth.min()]


def over_depths(table: pd.DataFrame, column: str) -> Float[np.ndarray, "sample depth"]:
    """A column over clips, or over the pairs of one type and span."""
    return table[column].to_numpy(np.float64).reshape(-1, table.depth.nunique())


def _by_depth(run: ProsodyResults, table: pd.DataFrame, column: str) -> Iterator[Row]:
    """A row per depth: the mean of a column, with its interval."""
    clusters = cluster_labels(run, first_depth(table))
    points = run.draws.points(over_depths(table, column), clusters)
    for depth, point in zip(table.depth.unique().tolist(), points, strict=True):
        yield {"depth": depth, **point}


# --- Lens


def scores_of(
    run: ProsodyResults, table: pd.DataFrame, end: str = "z"
) -> Float[np.ndarray, "row label"]:
    """The labels' scores in a table; in pairs, those of ``base`` or ``donor``."""
    return table[[f"{end}_{name}" for name in run.config.labels]].to_numpy(np.float64)


def label_index(run: ProsodyResults, labels: pd.Series) -> Labels:
    """Labels as columns of the scores."""
    places = {label: place for place, label in enumerate(run.config.labels)}
    return np.array([places[label] for label in labels], np.int64)


def read_lens(run: ProsodyResults) -> pd.DataFrame:
    """What the lens reads, with whose label wins there, and by how much the voice's leads."""
    lens = run["lens"]
    scores = scores_of(run, lens)
    words, voice = (label_index(run, lens[which]) for which in ("semantic", "prosody"))
    shares = wins(scores, words, voice, ties=run.config.ties)
    won = {f"{winner}_wins": shares[:, w] for w, winner in enumerate(WINNERS)}
    return lens.assign(margin=margin(scores, words, voice), **won)


def answers(run: ProsodyResults) -> Iterator[Row]:
    """What the final answer follows, over all items and by the words' and the voice's emotion."""
    runs = run["runs"]
    hits = {which: runs.prediction == runs[which] for which in ("semantic", "prosody")}
    hits["other"] = ~(hits["semantic"] | hits["prosody"])
    strata = {"all": pd.Series(True, runs.index)}
    for which in ("semantic", "prosody"):
        strata |= {f"{which}={label}": runs[which] == label for label in run.config.labels}
    for stratum, chosen in strata.items():
        for answer, hit in hits.items() if chosen.any() else ():
            found = mean_of(run, hit[chosen], runs[chosen])
            yield {"stratum": stratum, "answer": answer, **found}


# --- Patching


def beside_pairs(run: ProsodyResults) -> pd.DataFrame:
    """The patches, each beside what the own runs of its pair answer."""
    return run["patches"].merge(run["pairs"], on="pair_id", suffixes=("", "_of_pair"))


def read_patches(run: ProsodyResults) -> pd.DataFrame:
    """The patches, each with what it brings: hit, shift in every form, and recovery.

    Recovery is that of movable pairs, and NaN for the others; ``total`` is what it is a share of.
    """
    cells, config = beside_pairs(run), run.config
    patched, base, donor = (scores_of(run, cells, end) for end in ("z", "base", "donor"))
    target = label_index(run, cells.target)
    movable = (cells.base_prediction != cells.target) & (cells.donor_prediction == cells.target)
    hit = (cells.prediction == cells.target).astype(np.float64)
    recovery = target_recovery(patched, base, donor, target, min_effect=config.min_effect)
    return cells.assign(
        movable=movable,
        hit=hit,
        hit_if_movable=hit.where(movable),
        recovery=np.where(movable, recovery, np.nan),
        total=target_shift(donor, base, target, "logit_diff"),
        **{form: target_shift(patched, base, target, form) for form in FORMS},
    )


def _by_span(cells: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """The cells of each type and span."""
    for (which, span), part in cells.groupby(["type", "span"], sort=False):
        yield {"type": which, "span": span}, part


def flips(run: ProsodyResults, cells: pd.DataFrame) -> Iterator[Row]:
    """Flip rates by span and depth, with what they have to be compared with (M-001-6, C7)."""
    answers = ("base_prediction", "donor_prediction", "prediction", "target")
    for where, part in _by_span(cells):
        rows = (_by_depth(run, part, column) for column in ("hit", "hit_if_movable"))
        for every, movable in zip(*rows, strict=True):
            cell = part[part.depth == every["depth"]]
            yield {
                **where,
                "depth": every["depth"],
                **asdict(flip_rates(*(label_index(run, cell[name]) for name in answers))),
                "to_target_low": every["low"],
                "to_target_high": every["high"],
                "conditional_low": movable["low"],
                "conditional_high": movable["high"],
                "n": len(cell),
            }


def shifts(run: ProsodyResults, cells: pd.DataFrame) -> Iterator[Row]:
    """Mean shift of the target in its three forms, by span and depth (M-001-7, C31)."""
    for (_, sweeps), form in product(cells.groupby("type", sort=False), FORMS):
        for where, part in _by_span(sweeps):
            for row in _by_depth(run, part, form):
                yield {**where, "depth": row["depth"], "form": form, **row}


def recoveries(run: ProsodyResults, cells: pd.DataFrame) -> Iterator[Row]:
    """Mean recovery of movable pairs by span and depth."""
    for where, part in _by_span(cells):
        yield from ({**where, **row} for row in _by_depth(run, part, "recovery"))


def _highest(recovery: Float[np.ndarray, "curve depth"]) -> Float[np.ndarray, " curve"]:
    return recovery.argmax(axis=1).astype(np.float64)


EVENTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "audio": ("leaves", handoff_depth),
    "readout": ("arrives", partial(handoff_depth, rising=True)),
}
"""What happens to a span at which depth; others pass on what they have."""


def handoffs(run: ProsodyResults, cells: pd.DataFrame) -> Iterator[Row]:
    """Where the audio lets go for good (S-11), and what takes over.

    ``leaves``: the first depth from which the audio's mean recovery stays below one half.
    ``arrives``: the first from which the readout's stays at one half or above. ``passes``: the
    depth at which another span's recovery is largest, and how large. ``undefined`` is the share of
    the replicates without such a depth.
    """
    is_whole = np.isfinite(cells.recovery).groupby(cells.pair_id).transform("all")
    for where, part in _by_span(cells.assign(is_whole=is_whole)[cells.span != "all"]):
        kept = part[part.is_whole]
        clusters = cluster_labels(run, first_depth(kept))
        event, find = EVENTS.get(where["span"], ("passes", _highest))
        found, largest = Located(np.nan, np.nan, np.nan, undefined=1.0), np.nan
        if len(kept):
            values = over_depths(kept, "recovery")
            found = run.draws.where(values, clusters, find)
            largest = float(values.mean(axis=0).max())
        yield {
            **where,
            "event": event,
            "depth": found.at,
            "low": found.low,
            "high": found.high,
            "recovery": largest,
            "undefined": found.undefined,
            "n": len(clusters),
            "n_clusters": len({*clusters}),
        }


def control_flips(run: ProsodyResults, cells: pd.DataFrame) -> pd.DataFrame:
    """What other donors do where a pair's donor brings the target: the floor, by depth.

    Over movable pairs: how often the base's audio, replaced by the control's, says the pair's
    target, and how often it no longer says what the base said.
    """
    pairs = cells[cells.movable].drop_duplicates("pair_id")
    pairs = pairs[["type", "A", "target", "text", "speaker"]]
    controls = run["control_patches"][["item", "control", "depth", "prediction"]]
    floor = pairs.merge(controls, left_on="A", right_on="item")
    base = run["runs"].set_index("item").prediction
    rows = []
    for key, part in floor.groupby(["type", "control", "depth"], sort=False):
        hits = mean_of(run, part.prediction == part.target, part)
        left = float((part.prediction != part["A"].map(base)).mean())
        rows.append((*key, hits["mean"], hits["low"], hits["high"], left, hits["n"]))
    columns = ["type", "control", "depth", "to_target", "low", "high", "from_base", "n"]
    return pd.DataFrame(rows, columns=columns)
