"""What ``encoder_lens`` controls and claims, on tables made by hand, either way."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from hooked_alm.experiments.encoder_lens.experiment import EncoderLens
from hooked_alm.experiments.encoder_lens.settings import EncoderLensConfig
from hooked_alm.experiments.encoder_lens.tables import DepthResults, summarise

Change = Callable[[DepthResults], DepthResults]
N_CLIPS, N_BLOCKS = 24, 4
DISTANCES, ERRORS, LOOPS = (1.0, 0.9, 0.0, 0.0), (4, 5, 1, 0), (0.0, 1.0, 0.0, 0.0)
"""Of four words each, at depths 0 to 3 of the encoder."""


def made(
    distances: Sequence[float] = DISTANCES,
    errors: Sequence[int] = ERRORS,
    circles: Sequence[float] = LOOPS,
    settles: Sequence[int] = (1, 2, 4),
) -> DepthResults:
    """Results of an encoder of three blocks, and of a decoder of four."""
    tables: dict[str, list[dict[str, Any]]] = {"transcripts": [], "tokens": [], "checks": []}
    for i in range(N_CLIPS):
        who = {"clip": f"c{i}", "speaker": f"s{i % 4}"}
        for depth, distance in enumerate(distances):
            row = {"depth": depth, "text": "a b c d", "n_tokens": 4, "distance": distance}
            counts = {"n": 4, "substitutions": errors[depth], "deletions": 0, "insertions": 0}
            # One clip in eight is read a block later.
            odd = {"distance": 1.0} if i % 8 == 0 and depth == 1 else {}
            tables["transcripts"].append({
                **who, **row, **odd, "reference_known": 1.0,
                **{f"reference_{name}": n for name, n in counts.items()},
                "log_p_final": depth - 4.0, "log_p_reference": depth - 5.0, "repetition": 0.0,
                "loops": circles[depth],
            })  # fmt: skip
        for place, depth in enumerate(settles):
            token = {"place": place, "token": "a", "depth": depth, "margin": 1.0}
            tables["tokens"].append({**who, **token, "random_depth": N_BLOCKS})
        tables["checks"].append({**who, "memory": 0.0, "log_p": 0.0, "not_greedy": 0.0})
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    config = EncoderLensConfig(n_resamples=1000, audio="my.csv")
    run = EncoderLens.results(config, {"model": {"blocks": N_BLOCKS}}, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> DepthResults:
    """Settled at depth 2 of 3, wrong by a word there; in circles at depth 1; tokens early."""
    return made()


def _checks(**values: float) -> Change:
    def apply(run: DepthResults) -> DepthResults:
        run.tables["checks"] = run["checks"].assign(**values)
        return run

    return apply


BROKEN: dict[str, Change] = {
    "the last depth is what the model hears": _checks(memory=0.1),
    "the last depth is as likely as in the model": _checks(log_p=0.1),
    "the transcript is what one pass finds likeliest": _checks(not_greedy=0.1),
}
OTHER_WAY: dict[str, Change] = {
    "stabilises": lambda run: made(distances=(1.0, 0.9, 0.4, 0.0)),
    "last_block_helps": lambda run: made(errors=(4, 5, 0, 0)),
    "goes_in_circles": lambda run: made(circles=(0.0, 0.0, 0.0, 0.0)),
    "saturates": lambda run: made(settles=(4, 4, 4)),
}
