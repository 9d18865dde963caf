"""What ``sae_steering`` controls and claims, on tables made by hand, either way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.sae_steering.experiment import SAESteering
from hooked_alm.experiments.sae_steering.plan import ARMS, NO_OP
from hooked_alm.experiments.sae_steering.settings import SAESteeringConfig
from hooked_alm.experiments.sae_steering.tables import SteeringResults, summarise

Change = Callable[[SteeringResults], SteeringResults]
N = 20
"""Clips of either kind."""
SILENCED = {
    "features": 0.9, "random": 0.1, "random_shift": 0.1, "frequent": 0.2, "dense": 0.3,
    "reconstruction": 0.0,
}  # fmt: skip
WRONG = {"reconstruction": 1}


def made(
    silenced: dict[str, float] | None = None,
    wrong: dict[str, int] | None = None,
    heard: float = 1.0,
) -> SteeringResults:
    """Results in which arms silence some shares of the clips without speech.

    Args:
        silenced: arm -> share of the clips without speech of which nothing is written any more.
        wrong: arm -> words of five that are wrong under it.
        heard: 1 if words are written of nothing as the model is, else 0.
    """
    silenced, wrong = {**SILENCED, **(silenced or {})}, {**WRONG, **(wrong or {})}
    clips = [(f"{holds}{i}", holds, i) for holds in ("speech", "no_speech") for i in range(N)]

    def row(clip: str, holds: str, i: int, has_words: float, n_wrong: int = 0) -> dict[str, Any]:
        is_speech = holds == "speech"
        counts = {"n": 5 * is_speech, "substitutions": n_wrong * is_speech,
                  "insertions": 0 if is_speech else 2 * has_words}  # fmt: skip
        return {
            "clip": clip, "speaker": f"s{i % 4}", "holds": holds,
            "text": "a b" if has_words else "", "n_tokens": 2, "heard": has_words,
            **{f"reference_{name}": counts.get(name, 0)
               for name in ("n", "substitutions", "deletions", "insertions")},
        }  # fmt: skip

    tables: dict[str, list[dict[str, Any]]] = {
        "transcripts": [row(*one, 1.0 if one[1] == "speech" else heard) for one in clips],
        "chosen": [
            {"clip": f"other {clip}", "speaker": "s", "holds": holds, "rows": 50, "l0": 4.0,
             "unexplained": 0.1}
            for clip, holds, _ in clips
        ],
        "latents": [
            {"arm": "features", "draw": 0, "rank": i, "latent": 3 * i, "mean_no_speech": 2.0,
             "mean_speech": 0.1, "active_no_speech": 0.9, "active_speech": 0.1}
            for i in range(4)
        ],
        "steered": [],
    }  # fmt: skip
    config = SAESteeringConfig(n_resamples=1000, audio="my.csv", n_random=2, further_alphas=(2.0,))
    for arm in ARMS:
        alphas = (1.0,) if arm == "reconstruction" else config.alphas
        alphas = (NO_OP, *alphas) if arm == "features" else alphas
        draws = range(config.n_random if arm == "random" else 1)
        for alpha, draw, (clip, holds, i) in [
            (alpha, draw, one) for alpha in alphas for draw in draws for one in clips
        ]:
            is_silent = holds == "no_speech" and alpha != NO_OP and i < silenced[arm] * N
            words = 1.0 if holds == "speech" else heard
            tables["steered"].append({
                **row(clip, holds, i, 0.0 if is_silent else words,
                      wrong.get(arm, 0) if alpha != NO_OP else 0),
                "arm": arm, "draw": draw, "alpha": alpha, "moved": 0.2 * alpha,
                "off": 1e-7 if (arm, alpha) == ("features", 1.0) else np.nan,
            })  # fmt: skip
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    inputs = {
        "model": {"blocks": 2},
        "dictionary": {"point": "p", "d_sae": 12, "k": 3, "architecture": "topk"},
    }
    run = SAESteering.results(config, inputs, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> SteeringResults:
    """The features carry the words out of nothing, and reconstructions cost words."""
    return made()


def _moves_a_row(run: SteeringResults) -> SteeringResults:
    table = run["steered"]
    run.tables["steered"] = table.assign(moved=table.moved.where(table.alpha != NO_OP, 1e-6))
    return run


def _another_sign(run: SteeringResults) -> SteeringResults:
    run.tables["steered"] = run["steered"].assign(off=0.4)
    return run


def _weaker(run: SteeringResults) -> SteeringResults:
    table = run["steered"]
    run.tables["steered"] = table.assign(moved=table.moved.where(table.arm != "dense", 0.1))
    return run


def _fewer_clips(run: SteeringResults) -> SteeringResults:
    run.tables["steered"] = run["steered"].iloc[:-1]
    return run


def _tested_on_the_same(run: SteeringResults) -> SteeringResults:
    run.tables["chosen"] = run["chosen"].assign(clip="speech3")
    return run


BROKEN: dict[str, Change] = {
    "strength 0 changes nothing": _moves_a_row,
    "strength 1 is all other features and the error": _another_sign,
    "shifts move rows as far": _weaker,
    "every arm has the same clips": _fewer_clips,
    "features were chosen on other clips": _tested_on_the_same,
}
OTHER_WAY: dict[str, Change] = {
    "silences": lambda run: made(heard=0.0),
    "more than random": lambda run: made({"random": 0.9}),
    "more than random_shift": lambda run: made({"random_shift": 0.9}),
    "more than frequent": lambda run: made({"frequent": 1.0}),
    "more than dense": lambda run: made({"dense": 1.0}),
    "more than reconstruction": lambda run: made({"reconstruction": 0.9}),
    "cost": lambda run: made(wrong={"features": 1}),
    "reconstruction": lambda run: made(wrong={"reconstruction": 0}),
}
