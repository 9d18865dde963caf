"""Results of ``emotion_conflict`` in which each control fails, and each claim changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from emotion_toy import N_BLOCKS, toy_results, toy_tables
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.tables import EmotionResults
from hooked_alm.experiments.materials.ob1 import EMOTIONS
from hooked_alm.experiments.workbench.controls import ROUNDING

CONFIG = EmotionConflictConfig(n_resamples=1000)
LEAST = 1.5 * ROUNDING["logit"]["float32"]
"""A shift that is no rounding of the fast engine's."""
Change = Callable[[EmotionResults], EmotionResults]


def cases() -> EmotionResults:
    """A model that hears every voice, and settles conflicts for the text."""
    return toy_results(CONFIG)


def shifted(cells: str, by: float = LEAST) -> Change:
    """One of these patches, off by so much."""

    def change(run: EmotionResults) -> EmotionResults:
        patching = run["patching"]
        patching.loc[patching.query(cells).index[:1], "shift"] += by
        return run

    return change


def with_value(table: str, column: str, value: Any, rows: str = "index == index") -> Change:
    """Some rows with another value."""

    def change(run: EmotionResults) -> EmotionResults:
        run[table].loc[run[table].query(rows).index, column] = value
        return run

    return change


def _voice_everywhere(run: EmotionResults) -> EmotionResults:
    run["patching"]["prediction"] = run["patching"].voice
    return run


BROKEN: dict[str, Change] = {
    "a label is the top token": with_value("runs", "best_label_rank", 3),
    "probability of the labels together": with_value("runs", "label_mass", 0.1),
    "lens at the last depth = logits": with_value("depths", "z_sad", 9.0, "depth == 4"),
    "a run patched with itself": shifted("donor == 'self'"),
    "last block, any span without the readout": shifted(
        "donor == 'both' and block == 3 and span == 'struct'"
    ),
    "audio span, other instruction, audio first": shifted(
        "donor == 'text_swap' and span == 'audio' and block == 1"
    ),
    "all positions patched = the donor's answer": shifted(
        "donor == 'both' and span == 'all' and block == 1", 0.01
    ),
    "last block, readout patched = the donor's answer": shifted(
        "donor == 'both' and span == 'readout' and block == 3"
    ),
    "an unrelated donor does not bring the voice's label": _voice_everywhere,
    "attention of the segments sums to 1": with_value(
        "attention", "mass", 0.41, "span == 'audio' and layer == 2"
    ),
}


def few_clips(run: EmotionResults) -> EmotionResults:
    """The same of fewer clips than establish anything."""
    return toy_results(CONFIG, n_clips=9)


def _settled_at_the_end(run: EmotionResults) -> EmotionResults:
    """A lens that reads the voice ahead of the target, level with the others, until the output."""
    tables = toy_tables(CONFIG)
    runs = tables["runs"].set_index("unit")
    depths = tables["depths"].set_index("unit")
    early = (depths.depth < N_BLOCKS).to_numpy()
    scores = np.tile(np.arange(len(EMOTIONS)) / 10, (len(depths), 1))
    names = list(EMOTIONS)
    for row, unit in enumerate(depths.index):
        if early[row]:
            scores[row, names.index(runs.voice[unit])] = 1.0
    columns = [f"z_{name}" for name in names]
    found = pd.DataFrame(scores, depths.index, columns)
    depths.loc[early, columns] = found[early]
    return toy_results(CONFIG, {**tables, "depths": depths.reset_index()})


OTHER_WAY: dict[str, Change] = {
    **dict.fromkeys(
        ("answer_follows", "H2_dominance", "H1_patching", "handoff_text_swap",
         "handoff_audio_swap", "naming_is_not_enough", "voice_is_heard"),
        few_clips,
    ),
    "H1_lens": _settled_at_the_end,
}  # fmt: skip
