"""What ``attribute_lens`` must find in bundled models whose depths, or whose routes, are known.

``follows_voice`` reads the label early. ``resolve_late`` answers as it does, and gives all labels
the same probability until the last two blocks; ``bump`` is legible in the middle and again at the
end. ``route_mention`` answers by what the mention has heard, ``route_readout`` by what the readout
hears itself. See ``scripts/train_whole_truths.py``.
"""

from typing import Any

import numpy as np
import pandas as pd

from ..workbench.results import having
from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Truth

EARLY, LATE, BUMP = ("follows_voice", "follows_voice+resolve_late", "follows_voice+bump")
BY_MENTION, BY_READOUT = ("follows_voice+route_mention", "follows_voice+route_readout")
USED, UNUSED = Between(low=0.8), Between(high=0.1)
CHANCE = 0.2


def _at_readout(folder: RunFolder, table: str, **values: str) -> pd.DataFrame:
    return having(folder.read_table(table), position="readout", prompt="question", **values)


def _information(folder: RunFolder, measure: str = "hit") -> np.ndarray:
    """Share of clips whose label leads, or its probability among the labels, by depth."""
    found = _at_readout(folder, "information_curves", measure=measure)
    return found.sort_values("depth")["mean"].to_numpy(np.float64)


def _answers(folder: RunFolder) -> float:
    found = having(folder.read_table("accuracy"), prompt="question", heard="audio")
    return float(found["mean"].iloc[0])


def _critical(folder: RunFolder) -> float:
    return float(
        _at_readout(folder, "critical", definition="weighted", measure="hit").depth.iloc[0]
    )


def _finding(folder: RunFolder, claim: str) -> "pd.Series[Any]":
    return folder.read_table("findings").set_index("claim").loc[claim]


def _readable(folder: RunFolder) -> float:
    """The depth from which the report says that the label can be read."""
    return float(_finding(folder, "readable_emotion").estimate)


def _bump(folder: RunFolder) -> float:
    """What is read at depths 3 to 6 and no more at the two after them."""
    hits = _information(folder)
    return float(hits[3:7].min() - hits[7:9].max())


def _lost(folder: RunFolder, query: str) -> float:
    """Share of the right label's lead that is lost without a query's attention to the audio."""
    found = folder.read_table("knockout")
    deaf = having(found, first=0, last=found["last"].max(), query=query, keys="audio")
    return float(-deaf.gain.mean() / deaf.base.mean())


def _source(folder: RunFolder) -> str:
    """Where the report says that the readout gets the label from."""
    found = _finding(folder, "direct_emotion")
    if not found.established:
        return "not established"
    return "the audio" if found.estimate > 0 else "the mention"


def _established(folder: RunFolder, claim: str) -> str:
    return "established" if _finding(folder, claim).established else "not established"


TRUTHS = (
    Truth(
        claim="probability of the label among the labels at depth 3",
        find=lambda folder: float(_information(folder, "p_correct_soft")[3]),
        known={EARLY: Between(low=0.8), LATE: Between(high=CHANCE + 0.1)},
    ),
    Truth(
        claim="share of clips answered right",
        find=_answers,
        known=dict.fromkeys((EARLY, LATE, BUMP, BY_MENTION, BY_READOUT), Between(low=0.95)),
    ),
    Truth(
        claim="depth from which the label can be read",
        find=_readable,
        known={EARLY: Between(high=3), LATE: Between(low=9), BUMP: Between(low=9)},
    ),
    Truth(
        claim="critical layer",
        find=_critical,
        known={EARLY: Between(high=6), LATE: Between(low=7)},
    ),
    Truth(
        claim="share read at depths 3 to 6, and lost after them",
        find=_bump,
        known={EARLY: Between(high=0.1), BUMP: Between(low=0.6)},
    ),
    Truth(
        claim="a peak and a drop mean a wrong answer",
        find=lambda folder: _established(folder, "peaks_and_drops_emotion"),
        known={EARLY: "not established", BUMP: "not established"},
    ),
    Truth(
        claim="enrichment from an earlier depth helps",
        find=lambda folder: _established(folder, "enrichment_emotion"),
        known={EARLY: "not established", BUMP: "not established"},
    ),
    Truth(
        claim="share of the answer lost when the mention no longer reads the audio",
        find=lambda folder: _lost(folder, "mention"),
        known={BY_MENTION: USED, BY_READOUT: UNUSED},
    ),
    Truth(
        claim="share of the answer lost when the readout no longer reads the audio",
        find=lambda folder: _lost(folder, "readout"),
        known={BY_MENTION: UNUSED, BY_READOUT: USED},
    ),
    Truth(
        claim="where the readout gets the answer from",
        find=_source,
        known={BY_MENTION: "the mention", BY_READOUT: "the audio"},
    ),
)
