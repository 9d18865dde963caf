"""The tables of a ``convergence`` run, where its measures turn, and whether they agree.

Source: M-TC.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.convergence import (
    Step,
    agrees,
    chance_agreement,
    permuted_agreement,
    steepest_block,
)
from hooked_alm.methods.statistics.critical_layer import critical_layers, settling_depths

from ..materials.clips import SOUNDS
from ..materials.resampling import mean_curve, mean_of, over
from ..workbench.results import Results, Row, parts_by
from .settings import ConvergenceConfig, TurningPoint

AgreementResults = Results[ConvergenceConfig]
TABLES = {
    "transcripts": "how near the transcript of a depth is to the final one, and how likely that is",
    "tokens": "a token of the final transcript, and the decoder's depth that settles it",
    "streams": "the encoder's stream at a depth: norms, and similarity to its last state",
    "checks": "the last depth of the encoder against the model itself",
    **SOUNDS,
}
STEPS: dict[TurningPoint, Step] = {
    "cka": "difference", "centred_norm": "ratio", "raw_norm": "ratio"
}  # fmt: skip
"""Measures of the stream, and what is the largest step of each."""
N_PERMUTED = 2000


def summarise(run: AgreementResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "curves", curves(run)
    yield "depths", depths(run)
    yield "turning_points", turning_points(run)
    yield "agreement", agreement(run)


def n_depths(run: AgreementResults) -> int:
    """Blocks of the encoder: its last depth."""
    return int(run["transcripts"].depth.max())


def similarity(run: AgreementResults) -> str:
    """The column of the estimator that is asked for."""
    return "cka" if run.config.debiased else "plain_cka"


def curves(run: AgreementResults) -> pd.DataFrame:
    """Mean over clips of what the measures are made of, by the encoder's depth."""
    rows: list[Row] = []
    parts: list[tuple[str, pd.DataFrame, tuple[str, ...]]] = [
        ("", run["transcripts"], ("distance", "log_p"))
    ]
    parts += [
        (str(name), some, ("raw_norm", "centred_norm", "cka", "plain_cka"))
        for name, some in run["streams"].groupby("rows", sort=False)
    ]
    for name, table, columns in parts:
        for column in columns:
            curve = mean_curve(run, table, column)
            rows += [{"of": column, "rows": name, **point} for point in curve]
    return pd.DataFrame(rows)


def depths(run: AgreementResults) -> pd.DataFrame:
    """For every clip and measure the depth at which it turns; NaN where it does not.

    A step across block b, from 0, is depth b + 1. The decoder's depth is given as if the decoder
    had as many blocks as the encoder; ``own_depth`` is its own.
    """
    last = n_depths(run)
    who, far = over(run["transcripts"], "distance")
    _, log_p = over(run["transcripts"], "log_p")
    median = run["tokens"].groupby("clip", sort=False).depth.median()
    saturated = median.reindex(who["clip"]).to_numpy(np.float64)
    found = {
        ("stabilisation", ""): settling_depths(far <= run.config.near),
        ("critical", ""): critical_layers(log_p, run.config.critical_method),
        ("saturation", ""): saturated * last / run.n_blocks,
    }
    for name, some in run["streams"].groupby("rows", sort=False):
        for measure, step in STEPS.items():
            column = similarity(run) if measure == "cka" else measure
            of, values = over(some, column)
            blocks = pd.Series(steepest_block(values, step), index=of["clip"])
            found[measure, str(name)] = 1 + blocks.reindex(who["clip"]).to_numpy(np.float64)
    return pd.concat(
        [
            who.assign(
                measure=measure, rows=rows, depth=values, relative_depth=values / last,
                own_depth=saturated if measure == "saturation" else values,
            )
            for (measure, rows), values in found.items()
        ],
        ignore_index=True,
    )  # fmt: skip


def of_rows(run: AgreementResults, measure: str) -> str:
    """The rows that a measure is taken of in the run's settings."""
    return run.config.rows if measure in STEPS else ""


def turning_points(run: AgreementResults) -> pd.DataFrame:
    """Mean depth of every measure, and the one that most clips have."""
    rows: list[Row] = []
    for names, some in parts_by(run["depths"], "measure", "rows"):
        usual = some.depth.mode()
        rows.append({
            **names, **mean_of(run, some, "depth"),
            "most_often": float(usual.iloc[0]) if len(usual) else np.nan,
            "share_of_it": float((some.depth == usual.iloc[0]).mean()) if len(usual) else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def compared(
    run: AgreementResults,
) -> tuple[pd.DataFrame, Float[np.ndarray, "measure clip"]]:
    """Clips of which every measure of the settings has a depth, and these depths."""
    table = run["depths"]
    columns = []
    for measure in run.config.measures:
        some = table[(table.measure == measure) & (table.rows == of_rows(run, measure))]
        columns.append(some.set_index(["clip", "speaker"]).depth.rename(measure))
    both = pd.concat(columns, axis=1).dropna()
    return both.index.to_frame(index=False), both.to_numpy(np.float64).T


def agreement(run: AgreementResults) -> pd.DataFrame:
    """How often the measures agree, beside two kinds of chance, by tolerance.

    ``chance``: each depth is any of the encoder's. ``permuted``: each measure keeps its depths, and
    they are dealt out to the clips anew; ``p`` is the share of such deals that agree as often.
    """
    who, found = compared(run)
    rows: list[Row] = []
    for tolerance in sorted({0, 1, 2, run.config.tolerance}):
        chance = chance_agreement(n_depths(run), tolerance, len(run.config.measures))
        if not len(who):
            rows.append({"tolerance": tolerance, "mean": np.nan, "low": np.nan, "high": np.nan,
                         "n": 0, "n_clusters": 0, "chance": chance})  # fmt: skip
            continue
        hits = agrees(found, tolerance)
        null = permuted_agreement(found, tolerance, n=N_PERMUTED, seed=run.config.seed)
        rows.append({
            "tolerance": tolerance, **run.draws.row(hits, run.config.clusters(who)),
            "chance": chance, "permuted": float(null.mean()),
            "p": float((1 + (null >= hits.mean() - 1e-12).sum()) / (1 + len(null))),
        })  # fmt: skip
    columns = ["tolerance", "mean", "low", "high", "n", "n_undefined", "n_clusters", "chance"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "permuted", "p"])


def moved_by_massive(run: AgreementResults) -> pd.DataFrame:
    """For every clip, whether CKA's step is elsewhere without the massive rows."""
    table = run["depths"]
    cka = table[table.measure == "cka"].pivot(
        index=["clip", "speaker"], columns="rows", values="depth"
    )
    both = cka[["own", "without_massive"]].dropna()
    is_moved = both["own"] != both["without_massive"]
    return both.index.to_frame(index=False).assign(moved=is_moved.to_numpy())
