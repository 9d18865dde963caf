"""What ``semantic_vs_prosody`` must find in the two bundled models of opposite rules."""

from functools import partial

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth

WORDS, VOICE = "follows_semantics", "follows_prosody"


def _finding(folder: RunFolder, claim: str) -> Estimate:
    found = folder.read_table("findings").set_index("claim").loc[claim]
    return Estimate.of(found.rename({"estimate": "mean"}).to_dict())


TRUTHS = (
    Truth(
        claim="clips answered by their words minus by their voice (rate)",
        find=partial(_finding, claim="decides"),
        known={WORDS: Between(low=0), VOICE: Between(high=0)},
    ),
    Truth(
        claim="what exchanging words moves minus what exchanging voices does (rate)",
        find=partial(_finding, claim="moves_the_answer"),
        known={WORDS: Between(low=0), VOICE: Between(high=0)},
    ),
)
