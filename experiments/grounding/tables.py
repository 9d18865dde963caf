"""The tables of a ``grounding`` run, and what is averaged over their items.

Source: seed 003; M-GC.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.clips import SOUNDS
from ..materials.item_curves import handoffs
from ..workbench.intervals import Draws, prefixed
from ..workbench.results import Results, Row, having
from .measure import MLP, READINGS
from .plan import INPUTS
from .settings import ALL, GroundingConfig

GroundingResults = Results[GroundingConfig]
TABLES = {
    "runs": "a forward: a clip under an instruction, in its role in an item, and what is answered",
    "grounding": "an item with one span exchanged at one depth: each input's effect and share",
    "nodes": "an item with one head or MLP exchanged at one span: each input's effect and share",
    "unpatched": "an item patched with itself at a site: the largest change of a score",
    **SOUNDS,
}
EFFECTS = [f"{what}_{name}" for what in ("effect", "rec") for name in INPUTS]
MEASURES = ["gc", *EFFECTS]
DEPTH_CELL = ["direction", "span", "depth"]
NODE_CELL = ["direction", "span", "block", "head"]


def summarise(run: GroundingResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    draws = run.draws
    yield "items", items(run)
    yield "grounding_means", cell_means(run["grounding"], DEPTH_CELL, draws)
    yield "node_means", cell_means(run["nodes"], NODE_CELL, draws)
    yield "handoffs", handoffs_by_reading(run["grounding"], draws)
    yield "best_heads", best_heads(run["nodes"], draws)


def items(run: GroundingResults) -> pd.DataFrame:
    """Answers and total effects of every item, from whole runs alone, and the share that follows.

    ``equal_lengths``: whether its runs are equally long, clip and instruction each, so that spans
    align one to one. What was not exchanged is NaN.
    """
    runs, labels = run["runs"], run.inputs["labels"]
    scores = runs[[f"z_{name}" for name in labels]].to_numpy(np.float64)
    of_target, of_voice = (
        scores[np.arange(len(runs)), runs[who].map(labels.index)] for who in ("target", "voice")
    )
    lead = runs.assign(lead=of_target - of_voice).pivot(index="pair", columns="role", values="lead")
    answer = runs.pivot(index="pair", columns="role", values="prediction")
    base = runs[runs.role == "base"].set_index("pair")
    lead, answer = (one.reindex(base.index, columns=["base", *INPUTS]) for one in (lead, answer))
    lengths = runs.groupby("pair", sort=False)[["n_tokens", "n_audio_tokens"]].nunique()
    found = base[["clip", "target", "voice"]].assign(
        answer=answer.base,
        **{f"answer_{name}": answer[name] for name in INPUTS},
        te_audio=lead.audio - lead.base,
        te_text=lead.base - lead.text,  # the text's exchange calls for the voice's label
    )
    config = run.config
    found["gc"] = grounding_coefficient(
        found.te_audio.to_numpy(), found.te_text.to_numpy(),
        min_effect=config.min_effect, form=config.gc_form,
    )  # fmt: skip
    return found.assign(equal_lengths=(lengths == 1).all(axis=1)).reset_index()


def coefficient(means: pd.DataFrame) -> "pd.Series[Any]":
    """The row of ``grounding_means`` that is gc(0), of whole runs."""
    return having(means, direction="denoise", span=ALL, depth=0, measure="gc").iloc[0]


def cell_means(table: pd.DataFrame, keys: list[str], draws: Draws) -> pd.DataFrame:
    """Means of the coefficient, effects and recoveries of every cell, over items that have them.

    Intervals resample clips. A row per cell and ``measure``.
    """
    parts = []
    for measure in MEASURES:
        cells, values, clips = _by_item(table, keys, measure)
        found = pd.DataFrame(_means_of_defined(values, clips, draws))
        parts.append(pd.concat([cells.assign(measure=measure), found], axis=1))
    means = pd.concat(parts, ignore_index=True)
    return means.rename(columns={"n_clusters": "n_clips"})


def _by_item(
    table: pd.DataFrame, keys: list[str], measure: str
) -> tuple[pd.DataFrame, Float[np.ndarray, "item cell"], list[str]]:
    """The cells, a measure in each of them item by item, and the items' clips."""
    wide = table.pivot(index=["clip", "target"], columns=keys, values=measure)
    clips = wide.index.get_level_values("clip").tolist()
    return wide.columns.to_frame(index=False), wide.to_numpy(np.float64), clips


def _means_of_defined(values: np.ndarray, clips: Sequence[str], draws: Draws) -> list[Row]:
    """A row per column; columns that are defined for the same items are resampled together."""
    patterns, which = np.unique(np.isnan(values), axis=1, return_inverse=True)
    rows: list[Row] = [{}] * values.shape[1]
    for pattern in range(patterns.shape[1]):
        columns = np.flatnonzero(which.ravel() == pattern)
        for column, row in zip(columns, draws.points(values[:, columns], clips), strict=True):
            rows[column] = row
    return rows


def handoffs_by_reading(grounding: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Where each input leaves its span, and where it is at the readout, reading by reading."""
    cells = pd.concat([
        grounding[["clip", "target", "direction", "span", "depth"]].assign(
            donor=kind, recovery=grounding[f"rec_{name}"])
        for name, kind in INPUTS.items()
    ])  # fmt: skip
    tables = {one: handoffs(having(cells, direction=one), "depth", draws) for one in READINGS}
    return pd.concat(tables, names=["direction", None]).reset_index("direction")


def best_heads(nodes: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Of every input and reading the head with the largest mean effect, and its lead on the others.

    ``lead``: how far it is ahead of the one that is nearest to it, with the least end of a band
    that holds for its leads on all others at once.
    """
    rows = []
    for name, reading in product(INPUTS, READINGS):
        some = having(nodes, span="readout", direction=reading).dropna(subset=f"effect_{name}")
        if len(some := some[some["head"] != MLP]):
            rows.append({"input": name, "direction": reading, **_best(some, name, draws)})
    columns = [
        *("input", "direction", "block", "head", "n", "n_clips", "effect", "effect_low"),
        *("effect_high", "recovery", "recovery_low", "recovery_high", "n_recovered"),
        *("next_block", "next_head", "lead", "lead_low"),
    ]
    return pd.DataFrame(rows, columns=columns)


def _best(some: pd.DataFrame, name: str, draws: Draws) -> Row:
    (heads, values, clips), (_, recoveries, _) = (
        _by_item(some, ["block", "head"], f"{what}_{name}") for what in ("effect", "rec")
    )
    best = int(values.mean(axis=0).argmax())
    found, recovered = (draws.row(one[:, best], clips) for one in (values, recoveries))
    row = {
        **heads.loc[best].to_dict(), "n": found["n"], "n_clips": found["n_clusters"],
        **prefixed("effect", found, ""), **prefixed("recovery", recovered, ""),
        "n_recovered": recovered["n"],
    }  # fmt: skip
    if len(others := np.delete(np.arange(len(heads)), best)):
        leads = draws.mean(values[:, [best]] - values[:, others], clips, band="simultaneous")
        nearest = int(leads.mean.argmin())
        row |= heads.loc[others[nearest]].add_prefix("next_").to_dict()
        row |= {"lead": float(leads.mean[nearest]), "lead_low": float(leads.low.min())}
    return row
