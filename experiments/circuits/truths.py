"""What ``circuits`` must find in bundled twins of which two heads carry the rule, and in the base.

In a conflict ``follows_text`` answers what the instruction names, whatever the voice. Its twins
answer the voice's emotion, and differ from it in two heads of one block: exchanging the voice moves
their answer through these heads. See ``scripts/train_truths.py``.
"""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Truth
from .plan import MLP

BASE = "follows_text"
NONE = "none"


def heads_of_the_voice(folder: RunFolder) -> str:
    """The two heads whose exchange between voices moves the answer most, or none."""
    found = folder.read_table("winners")
    found = found[(found.contrast == "voice") & (found["head"] != MLP)]
    return ", ".join(sorted(found.node[:2])) or NONE


TRUTHS = (
    Truth(
        claim="heads that carry the voice",
        find=heads_of_the_voice,
        known={
            BASE: NONE,
            f"{BASE}+voice_heads_2": "L2H0, L2H1",
            f"{BASE}+voice_heads_1": "L1H0, L1H1",
        },
    ),
)
