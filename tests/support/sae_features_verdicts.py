"""Hand-made results of ``sae_features``: features of two domains, by far more than by chance."""

from collections.abc import Callable

import pandas as pd

from hooked_alm.experiments.sae_features.experiment import SAEFeatures
from hooked_alm.experiments.sae_features.settings import SAEFeaturesConfig
from hooked_alm.experiments.sae_features.tables import FeatureResults, summarise

Change = Callable[[FeatureResults], FeatureResults]
N = 20
"""Clips of either domain."""
CLIPS = {f"c{number:02d}": "sad" if number < N else "happy" for number in range(2 * N)}


def toy_results(n_sad: int = 4, n_happy: int = 4) -> FeatureResults:
    """Features 0, 1, … of sad clips, then those of happy ones, then one of all clips."""
    config = SAEFeaturesConfig(n_resamples=1000)
    kinds = ["sad"] * n_sad + ["happy"] * n_happy + [""]
    activity = [
        {"clip": clip, "feature": feature, "highest": 1.0 + feature + 0.01 * number, "at": 0.5,
         "share": 0.6, "mean": 0.4}
        for number, (clip, domain) in enumerate(CLIPS.items())
        for feature, kind in enumerate(kinds)
        if kind in ("", domain)
    ]  # fmt: skip
    clips = [{"clip": clip, "rows": 10, "l0": 3.0} for clip in CLIPS]
    frames = [
        {"feature": row["feature"], "clip": row["clip"], "row": i, "seconds": 0.02 * i,
         "activation": row["highest"] * (i == 3)}
        for row in activity[:6]
        for i in range(10)
    ]  # fmt: skip
    promoted = [{"feature": 0, "rank": 0, "token": " sad", "logit": 2.5}]
    inputs = {
        "model": {"blocks": 3},
        "dictionary": {"point": "p", "d_sae": 12, "k": 3, "architecture": "topk"},
        "domains": {"happy": N, "sad": N},
        "rows": 20 * N,
        "clips": dict.fromkeys(CLIPS, ""),
    }
    tables = {"activity": activity, "clips": clips, "frames": frames, "promoted": promoted}
    made = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    run = SAEFeatures.results(config, inputs, made)
    for name, table in summarise(run, CLIPS):
        run.tables[name] = table
    return run


def cases() -> FeatureResults:
    """Four features of either domain."""
    return toy_results()


def _beside_another_clip(run: FeatureResults) -> FeatureResults:
    run["frames"]["activation"] *= 1.01
    return run


def _cut(run: FeatureResults) -> FeatureResults:
    run["clips"].loc[0, "rows"] = 9
    return run


BROKEN: dict[str, Change] = {
    "a feature is the same when its clip is read again": _beside_another_clip,
    "every row of every clip is read": _cut,
}
OTHER_WAY: dict[str, Change] = {
    "of sad": lambda run: toy_results(n_sad=0),
    "of happy": lambda run: toy_results(n_happy=0),
}
