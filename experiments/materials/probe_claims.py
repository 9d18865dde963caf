"""What held-out probes control, and may establish.

Source: M-BT-5, M-BT-6.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import MIN_UNITS

from ..workbench.claims import Claim, Defect, Finding, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .probe_tables import (
    KEYS,
    Hits,
    ProbeResults,
    along,
    best_baseline,
    columns_of,
    most,
    streams_of,
)

MOST_ERRORS = 3
"""Standard errors above chance at which shuffled labels are surely read."""
IN = " in the "
"""Between a column and a stream, in the names of claims."""
Against = Float[np.ndarray, "clip #depth"]

# --- Controls


def _together(run: ProbeResults) -> Outcome:
    expected = "none on both sides of a fold"
    if run.config.cv == "random":
        return Outcome("folds were asked to be random", expected, None)
    n_folds = run["reads"].groupby([*KEYS, "group"]).fold.nunique()
    n = int((n_folds > 1).sum())
    return Outcome(f"{n} of {len(n_folds)} groups", expected, n == 0)


def _same_folds(run: ProbeResults) -> Outcome:
    reads, expected = run["reads"], "none"
    n_folds = reads.groupby(["label", "clip"]).fold.nunique()
    n_probes = reads.groupby(["label", "clip"]).size().groupby("label").nunique()
    off = int((n_folds > 1).sum() + (n_probes > 1).sum() + reads.duplicated([*KEYS, "clip"]).sum())
    return Outcome(f"{off} clips in several folds, or not once in each probe", expected, off == 0)


def _shuffled(run: ProbeResults) -> Outcome:
    mine = run["reads"][run["reads"].source == "model"]
    chance, off = mine.shuffled_chance, (mine.shuffled_hit - mine.shuffled_chance).mean()
    bound = MOST_ERRORS * float(np.sqrt((chance * (1 - chance)).mean() / len(mine)))
    found = f"{off:+.3f} from chance, of {len(mine)} labels"
    return Outcome(found, f"at most {bound:.3f} above", bool(off <= bound))


def _sums(run: ProbeResults) -> Outcome:
    return at_most(run["fits"].sum_off, ROUNDING["nat"]["float32"])


def _scored(run: ProbeResults) -> Outcome:
    hits, scored = run["reads"].groupby(KEYS).hit.mean(), run["fits"].set_index(KEYS).accuracy
    return at_most(hits.reindex(scored.index) - scored, ROUNDING["nat"]["float32"])


PROBE_CONTROLS = (
    Control(name="no group is on both sides of a fold", of=("reads",), check=_together,
            guards_against="probes that know the speakers, or texts, that they are judged on"),
    Control(name="all features are read in the same folds", of=("reads",), check=_same_folds,
            guards_against="a baseline that is easier, or harder, than the probe"),
    Control(name="shuffled labels are read at chance", of=("reads",), check=_shuffled,
            guards_against="labels that reach a probe by another way than its features"),
    Control(name="probabilities add up to 1", of=("reads", "fits"), check=_sums,
            guards_against="probes that did not converge, or have lost a label"),
    Control(name="scores are those of the clips", of=("reads", "fits"), check=_scored,
            guards_against="clips and labels in another order than features"),
)  # fmt: skip
PROBE_DEFECTS = (
    Defect("C58", ("reads", "fits"), lambda config: config.cv == "random" and config.force,
           "Folds are random although speakers may be known: a probe that tells them apart reads "
           "whatever goes with them."),
)  # fmt: skip

# --- Claims: of a column and a stream, at the best of all depths


def _pairs(run: ProbeResults) -> Sequence[str]:
    return [f"{column}{IN}{stream}" for column in columns_of(run) for stream in streams_of(run)]


def _beyond(
    claim: str, run: ProbeResults, column: str, values: Hits, against: Against, groups: list[str],
    facts: Callable[[int], str], why_not: dict[str, bool],
) -> Finding:  # fmt: skip
    """That some hits are surely more than others at some depth, chosen by the same clips."""
    found, n = most(run, values - against, groups), len({*groups})
    own = run["reads"][run["reads"].label == column].drop_duplicates("clip")
    above = most(run, values - own.value.value_counts(normalize=True).max(), groups)
    return judged(
        claim, f"{facts(found['at'])}: {shown(found)} more",
        {
            **few(len(values), "clips"),
            f"only {n} groups, too few for an interval": n < MIN_UNITS,
            **why_not,
            "not surely above the commonest label's share": not above["low"] > 0,
            "not surely more": not found["low"] > 0,
        },
        numbers=found, unit="accuracy",
    )  # fmt: skip


def _decodable(run: ProbeResults, pair: str) -> Finding:
    column, stream = pair.rsplit(IN, 1)
    depths, hits, groups = along(run, column, stream)
    best, baseline = best_baseline(run, column)
    name = run.inputs["baselines"][best]
    leaks = run["fits"].set_index("label").leaks[[column]].iloc[0]
    return _beyond(
        f"{column} can be read off the {stream}, better than without its states",
        run, column, hits, baseline[:, None], groups,
        lambda k: f"Of {len(hits)} clips of {len({*groups})} groups {hits[:, k].mean():.2f} at "
        f"depth {depths[k]}, {baseline.mean():.2f} by the best baseline, {name}",
        {leaks: bool(leaks)},
    )  # fmt: skip


def _learnt(run: ProbeResults, pair: str) -> Finding:
    column, stream = pair.rsplit(IN, 1)
    claim = f"Training has made {column} easier to read off the {stream}"
    depths, hits, groups = along(run, column, stream)
    blind = along(run, column, stream, source="untrained")[1]
    if not blind.size:
        return not_measured(claim, "random weights were not read", "accuracy")
    return _beyond(
        claim, run, column, hits, blind, groups,
        lambda k: f"At depth {depths[k]} {hits[:, k].mean():.2f}, {blind[:, k].mean():.2f} with "
        "random weights", {},
    )  # fmt: skip


def _deeper(run: ProbeResults, pair: str) -> Finding:
    column, stream = pair.rsplit(IN, 1)
    depths, hits, groups = along(run, column, stream)
    table = run["depths"]
    best = table[(table.label == column) & (table.stream == stream)].iloc[0]
    at = shown({"mean": best.depth, "low": best.depth_low, "high": best.depth_high}, 0)
    return _beyond(
        f"{column} is read better further up the {stream} than where it begins",
        run, column, hits, hits[:, :1], groups,
        lambda k: f"Best at depth {at} of {depths[0]} to {depths[-1]}, {best.accuracy:.2f}; "
        f"{hits[:, 0].mean():.2f} at depth {depths[0]}",
        {"one depth was read": len(depths) == 1},
    )  # fmt: skip


def _selective(run: ProbeResults, pair: str) -> Finding:
    column, stream = pair.rsplit(IN, 1)
    claim = f"Probes of {column} in the {stream} do more than tell types of clips apart"
    depths, known, groups = along(run, column, stream, "known_hit")
    control = along(run, column, stream, "control_hit")[1]
    if np.isnan(known).any():
        return not_measured(claim, "no two clips share a type", "accuracy")
    return _beyond(
        claim, run, column, known, control, groups,
        lambda k: f"Of known types, at depth {depths[k]}, {known[:, k].mean():.2f} of the labels "
        f"and {control[:, k].mean():.2f} of the control labels", {},
    )  # fmt: skip


_CLAIMS = {
    "decodable": (_decodable, ("reads", "fits")),
    "learnt": (_learnt, ("reads",)),
    "deeper": (_deeper, ("reads",)),
    "selective": (_selective, ("reads",)),
}


def probe_claims(*names: str) -> tuple[Claim, ...]:
    """Claims by their names; ``learnt`` needs a model with random weights."""
    return tuple(
        Claim(name=f"{name}: {{}}", rests_on=tables, judge=judge, per=_pairs)
        for name in names
        for judge, tables in [_CLAIMS[name]]
    )
