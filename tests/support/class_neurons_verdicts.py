"""Hand-made results of ``class_neurons``: neurons that are their class's, driven by the audio."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.class_neurons.experiment import ClassNeurons
from hooked_alm.experiments.class_neurons.settings import ClassNeuronsConfig
from hooked_alm.experiments.class_neurons.tables import NeuronResults, summarise
from hooked_alm.experiments.workbench.controls import ROUNDING
from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS
from table_edits import editor

Change = Callable[[NeuronResults], NeuronResults]
CLASSES = ["glad", "sad"]
CONFIG = ClassNeuronsConfig(n_resamples=1000, alphas=(-1, 0, 1, 4))
LEAST = 1.5 * ROUNDING["logit"]["float32"]
N_GROUPS = 12
INPUTS = {"model": {"blocks": 4}, "labels": CLASSES, "neurons": {"blocks": 4, "each": 50}}


def tables(n_groups: int = N_GROUPS) -> dict[str, pd.DataFrame]:
    """Speakers with a clip of either class; the second half of them is judged."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ClassNeurons.tables}
    for n, cls in product(range(n_groups), CLASSES):
        other = CLASSES[1 - CLASSES.index(cls)]
        half = "discovery" if n < n_groups // 2 else "held-out"
        who = {"item": f"{cls}{n}", "clip": f"{cls}{n}", "group": f"g{n:02d}", "cls": cls}
        logged = float(half == "discovery")
        rows["answers"].append({
            **who, "half": half, "named": None, "prediction": cls, "right": 1.0, "n_rows": 9,
            f"z_{cls}": 6.0, f"z_{other}": 1.0, "label_mass": 0.9, "best_label_rank": 1,
            "logged": logged,
        })  # fmt: skip
        if logged:
            continue
        for chosen_by in (*SELECTORS, *NEURON_CONTROLS):
            alphas = CONFIG.alphas if chosen_by == CONFIG.selector else (-1,)
            for of, alpha in product(CLASSES, alphas):
                own = 1.0 if chosen_by in SELECTORS else 0.01
                moved = alpha * (own + 0.01 * n) if of == cls else -0.1 * alpha
                rows["doses"].append({
                    **who, "chosen_by": chosen_by, "draw": 0, "of": of, "alpha": float(alpha),
                    "right_clean": 1.0, "right": 1.0, "lead_clean": 5.0, "lead": 5.0 + moved,
                    "said_of": float(of == cls), "lead_of": (5.0 if of == cls else -5.0)
                    + (moved if of == cls else -moved), "kl_rest": 0.01 * abs(alpha), "noise": 0.0,
                })  # fmt: skip
            effects = 1.0 + 0.01 * n, 0.1
            rows["drive"].append({
                **who, "voice": cls, "named": other, "chosen_by": chosen_by, "toward": 0.2,
                "effect_audio": effects[0], "effect_text": effects[1],
                "share": effects[0] / sum(effects),
            })  # fmt: skip
    logged_rows = int(sum(row["n_rows"] * row["logged"] for row in rows["answers"]))
    n_items = int(sum(row["logged"] for row in rows["answers"]))
    rows["logs"] = [{"file": "f", "sha256": "", "n_items": n_items, "n_rows": logged_rows}]
    rows["blocks"] = [{"block": block, "activity": 1.0 + block} for block in range(4)]
    for (by, name), (c, cls), rank in product(
        enumerate((*SELECTORS, *NEURON_CONTROLS)), enumerate(CLASSES), range(3)
    ):
        rows["neurons"].append({
            "chosen_by": name, "draw": 0, "cls": cls, "rank": rank, "block": 1 + c,
            "neuron": 3 * by + rank, "score": 1.0, "lap": 0.9, "lap_rest": 0.1, "mean": 1.0,
            "mean_rest": 0.1,
        })  # fmt: skip
    return {name: pd.DataFrame(found) for name, found in rows.items() if found}


def concluded(made: dict[str, pd.DataFrame]) -> NeuronResults:
    run = ClassNeurons.results(CONFIG, INPUTS, made)
    run.tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> NeuronResults:
    return concluded(tables())


edit = editor(tables, concluded)


BROKEN: dict[str, Change] = {
    "a label is the top token": edit("answers", "right == 1", "best_label_rank", lambda x: 3),
    "probability of the labels together": edit("answers", "right == 1", "label_mass",
                                               lambda x: 0.1),
    "neurons at alpha = 0": edit("doses", "alpha == 0", "lead", lambda x: x + LEAST),
    "the unchanged run is the item as asked": edit(
        "doses", "cls == 'sad'", "lead_clean", lambda x: x + LEAST
    ),
    "the logs count every position of their items": edit(
        "logs", "file == 'f'", "n_rows", lambda x: x + 1
    ),
    "no group in both halves": edit(
        "answers", "half == 'held-out'", "logged", lambda x: [1.0, *[0.0] * (len(x) - 1)]
    ),
    "as many neurons for every class, none of them random": edit(
        "neurons", "chosen_by == 'layer' and rank == 0", "neuron",
        lambda x: 3 * SELECTORS.index("mad"),
    ),
    "the shares of audio and instruction add up to 1": edit(
        "drive", "cls == 'sad'", "share", lambda x: x + 0.01
    ),
}  # fmt: skip


def _as_much(table: str) -> Change:
    return edit("doses", f"chosen_by == '{table}' and alpha == -1", "lead",
                lambda x: 5.0 + np.resize([0.3, -0.3], len(x)))  # fmt: skip


OTHER_WAY: dict[str, Change] = {
    **{f"specific_{selector}": _as_much(selector) for selector in SELECTORS},
    "gain": edit(
        "doses", "of != cls", "lead_of", lambda x: np.random.default_rng(0).normal(size=len(x))
    ),
    "drive": edit("drive", "cls == 'sad'", "share", lambda x: 0.05),
}
