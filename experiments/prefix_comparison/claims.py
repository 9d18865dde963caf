"""Known defects, controls and claims of ``prefix_comparison`` (cards M-002-13 to M-002-15)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.reading.segment_mass import LATEST

from ..workbench.claims import (
    MIN_ITEMS,
    Claim,
    Defect,
    Finding,
    around_zero,
    few,
    judged,
    not_measured,
    shown,
)
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from ..workbench.intervals import numbers
from .tables import (
    QUADRANTS,
    TABLES,
    PrefixResults,
    benefit,
    by_quadrant,
    compared,
    fisher,
    means,
    wide,
)

NATS = "nats per token"
READ_BY_LENS = tuple(name for name in TABLES if name != "mass")


DEFECTS = (
    Defect(
        id="C5",
        text="Positions are matched by left padding alone. Under rotary embeddings it changes "
        "nothing, so that what it leaves unchanged is no evidence.",
        holds=lambda c: "left_pad" in c.pos_modes and not {"gap", "filler"} & {*c.pos_modes},
        touches=("positions", "matched"),
    ),
    Defect(
        id="C6",
        text="The lens reads Hugging Face's hidden_states, whose last entry is normed already: "
        "at the last depth the final norm is applied twice.",
        holds=lambda config: config.lens_source == "hf_tuple",
        touches=READ_BY_LENS,
    ),
    Defect(
        id="C39",
        text="Prefix and continuation are joined as text: tokens at the boundary may merge, "
        "and differ between the conditions.",
        holds=lambda config: config.concatenate == "text",
        touches=tuple(TABLES),
    ),
)


# --- Controls


def _sums_of_attention(run: PrefixResults) -> Outcome:
    a, b, _ = compared(run)
    mass = run["mass"]
    whole = mass[mass.run.isin([a, b]) & (mass.segment != LATEST)]
    sums = whole.groupby(["item", "run", "layer"])["mass"].sum()
    return at_most(sums - 1, ROUNDING["share"][run.config.dtype])


def _original_again(run: PrefixResults) -> Outcome:
    runs = run["runs"].set_index("item")
    again = runs[runs.run.str.startswith("original ")][["nll", "delta", "mass"]]
    return at_most(again - runs[runs.role == "a"].reindex(again.index)[[*again]], 0.0)


def _range_of_js(run: PrefixResults) -> Outcome:
    columns = [run[name]["js"] for name in ("items", "runs", "curves", "classes", "matched")]
    js = pd.concat([*columns, run["positions"].largest_js]).astype(np.float64)
    outside = np.maximum(js - math.log(2), -js).clip(lower=0)
    return at_most(outside, ROUNDING["nat"][run.config.dtype], "nats")


CONTROLS = (
    Control(
        name="attention to all segments sums to 1",
        of=("mass", "coupling"),
        guards_against="positions that no segment has, or that two have",
        check=_sums_of_attention,
    ),
    Control(
        name="the original content put in again changes nothing",
        of=("items", "runs", "curves", "classes", "mass", "coupling"),
        guards_against="content put in at other positions, and runs that do not repeat",
        check=_original_again,
    ),
    Control(
        name="JS lies between 0 and ln 2",
        of=READ_BY_LENS,
        guards_against="logits that are summed up wrongly, so that probabilities do not add up",
        check=_range_of_js,
    ),
    Control(
        name="matched runs predict the first token at one position id",
        of=("positions", "matched"),
        guards_against="lengths that stay unequal",
        check=lambda run: at_most(1.0 - run["positions"].is_matched.astype(float), 0.0),
    ),
)


# --- Claims


def _unsure(row: Mapping[str, Any]) -> dict[str, bool]:
    # Items of one group are one observation, however many they are.
    n, n_groups = int(row["n"]), int(row["n_groups"])
    what = "items" if n == n_groups else "groups of items"
    return few(n_groups, what) | around_zero(row, "estimate")


def _mean(values: "pd.Series[float]", run: PrefixResults) -> dict[str, Any]:
    """Mean over items, its interval, and how many items and groups it is from."""
    return means(values.to_frame("mean"), run.draws).iloc[0].to_dict()


def _output(run: PrefixResults) -> Finding:
    a, b, _ = compared(run)
    row = _mean(benefit(run).iloc[:, -1], run)
    claim = f"With {a} the continuation is {'likelier' if row['mean'] < 0 else 'less likely'}"
    facts = (
        f"ΔNLL ({a} − {b}) at the output {shown(row)} {NATS}, JS {run['items'].js.mean():.3f} of "
        f"at most 0.693, {int(row['n'])} items"
    )
    return judged(f"{claim} than with {b}", facts, _unsure(row), numbers=row, unit=NATS)


def _window(run: PrefixResults) -> Finding:
    """The longest run of depths that differ from 0 under the band for all depths at once."""
    a, b, _ = compared(run)
    curve, own = benefit(run), run["curves_summary"]
    own = own[(own.run == a) & (own.metric == "delta")]
    differs = (own.low_all > 0) | (own.high_all < 0)
    ends = longest(np.where(differs, np.sign(own["mean"]), 0))
    if ends is None:
        claim = f"{a} and {b} differ from some depth on"
        why = {"no depth differs from 0 under the simultaneous band": True}
        return judged(claim, f"{len(curve)} items", why, numbers={"n": len(curve)}, unit=NATS)
    window = own.depth.to_list()[ends[0] : ends[1] + 1]
    row = _mean(curve[window].mean(axis=1), run)
    claim = f"{a} and {b} differ at depths {window[0]}–{window[-1]} of {own.depth.max()}"
    facts = f"Mean ΔNLL over these depths {shown(row)} {NATS}, {int(row['n'])} items"
    return judged(claim, facts, _unsure(row), numbers=row, unit=NATS)


def longest(signs: np.ndarray) -> tuple[int, int] | None:
    """Ends of the longest stretch of one sign; the deeper one of two as long."""
    best: tuple[int, int] | None = None
    start = 0
    for i, sign in enumerate(signs):
        if sign != signs[start]:
            start = i
        if sign and (best is None or i - start >= best[1] - best[0]):
            best = start, i
    return best


def _quadrants(run: PrefixResults) -> Finding:
    a, b, _ = compared(run)
    items = run["items"]
    sizes = ", ".join(f"{name} {(items.quadrant == name).sum()}" for name in QUADRANTS)
    claim = f"The benefit of {a} is larger where only {a} succeeds than where only {b} does"
    _, found = by_quadrant(benefit(run).iloc[:, -1], run)
    if found is None:
        why, facts = {"G10 or G01 has no item": True}, f"Items by outcome: {sizes}"
        return judged(claim, facts, why, numbers={"n": len(items)}, unit=NATS)
    row = numbers(found)
    groups = items.groupby("quadrant").group.nunique().to_dict()
    a_only, b_only = groups["G10"], groups["G01"]
    why = {
        f"only {a_only} and {b_only} items or groups of them": min(a_only, b_only) < MIN_ITEMS,
        "the interval of G10 − G01 is not below 0": not row["high"] < 0,
    }
    facts = (
        f"ΔNLL at the output, G10 − G01 {shown(row)} {NATS}; items: {sizes}. A description: the "
        "outcome comes of the same probabilities"
    )
    return judged(claim, facts, why, numbers=row, unit=NATS)


def _coupling(run: PrefixResults) -> Finding:
    """Mean over layers, so that no layer is picked for its result."""
    z = fisher(run["coupling"], "partial")
    defined = z.mean(axis=1).dropna()
    claim = f"Tokens whose prediction attends to {compared(run)[2]} more benefit more"
    if defined.empty:
        why_not = "no item has tokens enough for a correlation"
        return not_measured(claim, why_not, "correlation", facts=f"{len(z)} items")
    row = _mean(defined, run)
    row |= {name: np.tanh(row[name]) for name in ("mean", "low", "high")}
    why = {**_unsure(row), "the correlation is not below 0": not row["high"] < 0}
    facts = (
        f"Rank correlation of attention and ΔNLL given position and class, mean over layers "
        f"{shown(row)}, {int(row['n'])} of {len(z)} items"
    )
    return judged(claim, facts, why, numbers=row, unit="correlation")


def _content(run: PrefixResults) -> Finding | None:
    a, _, segment = compared(run)
    runs = wide(run["runs"], "run", "delta")
    if f"neutral {segment}" not in runs:
        return None
    row = _mean((runs[f"neutral {segment}"] - runs[a]).dropna(), run)
    facts = (
        f"Neutral content of the same length raises the loss by {shown(row)} {NATS}, "
        f"{int(row['n'])} items"
    )
    why = {**_unsure(row), "it does not rise": not row["low"] > 0}
    claim = f"The content of {segment} makes the continuation likelier"
    return judged(claim, facts, why, numbers=row, unit=NATS)


def _position(run: PrefixResults, mode: str) -> Finding:
    row = run["positions_summary"].set_index("mode").loc[mode].to_dict()
    row["mean"] = row["delta"]
    claim = f"The difference stays when lengths are matched by {mode}"
    facts = f"ΔNLL at the output {shown(row)} {NATS}, as run {row['as_run']:.2f}"
    differs = bool(np.sign(row["delta"]) != np.sign(row["as_run"]))
    why = {**_unsure(row), "its sign is another than as run": differs}
    return judged(claim, facts, why, numbers=row, unit=NATS)


def _modes_that_act(run: PrefixResults) -> list[str]:
    return [mode for mode in ("gap", "filler") if mode in {*run["positions"]["mode"]}]


CLAIMS = (
    Claim(name="output", rests_on=("curves", "items"), judge=_output),
    Claim(name="window", rests_on=("curves",), judge=_window),
    Claim(name="quadrants", rests_on=("curves", "items"), judge=_quadrants),
    Claim(name="coupling", rests_on=("coupling",), judge=_coupling),
    Claim(name="content", rests_on=("runs",), judge=_content),
    Claim(
        name="position: {}",
        rests_on=("positions", "matched", "items"),
        judge=_position,
        per=_modes_that_act,
    ),
)
