"""The tables of an ``encoder_lens`` run, and what is averaged over them.

Source: M-BT-1 to M-BT-3.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.critical_layer import settling_depths

from ..materials.clips import SOUNDS
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
ERRORS = ("n", "substitutions", "deletions", "insertions")
"""Counts against the reference."""


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


def clusters(run: DepthResults, who: pd.DataFrame) -> list[str]:
    """What the intervals resample of some rows."""
    return who["clip" if run.config.cluster == "item" else "speaker"].tolist()


def wide(table: pd.DataFrame, column: str) -> tuple[pd.DataFrame, Float[np.ndarray, "clip depth"]]:
    """Clips and speakers, and a column of theirs along the encoder's depth."""
    found = table.pivot(index=["clip", "speaker"], columns="depth", values=column)
    return found.index.to_frame(index=False), found.to_numpy(np.float64)


def depths(run: DepthResults) -> pd.DataFrame:
    """Mean over clips of every measure, by the encoder's depth."""
    table = run["transcripts"].assign(empty=(run["transcripts"].n_tokens == 0).astype(float))
    # Where nothing is written, nothing is written again.
    table["repetition"] = table.repetition.fillna(0.0)
    rows = []
    for measure in MEASURES:
        who, values = wide(table, measure)
        points = run.draws.points(values, clusters(run, who))
        rows += [{"measure": measure, "depth": k, **point} for k, point in enumerate(points)]
    return pd.DataFrame(rows)


def rates(run: DepthResults) -> Iterator[tuple[int, pd.DataFrame, Float[np.ndarray, "clip 2"]]]:
    """Depth, clips whose words are known, and errors and words of each there."""
    known = run["transcripts"][run["transcripts"].reference_known == 1]
    for depth, part in known.groupby("depth"):
        counts = part[[f"reference_{name}" for name in ERRORS[1:]]].sum(axis=1)
        found = np.stack([counts, part.reference_n], axis=1).astype(np.float64)
        yield int(str(depth)), part[["clip", "speaker"]], found


def _rate(means: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], np.nan)


def word_error_rates(run: DepthResults) -> pd.DataFrame:
    """Errors of the corpus over its words, by the encoder's depth; never a mean of clips' rates."""
    rows = []
    for depth, who, counts in rates(run):
        found = run.draws.where(counts, clusters(run, who), _rate)
        part = run["transcripts"][run["transcripts"].depth == depth]
        sums = {name: int(part[f"reference_{name}"].sum()) for name in ERRORS}
        rows.append({
            "depth": depth, "mean": found.at, "low": found.low, "high": found.high, **sums,
            "n_clips": len(who),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["depth", "mean", "low", "high", *ERRORS, "n_clips"])


def last_block(run: DepthResults) -> dict[str, Any]:
    """How far the error rate of the last depth but one is above that of the last."""
    last = n_depths(run)
    found = {depth: (who, counts) for depth, who, counts in rates(run)}
    if not found:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "n_clusters": 0}
    (who, before), (_, after) = found[last - 1], found[last]
    both = np.concatenate([before, after], axis=1)
    draws = run.draws.where(both, clusters(run, who), lambda m: _rate(m[:, :2]) - _rate(m[:, 2:]))
    sizes = {"n": len(who), "n_clusters": len({*clusters(run, who)})}
    return {"mean": draws.at, "low": draws.low, "high": draws.high, **sizes}


def stabilisation(run: DepthResults) -> pd.DataFrame:
    """For every clip, the encoder's depth from which its transcript is near the final one."""
    who, distances = wide(run["transcripts"], "distance")
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
        found = run.draws.row(table[column], clusters(run, table))
        rows.append({"stack": stack, "what": what, **found, "blocks": n})
    return pd.DataFrame(rows)
