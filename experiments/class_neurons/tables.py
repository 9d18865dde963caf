"""The tables of a ``class_neurons`` run, and what is made of them.

Source: M-ESN-3, M-ESN-4, M-ESN-6, M-ESN-7, M-ESN-8.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS, Drive
from hooked_alm.methods.statistics.class_neurons import Neuron
from hooked_alm.methods.statistics.neuron_sets import block_counts, jaccard_by_chance, overlap

from ..materials.class_changes import dose_means, matrix, second_pass, specificity_table
from ..materials.clips import SOUNDS
from ..materials.neuron_logs import LOGS
from ..workbench.intervals import Draws
from ..workbench.results import Results, having
from .settings import OUT, ClassNeuronsConfig

NeuronResults = Results[ClassNeuronsConfig]
TABLES = {
    "answers": "an item as asked: its class, and what is answered",
    **LOGS,
    "neurons": "a neuron of a class, by a selector, or drawn at random beside it",
    "blocks": "a block, and the mean square of its neurons",
    "doses": "an item with the neurons of a class at a strength",
    "drive": "a conflict: what another audio and another instruction do to neurons",
    **SOUNDS,
}
DRIVE = ["item", "clip", "group", "cls", "voice", "named", "chosen_by", *Drive._fields]
MAY_LACK = {"drive": DRIVE}


def summarise(run: NeuronResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    doses, draws, selector = run["doses"], run.draws, run.config.selector
    taken_out = having(doses, alpha=OUT)
    yield "classes", classes(run["answers"])
    yield "matrix", matrix(taken_out, draws)
    yield "specificity", specificity_table(taken_out, selector, NEURON_CONTROLS, draws)
    yield "dose_means", dose_means(ours := having(doses, chosen_by=selector), draws)
    yield "second_pass", second_pass(ours, run["answers"], draws)
    yield "layers", layers(run)
    yield "overlaps", overlaps(run)
    yield "drive_means", drive_means(run, draws)


def classes(answers: pd.DataFrame) -> pd.DataFrame:
    """Items of every class and half: how many are right, and how many were logged."""
    found = answers.groupby(["half", "cls"], sort=True).agg(
        n_items=("item", "size"), n_groups=("group", "nunique"), n_right=("right", "sum"),
        n_logged=("logged", "sum"),
    )  # fmt: skip
    return found.reset_index().astype({"n_right": int, "n_logged": int})


def lists_of(neurons: pd.DataFrame) -> dict[tuple[str, str], list[Neuron]]:
    """Neurons by selector and class."""
    selected = neurons[neurons.chosen_by.isin(SELECTORS)]
    return {
        (str(chosen_by), str(cls)): [*zip(part.block.tolist(), part.neuron.tolist(), strict=True)]
        for (chosen_by, cls), part in selected.groupby(["chosen_by", "cls"], sort=False)
    }


def layers(run: NeuronResults) -> pd.DataFrame:
    """Neurons of every block, by selector, beside what both nulls have, and the p of each."""
    nulls = {"uniform": np.ones(run.n_blocks), "activity": run["blocks"].activity.to_numpy()}
    lists, seed = lists_of(run["neurons"]), run.config.seed
    return pd.DataFrame([
        {"chosen_by": selector, **row}
        for selector in SELECTORS
        for row in block_counts(
            {at for (by, _), some in lists.items() if by == selector for at in some},
            nulls, seed=seed,
        )
    ])  # fmt: skip


def overlaps(run: NeuronResults) -> pd.DataFrame:
    """What two selectors' neurons of a class share, and what one selector's of two classes do."""
    lists, sizes = lists_of(run["neurons"]), run.inputs["neurons"]
    n_neurons, by_chance = sizes["blocks"] * sizes["each"], jaccard_by_chance(run.config.rate)
    return pd.DataFrame([
        {
            "chosen_by": a[0], "cls": a[1], "other_chosen_by": b[0], "other_cls": b[1],
            **overlap(lists[a], lists[b], n_neurons)._asdict(), "by_chance": by_chance,
        }
        for a, b in combinations(lists, 2)
        if a[0] == b[0] or a[1] == b[1]
    ])  # fmt: skip


def drive_means(run: NeuronResults, draws: Draws) -> pd.DataFrame:
    """Mean effects of both exchanges and the audio's share, by who chose the neurons."""
    rows = [
        {"chosen_by": chosen_by, "measure": what, **draws.row(part[what], part.group.tolist())}
        for chosen_by, part in run["drive"].groupby("chosen_by", sort=False)
        for what in ("effect_audio", "effect_text", "share")
    ]
    columns = ["chosen_by", "measure", "mean", "low", "high", "n", "n_undefined", "n_clusters"]
    return pd.DataFrame(rows, columns=columns)
