"""What experiments on conflicts claim in the same words, and how they judge patched runs.

Source: S-11, S-12.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..workbench.claims import MIN_ITEMS, Finding, counted, few, judged, shown
from ..workbench.controls import ROUNDING, Outcome, at_most
from ..workbench.results import Results
from .conflict_runs import EXCHANGES
from .confounds import confounded

LARGE = 0.5
"""Recovery above which a part carries what is exchanged."""
MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a hand-off before its interval means nothing."""


def of_enough_clips(judge: Callable[..., Finding]) -> Callable[..., Finding]:
    """Doubts a finding of many items but few clips: what is sampled is clips."""

    @wraps(judge)
    def judged(run: Results[Any], *value: str, **more: Any) -> Finding:
        finding, n_clips = judge(run, *value, **more), run["runs"]["clip"].nunique()
        is_few = n_clips < MIN_ITEMS <= finding.n
        return finding.doubted(f"only {n_clips} clips") if is_few else finding

    return judged


def as_whole_runs(run: Results[Any], off: Any) -> Outcome:
    """The outcome of a control: what patched runs are off by from whole runs that they must equal.

    Exactly 0 where each patch is a whole forward, rounding under the fast engine.
    """
    allowed = 0.0 if run.config.engine == "hooks" else ROUNDING["logit"][run.config.dtype]
    return at_most(off, allowed, "logits")


def shares_add_up(cells: pd.DataFrame, share: str, min_effect: float) -> Outcome:
    """The outcome of a control: with the text's, made anew, the audio's shares add up to 1.

    Args:
        cells: effects of both inputs, and a column of shares; NaN where these are undefined.
        share: name of the column.
        min_effect: of the shares; see ``grounding_coefficient``.
    """
    cells = cells[cells[share].notna()]
    of_text = grounding_coefficient(
        cells.effect_text.to_numpy(float), cells.effect_audio.to_numpy(float),
        min_effect=min_effect,
    )  # fmt: skip
    return at_most(cells[share].to_numpy(float) + of_text - 1, 1e-9)


def input_finding(
    run: Results[Any],
    row: Mapping[str, Any],
    even: float,
    what: Mapping[str, str],
    claim: str,
    facts: str,
    why_not: Mapping[str, bool],
    unit: str,
) -> Finding:
    """The claim that something is of one of both inputs, by the audio's share.

    Args:
        run: of the claim.
        row: the share, with its interval.
        even: share where both inputs do alike.
        what: the inputs ``audio`` and ``text``, in words.
        claim: see `Finding`; ``{}`` stands for the input.
        facts: see `Finding`.
        why_not: reasons against it beside its interval, and, of the audio, what else than their
            label tells clips apart.
        unit: of the share.
    """
    is_sure = row["low"] > even or row["high"] < even
    name = "audio" if row["mean"] > even else "text"
    doubts = confounded(run["confounds"], run.config) if name == "audio" else {}
    level = {f"not surely on one side of {even:g}": not is_sure}
    return judged(
        claim.format(what[name]), facts, {**why_not, **level, **doubts}, numbers=row, unit=unit
    )


def numbers_of(row: pd.Series, middle: str) -> dict[str, Any]:
    """Mean, ends and size of a row whose middle has another name."""
    return {"mean": row[middle], "low": row.low, "high": row.high, "n": row.n}


def handoff_finding(
    table: pd.DataFrame, donor: str, x: str, last: int, why_not: Mapping[str, bool]
) -> Finding:
    """The claim that what a donor exchanges moves from its own span to the readout.

    Args:
        table: rows of `handoffs`.
        donor: one of `EXCHANGES`.
        x: column of the place, a block or a depth.
        last: the last of these; the first is 0.
        why_not: reasons against it that are the run's own.
    """
    what, source, _ = EXCHANGES[donor]
    claim = f"The {what} moves from {source} to the readout"
    rows = table[table.donor == donor].set_index("event")
    if not {"leaves", "arrives"} <= {*rows.index}:
        facts, unknown = "Where was not measured", {"not all of it was patched": True}
        return counted(claim, facts, unknown, {}, f"{x}s")
    leaves, arrives = rows.loc["leaves"], rows.loc["arrives"]
    if np.isfinite(leaves[x]):
        claim += f" by {x} {leaves[x]:.0f}"
    return counted(
        claim,
        f"It leaves {source} at {place_in_words(leaves, x, last)} and is at the readout from "
        f"{place_in_words(arrives, x, last)}",
        no_handoff(leaves, x) | no_handoff(arrives, x) | dict(why_not),
        numbers_of(leaves, x),
        f"{x}s",
    )


def place_in_words(row: pd.Series, x: str, last: int) -> str:
    """Where something happens, with its interval."""
    if not np.isfinite(row[x]):
        return f"no {x}"
    return f"{x} {shown(numbers_of(row, x), 0)} of 0 to {last}"


def no_handoff(row: pd.Series, x: str) -> dict[str, bool]:
    """The reasons against a place that too few items, or not all replicates, have."""
    is_unsure = row.n >= MIN_ITEMS and not row.undefined <= MOST_UNDEFINED
    return {
        **few(row.n, "items have a total effect to recover"),
        f"no such {x} in some resamples": is_unsure,
    }


class BestPart(NamedTuple):
    """The part that does most in one reading, such as a head; see `Draws.best`."""

    name: str
    recovery: Mapping[str, Any]
    """``mean``, ``low``, ``high`` and ``n``."""
    lead_low: float
    told: str
    """What it does, in words."""


def carrier_finding(
    part: str, does: str, best: Mapping[str, BestPart], items: str, why_not: Mapping[str, bool]
) -> Finding:
    """The claim that a single part carries what an exchange does, in every reading of it.

    Args:
        part: what it is one of, such as head.
        does: what it does, such as "carries the voice's part".
        best: reading -> the part that does most.
        items: that have a recovery, in words.
        why_not: reasons against it that are the run's own.
    """
    weaker = min(best.values(), key=lambda one: np.nan_to_num(one.recovery["mean"], nan=-1.0))
    names = [*dict.fromkeys(one.name for one in best.values())]
    level = [reading for reading, one in best.items() if not one.lead_low > 0]
    small = [reading for reading, one in best.items() if not one.recovery["low"] > LARGE]
    reasons = {
        **few(min(one.recovery["n"] for one in best.values()), items),
        f"no single {part}: not the same in both readings": len(names) > 1,
        f"no single {part}: none is surely ahead of all others ({', '.join(level)})": bool(level),
        f"none surely recovers more than {LARGE:g} ({', '.join(small)})": bool(small),
    }
    which = f"A single {part}" if any(reasons.values()) else f"{part.capitalize()} {names[0]}"
    return judged(
        f"{which} {does}",
        "; ".join(f"{reading}: {one.told}" for reading, one in best.items()),
        reasons | dict(why_not),
        numbers=weaker.recovery,
        unit="recovery",
    )
