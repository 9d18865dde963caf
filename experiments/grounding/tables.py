"""The tables of a ``grounding`` run, and what is averaged over their items.

Source: seed 003; M-GC.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.clips import SOUNDS
from ..materials.conflict_runs import INPUTS
from ..materials.item_curves import cell_means, curves, handoffs
from ..workbench.intervals import Draws, prefixed
from ..workbench.results import Results, having
from .measure import MLP, READINGS
from .settings import ALL, GroundingConfig

GroundingResults = Results[GroundingConfig]
TABLES = {
    "runs": "a forward: a clip under an instruction, in its role in an item, and what is answered",
    "grounding": "an item with one span exchanged at one depth: each input's effect and share",
    "nodes": "an item with one head or MLP exchanged at one span: each input's effect and share",
    "unpatched": "an item patched with itself at a site: the largest change of a score",
    **SOUNDS,
}
MEASURES = ["gc", *(f"{what}_{name}" for what in ("effect", "rec") for name in INPUTS)]
DEPTH_CELL = ["direction", "span", "depth"]
NODE_CELL = ["direction", "span", "block", "head"]


def summarise(run: GroundingResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    draws = run.draws
    yield "items", items(run)
    yield "grounding_means", cell_means(run["grounding"], MEASURES, DEPTH_CELL, draws)
    yield "node_means", cell_means(run["nodes"], MEASURES, NODE_CELL, draws)
    yield "handoffs", handoffs_by_reading(run["grounding"], draws)
    yield "best_heads", best_heads(run["nodes"], draws)


def items(run: GroundingResults) -> pd.DataFrame:
    """Answers and total effects of every item, from whole runs alone, and the share that follows.

    ``equal_lengths``: whether its runs are equally long, clip and instruction each, so that spans
    align one to one. What was not exchanged is NaN.
    """
    runs = run["runs"]
    leads = [
        row[f"z_{row['target']}"] - row[f"z_{row['voice']}"] for row in runs.to_dict("records")
    ]
    lead = runs.assign(lead=leads).pivot(index="pair", columns="role", values="lead")
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
    """The row of ``grounding_means`` of whole runs: all exchanged, at the last depth (I8)."""
    return having(means, direction="denoise", span=ALL, measure="gc").nlargest(1, "depth").iloc[0]


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

    ``lead`` and ``next`` are `Draws.best`'s.
    """
    rows = []
    for name, reading in product(INPUTS, READINGS):
        some = having(nodes, span="readout", direction=reading).dropna(subset=f"effect_{name}")
        if (some := some[some["head"] != MLP]).empty:
            continue
        (what, effects, heads), (_, recoveries, _) = (
            curves(some, ["block", "head"], f"{what}_{name}") for what in ("effect", "rec")
        )
        clips = what["clip"].tolist()
        best = draws.best(effects, clips)
        effect, recovered = (draws.row(one[:, best.at], clips) for one in (effects, recoveries))
        block, head = heads[best.at]
        next_block, next_head = (np.nan, np.nan) if best.next is None else heads[best.next]
        rows.append({
            "input": name, "direction": reading, "block": block, "head": head, "n": effect["n"],
            "n_clips": effect["n_clusters"], **prefixed("effect", effect, ""),
            **prefixed("recovery", recovered, ""), "n_recovered": recovered["n"],
            "next_block": next_block, "next_head": next_head,
            "lead": best.lead, "lead_low": best.lead_low,
        })  # fmt: skip
    return pd.DataFrame(rows)
