"""What ``grounding`` controls and claims, on tables made by hand: each comes out either way."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.grounding.experiment import Grounding
from hooked_alm.experiments.grounding.measure import MLP, READINGS
from hooked_alm.experiments.grounding.settings import SPANS, GroundingConfig
from hooked_alm.experiments.grounding.tables import GroundingResults, summarise
from hooked_alm.experiments.workbench.controls import ROUNDING
from hooked_alm.methods.statistics.grounding import grounding_coefficient

N_BLOCKS = 4
INPUTS = {"model": {"blocks": N_BLOCKS}, "audio_is_first": True, "labels": ["sad", "glad"]}
LEAST = 1.5 * ROUNDING["logit"]["float32"]
"""An effect that is no rounding of the fast engine's."""
Change = Callable[[GroundingResults], GroundingResults]
AUDIO = {"audio": [1.0, 1.0, 0.8, 0.2, 0.0], "readout": [0.0, 0.1, 0.3, 0.9, 1.0]}
TEXT = {"text": [1.0, 0.9, 0.2, 0.0, 0.0], "readout": [0.0, 0.1, 0.6, 0.9, 1.0]}
CARRIERS = {(2, 1): (0.8, 0.1), (1, 0): (0.1, 0.9)}
"""Head -> its share of the audio's and of the text's effect."""


def cell(te: tuple[float, float], shares: tuple[float, float]) -> dict[str, float]:
    effects = [total * share for total, share in zip(te, shares, strict=True)]
    gc = grounding_coefficient(*(np.array([one]) for one in effects), min_effect=0.5)
    return {
        **dict(zip(("te_audio", "te_text"), te, strict=True)),
        **dict(zip(("effect_audio", "effect_text"), effects, strict=True)),
        **dict(zip(("rec_audio", "rec_text"), shares, strict=True)),
        "gc": float(gc[0]),
        "noise": 0.0,
    }


def tables(n_clips: int = 12, *, is_even: bool = False) -> dict[str, pd.DataFrame]:
    """A model that follows the voice, which one head brings, as another does the instruction.

    Args:
        n_clips: recordings.
        is_even: the instruction moves every other answer ten times as far as the voice.
    """
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in Grounding.tables}
    for n in range(n_clips):
        voice, target = ("sad", "glad")[:: 1 if n % 2 else -1]
        who = {"pair": f"c{n}__{target}", "clip": f"c{n}", "target": target, "voice": voice}
        te = 10 + 0.1 * (n % 3), 100.0 if is_even and n % 2 else 1 + 0.1 * (n % 4)
        leads = {"base": -5.0, "audio": te[0] - 5.0, "text": -5.0 - te[1]}
        for role, lead in leads.items():
            said = {"prediction": target if lead > 0 else voice, f"z_{target}": lead}
            run = {"role": role, f"z_{voice}": 0.0, **said, "label_mass": 0.9}
            lengths = {"best_label_rank": 1, "n_tokens": 20, "n_audio_tokens": 8}
            rows["runs"].append({**who, **run, **lengths})
        rows["unpatched"].append({**who, "site": "z", "shift": 0.0})
        for reading in READINGS:
            for span, depth in product(SPANS, range(N_BLOCKS + 1)):
                nothing = [0.0] * (N_BLOCKS + 1)
                shares = AUDIO.get(span, nothing)[depth], TEXT.get(span, nothing)[depth]
                shares = (1.0, 1.0) if span == "all" else shares
                at = {"direction": reading, "depth": depth, "span": span}
                rows["grounding"].append({**who, **at, **cell(te, shares)})
            for block, head in product(range(N_BLOCKS), (0, 1, MLP)):
                shares = CARRIERS.get((block, head), (0.05 + 0.001 * n, 0.02))
                at = {"direction": reading, "block": block, "head": head, "span": "readout"}
                rows["nodes"].append({**who, **at, **cell(te, shares)})
    return {name: pd.DataFrame(found) for name, found in rows.items() if found}


def concluded(made: dict[str, pd.DataFrame]) -> GroundingResults:
    run = Grounding.results(GroundingConfig(n_resamples=1000), INPUTS, made)
    run.tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> GroundingResults:
    return concluded(tables())


def edit(table: str, query: str, column: str, by: Callable[[pd.Series], Any]) -> Change:
    """Changes some numbers of a run, and makes its summaries anew."""

    def change(run: GroundingResults) -> GroundingResults:
        found = run[table].copy()
        rows = found.query(query).index
        found.loc[rows, column] = by(found.loc[rows, column])
        if column.startswith("effect"):
            effects = (found[name].to_numpy(float) for name in ("effect_audio", "effect_text"))
            found["gc"] = grounding_coefficient(*effects, min_effect=0.5)
        return concluded(
            {name: run[name] for name in run.tables if name in TABLES} | {table: found}
        )

    return change


TABLES = {*Grounding.tables} - {"sounds"}
BROKEN: dict[str, Change] = {
    "a label is the top token": edit("runs", "role != 'z'", "best_label_rank", lambda x: 3),
    "probability of the labels together": edit("runs", "role != 'z'", "label_mass", lambda x: 0.1),
    "a run patched with itself": edit("unpatched", "clip == 'c1'", "shift", lambda x: x + LEAST),
    "all positions exchanged, at any depth = the other run": edit(
        "grounding", "span == 'all' and depth == 1 and clip == 'c1'", "effect_text",
        lambda x: x + LEAST,
    ),
    "last depth, any span without the readout": edit(
        "grounding", "span == 'struct' and depth == 4", "effect_audio", lambda x: x + LEAST
    ),
    "last depth, readout exchanged = the other run": edit(
        "grounding", "span == 'readout' and depth == 4", "effect_text", lambda x: x - LEAST
    ),
    "audio span, other instruction, audio first": edit(
        "grounding", "span == 'audio' and depth == 2", "effect_text", lambda x: x + LEAST
    ),
    "the shares of audio and text add up to 1": edit(
        "nodes", "block == 2 and head == 1", "gc", lambda x: x - 0.01
    ),
}  # fmt: skip


def few_clips(run: GroundingResults) -> GroundingResults:
    """The same of fewer clips than establish anything."""
    return concluded(tables(n_clips=9))


def even(run: GroundingResults) -> GroundingResults:
    """Neither input has surely more of the answer."""
    return concluded(tables(is_even=True))


OTHER_WAY: dict[str, Change] = {
    "grounded": even,
    "handover_denoise": few_clips,
    "handover_noise": edit(
        "grounding", "span == 'readout' and direction == 'noise'", "rec_audio", lambda x: 0.4
    ),
    "head_audio": edit(
        "nodes", "block == 3 and head == 1 and direction == 'noise'", "effect_audio",
        lambda x: np.linspace(7.0, 9.0, len(x)),
    ),
    "head_text": edit(
        "nodes", "block == 1 and head == 0 and direction == 'denoise'", "rec_text",
        lambda x: 0.4,
    ),
}  # fmt: skip
