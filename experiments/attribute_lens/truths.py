"""What ``attribute_lens`` must find in bundled models whose depths, or whose routes, are known.

``follows_voice`` reads the label early. ``resolve_late`` answers as it does, and gives all labels
the same probability until the last two blocks; ``bump`` is legible in the middle and again at the
end. ``route_mention`` answers by what the mention has heard, ``route_readout`` by what the readout
hears itself. See ``scripts/train_whole_truths.py``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..workbench.run_folder import RunFolder
from ..workbench.truths import (
    Between,
    Truth,
    finding_of,
    number_in,
    rows_of,
    whether_established,
)

EARLY, LATE, BUMP = ("follows_voice", "follows_voice+resolve_late", "follows_voice+bump")
BY_MENTION, BY_READOUT = ("follows_voice+route_mention", "follows_voice+route_readout")
USED, UNUSED = Between(low=0.8), Between(high=0.1)
CHANCE = 0.2
AT_READOUT: Mapping[str, Any] = {"position": "readout", "prompt": "question"}


def _bump(folder: RunFolder) -> float:
    """What is read at depths 3 to 6 and no more at the two after them."""
    found = rows_of(folder, "information_curves", measure="hit", **AT_READOUT)
    hits = found.sort_values("depth")["mean"].to_numpy(np.float64)
    return float(hits[3:7].min() - hits[7:9].max())


def _lost(folder: RunFolder, query: str) -> float:
    """Share of the right label's lead that is lost without a query's attention to the audio."""
    found = rows_of(folder, "knockout", query=query, keys="audio", first=0)
    deaf = found[found["last"] == found["last"].max()]
    return float(-deaf.gain.mean() / deaf.base.mean())


def _source(folder: RunFolder) -> str:
    """Where the report says that the readout gets the label from."""
    found = finding_of(folder, "direct_emotion")
    if not found.established:
        return "not established"
    return "the audio" if found.estimate > 0 else "the mention"


TRUTHS = (
    Truth(
        claim="probability of the label among the labels at depth 3",
        find=partial(number_in, table="information_curves", measure="p_correct_soft", depth=3,
                     **AT_READOUT),
        known={EARLY: Between(low=0.8), LATE: Between(high=CHANCE + 0.1)},
    ),
    Truth(
        claim="share of clips answered right",
        find=partial(number_in, table="accuracy", prompt="question", heard="audio"),
        known=dict.fromkeys((EARLY, LATE, BUMP, BY_MENTION, BY_READOUT), Between(low=0.95)),
    ),
    Truth(
        claim="depth from which the label can be read",
        find=lambda folder: float(finding_of(folder, "readable_emotion").estimate),
        known={EARLY: Between(high=3), LATE: Between(low=9), BUMP: Between(low=9)},
    ),
    Truth(
        claim="critical layer",
        find=partial(number_in, table="critical", column="depth", definition="weighted",
                     measure="hit", **AT_READOUT),
        known={EARLY: Between(high=6), LATE: Between(low=7)},
    ),
    Truth(
        claim="share read at depths 3 to 6, and lost after them",
        find=_bump,
        known={EARLY: Between(high=0.1), BUMP: Between(low=0.6)},
    ),
    *(
        Truth(
            claim=claim,
            find=partial(whether_established, claim=name),
            known=dict.fromkeys((EARLY, BUMP), "not established"),
        )
        for claim, name in (
            ("a peak and a drop mean a wrong answer", "peaks_and_drops_emotion"),
            ("enrichment from an earlier depth helps", "enrichment_emotion"),
        )
    ),
    *(
        Truth(
            claim=f"share of the answer lost when the {query} no longer reads the audio",
            find=partial(_lost, query=query),
            known={BY_MENTION: by_mention, BY_READOUT: by_readout},
        )
        for query, by_mention, by_readout in (("mention", USED, UNUSED), ("readout", UNUSED, USED))
    ),
    Truth(
        claim="where the readout gets the answer from",
        find=_source,
        known={BY_MENTION: "the mention", BY_READOUT: "the audio"},
    ),
)  # fmt: skip
