"""What a ``grounding`` run may establish, in sentences made from its numbers.

Source: seed 003; M-GC.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..materials.conflict_claims import (
    BestPart,
    carrier_finding,
    handoff_finding,
    input_finding,
    of_enough_clips,
)
from ..materials.conflict_runs import EXCHANGES, INPUTS
from ..materials.confounds import confounded
from ..workbench.claims import Claim, Finding, few, not_measured, shown, within_rounding
from ..workbench.intervals import unprefixed
from ..workbench.results import having
from .measure import READINGS
from .tables import GroundingResults, coefficient

WHAT = {name: EXCHANGES[kind].what for name, kind in INPUTS.items()}


def _doubts_of(run: GroundingResults, name: str) -> dict[str, bool]:
    """What else than its label may tell clips apart is a reason against what the audio does."""
    return confounded(run["confounds"], run.config) if name == "audio" else {}


def _at_rounding(run: GroundingResults, name: str) -> dict[str, bool]:
    cells = run["grounding"].drop_duplicates("pair").dropna(subset=f"te_{name}")
    return within_rounding(cells[f"te_{name}"], cells.noise, "logits")


@of_enough_clips
def _grounded(run: GroundingResults) -> Finding:
    """The claim which input the answer rests on: the coefficient of whole runs."""
    n_items = run["runs"].pair.nunique()
    row = coefficient(run["grounding_means"]).to_dict()
    if not row["n"]:
        why = "no item has an effect of audio and text together to share"
        if run.config.condition == "audio_only":
            why = "under audio_only no instruction can be exchanged"
        claim, facts = "The answer is grounded in one input", f"gc = NaN in {n_items} items"
        return not_measured(claim, why, run.config.gc_form, facts)
    effects = ", ".join(f"{WHAT[one]} {run['items'][f'te_{one}'].mean():.2f}" for one in INPUTS)
    return input_finding(
        run, row, run.config.even, WHAT, "The answer is grounded in the {}",
        f"gc = {shown(row)}, {run.config.even:g} is even; total effects in logits: {effects}; "
        f"n = {row['n']} of {n_items} items",
        few(row["n"]), run.config.gc_form,
    )  # fmt: skip


@of_enough_clips
def _handover(run: GroundingResults, reading: str) -> Finding:
    """The claim where the input that moves the answer most reaches the readout."""
    effects = run["items"][[f"te_{name}" for name in INPUTS]].mean().abs()
    name = str(effects.idxmax()).removeprefix("te_")
    found = handoff_finding(
        having(run["handoffs"], direction=reading), INPUTS[name], "depth", run.n_blocks,
        _at_rounding(run, name) | _doubts_of(run, name),
    )  # fmt: skip
    return replace(found, claim=f"{found.claim}, by {reading}")


@of_enough_clips
def _head(run: GroundingResults, name: str) -> Finding:
    """The claim that one head carries an input's part, in both readings."""
    best, does = having(run["best_heads"], input=name), f"carries the {WHAT[name]}'s part"
    if best.empty:
        why = f"the {WHAT[name]} was not exchanged"
        return not_measured(f"A single head {does}", why, "recovery")
    parts = {row["direction"]: _part(row, run) for row in best.to_dict("records")}
    doubts = _at_rounding(run, name) | _doubts_of(run, name)
    return carrier_finding("head", does, parts, "items have a total effect to recover", doubts)


def _part(row: Mapping[str, Any], run: GroundingResults) -> BestPart:
    name, recovery = f"L{row['block']:.0f}H{row['head']:.0f}", unprefixed("recovery", row, "")
    told = f"{name} moves {shown(unprefixed('effect', row, ''))} logits"
    if np.isfinite(row["lead"]):
        told += f", {row['lead']:.2f} ahead of L{row['next_block']:.0f}H{row['next_head']:.0f}"
    least = f"{run.config.min_effect:g} logits"
    nothing = f"undefined, as the exchange moves no item's answer by {least}"
    told += f", recovery {shown(recovery) if row['n_recovered'] else nothing}"
    return BestPart(name, recovery | {"n": row["n_recovered"]}, row["lead_low"], told)


CLAIMS = (
    Claim(name="grounded", rests_on=("grounding", "runs"), judge=_grounded),
    Claim(name="handover_{}", rests_on=("grounding",), judge=_handover,
          per=lambda run: [*READINGS]),
    Claim(name="head_{}", rests_on=("nodes",), judge=_head, per=lambda run: [*INPUTS]),
)  # fmt: skip
