"""What ``sae_patching`` must find in the bundled twins, whose rule is known.

``follows_voice`` answers what the voice carries, ``follows_text`` what the instruction names: the
same exchange of the voice's features flips one's answers and none of the other's (GT-rule).
"""

from ..workbench.truths import Between, Truth

TRUTHS = (
    Truth(
        claim="share of answers that exchanged features of the voice flip, under a conflict",
        find=lambda folder: (
            folder.read_table("findings").set_index("claim").estimate["flips_conflict"]
        ),
        known={"follows_voice": Between(low=0.8), "follows_text": Between(high=0.05)},
    ),
)
