"""Hand-made results of ``semantic_vs_prosody``, in which the words or the voice decide."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd

from hooked_alm.experiments.semantic_vs_prosody.experiment import SemanticVsProsody
from hooked_alm.experiments.semantic_vs_prosody.settings import SPANS, SemanticVsProsodyConfig
from hooked_alm.experiments.semantic_vs_prosody.tables import ProsodyResults, summarise

CONFIG = SemanticVsProsodyConfig(n_resamples=1000)
N_BLOCKS = 8
LABELS = list(CONFIG.labels)
FALLING = [1, 1, 1, 0.7, 0.3, 0.1, 0, 0, 0]
"""Recovery of an audio span that lets go at depth 4."""
Side = Literal["semantic", "prosody"]
Change = Callable[[ProsodyResults], ProsodyResults]


def scores(label: str, prefix: str = "z", share: float = 1.0) -> dict[str, float]:
    """The label's score is 4, and the others' 0."""
    return {f"{prefix}_{name}": 4.0 * share * (name == label) for name in LABELS}


def toy_tables(follows: Side, n: int) -> dict[str, pd.DataFrame]:
    """Clips of sentences of their own, and each in one pair of either type."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("runs", "lens", "pairs", "patches", "control_patches")
    }
    for i in range(n):
        words, voice = ("happy", "sad") if i % 2 else ("sad", "happy")
        who = {"item": f"clip {i}", "semantic": words, "prosody": voice, "speaker": "s",
               "text": f"sentence {i}"}  # fmt: skip
        said = words if follows == "semantic" else voice
        sure = {"label_mass": 0.99, "best_label_rank": 1}
        run = {**who, "prediction": said, **scores(said), **sure, "top_token": said}
        rows["runs"].append(run)
        for depth in range(N_BLOCKS + 1):
            share = depth / N_BLOCKS
            fidelity = {"kl": 1 - share, "agrees": float(depth >= 3), "entropy": 1.0}
            read = {**scores(said, share=share), **fidelity, "residual_norm": 1.0, **sure}
            rows["lens"].append({**who, "depth": depth, **read})
        for which in ("semantic", "prosody"):
            _add_pair(rows, who, which, said, "angry" if which == follows else said)
        _add_controls(rows["control_patches"], who, said)
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def _add_pair(
    rows: dict[str, list[dict[str, Any]]], who: dict[str, Any], which: str, said: str, donor: str
) -> None:
    pair = {"pair_id": f"{which} {who['item']}", "type": which, "A": who["item"], "B": "other",
            "target": "angry", "text": who["text"], "speaker": "s"}  # fmt: skip
    ends = {"base_prediction": said, **scores(said, "base")}
    ends |= {"donor_prediction": donor, **scores(donor, "donor")}
    rows["pairs"].append({**pair, "len_A": 8, "len_B": 8, **ends})
    for depth, falling in enumerate(FALLING):
        shares = {"audio": falling, "readout": 1 - falling, "all": 1.0}
        for span in SPANS:
            share = shares.get(span, 0.0)
            z = {f"z_{n}": ends[f"base_{n}"] + share * (ends[f"donor_{n}"] - ends[f"base_{n}"])
                 for n in LABELS}  # fmt: skip
            top = LABELS[int(np.argmax([*z.values()]))]
            cell = {"depth": depth, "span": span, "noise": 0.0, "prediction": top}
            rows["patches"].append({**pair, **cell, **z})


def _add_controls(rows: list[dict[str, Any]], who: dict[str, Any], said: str) -> None:
    for control in CONFIG.controls:
        after = said if control in ("self", "same_labels") else "neutral"
        for depth in range(N_BLOCKS + 1):
            cell = {"depth": depth, "span": "audio", "prediction": after, **scores(after)}
            rows.append({**who, "control": control, **cell, **scores(said, "base")})


@functools.cache
def toy_results(follows: Side = "semantic", n: int = 12) -> ProsodyResults:
    """The tables as results, summaries included."""
    inputs = {"model": {"blocks": N_BLOCKS}}
    run = SemanticVsProsody.results(CONFIG, inputs, toy_tables(follows, n))
    run.tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> ProsodyResults:
    """A model that follows the words."""
    return toy_results()


def with_value(table: str, column: str, value: Any, rows: str = "index == index") -> Change:
    """Some rows with another value."""

    def change(run: ProsodyResults) -> ProsodyResults:
        run[table].loc[run[table].query(rows).index, column] = value
        return run

    return change


BROKEN: dict[str, Change] = {
    "a label is the top token": with_value("runs", "best_label_rank", 3),
    "probability of the labels together": with_value("runs", "label_mass", 0.1),
    "lens at the last depth = logits": with_value("lens", "z_sad", 9.0, "depth == 8"),
    "win rates of a depth sum to 1": with_value(
        "winrate_curve_conflict", "mean", 0.9, "depth == 2 and winner == 'other'"
    ),
    "a run patched with itself changes nothing": with_value(
        "control_patches", "z_sad", 0.001, "control == 'self' and depth == 3"
    ),
    "last depth, any span without the readout: no change": with_value(
        "patches", "z_sad", 0.001, "depth == 8 and span == 'text'"
    ),
    "last depth, readout: the donor's answer": with_value(
        "patches", "z_sad", 0.001, "depth == 8 and span == 'readout'"
    ),
    "depth 0, audio of equal length: the donor's run": with_value(
        "patches", "z_sad", 0.001, "depth == 0 and span == 'audio'"
    ),
    "all positions of equal length: the donor's answer at every depth": with_value(
        "patches", "z_sad", 0.001, "depth == 5 and span == 'all'"
    ),
    "silence and noise bring the target less often than B's audio": with_value(
        "control_flips", "to_target", 1.0, "control == 'silence'"
    ),
}
OTHER_WAY: dict[str, Change] = {
    **dict.fromkeys(
        ("decides", "readable_from", "moves_the_answer", "handoff_semantic"),
        lambda run: toy_results(n=9),
    ),
    "handoff_prosody": lambda run: toy_results("prosody"),
}
