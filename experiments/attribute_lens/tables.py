"""The tables of an ``attribute_lens`` run, and what is averaged over them.

Source: M-AL-2 to M-AL-5, S-7.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.patching.enrich import EnrichMode
from hooked_alm.methods.statistics.critical_layer import resolve_depths
from hooked_alm.methods.statistics.information import weighted_depths

from ..materials.clips import SOUNDS
from ..workbench.results import Results, Row, having
from .plan import ChosenEnrichment
from .settings import AttributeLensConfig

AttributeResults = Results[AttributeLensConfig]
_WHO = ("clip", "speaker", "attribute", "prompt", "label")
_CELL = ("prediction", "hit", "margin", "gain", "base", "base_hit", "noise")
TABLES = {
    "answers": "a clip asked for an attribute in one format, and what is answered",
    "information": "what a lens reads of its label, at one position and depth",
    "absences": "the same clip and question without its audio, or its transcript",
    "knockout": "a question whose readout, or mention, is kept from keys in a window of blocks",
    "enrichment_search": "a question enriched by one depth after one block, to choose from",
    "enrichment": "a question of another clip enriched as chosen, or by what should not help",
    **SOUNDS,
}
MAY_LACK = {
    "absences": (*_WHO, "heard", "prediction", "hit", "margin"),
    "enrichment_search": (*_WHO, *_CELL, "mode", "source", "layer"),
    "enrichment": (*_WHO, *_CELL, "mode", "source", "layer", "donor"),
}
"""Columns that are read of tables that some settings leave empty."""
MEASURES = ("hit", "p_correct_soft", "label_mass", "kl", "agrees")
CURVE = ["attribute", "prompt", "position", "lens"]
"""What tells curves over depths apart."""


def summarise(run: AttributeResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "accuracy", accuracy(run)
    yield "information_curves", information_curves(run)
    yield "critical", critical(run)
    yield "outcomes", outcomes(run)
    yield "knockouts", knockouts(run)
    yield "enrichments", enrichments(run)


def attributes_of(run: AttributeResults) -> list[str]:
    """Attributes in their order."""
    return [*run.inputs["labels"]]


def mean_of(run: AttributeResults, table: pd.DataFrame, column: str) -> dict[str, Any]:
    """Mean of a column with its interval; a row is a clip."""
    return run.draws.row(table[column].to_numpy(np.float64), run.config.clusters(table))


def wide(
    table: pd.DataFrame, column: str, x: str = "depth"
) -> tuple[pd.DataFrame, Float[np.ndarray, "clip x"]]:
    """Clips and speakers, and their curves of a column along ``x``."""
    found = table.pivot(index=["clip", "speaker"], columns=x, values=column)
    return found.index.to_frame(index=False), found.to_numpy(np.float64)


def accuracy(run: AttributeResults) -> pd.DataFrame:
    """How often, and by how much, the right label leads; with the audio and without."""
    every = pd.concat([run["answers"].assign(heard="audio"), run["absences"]])
    rows = []
    for (attribute, prompt, heard), part in every.groupby(
        ["attribute", "prompt", "heard"], sort=False
    ):
        hits, margins = (mean_of(run, part, column) for column in ("hit", "margin"))
        rows.append({
            "attribute": attribute, "prompt": prompt, "heard": heard, **hits,
            **{f"margin_{name}": margins[name] for name in ("mean", "low", "high")},
            "chance": expected_hits(part),
        })  # fmt: skip
    return pd.DataFrame(rows)


def expected_hits(part: pd.DataFrame) -> float:
    """The share of hits if labels were dealt out at random: chance, for these predictions."""
    shares = [part[column].value_counts(normalize=True) for column in ("prediction", "label")]
    return float(shares[0].mul(shares[1], fill_value=0.0).sum())


# --- Lens


def information_curves(run: AttributeResults) -> pd.DataFrame:
    """Mean of every measure by depth, and the hits that dealt-out labels would give (M-AL-2)."""
    rows: list[Row] = []
    for key, part in run["information"].groupby(CURVE, sort=False):
        names = dict(zip(CURVE, cast(Sequence[str], key), strict=True))
        chance = [expected_hits(some) for _, some in part.groupby("depth")]
        for measure in MEASURES:
            who, curves = wide(part, measure)
            points = run.draws.points(curves, run.config.clusters(who))
            rows += [
                {**names, "measure": measure, "depth": depth, **point,
                 "chance": chance[depth] if measure == "hit" else np.nan}
                for depth, point in enumerate(points)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def above(run: AttributeResults, attribute: str) -> float:
    """The score above which a depth counts: chance and a margin."""
    return (1 + run.config.margin) / len(run.inputs["labels"][attribute])


def _first_above(curves: Float[np.ndarray, "curve depth"], bar: float) -> np.ndarray:
    is_above = curves > bar
    return np.where(is_above.any(axis=1), is_above.argmax(axis=1), np.nan)


def _resolved(curves: Float[np.ndarray, "curve depth"], bar: float) -> np.ndarray:
    return np.where(curves[:, -1] > bar, resolve_depths(curves - bar), np.nan)


def critical(run: AttributeResults) -> pd.DataFrame:
    """Where the information of the mean curve is, by three definitions (M-AL-3).

    ``weighted`` is AudioLens' critical layer: a mean depth, and no event. ``first_above`` is the
    first depth above the bar, ``resolve`` the first from which it stays above. Each is given of the
    hits, as AudioLens has it, and of the label's probability among the labels: one may lead by a
    hair, time and again, where all have the same.
    """
    rows = []
    for key, part in run["information"].groupby(CURVE, sort=False):
        names = dict(zip(CURVE, cast(Sequence[str], key), strict=True))
        bar = above(run, names["attribute"])
        n_labels = len(run.inputs["labels"][names["attribute"]])
        definitions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "weighted": partial(weighted_depths, n_labels=n_labels, margin=run.config.margin),
            "first_above": partial(_first_above, bar=bar),
            "resolve": partial(_resolved, bar=bar),
        }
        for measure, (name, find) in product(("hit", "p_correct_soft"), definitions.items()):
            who, curves = wide(part, measure)
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
    information, answers, prompt = run["information"], run["answers"], run.config.causal_prompt
    rows = []
    for attribute in attributes_of(run):
        of_it = having(answers, attribute=attribute)
        others = [one for one in of_it.prompt.unique() if one != prompt]
        told_by = others[0] if others else prompt
        right = having(of_it, prompt=told_by).set_index("clip").hit
        some = having(information, attribute=attribute, prompt=prompt, position="readout")
        for lens, part in some.groupby("lens", sort=False):
            outcome = part["clip"].map(right).map({1.0: "right", 0.0: "wrong"})
            for name, items in part.groupby(outcome, sort=False):
                who, curves = wide(items, "hit")
                points = run.draws.points(curves, run.config.clusters(who))
                about = {"attribute": attribute, "lens": lens, "told_by": told_by, "outcome": name}
                rows += [{**about, "depth": depth, **point} for depth, point in enumerate(points)]
    return pd.DataFrame(rows)


# --- Attention


def knockouts(run: AttributeResults) -> pd.DataFrame:
    """What it costs not to see some keys, by window of blocks (M-AL-4).

    ``share`` is of what silence in the audio's place costs, in the means; NaN where that is not
    surely a cost, or was not asked.
    """
    rows = []
    for attribute, every in run["knockout"].groupby("attribute", sort=False):
        whole = lost_in_silence(run, str(attribute))
        for (query, keys, first, last), part in every.groupby(
            ["query", "keys", "first", "last"], sort=False
        ):
            gain = mean_of(run, part, "gain")
            rows.append({
                "attribute": attribute, "query": query, "keys": keys, "first": first, "last": last,
                **gain, "share": -gain["mean"] / whole["mean"] if whole["low"] > 0 else np.nan,
                "hit": part.hit.mean(), "base_hit": part.base_hit.mean(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def lost_in_silence(run: AttributeResults, attribute: str) -> dict[str, Any]:
    """Margin with the audio minus margin with silence in its place, clip by clip."""
    silent = having(run["absences"], attribute=attribute, heard="silence")
    answers = having(run["answers"], attribute=attribute, prompt=run.config.causal_prompt)
    both = answers.merge(silent[["clip", "margin"]], on="clip", suffixes=("", "_silent"))
    if both.empty:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "n_clusters": 0}
    return mean_of(run, both.assign(lost=both.margin - both.margin_silent), "lost")


# --- Enrichment


def chosen_enrichment(search: pd.DataFrame | None) -> dict[str, ChosenEnrichment]:
    """Attribute -> what helped most on the clips of the search: hits first, then the margin."""
    if search is None or search.empty:
        return {}
    cells = search.groupby(["attribute", "mode", "source", "layer"], sort=False)[["hit", "margin"]]
    means = cells.mean().reset_index()
    best = means.sort_values(["hit", "margin"], ascending=False, kind="stable")
    return {
        str(row.attribute): ChosenEnrichment(
            cast(EnrichMode, row.mode), int(row.source), int(row.layer)
        )
        for row in best.drop_duplicates("attribute").itertuples()
    }


def enrichments(run: AttributeResults) -> pd.DataFrame:
    """What the chosen enrichment and its controls bring, on other clips (M-AL-5)."""
    rows = []
    table = run["enrichment"].assign(hits_gained=run["enrichment"].hit - run["enrichment"].base_hit)
    for key, part in table.groupby(["attribute", "donor", "mode", "source", "layer"], sort=False):
        names = dict(zip(("attribute", "donor", "mode", "source", "layer"), key, strict=True))
        gains = {column: mean_of(run, part, column) for column in ("gain", "hits_gained")}
        ends = {
            f"{column}_{end}": row[end]
            for column, row in gains.items()
            for end in ("mean", "low", "high")
        }
        rows.append({**names, **ends, "n": gains["gain"]["n"]})
    columns = ["attribute", "donor", "mode", "source", "layer"]
    columns += [f"{c}_{e}" for c in ("gain", "hits_gained") for e in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=[*columns, "n"])
