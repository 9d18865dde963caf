"""The tables of a ``component_patching`` run, and what is averaged over them.

Source: M-BT-4.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.held_out import Half, split_clips
from ..materials.resampling import mean_of
from ..workbench.intervals import prefixed
from ..workbench.results import Results, Row, parts_by
from .measure import ALL
from .settings import ComponentPatchingConfig

PatchingResults = Results[ComponentPatchingConfig]
TABLES = {
    "runs": "a clip, or what it is patched towards, as the model hears it",
    "patched": "a component of a clip, patched towards a reference, or ablated (zero)",
    **SOUNDS,
}
CELL = ["stack", "site", "layer", "head"]
ENDS = ("mean", "low", "high")


def summarise(run: PatchingResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "behaviour", behaviour(run)
    yield "components", components(run)


def own(run: PatchingResults) -> pd.DataFrame:
    """The clips as they are, with ``value``: acoustic word above contextual word, in nats."""
    runs = run["runs"]
    return runs[runs.reference == "none"].reset_index(drop=True)


def misheard(run: PatchingResults) -> set[str]:
    """Clips in which the contextual word is likelier than the one that is said."""
    table = own(run)
    return {*table[table.value < 0]["clip"]}


def behaviour(run: PatchingResults) -> pd.DataFrame:
    """What the clips, and the references, come to as whole runs."""
    rows: list[Row] = []
    for reference, some in run["runs"].groupby("reference", sort=False):
        table = some.assign(contextual=(some.value < 0).astype(float))
        table = table.groupby(["clip", "speaker"], sort=False)[["value", "contextual"]].mean()
        who = run.config.clusters(table.reset_index())
        rows.append({
            "heard": "the clip itself" if reference == "none" else reference, "n": len(table),
            **prefixed("log_odds", run.draws.row(table.value, who)),
            **prefixed("contextual", run.draws.row(table.contextual, who)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_clip(run: PatchingResults) -> pd.DataFrame:
    """Every cell of every clip, its draws averaged.

    ``shift`` is how far the log-odds move, ``restored`` the share of draws in which the acoustic
    word is likelier than the contextual one, of clips in which it is not by itself (else NaN).
    ``stranger_restored`` is the same of two words of another sentence.
    """
    table = run["patched"]
    is_misheard = table["clip"].isin(misheard(run))
    table = table.assign(
        shift=table.value - table.base,
        restored=np.where(is_misheard, (table.value > 0).astype(float), np.nan),
        stranger_restored=np.where(
            table.stranger_base < 0, (table.stranger > 0).astype(float), np.nan
        ),
    )
    keys = ["clip", "speaker", *CELL, "reference", "alpha"]
    columns = ["shift", "restored", "stranger_restored", "moved"]
    return table.groupby(keys, sort=False)[columns].mean().reset_index()


def halves(run: PatchingResults) -> dict[str, Half]:
    """The part of every clip: components are chosen on one, and judged on the other."""
    table, config = own(run), run.config
    groups = config.clusters(table)
    return split_clips(table["clip"], groups, config.discovery_share, config.seed)


def components(run: PatchingResults) -> pd.DataFrame:
    """What patching every component does, by reference and strength.

    ``first_restored`` is ``restored`` on the clips on which components are chosen.
    """
    table, part = by_clip(run), halves(run)
    rows: list[Row] = []
    for names, some in parts_by(table, *CELL, "reference", "alpha"):
        asked, strange = (some[some[name].notna()] for name in ("restored", "stranger_restored"))
        is_first = asked["clip"].map(part) == "discovery"
        rows.append({
            **names,
            **prefixed("restored", _share(run, asked, "restored")), "n_misheard": len(asked),
            **prefixed("stranger_restored", _share(run, strange, "stranger_restored")),
            "first_restored": asked.restored[is_first].mean(),
            **prefixed("shift", mean_of(run, some, "shift")),
            "n": len(some), "moved": some.moved.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _share(run: PatchingResults, some: pd.DataFrame, column: str) -> dict[str, Any]:
    if some.empty:
        return dict.fromkeys(ENDS, np.nan)
    return mean_of(run, some, column)


def replaced(run: PatchingResults, reference: str = "noise") -> pd.DataFrame:
    """Whole components, at strength 1 towards a reference."""
    table = run["components"]
    return table[(table["head"] == ALL) & (table.reference == reference) & (table.alpha == 1)]


def named(row: Any) -> str:
    """A component in words: ``encoder attn L3``, ``decoder head L2H1``."""
    head = "" if row["head"] == ALL else f"H{row['head']}"
    return f"{row['stack']} {row['site']} L{row['layer']}{head}"


def best(run: PatchingResults, stack: str) -> "pd.Series[Any] | None":
    """The component that restores most of the clips on which components are chosen.

    Of equals it is the one that is moved least; None if no clip there is misheard.
    """
    table = replaced(run)
    table = table[(table["stack"] == stack) & table.first_restored.notna()]
    if table.empty:
        return None
    return table.sort_values(["first_restored", "moved"], ascending=[False, True]).iloc[0]


def held_out(
    run: PatchingResults, component: Any, reference: str = "noise", column: str = "restored"
) -> pd.DataFrame:
    """Misheard clips on which a component was not chosen, patched at strength 1.

    With ``stranger_restored``, clips in which another sentence's word is the less likely one.
    """
    table, part = by_clip(run), halves(run)
    is_it = (table[CELL] == [component[name] for name in CELL]).all(axis=1)
    table = table[is_it & (table.reference == reference) & (table.alpha == 1)]
    return table[table[column].notna() & (table["clip"].map(part) == "held-out")]
