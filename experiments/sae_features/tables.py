"""Summaries of a ``sae_features`` run: every feature, and how many are of each domain."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from hooked_alm.methods.dictionary.specialisation import specialisation, specialised_by_chance

from ..workbench.results import Results, Tables
from .settings import SAEFeaturesConfig

FeatureResults = Results[SAEFeaturesConfig]
TABLES = {
    "clips": "a clip, its rows, and how many features are active in one",
    "activity": "a feature in a clip in which it is active",
    "frames": "a row of a clip, and the activation of a feature that is shown",
    "promoted": "a token that a feature's direction raises",
}


def summarise(
    run: FeatureResults, domains: Mapping[str, str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    yield "features", feature_table(run.tables, domains, run.config)
    yield "domains", domain_table(run.tables, domains, run.config)


def feature_table(
    tables: Tables, domains: Mapping[str, str], config: SAEFeaturesConfig
) -> pd.DataFrame:
    """Features that are active anywhere: how often, how strongly, and of which domain.

    ``domain_share`` is the share of its commonest domain among the clips in which more than
    ``active_share`` of the rows activate it, ``n_clips``; ``domain`` is empty where that is not
    enough.
    """
    features, active, codes, values = _active(tables, domains, config)
    found = specialisation(active, codes, share=config.domain_share, min_clips=config.domain_clips)
    by_feature = tables["activity"].groupby("feature")
    strongest = by_feature["highest"].idxmax()
    rows = tables["activity"].loc[strongest].set_index("feature").loc[features]
    best = np.nan_to_num(found.share).argmax(axis=1)
    return pd.DataFrame({
        "feature": features,
        "n_clips": found.n_clips,
        "commonest": [values[i] for i in best],
        "domain_share": np.take_along_axis(found.share, best[:, None], axis=1)[:, 0],
        "domain": [values[i] if i >= 0 else "" for i in found.domain],
        "highest": rows["highest"].to_numpy(),
        "clip": rows["clip"].to_numpy(),
        "at": rows["at"].to_numpy(),
    })  # fmt: skip


def domain_table(
    tables: Tables, domains: Mapping[str, str], config: SAEFeaturesConfig
) -> pd.DataFrame:
    """How many features are of each domain, beside what dealing domains out to the clips gives.

    ``p`` is the share of such draws with as many or more, the run's own among them.
    """
    features, active, codes, values = _active(tables, domains, config)
    share, min_clips = config.domain_share, config.domain_clips
    found = specialisation(active, codes, share=share, min_clips=min_clips).domain
    chance = specialised_by_chance(
        active, codes, n_draws=config.n_draws, seed=config.seed, share=share, min_clips=min_clips
    )
    counts = np.bincount(found[found >= 0], minlength=len(values))
    return pd.DataFrame({
        "domain": values,
        "clips": np.bincount(codes, minlength=len(values)),
        "features": counts,
        "by_chance": chance.mean(axis=0),
        "by_chance_high": np.quantile(chance, 0.95, axis=0),
        "p": (1 + (chance >= counts).sum(axis=0)) / (1 + len(chance)),
        "n_features": len(features),
    })  # fmt: skip


def shown_features(
    tables: Tables, domains: Mapping[str, str], config: SAEFeaturesConfig
) -> list[int]:
    """Features that the page shows: those that were named, or else first the specialised ones.

    Of these the surest come first; the rest are those that fire most strongly.
    """
    table = feature_table(tables, domains, config)
    if config.features is not None:
        return [one for one in config.features if one in {*table["feature"]}]
    table = table.assign(is_of_one=table["domain"] != "")
    order = table.sort_values(
        ["is_of_one", "domain_share", "n_clips", "highest"], ascending=False, kind="stable"
    )
    special = order[order["is_of_one"]]["feature"].tolist()
    rest = table[~table["is_of_one"]].sort_values("highest", ascending=False, kind="stable")
    return (special + rest["feature"].tolist())[: config.n_shown]


def strongest_clips(tables: Tables, feature: int, config: SAEFeaturesConfig) -> list[str]:
    """Clips in which a feature reaches highest."""
    some = tables["activity"][tables["activity"]["feature"] == feature]
    order = some.sort_values("highest", ascending=False, kind="stable")["clip"]
    return list(order[: config.n_clips])


def _active(
    tables: Tables, domains: Mapping[str, str], config: SAEFeaturesConfig
) -> tuple[list[int], Bool[np.ndarray, "clip feature"], Int[np.ndarray, " clip"], list[str]]:
    """Features, in which clips each is active, the clips' domains as codes, and their names."""
    activity, clips = tables["activity"], tables["clips"]["clip"].tolist()
    values = sorted({*domains.values()})
    codes = np.array([values.index(domains[clip]) for clip in clips], np.int64)
    features = sorted({*activity["feature"].tolist()})
    place = {feature: i for i, feature in enumerate(features)}
    row = {clip: i for i, clip in enumerate(clips)}
    active = np.zeros((len(clips), len(features)), bool)
    enough = activity[activity["share"] > config.active_share]
    active[[row[c] for c in enough["clip"]], [place[f] for f in enough["feature"]]] = True
    return features, active, codes, values
