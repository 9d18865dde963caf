"""The tables of an ``asr_components`` run, and what is averaged over them.

Source: M-BT-7.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.held_out import Half, split_clips
from ..materials.kept_features import FEATURES
from ..materials.transcript_tables import ERROR_COLUMNS, NOWHERE, error_rate, error_rise
from ..workbench.intervals import prefixed
from ..workbench.results import Results, Row
from .plan import ALL, FAILURES, Failure, nodes_of
from .settings import AsrComponentsConfig

ComponentResults = Results[AsrComponentsConfig]
_ROW = ("clip", "speaker", "holds", "text", "n_tokens", "loops", "heard", "repetition")
TABLES = {
    "transcripts": "a clip written down with all heads",
    "screen": "a head, and what closing it would do to a transcript that fails, to first order",
    "ablated": "a clip written down without a head",
    **FEATURES,
    **SOUNDS,
}
MAY_LACK = {
    "screen": ("clip", "speaker", "of", "kind", "layer", "head", "effect", "norm"),
    "ablated": (*_ROW, *ERROR_COLUMNS, "node", "kind", "layer", "head", "why"),
    "features": ("file", "sha256"),
}
"""Columns that are read of tables which a run has none of where nothing fails, or no mean is taken
of heads."""
FAILS = {"loop": "loops", "hallucination": "heard"}
"""Failure -> the column that says whether a transcript has it."""
MEASURE: dict[Failure, str] = {"loop": "cured", "hallucination": "silenced"}
"""Failure -> what the share of clips is called that no longer have it."""
NODE = ("kind", "layer", "head", "why")


def summarise(run: ComponentResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "behaviour", behaviour(run)
    yield "effects", effects(run)
    yield "heads", heads(run)


def failing(run: ComponentResults, failure: str) -> pd.DataFrame:
    """The clips that fail with all heads: any that go in circles, those of nothing with words."""
    table = run["transcripts"]
    among = table if failure == "loop" else table[table.holds == "no_speech"]
    return among[among[FAILS[failure]] == 1]


def spoken(table: pd.DataFrame, run: ComponentResults) -> pd.DataFrame:
    """Rows of clips with speech that are written down without circles as the model is."""
    sound = run["transcripts"]
    sound = sound[(sound.holds == "speech") & (sound.loops == 0)]
    return table[table["clip"].isin(sound["clip"])]


def behaviour(run: ComponentResults) -> pd.DataFrame:
    """What the model does with all heads, by what the clips hold."""
    rows: list[Row] = []
    for holds, some in run["transcripts"].groupby("holds", sort=False):
        who = run.config.clusters(some)
        rows.append({
            "holds": holds, "n": len(some), **prefixed("loops", run.draws.row(some.loops, who)),
            **prefixed("heard", run.draws.row(some.heard, who)),
            **prefixed("wer", error_rate(run, some)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def effects(run: ComponentResults) -> pd.DataFrame:
    """Mean first-order effect of closing each head on the transcripts that fail."""
    parts = []
    for failure in FAILURES:
        mine = run["screen"][run["screen"].of == failure]
        for kind in run.config.kinds:
            parts.append(nodes_of(mine, kind, "cell").assign(of=failure, kind=kind))
    columns = ["of", "kind", "layer", "head", "effect", "norm"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)


def halves(run: ComponentResults) -> dict[str, Half]:
    """The part of every clip: heads are chosen on one, and judged on the other."""
    table, config = run["transcripts"], run.config
    groups = config.clusters(table)
    return split_clips(table["clip"], groups, config.discovery_share, config.seed)


def heads(run: ComponentResults) -> pd.DataFrame:
    """What leaving each head out does: failures cured, and what it costs on speech.

    ``cured`` is the share of the clips that loop with all heads and no longer do, ``silenced`` that
    of the clips without speech in which nothing is heard any more; ``first_`` is the same on the
    clips on which heads are chosen. ``wer_delta`` is how much the error rate of speech that is
    written down without circles rises.
    """
    part, rows = halves(run), list[Row]()
    for node, some in run["ablated"].groupby("node", sort=False):
        row: Row = {"node": node, **{name: some.iloc[0][name] for name in NODE}}
        for failure, name in MEASURE.items():
            mine = some[some["clip"].isin(failing(run, failure)["clip"])]
            good = 1 - mine[FAILS[failure]]
            is_first = mine["clip"].map(part) == "discovery"
            found = run.draws.row(good, run.config.clusters(mine)) if len(mine) else NOWHERE
            row |= prefixed(name, found)
            row |= {f"first_{name}": good[is_first].mean(), f"n_{name}": len(mine)}
        rows.append(row | prefixed("wer_delta", _wer_delta(run, some)))
    names = ["node", *NODE]
    for name in MEASURE.values():
        names += [*prefixed(name, NOWHERE), f"first_{name}", f"n_{name}"]
    return pd.DataFrame(rows).reindex(columns=[*names, *prefixed("wer_delta", NOWHERE)])


def _wer_delta(run: ComponentResults, ablated: pd.DataFrame) -> dict[str, Any]:
    """Error rate of speech without a head minus that with all."""
    before = spoken(run["transcripts"], run)
    after = spoken(ablated, run).set_index("clip").loc[before["clip"]].reset_index()
    return error_rise(run, before, after)


def best(run: ComponentResults, name: str, **where: Any) -> str | None:
    """The head that was best on the clips on which heads are chosen; None if none was tried."""
    table = run["heads"]
    table = table[(table.why != "random") & table[f"first_{name}"].notna()]
    for column, value in where.items():
        table = table[table[column] == value]
    if table.empty:
        return None
    # Of equals the one that costs speech least.
    order = table.sort_values([f"first_{name}", "wer_delta_mean"], ascending=[False, True])
    return str(order.node.iloc[0])


def held_out(run: ComponentResults, node: str, failure: str) -> pd.DataFrame:
    """Clips of the other half that fail with all heads, without a head; ``good`` is 1 if cured."""
    part, table = halves(run), run["ablated"]
    mine = table[(table.node == node) & table["clip"].isin(failing(run, failure)["clip"])]
    mine = mine[mine["clip"].map(part) == "held-out"]
    return mine.assign(good=1 - mine[FAILS[failure]])


def is_whole_stack(layer: Any) -> bool:
    """Whether a head is left out of all blocks."""
    return int(layer) == ALL
