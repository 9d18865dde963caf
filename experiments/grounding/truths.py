"""What ``grounding`` must find in bundled models whose rule, or whose heads, are known.

The rule twins answer voice or instruction. The localised twins of ``follows_text`` answer the voice
through two heads of one block, and are the base elsewhere; see ``scripts/train_truths.py``.
"""

from ..workbench.results import having
from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Truth
from .measure import MLP, READINGS
from .tables import coefficient

BASE, OTHER = "follows_text", "follows_voice"
LEAST = 0.5
"""Logits that a head must move to be named."""


def blocks_of_the_voice(folder: RunFolder) -> str:
    """The blocks of heads that move at least half as much of the voice as the one that moves most.

    They must be the same in both readings.
    """
    means = having(folder.read_table("node_means"), span="readout", measure="effect_audio")
    found = set()
    for reading in READINGS:
        heads = having(means, direction=reading).query(f"head != {MLP}")
        bar = max(LEAST, heads["mean"].max() / 2)
        blocks = sorted({*heads[heads["mean"] >= bar].block.astype(int)})
        found.add(", ".join(f"block {block}" for block in blocks) or "none")
    return found.pop() if len(found) == 1 else "not the same in both readings"


TRUTHS = (
    Truth(
        claim="the voice's share of what moves the answer, gc",
        find=lambda folder: float(coefficient(folder.read_table("grounding_means"))["mean"]),
        # An agreeing voice raises the answer's margin in follows_text, too.
        known={BASE: Between(high=0.2), OTHER: Between(low=0.9)},
    ),
    Truth(
        claim="where heads carry the voice",
        find=blocks_of_the_voice,
        known={
            BASE: "none",
            f"{BASE}+voice_heads_2": "block 2",
            f"{BASE}+voice_heads_1": "block 1",
        },
    ),
)
