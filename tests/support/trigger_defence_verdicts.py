"""Hand-made results of ``trigger_defence``: an attack that the encoder's neurons carry."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.trigger_defence.claims import TOLERATED
from hooked_alm.experiments.trigger_defence.experiment import TriggerDefence
from hooked_alm.experiments.trigger_defence.plan import Defence, defences
from hooked_alm.experiments.trigger_defence.settings import TriggerDefenceConfig
from hooked_alm.experiments.trigger_defence.tables import (
    DefenceResults,
    judged_defences,
    summarise,
)
from hooked_alm.experiments.workbench.controls import ROUNDING
from table_edits import editor

Change = Callable[[DefenceResults], DefenceResults]
CONFIG = TriggerDefenceConfig(n_resamples=1000, further_percents=(), model="bundled:follows_voice")
N = 12
"""Clips of either half, one for each of as many groups."""
LEAST = 1.5 * ROUNDING["logit"]["float32"]
RESTORES = {"audio": 0.9, "lm": 0.5, "features": 0.9, "input": 0.5}
"""Place -> share of the clips that a defence of it restores."""
INPUTS = {"model": {"blocks": 4}, "target": "neutral", "dictionary": None,
          "neurons": {"lm": [4, 50], "audio": [2, 40]}}  # fmt: skip
KeyOf = Callable[[Defence], float]


def share_restored(defence: Defence) -> float:
    """What a defence restores: drawn neurons and a dense change little."""
    if defence.chosen_by != "sensitive" or defence.kind == "dense":
        return 0.05
    return RESTORES[defence.place]


def no_loss(defence: Defence) -> float:
    """Share of clean clips that lose their right answer."""
    return 0.0


def tables(
    reached: float = 1.0, restored: KeyOf = share_restored, lost: KeyOf = no_loss
) -> dict[str, pd.DataFrame]:
    """Clips of which a share is reached, restored, or lost under a defence."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TriggerDefence.tables}
    for half in ("discovery", "held-out"):
        for n in range(N):
            who = {"clip": f"{half}{n}", "group": f"{half}{n:02d}", "label": "sad",
                   "target": "neutral"}  # fmt: skip
            is_reached = n < reached * N
            answer, margin = ("neutral", -3.0) if is_reached else ("sad", 2.0)
            sides = {"answer_clean": "sad", "margin_clean": 5.0}
            rows["attack"].append({
                **who, "half": half, **sides, "answer": answer, "margin": margin,
                "answer_control": "sad", "margin_control": 5.0, "loss_start": 6.0, "loss": 0.01,
                "n_steps": 12, "snr_db": 30.0, "snr_control_db": 30.0, "largest": CONFIG.eps,
                "loudest": 0.5, "label_mass": 0.9, "best_label_rank": 1,
            })  # fmt: skip
            if half == "discovery":
                continue
            for defence in defences(CONFIG, attacked=True):
                is_restored = is_reached and n < restored(defence) * N
                after = ("sad", 4.0) if is_restored else (answer, margin + 0.1)
                rows["defences"].append({
                    **who, **defence.identity(), **sides, "answer_before": answer,
                    "margin_before": margin, "answer": after[0], "margin": after[1],
                })  # fmt: skip
            for defence in defences(CONFIG, attacked=False):
                is_lost = n < lost(defence) * N
                moved = 0.0 if defence.donor == "clean" else 0.1
                rows["utility"].append({
                    **who, **defence.identity(), **sides, "answer_before": "sad",
                    "margin_before": 5.0, "answer": "angry" if is_lost else "sad",
                    "margin": 5.0 - moved,
                })  # fmt: skip
    for place in ("lm", "audio"):
        for number, chosen_by in enumerate(("sensitive", "random", "layer")):
            rows["sensitivity"] += [
                {"place": place, "chosen_by": chosen_by, "draw": 0, "rank": rank, "block": 1,
                 "neuron": 4 * number + rank, "score": 1.0}
                for rank in range(4)
            ]  # fmt: skip
    rows["losses"] = [{"clip": "held-out0", "step": 0, "loss": 6.0}]
    return {name: pd.DataFrame(found) for name, found in rows.items() if found}


def concluded(made: dict[str, pd.DataFrame]) -> DefenceResults:
    run = TriggerDefence.results(CONFIG, INPUTS, made)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> DefenceResults:
    """Sensitive neurons restore, drawn ones do not, and nothing is lost."""
    return concluded(tables())


edit = editor(tables, concluded)


BROKEN: dict[str, Change] = {
    "a label is the top token": edit("attack", "n_steps > 0", "best_label_rank", lambda x: 3),
    "probability of the labels together": edit("attack", "n_steps > 0", "label_mass",
                                               lambda x: 0.1),
    "perturbations are within eps and full scale": edit(
        "attack", "half == 'discovery'", "largest", lambda x: x + 0.001
    ),
    "the control noise is as large": edit(
        "attack", "half == 'discovery'", "snr_control_db", lambda x: x + 1
    ),
    "a clean clip's own values change nothing": edit(
        "utility", "donor == 'clean' and place == 'lm'", "margin", lambda x: x + LEAST
    ),
    "a patch is no identity": edit(
        "defences", "kind == 'patch' and donor == 'clean'", "margin", lambda x: -3.0
    ),
    "clips are heard alike when attacked and when defended": edit(
        "attack", "half == 'held-out'", "margin", lambda x: x + LEAST
    ),
    "no group in both halves": edit(
        "attack", "clip == 'discovery0'", "group", lambda x: "held-out00"
    ),
    "as many drawn neurons, none of them sensitive": edit(
        "sensitivity", "chosen_by == 'layer' and rank == 0", "neuron", lambda x: 0
    ),
}  # fmt: skip


def _other(restored: KeyOf) -> Change:
    return lambda run: concluded(tables(restored=restored))


def _only_as_drawn(name: str) -> Change:
    """The defence restores as little as drawn neurons do."""
    return _other(lambda one: 0.05 if one.name == name else share_restored(one))


def _costly(name: str) -> Change:
    """The defence costs more than is tolerated."""

    def lost(one: Defence) -> float:
        return 10 * TOLERATED if one.name == name else 0.0

    return lambda run: concluded(tables(lost=lost))


OTHER_WAY: dict[str, Change] = {
    "attack": lambda run: concluded(tables(reached=0.05)),
    **{f"restores_{name}": _only_as_drawn(name)
       for name, one in judged_defences(CONFIG).items() if one.place in ("lm", "audio")},
    "place": _other(lambda one: 0.5 if one.place in ("lm", "audio") else share_restored(one)),
    "features": _other(lambda one: 0.5),
    **{f"cost_{name}": _costly(name)
       for name, one in judged_defences(CONFIG, attacked=False).items() if one.donor != "clean"},
}  # fmt: skip
