"""What a ``lora_blocks`` run controls and claims.

Source: M-LO-3, M-LO-8; "delayed specialisation" of Behind the Scenes.
"""

from functools import partial

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
from ..workbench.results import Row, having
from .tables import LoraResults


def _last_depth(run: LoraResults) -> Outcome:
    return same_at_the_end(
        run, run["depths"], run["runs"], on=["item", "way"], column="lead", unit="logits"
    )


def _first_erased(run: LoraResults) -> Outcome:
    first = having(run["erased"], block=run["switched"]["block"].min())
    both = first.pivot(index="item", columns="form", values="loss")
    return at_most(both["single"] - both["progressive"], 0.0, "nats")


def _before_blocks(run: LoraResults) -> Outcome:
    cka = having(run["similarity"], of="states", depth=0)["cka"].dropna()
    return at_most(1 - cka, ROUNDING["nat"][run.config.dtype], "of CKA")


def _whole(run: LoraResults) -> Outcome:
    runs = run["runs"].pivot(index="item", columns="way", values="lead")
    items = run["items"].set_index("item")
    off = pd.concat([items["lead_off"] - runs["base"], items["lead_on"] - runs["adapted"]])
    return at_most(off, ROUNDING["logit"][run.config.dtype], "logits")


CONTROLS = (
    *label_controls("runs", "items", "switched"),
    Control(name="the whole adapter, gone on with at the middle block", of=("items", "switched"),
            check=lambda run: at_most(run["items"]["resumed"], 0.0, "logits"),
            guards_against="a stream that is not the one which enters a switched block"),
    Control(name="with and without the adapter, switched = run whole", of=("items", "switched"),
            check=_whole, guards_against="switches that leave updates on or off"),
    Control(name="the lens at the last depth = the model", of=("depths", "drift"),
            check=_last_depth, guards_against="a stream that is read at another position (I5)"),
    Control(name="every block with an update is switched", of=("sizes", "switched"),
            check=lambda run: at_most(
                [len({*run["sizes"]["block"]} ^ {*run["switched"]["block"]})], 0.0, "blocks"),
            guards_against="updates that are measured in other blocks than they act in"),
    Control(name="without the first block is the same, erased alone or from it on", of=("erased",),
            check=_first_erased, guards_against="other blocks erased than it says"),
    Control(name="before the first block nothing is turned", of=("similarity",),
            check=_before_blocks, guards_against="clips, or depths, that are mixed up"),
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


@of_enough_clips
def _over_blocks(
    run: LoraResults, measure: str, claim: str, facts: str, bar: float, why: str
) -> Finding:
    """The claim that a measure of ``size_ranks``, of blocks alone, is surely above a bar.

    ``facts`` has places for its mean, the number of blocks and the first of the upper half; ``why``
    is the reason against the claim where it is not above.
    """
    row: Row = having(run["size_ranks"], reading="denoise", measure=measure).iloc[0].to_dict()
    unit = {"rho": "rho", "late": "share"}[measure]
    if not row["n"] > 0:
        return not_measured(claim, "no item is moved, or all updates are as large", unit)
    blocks, upper = run["sizes"]["block"].nunique(), int(np.ceil(run.n_blocks / 2))
    said = facts.format(mean=shown(row), blocks=blocks, upper=upper)
    reasons = {**few(row["n"], "items that the adapter moves"), why: not row["low"] > bar}
    return judged(
        claim, f"{said}, mean over {int(row['n'])} items", reasons, numbers=row, unit=unit
    )


_by_size = partial(
    _over_blocks, measure="rho", claim="Blocks with larger updates change the answer more",
    facts="Spearman's rho over {blocks} blocks of Frobenius norm and size of effect alone: {mean}",
    bar=0.0, why="no correlation surely above 0",
)  # fmt: skip
_late = partial(
    _over_blocks, measure="late", bar=LARGE, why="not surely more than half",
    claim="What the adapter does is done in the upper half of the blocks",
    facts="Blocks from {upper} on do {mean} of what single blocks do towards the adapted answer",
)  # fmt: skip
CLAIMS = (
    Claim(name="carrier", rests_on=("items", "switched"), judge=_carrier),
    Claim(name="by_size", rests_on=("items", "switched", "sizes"), judge=_by_size),
    Claim(name="late", rests_on=("items", "switched"), judge=_late),
)
