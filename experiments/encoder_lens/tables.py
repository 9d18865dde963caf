"""The tables of an ``encoder_lens`` run, and what is averaged over them.

Source: M-BT-1 to M-BT-3.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from hooked_alm.methods.statistics.critical_layer import settling_depths

from ..materials.clips import SOUNDS
from ..materials.resampling import mean_curve, mean_of, over
from ..materials.transcript_tables import ERRORS, error_rate, error_rise
from ..workbench.results import Results, Row
from .settings import EncoderLensConfig

DepthResults = Results[EncoderLensConfig]
TABLES = {
    "transcripts": "what the decoder writes when the encoder ends at a depth",
    "tokens": "a token of the final transcript, and the decoder's depth that settles it",
    "checks": "the last depth of the encoder against the model itself",
    **SOUNDS,
}
MEASURES = ("distance", "log_p_final", "log_p_reference", "repetition", "loops", "empty")


def summarise(run: DepthResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "depths", depths(run)
    yield "word_errors", word_error_rates(run)
    yield "stabilisation", stabilisation(run)
    yield "saturation", saturation(run)
    yield "settled", settled(run)


def n_depths(run: DepthResults) -> int:
    """Blocks of the encoder: its last depth."""
    return int(run["transcripts"].depth.max())


def depths(run: DepthResults) -> pd.DataFrame:
    """Mean over clips of every measure, by the encoder's depth."""
    table = run["transcripts"].assign(empty=(run["transcripts"].n_tokens == 0).astype(float))
    # Where nothing is written, nothing is written again.
    table["repetition"] = table.repetition.fillna(0.0)
    rows = []
    for measure in MEASURES:
        rows += [{"measure": measure, **point} for point in mean_curve(run, table, measure)]
    return pd.DataFrame(rows)


def known(run: DepthResults, depth: int) -> pd.DataFrame:
    """Transcripts of a depth, of clips of which it is known what is said."""
    table = run["transcripts"]
    return table[(table.reference_known == 1) & (table.depth == depth)]


def word_error_rates(run: DepthResults) -> pd.DataFrame:
    """Errors of the corpus over its words, by the encoder's depth; see ``error_rate``."""
    rows = []
    for depth in range(n_depths(run) + 1):
        if (some := known(run, depth)).empty:
            continue
        rate = error_rate(run, some)
        sums = {name: int(some[f"reference_{name}"].sum()) for name in ERRORS}
        ends = {end: rate[end] for end in ("mean", "low", "high")}
        rows.append({"depth": depth, **ends, **sums, "n_clips": len(some)})
    return pd.DataFrame(rows, columns=["depth", "mean", "low", "high", *ERRORS, "n_clips"])


def last_block(run: DepthResults) -> dict[str, Any]:
    """How far the error rate of the last depth but one is above that of the last."""
    last = n_depths(run)
    return error_rise(run, known(run, last), known(run, last - 1))


def stabilisation(run: DepthResults) -> pd.DataFrame:
    """For every clip, the encoder's depth from which its transcript is near the final one."""
    who, distances = over(run["transcripts"], "distance")
    return who.assign(depth=settling_depths(distances <= run.config.near))


def saturation(run: DepthResults) -> pd.DataFrame:
    """For every clip, the mean depth of the decoder that settles a token, and by chance."""
    means = run["tokens"].groupby(["clip", "speaker"], sort=False)[["depth", "random_depth"]].mean()
    return means.reset_index()


def settled(run: DepthResults) -> pd.DataFrame:
    """Mean over clips of either depth, beside the stack's blocks."""
    saturated = run["saturation"]
    values = {
        ("encoder", "stabilisation"): (run["stabilisation"], "depth", n_depths(run)),
        ("decoder", "saturation"): (saturated, "depth", run.n_blocks),
        ("decoder", "saturation of random directions"): (saturated, "random_depth", run.n_blocks),
    }
    rows: list[Row] = []
    for (stack, what), (table, column, n) in values.items():
        found = mean_of(run, table, column)
        rows.append({"stack": stack, "what": what, **found, "blocks": n})
    return pd.DataFrame(rows)
