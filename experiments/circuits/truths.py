"""What ``circuits`` must find in a bundled twin of which two heads carry the rule, and in the base.

In a conflict ``follows_text`` answers what the instruction names, whatever the voice. Its twin
answers the voice's emotion, and differs from it in two heads of one block: exchanging the voice
moves its answer through these heads. The counter-twin ``voice_heads_1`` is not among these models:
what its heads write behind the audio is fetched by heads of the next block, and at the readout
these move the answer as much. See ``scripts/train_truths.py``.
"""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Truth
from .plan import MLP

BASE = "follows_text"
LEAST = 0.5
"""Logits that a head must move to be named: an agreeing voice raises the base's margin, too."""


def heads_of_the_voice(folder: RunFolder) -> str:
    """The heads whose exchange between voices moves the answer half as much as the largest does."""
    found = folder.read_table("winners")
    found = found[(found.contrast == "voice") & (found["head"] != MLP)]
    bar = max(LEAST, found["mean"].max() / 2)
    return ", ".join(sorted(found[found["mean"] >= bar].node)) or "none"


TRUTHS = (
    Truth(
        claim="heads that carry the voice",
        find=heads_of_the_voice,
        known={BASE: "none", f"{BASE}+voice_heads_2": "L2H0, L2H1"},
    ),
)
