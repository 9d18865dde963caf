"""What ``circuits`` controls and claims, on tables made by hand: each comes out either way."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.circuits.confounds import clip_confounds
from hooked_alm.experiments.circuits.experiment import Circuits
from hooked_alm.experiments.circuits.settings import CircuitsConfig
from hooked_alm.experiments.circuits.tables import CircuitResults, summarise

CONTRASTS = {"instruction": 3.0, "voice": 1.0}
PATH = {"mode": "edge", "sender": "hook_embed", "receiver": "blocks.1.attn.hook_v_input[0]"}
Change = Callable[[CircuitResults], CircuitResults]


def rows_of_pair(total: float, i: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Table and row of all that is measured on a pair; about equal in all pairs."""
    around = np.random.default_rng(i).normal(1, 0.05, 100).tolist().pop
    effect = total * around()
    as_given = {"base_as_given": True, "donor_as_given": True}
    yield "pairs", {"base": 2.0, "donor": 2 - effect, "total_effect": effect, **as_given}
    for direction in ("noising", "denoising"):
        last, edge = 0.2 * around(), {"mode": "edge", "sender": "blocks.2.hook_mlp_out"}
        yield "direct", {"direction": direction, **edge, "toward": last}
        acting = {(1, 0): 0.8 * around(), (1, -1): 0.5 * around(), (2, -1): last}
        for layer, head, place in product(range(3), (0, -1), ("readout", "audio")):
            size = acting.get((layer, head), 0.0) if place == "readout" else 0.0
            at = {"direction": direction, "place": place, "layer": layer, "head": head}
            yield "nodes", {**at, "toward": size, "recovery": size / effect, "noise": 0.0}
    for place, size in {"audio": 0.6, "readout": 0.1}.items():
        found = {"place": place, "toward": size * around()}
        yield "reads", {"layer": 1, "head": 0, "input": "v", **found}
        yield "paths", {**PATH, **found, "noise": 0.0}
    if i >= 8:
        yield "circuit", {"circuit": "every edge", "value": 2 - effect}
        for name, share in {"circuit": 0.9, "random 1": 0.2, "random 2": 0.1}.items():
            for what, kept in {"alone": share, "removed": 1 - share}.items():
                circuit = {"circuit": name, "what": what, "n_edges": 9}
                yield "circuit", {**circuit, "share": kept * around()}


def concluded(tables: dict[str, pd.DataFrame]) -> CircuitResults:
    run = Circuits.results(CircuitsConfig(n_resamples=1000), {"model": {"blocks": 3}}, tables)
    run.tables["confounds"] = clip_confounds(pd.DataFrame(columns=["contrast", "answer"]), seed=0)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> CircuitResults:
    """One head and one MLP hear the audio and carry the answers."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for contrast, total in CONTRASTS.items():
        for i in range(16):
            who = {"pair": f"{contrast}-{i}", "contrast": contrast, "group": f"g{i}"}
            who["part"] = "discovery" if i < 8 else "held-out"
            for name, row in rows_of_pair(total, i):
                tables.setdefault(name, []).append({**who, **row})
    return concluded({name: pd.DataFrame(rows) for name, rows in tables.items()})


def edit(table: str, query: str, column: str, by: Callable[[pd.Series], pd.Series]) -> Change:
    """Changes some numbers of a run, and makes its summaries anew."""

    def change(run: CircuitResults) -> CircuitResults:
        found = run[table].copy()
        rows = found.query(query).index
        found.loc[rows, column] = by(found.loc[rows, column])
        return concluded({name: run[name] for name in Circuits.tables} | {table: found})

    return change


BLIND, DIRECT, EVERY = (control.name for control in Circuits.controls)
BROKEN = {
    BLIND: edit("nodes", "layer == 2 and place == 'audio'", "toward", lambda x: x + 1),
    DIRECT: edit("direct", "direction == 'noising'", "toward", lambda x: x + 1),
    EVERY: edit("circuit", "circuit == 'every edge'", "value", lambda x: x + 1),
}
RESTING = {
    **dict.fromkeys((BLIND, DIRECT), "nodes reads paths alone removed"),
    EVERY: "dominance effect alone removed",
}
OTHER_WAY = {"dominance": edit("pairs", "contrast == 'voice'", "total_effect", lambda x: x + 2)}
for contrast in CONTRASTS:
    own = f"contrast == '{contrast}' and part == 'held-out'"
    OTHER_WAY |= {
        f"{contrast}: effect": edit("pairs", own, "total_effect", lambda x: -x),
        f"{contrast}: nodes": edit("nodes", f"{own} and head == 0", "toward", lambda x: -x),
        f"{contrast}: reads": edit("reads", own, "toward", lambda x: 0 * x),
        f"{contrast}: paths": edit("paths", own, "toward", lambda x: -x),
        f"{contrast}: alone": edit("circuit", own, "share", lambda x: x / 2),
        f"{contrast}: removed": edit("circuit", own, "share", lambda x: x + 0.5),
    }
