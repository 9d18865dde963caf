"""What ``minimal_pairs`` controls and claims, on tables made by hand: each comes out either way."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.materials.pair_acceptance import ACCEPTANCE, EVERY
from hooked_alm.experiments.minimal_pairs.experiment import MinimalPairs
from hooked_alm.experiments.minimal_pairs.settings import MinimalPairsConfig
from hooked_alm.experiments.minimal_pairs.tables import PairResults, effects, sets_of
from hooked_alm.experiments.workbench.controls import FAIL, PASS

Change = Callable[[PairResults], PairResults]
N = 12
TOTAL = 2.0


def concluded(tables: dict[str, pd.DataFrame]) -> PairResults:
    run = MinimalPairs.results(MinimalPairsConfig(), {"model": {"blocks": 2}}, tables)
    run.tables["sets"] = sets_of(run["pairs"], run["acceptance"])
    for name, table in effects(run):
        run.tables[name] = table
    return run


def cases() -> PairResults:
    """The audio is enough and not necessary below depth 2; one head is stood in for."""
    rows: dict[str, list[dict[str, Any]]] = {"depths": [], "heads": [], "pairs": []}
    criteria = []
    for i in range(N):
        around = np.random.default_rng(i).normal(1, 0.02, 40).tolist().pop
        who = {"pair": f"emotion-{i}", "attribute": "emotion", "group": f"g{i}"}
        about = {"family": "prosodic", "label_a": "sad", "label_b": "angry", "speaker": "anna"}
        rows["pairs"].append(
            {**who, **about, "text": "one", "accepted": True, "own_probe": -0.9 * around()}
        )
        for name, bound in (("frames", 0), ("level", 0.5)):
            found = {"criterion": name, "measured": 0.0, "bound": bound, "verdict": PASS}
            criteria.append({**who, **found, "low": np.nan, "high": np.nan})
        shares = {"noising": (1.0, 0.2, 0.0), "denoising": (1.0, 0.8, 0.0)}
        for direction, depth in product(shares, range(3)):
            share = shares[direction][depth] * (around() if depth == 1 else 1.0)
            ends = (TOTAL, 0.0) if direction == "noising" else (0.0, TOTAL)
            value = ends[0] + share * (ends[1] - ends[0])
            at = {"direction": direction, "place": "audio", "depth": depth, "noise": 0.0}
            found = {"value": value, "toward": share * TOTAL, "recovery": share}
            rows["depths"].append({**who, **at, **found, "base": ends[0], "donor": ends[1]})
        for place, layer, head in product(("readout", "audio"), range(2), range(2)):
            acting = (place, layer, head) == ("readout", 1, 0)
            moved = {"patched": acting * around(), "ablated": 0.0}
            rows["heads"].append({**who, "place": place, "layer": layer, "head": head, **moved})
    tables = {name: pd.DataFrame(found) for name, found in rows.items()}
    tables["acceptance"] = pd.DataFrame(criteria)[ACCEPTANCE]
    tables["probes"] = pd.DataFrame([{"column": "text", "reads": True}])
    tables["written"] = pd.DataFrame([{"clip": "a", "file": "a.wav", "difference": 0.0}])
    tables["clips"] = pd.DataFrame([{"clip": "a"}])
    return concluded(tables)


def edit(table: str, query: str, column: str, by: Callable[[pd.Series], pd.Series]) -> Change:
    """Changes some numbers of a run, and makes what rests on them anew."""

    def change(run: PairResults) -> PairResults:
        found = run[table].copy()
        chosen = found.query(query).index
        found.loc[chosen, column] = by(found.loc[chosen, column])
        kept = {*MinimalPairs.tables, "pairs", "acceptance", "probes"}
        return concluded({name: run[name] for name in kept} | {table: found})

    return change


def leaking(run: PairResults) -> PairResults:
    """The set is rejected: its labels can be told by their level."""
    leak = {"attribute": "emotion", "pair": EVERY, "criterion": "level leak", "measured": 0.001}
    row = pd.DataFrame([{**leak, "bound": 0.05, "verdict": FAIL}])
    criteria = pd.concat([run["acceptance"], row], ignore_index=True)
    pairs = run["pairs"].assign(accepted=False)
    return concluded({**run.tables, "acceptance": criteria, "pairs": pairs})


HEARD, WHOLE, BLIND = (control.name for control in MinimalPairs.controls)
BROKEN = {
    HEARD: edit("written", "difference == 0", "difference", lambda x: x + 1),
    WHOLE: edit("depths", "depth == 0", "value", lambda x: x + 1),
    BLIND: edit("heads", "layer == 1 and place == 'audio'", "ablated", lambda x: x + 1),
}
OTHER_WAY = {
    "emotion: alone": leaking,
    "emotion: directions": edit("depths", "depth == 1", "recovery", lambda x: 0 * x + 0.5),
    "emotion: backup": edit("heads", "patched != 0", "ablated", lambda x: x + 1),
}
