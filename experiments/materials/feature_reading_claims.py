"""What readings of features control, and what claims about them are made from.

Source: M-SAE-4, M-SAE-6.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..workbench.claims import Defect
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from ..workbench.intervals import numbers
from .feature_reading_tables import ReadingResults

MOST_ERRORS = 3
"""Standard errors above chance at which labels that were dealt out are surely read."""
READ_FACTORS = ("dci", "factors", "factor_errors")
"""Tables of what is read of factors."""

# --- Controls


def _together(run: ReadingResults) -> Outcome:
    expected = "none on both sides of a fold"
    if run.config.cv == "random":
        return Outcome("folds were asked to be random", expected, None)
    n_folds = run["held_out"].groupby(["of", "group"]).fold.nunique()
    n = int((n_folds > 1).sum())
    return Outcome(f"{n} of {len(n_folds)} groups", expected, n == 0)


def _whole(run: ReadingResults) -> Outcome:
    return at_most(run["checks"].otherwise, 0.0, "clips")


def _dealt(run: ReadingResults) -> Outcome:
    """Of the columns and features together: those of one column share the clips."""
    checks = run["checks"]
    off, n = (checks.dealt - checks.chance).mean(), checks.groupby("label").n_clips.first().sum()
    bound = MOST_ERRORS * float(np.sqrt((checks.chance * (1 - checks.chance)).mean() / n))
    return Outcome(f"{off:+.3f} from chance", f"at most {bound:.3f} above", bool(off <= bound))


def _themselves(run: ReadingResults) -> Outcome:
    """A Lasso of a factor that has it among its codes takes that alone, whatever goes with it."""
    mine = run["dci"][run["dci"].kind == "itself"]
    n_codes = mine.n_codes.where(mine.n_codes > 1)  # of one, neither is defined
    off = mine[n_codes.notna()][["disentanglement", "completeness"]] - 1
    return at_most(off, ROUNDING["share"]["float32"])


def _finished(run: ReadingResults) -> Outcome:
    return at_most(run["factors"].unfinished, 0.0, "Lassos")


READING_CONTROLS = (
    Control(name="no group is on both sides of a fold", of=("reads", "factor_errors"),
            check=_together,
            guards_against="probes that know the speakers, or texts, that they are judged on"),
    Control(name="all features are the whole probe", of=("reads",), check=_whole,
            guards_against="features that a ranking loses, or doubles"),
    Control(name="labels that are dealt out are read at chance", of=("reads",), check=_dealt,
            guards_against="a ranking that knows the clips that are read"),
    Control(name="factors that are codes themselves are held apart", of=READ_FACTORS,
            check=_themselves,
            guards_against="weights that are counted to another factor or code"),
    Control(name="every Lasso comes to its end", of=READ_FACTORS, check=_finished,
            guards_against="weights that depend on where a fit was stopped"),
)  # fmt: skip
READING_DEFECTS = (
    Defect("C58", ("reads", *READ_FACTORS), lambda config: config.cv == "random" and config.force,
           "Folds are random although speakers may be known: what tells them apart is read, too."),
)  # fmt: skip

# --- What claims are made from


def hits_of(
    reads: pd.DataFrame, kind: str, how: str = "kept", *, at_random: bool = False
) -> pd.DataFrame:
    """A row for each clip's group, as often as it has clips, and a column for each k."""
    mine = reads[
        (reads.kind == kind) & (reads.how == how) & ((reads.ranked == "random") == at_random)
    ]
    wide = mine.pivot(index="group", columns="k", values="value")
    sizes = mine.drop_duplicates("group").set_index("group").n
    return wide.loc[np.repeat(sizes.index, sizes)]


def surely_more(run: ReadingResults, more: pd.DataFrame) -> dict[str, Any]:
    """The largest mean over the columns (``at``), with ends that hold for all of them at once."""
    found = run.draws.mean(more.to_numpy(), [*more.index], band="simultaneous")
    at = int(found.mean.argmax())
    return {**numbers(found, at), "at": int(more.columns[at])}


def best_of(others: Sequence[pd.DataFrame], ks: Sequence[int]) -> pd.DataFrame:
    """Of each k, what is read off the features that more is read off."""
    best = np.argmax([other[ks].mean() for other in others], axis=0)
    return pd.DataFrame({k: others[i][k] for k, i in zip(ks, best.tolist(), strict=True)})


def commonest(run: ReadingResults, label: str) -> float:
    """Share of a column's commonest label."""
    held_out = run["held_out"]
    return float(held_out[held_out.of == label].value.value_counts(normalize=True).iloc[0])


def leaks_of(run: ReadingResults, label: str) -> dict[str, bool]:
    """Reasons against a claim about a column whose folds have something in common."""
    leaks = next(one["leaks"] for one in run.inputs["labels"] if one["column"] == label)
    return {f"the {name} of {share:.0%} of the clips is in other folds, too": True
            for name, share in leaks.items()}  # fmt: skip
