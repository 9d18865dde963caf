"""Hand-made results of ``activations``: two shards of three clips, all as told."""

from collections.abc import Callable

import pandas as pd

from hooked_alm.experiments.activations.experiment import StoreActivations
from hooked_alm.experiments.activations.settings import ActivationsConfig
from hooked_alm.experiments.activations.tables import StoredResults, summarise

Change = Callable[[StoredResults], StoredResults]


def cases() -> StoredResults:
    """Of the decoder and of the encoder."""
    kinds = ("prompt", "encoder")
    shards = [
        {"shard": shard, "kind": kind, "clips": 2 - shard, "rows": n, "planned": n, "bytes": 9 * n}
        for shard, n in enumerate((20, 10))
        for kind in kinds
    ]
    clips = [
        {"kind": kind, "clip": clip, "span": "audio", "rows": 10}
        for kind in kinds
        for clip in "abc"
    ]
    tables = {"shards": pd.DataFrame(shards), "clips": pd.DataFrame(clips)}
    inputs = {
        "model": {"blocks": 2}, "clips": dict.fromkeys("abc", "0"),
        "labels": {"speaker": ["x", "x", "y"]},
        "points": {"prompt": {"blocks.0.hook_resid_post": [4]}, "encoder": {"e": [2, 3]}},
    }  # fmt: skip
    run = StoreActivations.results(ActivationsConfig(n_resamples=1000), inputs, tables)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def _loses_a_row(run: StoredResults) -> StoredResults:
    run["shards"].loc[1, "rows"] -= 1
    return run


def _loses_a_clip(run: StoredResults) -> StoredResults:
    run.tables["clips"] = run["clips"].iloc[1:]
    return run


BROKEN: dict[str, Change] = {
    "rows are as many as were told": _loses_a_row,
    "every clip has rows": _loses_a_clip,
}
OTHER_WAY: dict[str, Change] = {}
