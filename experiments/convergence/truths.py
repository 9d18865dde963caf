"""What ``convergence`` must find in a Whisper whose raw norm was made to jump.

``jump_1`` and ``jump_4`` add a constant, which no layer reads, to a bias of block 1 and block 4 of
the encoder: the model computes what it did. See ``scripts/plant_jumps.py``.
"""

from functools import partial

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Truth, number_in

BASE, FIRST, FOURTH = "tiny_whisper", "tiny_whisper+jump_1", "tiny_whisper+jump_4"


def _block(folder: RunFolder, measure: str) -> float:
    """The block, from 0, across which a measure takes its largest step in most clips."""
    where = {"measure": measure, "rows": ["own", ""]}
    return number_in(folder, "turning_points", "most_often", **where) - 1


TRUTHS = (
    Truth(
        claim="block across which the raw norm jumps (C41)",
        find=lambda folder: _block(folder, "raw_norm"),
        known={BASE: Between(0, 0), FIRST: Between(1, 1), FOURTH: Between(4, 4)},
    ),
    *(
        Truth(
            claim=f"block across which {what} takes its largest step",
            find=partial(_block, measure=measure),
            known=dict.fromkeys((BASE, FIRST, FOURTH), Between(0, 0)),
        )
        for measure, what in (("cka", "CKA"), ("centred_norm", "the centred norm"))
    ),
)
