"""What a ``sae_patching`` run may establish, in sentences made from its numbers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from ..materials.conflict_claims import of_enough_clips
from ..materials.confounds import confounded
from ..workbench.claims import Claim, Finding, few, judged, shown
from ..workbench.results import having
from .tables import BESIDE, ExchangeResults

HALF, MOST = 0.5, 0.9
"""Shares above which latents flip answers, and others are as active and move as far; and from which
a share is nearly all."""


def _conditions(run: ExchangeResults) -> Sequence[str]:
    return [*run.config.conditions]


def _row(table: pd.DataFrame, **where: object) -> dict[str, Any]:
    return {str(name): value for name, value in having(table, **where).iloc[0].items()}


def _means(run: ExchangeResults, condition: str, family: str, measure: str) -> dict[str, Any]:
    """The row of a family at the number of latents that claims are about."""
    n = run.config.n_latents if family in ("chosen", *BESIDE) else 0
    where = {"family": family, "measure": measure, "n_latents": n, "alpha": 1}
    return _row(run["edit_means"], condition=condition, **where)


def _flips(run: ExchangeResults, condition: str) -> Finding:
    """The claim that the chosen latents decide the answer."""
    found, n = _means(run, condition, "chosen", "flipped"), run.config.n_latents
    return judged(
        f"Exchanging {n} latents of either label flips the answer, under {condition}",
        f"{shown(found)} of the answers become the other label's, with all latents "
        f"{shown(_means(run, condition, 'all', 'flipped'))}, n = {int(found['n'])} exchanges; in "
        f"{int(found['n_undefined'])} it is the answer already",
        {
            **few(found["n"], "exchanges whose label is not the answer already"),
            f"not surely more than {HALF:g} of them": not found["low"] > HALF,
            **confounded(run["confounds"], run.config),
        },
        numbers=found,
        unit="share of answers",
    )


def _more(run: ExchangeResults, condition: str, family: str) -> Finding:
    """The claim that it is these latents, not as many others, nor a push as large."""
    n, what = run.config.n_latents, BESIDE[family]
    lead = _row(run["compared"], condition=condition, family=family, n_latents=n)
    ours, theirs = (_means(run, condition, one, "flipped") for one in ("chosen", family))
    way, other_way = (_means(run, condition, one, "moved")["mean"] for one in ("chosen", family))
    facts = (
        f"{ours['mean']:.2f} of the answers flip, with {what} {theirs['mean']:.2f}; difference "
        f"{shown(lead)}, n = {int(lead['n'])}; rows move by {way:.3g} and {other_way:.3g}"
    )
    reasons = {**few(lead["n"], "exchanges"), "not surely more often": not lead["low"] > 0}
    if family == "matched":
        share = theirs["activity"] / ours["activity"]
        facts += f"; the others are {share:.2f} times as active"
        reasons["no others are as active"] = not share > HALF
    if family == "scaled":
        reasons["the others leave most rows alone"] = not other_way / way > HALF
    return judged(
        f"{n} latents of either label flip the answer more often than {what}, under {condition}",
        facts, reasons | confounded(run["confounds"], run.config), numbers=lead,
        unit="share of answers",
    )  # fmt: skip


def _nearly_all(
    run: ExchangeResults, condition: str, family: str, measure: str, claim: str, facts: str
) -> Finding:
    found = _means(run, condition, family, measure)
    return judged(
        f"{claim}, under {condition}",
        f"{facts}: {shown(found)}, n = {int(found['n'])} exchanges",
        few(found["n"], "such exchanges")
        | {f"not surely {MOST:g} or more": not found["low"] >= MOST},
        numbers=found,
        unit="share",
    )


CLAIMS = (
    Claim(name="flips_{}", rests_on=("edits",), judge=of_enough_clips(_flips), per=_conditions),
    *(
        Claim(name=f"more_than_{family}_{{}}", rests_on=("edits",),
              judge=of_enough_clips(partial(_more, family=family)), per=_conditions)
        for family in BESIDE
    ),
    Claim(name="carried_{}", rests_on=("edits",), per=_conditions, judge=of_enough_clips(partial(
        _nearly_all, family="all", measure="recovery",
        claim="All features carry nearly all that the rows carry",
        facts="Exchanging all of them has this part of the effect of exchanging the rows",
    ))),
    Claim(name="stays_{}", rests_on=("edits",),
          per=lambda run: [*run["edits"].dropna(subset="stayed").condition.unique()],
          judge=of_enough_clips(partial(
        _nearly_all, family="chosen", measure="stayed",
        claim="An answer that is not the voice's stays",
        facts="Of the answers that follow something else, so many stay",
    ))),
)  # fmt: skip
