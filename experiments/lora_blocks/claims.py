"""What a ``lora_blocks`` run controls and claims.

Source: M-LO-3, M-LO-8; "delayed specialisation" of Behind the Scenes.
"""

from typing import Any

import numpy as np
import pandas as pd

from ..materials.conflict_claims import LARGE, BestPart, carrier_finding, of_enough_clips
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import (
    ROUNDING,
    Control,
    Outcome,
    at_most,
    label_controls,
    same_at_the_end,
)
from .tables import LoraResults


def _resumed(run: LoraResults) -> Outcome:
    return at_most(run["items"]["resumed"], 0.0, "logits")


def _last_depth(run: LoraResults) -> Outcome:
    return same_at_the_end(
        run, run["depths"], run["runs"], on=["item", "way"], column="lead", unit="logits"
    )


def _whole(run: LoraResults) -> Outcome:
    runs = run["runs"].pivot(index="item", columns="way", values="lead")
    items = run["items"].set_index("item")
    off = pd.concat([items["lead_off"] - runs["base"], items["lead_on"] - runs["adapted"]])
    return at_most(off, ROUNDING["logit"][run.config.dtype], "logits")


CONTROLS = (
    *label_controls("runs", "items", "switched"),
    Control(name="the whole adapter, gone on with at the middle block", of=("items", "switched"),
            check=_resumed,
            guards_against="a stream that is not the one which enters a switched block"),
    Control(name="with and without the adapter, switched = run whole", of=("items", "switched"),
            check=_whole, guards_against="switches that leave updates on or off"),
    Control(name="the lens at the last depth = the model", of=("depths", "drift"),
            check=_last_depth, guards_against="a stream that is read at another position (I5)"),
    Control(name="every block with an update is switched", of=("sizes", "switched"),
            check=lambda run: at_most(
                [len({*run["sizes"]["block"]} ^ {*run["switched"]["block"]})], 0.0, "blocks"),
            guards_against="updates that are measured in other blocks than they act in"),
)  # fmt: skip


@of_enough_clips
def _carrier(run: LoraResults) -> Finding:
    """The claim that one block carries what the adapter does, in both readings."""
    does, best = "carries what the adapter does", run["best_blocks"]
    if best.empty:
        few_moved = f"no item is moved by {run.config.min_effect:g} logits or more"
        return not_measured(f"A single block {does}", few_moved, "recovery")
    parts = {
        row["reading"]: BestPart(
            f"{row['block']}", row, row["lead_low"], f"block {row['block']}, recovery {shown(row)}"
        )
        for row in best.to_dict("records")
    }
    return carrier_finding("block", does, parts, "items that the adapter moves", {})


def _over_blocks(
    run: LoraResults, measure: str, claim: str, facts: str, bar: float, why: str, unit: str
) -> Finding:
    """The claim that a measure over the blocks, of one alone, is surely above a bar.

    Args:
        run: of the claim.
        measure: of ``size_ranks``.
        claim: as it is made.
        facts: what was measured, with ``{}`` for its mean and interval.
        bar: that it has to be above.
        why: the reason against the claim where it is not.
        unit: of the measure.
    """
    table = run["size_ranks"]
    rows = table[(table["reading"] == "denoise") & (table["measure"] == measure)]
    row: dict[str, Any] = rows.iloc[0].to_dict()
    if not row["n"] > 0:
        return not_measured(claim, "no item is moved, or all updates are as large", unit)
    return judged(
        claim,
        f"{facts.format(shown(row))}, mean over {int(row['n'])} items",
        {**few(row["n"], "items that the adapter moves"), why: not row["low"] > bar},
        numbers=row, unit=unit,
    )  # fmt: skip


@of_enough_clips
def _by_size(run: LoraResults) -> Finding:
    """The claim that the larger an update is, the more it does."""
    facts = (
        f"Spearman's rho over {run['sizes']['block'].nunique()} blocks of Frobenius norm and size "
        "of effect alone: {}"
    )
    return _over_blocks(
        run, "rho", "Blocks with larger updates change the answer more", facts, 0.0,
        "no correlation surely above 0", "rho",
    )  # fmt: skip


@of_enough_clips
def _late(run: LoraResults) -> Finding:
    """The claim that the adapter acts late."""
    first = int(np.ceil(run.n_blocks / 2))
    facts = f"Blocks from {first} on do {{}} of what single blocks do towards the adapted answer"
    return _over_blocks(
        run, "late", "What the adapter does is done in the upper half of the blocks", facts, LARGE,
        "not surely more than half", "share",
    )  # fmt: skip


CLAIMS = (
    Claim(name="carrier", rests_on=("items", "switched"), judge=_carrier),
    Claim(name="by_size", rests_on=("items", "switched", "sizes"), judge=_by_size),
    Claim(name="late", rests_on=("items", "switched"), judge=_late),
)
