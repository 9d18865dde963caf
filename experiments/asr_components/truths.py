"""What ``asr_components`` must find in bundled twins of which one head carries the circles.

Where a sentence ends in *again* both twins say it without end, and are ``tiny_whisper`` elsewhere:
one through a head of cross-attention, the other through one of self-attention. See
``scripts/train_whisper_truths.py``.
"""

import pandas as pd

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Truth
from .tables import is_whole_stack

BASE = "tiny_whisper"
LEAST = 0.8
"""Share of the circles that a head must cure to be named."""


def _cures(folder: RunFolder) -> pd.DataFrame:
    """Heads of one block without which nearly no transcript goes in circles, the best first.

    Of equals the one that costs speech least is the first.
    """
    found = folder.read_table("heads")
    found = found[~found.layer.map(is_whole_stack).astype(bool) & (found.cured_mean >= LEAST)]
    return found.sort_values(["cured_mean", "wer_delta_mean"], ascending=[False, True])


def head_of_the_circles(folder: RunFolder) -> str:
    """The head whose absence cures most of them."""
    found = _cures(folder)
    return "none" if found.empty else str(found.node.iloc[0])


def kinds_of_the_circles(folder: RunFolder) -> str:
    """What kind of attention has such a head."""
    return ", ".join(sorted({*_cures(folder).kind})) or "none"


TRUTHS = (
    Truth(
        claim="the head that carries the circles",
        find=head_of_the_circles,
        known={
            BASE: "none",
            f"{BASE}+repeat_cross": "cross L4H2",
            f"{BASE}+repeat_self": "self L3H1",
        },
    ),
    Truth(
        claim="what kind of attention carries them",
        find=kinds_of_the_circles,
        known={BASE: "none", f"{BASE}+repeat_cross": "cross", f"{BASE}+repeat_self": "self"},
    ),
)
