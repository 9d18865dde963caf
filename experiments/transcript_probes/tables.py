"""The tables of a ``transcript_probes`` run, beside those of its probes.

Source: M-BT-5.
"""

from collections.abc import Iterator

import pandas as pd

from ..materials.probe_tables import PROBE_TABLES, summarise
from ..workbench.results import Results
from .plan import value_of
from .settings import TranscriptProbesConfig

TranscriptResults = Results[TranscriptProbesConfig]
TABLES = {
    "transcripts": "a clip, its greedy transcript, and what tells how good it is without states",
    "unread": "a label that no probe was trained on, and why",
    **PROBE_TABLES,
}
MAY_LACK = {"unread": ("label", "why")}
LEFT_OUT = "(left out)"


def summarise_transcripts(run: TranscriptResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "classes", classes(run)
    yield from summarise(run)


def classes(run: TranscriptResults) -> pd.DataFrame:
    """How many transcripts have each label, and how many none."""
    rows = [{str(k): v for k, v in row.items()} for row in run["transcripts"].to_dict("records")]
    found = []
    for label in run.config.labels:
        values = pd.Series([value_of(label, row, run.config.wrong_rate) for row in rows])
        counts = values.replace("", LEFT_OUT).value_counts().sort_index(ascending=False)
        found += [{"label": label, "value": value, "n": n} for value, n in counts.items()]
    return pd.DataFrame(found)
