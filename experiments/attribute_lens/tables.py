"""The tables of an ``attribute_lens`` run, and what is averaged over them.

Source: M-AL-2 to M-AL-5, S-7.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import get_args

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.information import (
    InformationDepth,
    bar_above,
    information_depths,
)
from hooked_alm.methods.statistics.label_scores import dealt_hits

from ..materials.attribute_answers import (
    ANSWERS,
    SAID,
    WHO,
    accuracy,
    attributes_of,
    lost_in_silence,
)
from ..materials.clips import SOUNDS
from ..materials.enrichment import ENRICHMENTS, ENRICHMENTS_MAY_LACK, enrichments
from ..materials.resampling import mean_curve, mean_of, over
from ..workbench.results import Results, having, parts_by
from .settings import AttributeLensConfig

AttributeResults = Results[AttributeLensConfig]
TABLES = {
    **ANSWERS,
    "information": "what a lens reads of its label, at one position and depth",
    "knockout": "a question whose readout, or mention, is kept from keys in a window of blocks",
    **ENRICHMENTS,
    **SOUNDS,
}
MAY_LACK = {"absences": (*WHO, "heard", *SAID), **ENRICHMENTS_MAY_LACK}
"""Columns that are read of tables that some settings leave empty."""
MEASURES = ("hit", "p_correct_soft", "label_mass", "kl", "agrees")
CURVE = ("attribute", "prompt", "position", "lens")
"""What tells curves over depths apart."""


def summarise(run: AttributeResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "accuracy", accuracy(run)
    yield "information_curves", information_curves(run)
    yield "critical", critical(run)
    yield "outcomes", outcomes(run)
    yield "knockouts", knockouts(run)
    yield "enrichments", enrichments(run)


def information_curves(run: AttributeResults) -> pd.DataFrame:
    """Mean of every measure by depth, and the hits that dealt-out labels would give (M-AL-2)."""
    rows = []
    for names, part in parts_by(run["information"], *CURVE):
        chance = [dealt_hits(some.prediction, some.label) for _, some in part.groupby("depth")]
        for measure in MEASURES:
            by_chance = chance if measure == "hit" else [np.nan] * len(chance)
            rows += [
                {**names, "measure": measure, **point, "chance": one}
                for point, one in zip(mean_curve(run, part, measure), by_chance, strict=True)
            ]
    return pd.DataFrame(rows)


def above(run: AttributeResults, attribute: str) -> float:
    """The score above which a depth counts: chance and a margin."""
    return bar_above(len(run.inputs["labels"][attribute]), run.config.margin)


def critical(run: AttributeResults) -> pd.DataFrame:
    """Where the information of the mean curve is, by three definitions (M-AL-3).

    ``weighted`` is AudioLens' critical layer: a mean depth, and no event. ``first_above`` is the
    first depth above the bar, ``resolve`` the first from which it stays above. Each is given of the
    hits, as AudioLens has it, and of the label's probability among the labels: one may lead by a
    hair, time and again, where all have the same.
    """
    rows = []
    for names, part in parts_by(run["information"], *CURVE):
        n_labels = len(run.inputs["labels"][names["attribute"]])
        for measure, name in product(("hit", "p_correct_soft"), get_args(InformationDepth)):
            find = partial(
                information_depths, definition=name, n_labels=n_labels, margin=run.config.margin
            )
            who, curves = over(part, measure)
            found = run.draws.where(curves, run.config.clusters(who), find)
            rows.append({
                **names, "measure": measure, "definition": name, "depth": found.at,
                "low": found.low, "high": found.high, "undefined": found.undefined,
                "relative_depth": found.at / run.n_blocks, "n": len(who),
            })  # fmt: skip
    return pd.DataFrame(rows)


def outcomes(run: AttributeResults) -> pd.DataFrame:
    """Information at the readout where the clip was answered right, and where not, by depth.

    Which it was, another format of the same clip says where one was asked: the answer that a curve
    ends in would be circular.
    """
    prompt, rows = run.config.causal_prompt, []
    for attribute in attributes_of(run):
        answers = having(run["answers"], attribute=attribute)
        told_by = next((one for one in answers.prompt.unique() if one != prompt), prompt)
        right = having(answers, prompt=told_by).set_index("clip").hit
        some = having(run["information"], attribute=attribute, prompt=prompt, position="readout")
        outcome = some["clip"].map(right).map({1.0: "right", 0.0: "wrong"})
        rows += [
            {"attribute": attribute, "lens": names["lens"], "told_by": told_by,
             "outcome": names["outcome"], **point}
            for names, part in parts_by(some.assign(outcome=outcome), "lens", "outcome")
            for point in mean_curve(run, part, "hit")
        ]  # fmt: skip
    return pd.DataFrame(rows)


def knockouts(run: AttributeResults) -> pd.DataFrame:
    """What it costs not to see some keys, by window of blocks (M-AL-4).

    ``share`` is of what silence in the audio's place costs, in the means; NaN where that is not
    surely a cost, or was not asked.
    """
    rows, silence = [], {one: lost_in_silence(run, one) for one in attributes_of(run)}
    for names, part in parts_by(run["knockout"], "attribute", "query", "keys", "first", "last"):
        gain, whole = mean_of(run, part, "gain"), silence[names["attribute"]]
        share = -gain["mean"] / whole["mean"] if whole["low"] > 0 else np.nan
        hits = {"hit": part.hit.mean(), "base_hit": part.base_hit.mean()}
        rows.append({**names, **gain, "share": share, **hits})
    return pd.DataFrame(rows)
