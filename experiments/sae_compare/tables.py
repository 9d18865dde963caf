"""Summaries of a ``sae_compare`` run; what is sampled are groups of clips, or latents."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.dictionary_partners import stability_table
from ..materials.feature_reading_tables import (
    MAY_LACK_FACTORS,
    MEASURES,
    READING_TABLES,
    factor_table,
    held_apart_table,
    reading_table,
)
from ..materials.kept_features import FEATURES
from ..workbench.intervals import numbers, prefixed
from ..workbench.results import Results, Row, having, parts_by
from .settings import SAECompareConfig

ComparedResults = Results[SAECompareConfig]
TABLES = {
    **FEATURES,
    **SOUNDS,
    "clips": "a clip, and what a dictionary does not reconstruct of it",
    "held_out": "a clip, and in which fold it is read: of a column, or of the factors",
    "quality": "a dictionary on all rows, as in use",
    "copies": "a dictionary, and what of it a shuffled, rescaled copy lacks",
    "partners": "a living latent, and how near its partner in another dictionary is",
    "correlations": "a latent, and how its activation goes with its partner's, or another's",
    **READING_TABLES,
}
MAY_LACK = {
    **MAY_LACK_FACTORS,
    "correlations": ("point", "first", "second", "latent", "correlation", "by_chance"),
}
PAIR = ["point", "first", "second"]
FEW = 5
"""Features that the table of all dictionaries reads labels off, at most."""


def summarise(run: ComparedResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file; each finds those before it."""
    for name, made in (
        ("reconstruction", reconstruction_table), ("stability", agreement_table),
        ("k_sparse", reading_table), ("held_apart", held_apart_table),
        ("factors_read", factor_table), ("dictionaries", dictionary_table),
    ):  # fmt: skip
        run.tables[name] = made(run)
        yield name, run.tables[name]


def reconstruction_table(run: ComparedResults) -> pd.DataFrame:
    """Unexplained variance and active latents a row, with intervals over groups of clips.

    ``fvu`` is the mean over clips of a clip's error, over what the variance is a clip.
    """
    rows = []
    for _, one in run["quality"].iterrows():
        clips = run["clips"][run["clips"].dictionary == one.dictionary]
        spread = one.variance * one.n_rows / len(clips)
        groups = clips.group.tolist()
        fvu = run.draws.row(clips.error / spread, groups)
        l0 = run.draws.row(clips.active / clips.rows.mean(), groups)
        rows.append({
            "dictionary": one.dictionary, "point": one.point, **prefixed("fvu", fvu, ""),
            **prefixed("l0", l0, ""), "dead": int(one.n_dead),
            **{name: one[name] for name in ("cosine", "l2_ratio", "over_1_percent")},
            "n_groups": fvu["n_clusters"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def agreement_table(run: ComparedResults) -> pd.DataFrame:
    """Partners of every pair, and of matched ones how their activations go together."""
    table = stability_table(run["partners"], run.draws, "first", "second")
    if table.empty:
        return table
    rows = []
    for names, some in parts_by(run["correlations"], *PAIR):
        found: Row = names | {"source": "rows", "how": "matched"}
        for name in ("correlation", "by_chance"):
            mean = numbers(run.draws.mean(some[name].to_numpy(np.float64)))
            found |= prefixed(name, mean, "")
        rows.append(found)
    table = table.merge(pd.DataFrame(rows), on=[*PAIR, "source", "how"], how="left")
    return table[["first", "second", *(name for name in table if name not in PAIR), "point"]]


def dictionary_table(run: ComparedResults) -> pd.DataFrame:
    """A row a dictionary: what it was compared by, in short."""
    rows = []
    for name, about in run.inputs["dictionaries"].items():
        mine = run["reconstruction"].set_index("dictionary").loc[name]
        found: Row = {
            "dictionary": name,
            **{key: mine[key] for key in ("fvu", "fvu_low", "fvu_high", "l0", "dead")},
        }
        if not (pairs := run["stability"]).empty:
            is_mine = (pairs["first"] == name) | (pairs["second"] == name)
            own = having(pairs[is_mine], source="rows", how="matched")
            found |= {"partner_share": own.share.mean(), "pw_mcc": own.cosine.mean()}
        for label, some in _best_first(run["k_sparse"], name).groupby("label", sort=False):
            found[f"{label} (k = {some.k.iloc[0]})"] = some.accuracy.iloc[0]
            found[f"{label} (all)"] = some.accuracy.iloc[-1]
        for table, keys in (("factors_read", ["r2"]), ("held_apart", [*MEASURES])):
            own = having(run[table], owner=name, kind="codes")
            own = own[own.factor == "mean of all"] if "factor" in own else own
            found |= {key: one for key in keys for one in own[key]}
        rows.append(found | {key: about[key] for key in ("d_sae", "architecture", "point")})
    return pd.DataFrame(rows)


def _best_first(reads: pd.DataFrame, name: str) -> pd.DataFrame:
    """What is read off the first codes: of as many as `FEW`, or the fewest, and of all."""
    mine = having(reads, owner=name, kind="codes", how="kept")
    mine = mine[mine.ranked != "random"]
    few = mine[mine.k <= max(FEW, mine.k.min())]
    at = [few[few.k == few.k.max()], mine[mine.k == mine.k.max()]]
    return pd.concat(at)
