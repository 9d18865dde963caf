"""What ``semantic_vs_prosody`` must find in the two bundled models of opposite rules."""

from functools import partial

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth, finding_of

WORDS, VOICE = "follows_semantics", "follows_prosody"


def _finding(folder: RunFolder, claim: str) -> Estimate:
    return Estimate.of(finding_of(folder, claim).rename({"estimate": "mean"}).to_dict())


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
