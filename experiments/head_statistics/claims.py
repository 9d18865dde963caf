"""What a ``head_statistics`` run controls and claims, and what its settings are known to spoil."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.reading.head_norms import CONTRIBUTION, OUTPUT

from ..workbench.claims import MIN_ITEMS, Claim, Defect, Finding, judged, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from ..workbench.intervals import numbers
from .tables import HeadResults, layer_by_head, merged

ALIKE = 0.9
"""Rank correlation from which on two orders of heads are called the same."""
NORMS = ("heads", "layers")
PROMPTS = ("items", *NORMS)
"""Tables that a wrong prompt makes wrong."""

DEFECTS = (
    Defect(
        id="C34", touches=NORMS, holds=lambda config: config.head_output == "pattern_times_v",
        text="Attention is computed again from pattern and values, although the input of the "
        "output projection is what the heads wrote; with a fused kernel it is another rounding of "
        "it.",
    ),
    Defect(
        id="C35", touches=PROMPTS, holds=lambda config: config.template_form == "seed",
        text="The prompt ends with a space: where the tokenizer merges it with the letter, the "
        "last token is not the one that predicts the answer, and labels by token count are "
        "shifted.",
    ),
    Defect(
        id="C36", touches=PROMPTS, holds=lambda config: config.template_form == "seed",
        text="The instruction lists the letters A to D, whatever options there are.",
    ),
    Defect(
        id="C37", touches=PROMPTS, holds=lambda config: config.overflow == "right",
        text="Prompts that are too long lose their end, and with it 'Answer:'.",
    ),
)  # fmt: skip


def _rounding(run: HeadResults, off: pd.Series) -> Outcome:
    return at_most(off, ROUNDING["relative"][run.config.dtype], "(relative)")


CONTROLS = (
    Control(
        name="the heads' contributions, along their sum, add up to its norm",
        of=(*NORMS, "units"),
        guards_against="heads cut out of the wrong columns of the projection, or another z",
        check=lambda run: _rounding(run, run["units"].identity_error),
    ),
    Control(
        name="no sum is longer than its parts together",
        of=(*NORMS, "units"),
        guards_against="contributions that are measured too small",
        check=lambda run: _rounding(run, (run["units"].most_kept - 1).clip(lower=0)),
    ),
)


def rank_correlations(
    one: Float[np.ndarray, "layer head"], other: Float[np.ndarray, "layer head"]
) -> Float[np.ndarray, " layer"]:
    """Spearman's ρ over the heads of each layer; NaN where a layer's heads are all alike."""
    ranks, others = (pd.DataFrame(values).rank(axis=1) for values in (one, other))
    return ranks.corrwith(others, axis=1).to_numpy()


def _stable(run: HeadResults) -> Finding:
    """The order of what heads write, on even and on odd questions."""
    halves = [merged(run["heads"], CONTRIBUTION, half) for half in (0, 1)]
    n_layers = run["heads"].layer.nunique()
    orders = [half.mean.reshape(n_layers, -1) for half in halves if half.n]
    alike = rank_correlations(*orders) if orders[1:] else np.full(n_layers, np.nan)
    return _alike(run, "What heads write ranks them alike on either half of the questions", alike)


def _stands_in(run: HeadResults) -> Finding:
    """The order of outputs against that of what heads write."""
    orders = [layer_by_head(run["head_statistics"], f"{q}_mean") for q in (OUTPUT, CONTRIBUTION)]
    claim = "The norm of a head's output ranks heads as what they write does"
    return _alike(run, claim, rank_correlations(*orders))


def _alike(run: HeadResults, claim: str, by_layer: Float[np.ndarray, " layer"]) -> Finding:
    found = numbers(run.draws.mean(by_layer))
    n_items = int(run["units"].n_items.sum())
    return judged(
        claim,
        f"Spearman's ρ over the heads of a layer, mean of {found['n']} layers: {shown(found, 3)}",
        {
            f"only {n_items} items": n_items < 2 * MIN_ITEMS,
            f"the interval is not above {ALIKE}": not found["low"] > ALIKE,
        },
        numbers=found,
        unit="rank correlation",
    )


CLAIMS = (
    Claim(name="stable", rests_on=("heads", "units"), judge=_stable),
    Claim(name="stands in", rests_on=("heads", "units"), judge=_stands_in),
)
