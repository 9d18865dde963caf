"""What ``emotion_conflict`` must find in the two bundled models of opposite rules.

What is about arbitration reverses from one to the other, what is not stays.
"""

from functools import partial

from ..workbench.controls import FAIL
from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth

TEXT, VOICE = "follows_text", "follows_voice"


def _estimate(folder: RunFolder, table: str, query: str, column: str, row: str) -> Estimate:
    """A row of a summary table: of the clips and depth that may be compared."""
    found = folder.read_table(table).query(query).set_index(column).loc[row]
    return Estimate.of(found.rename({"rate": "mean", "estimate": "mean"}).to_dict())


_flips = partial(
    _estimate, table="ob1_flip_summary", query="among == 'audio_only_correct'", column="measure"
)
_at_output = partial(
    _estimate, table="delta_logit_curves", query="stratum == 'all' and depth == depth.max()",
    column="condition",
)  # fmt: skip
_findings = partial(_estimate, table="findings", query="n >= 0", column="claim")
_accuracy = partial(
    _estimate, table="accuracy", query="answer == 'the voice (A)'", column="condition"
)


def _failed(folder: RunFolder) -> str:
    """Names of the controls that fail."""
    controls = folder.read_table("controls")
    return ", ".join(controls[controls.verdict == FAIL].control) or "none fails"


TRUTHS = (
    Truth(
        claim="answers T in conflict (rate)",
        find=partial(_flips, row="text_follow"),
        known={TEXT: Between(low=0.5), VOICE: Between(high=0.5)},
    ),
    Truth(
        claim="answers A in conflict (rate)",
        find=partial(_flips, row="audio_follow"),
        known={TEXT: Between(high=0.5), VOICE: Between(low=0.5)},
    ),
    Truth(
        claim="Δlogit in conflict, at the output",
        find=partial(_at_output, row="conflict"),
        known={TEXT: Between(low=0), VOICE: Between(high=0)},
    ),
    Truth(
        claim="H2, TE(text) − TE(voice) (logits)",
        find=partial(_findings, row="H2_dominance"),
        known={TEXT: Between(low=0), VOICE: Between(high=0)},
    ),
    Truth(
        claim="hears the voice: A under audio_only (rate)",
        find=partial(_accuracy, row="audio_only"),
        known=dict.fromkeys((TEXT, VOICE), Between(low=0.5)),
    ),
    Truth(
        claim="A under consistent (rate)",
        find=partial(_accuracy, row="consistent"),
        known=dict.fromkeys((TEXT, VOICE), Between(low=0.5)),
    ),
    Truth(
        claim="A under mention_only (rate)",
        find=partial(_accuracy, row="mention_only"),
        known=dict.fromkeys((TEXT, VOICE), Between(low=0.5)),
    ),
    Truth(
        claim="Δlogit in audio_only, at the output",
        find=partial(_at_output, row="audio_only"),
        known=dict.fromkeys((TEXT, VOICE), Between(high=0)),
    ),
    Truth(
        claim="controls",
        find=_failed,
        known=dict.fromkeys((TEXT, VOICE), "none fails"),
    ),
)
