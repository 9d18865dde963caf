"""What ``lora_blocks`` must find in bundled adapters of which one block carries the rule.

The updates of all other blocks have the same norm and change no answer; see
``scripts/train_adapters.py``.
"""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth, rows_of
from .measure import SWITCHES

EARLY, LATE = "follows_text+lora_early", "follows_text+lora_late"
NOTHING = "no block is larger than another"


def _carrier(folder: RunFolder) -> str:
    best = folder.read_table("best_blocks").set_index("reading")["block"]
    found = {int(best[reading]) for reading in SWITCHES}
    return f"block {found.pop()}" if len(found) == 1 else "not the same in both readings"


def _missed(folder: RunFolder) -> str:
    rows = rows_of(folder, "erasure", form="single", measure="accuracy")
    return ", ".join(f"block {one}" for one in rows[rows["high"] < rows["whole"] / 2]["block"])


def _ranked(folder: RunFolder, measure: str) -> Estimate | str:
    row = rows_of(folder, "size_ranks", reading="denoise", measure=measure).iloc[0].to_dict()
    return Estimate.of(row) if row["n"] else NOTHING


TRUTHS = (
    Truth(
        claim="the block that carries the rule",
        find=_carrier,
        known={EARLY: "block 1", LATE: "block 6"},
    ),
    Truth(
        claim="blocks without which the voice is no longer answered",
        find=_missed,
        known={EARLY: "block 1", LATE: "block 6"},
    ),
    Truth(
        claim="share of what single blocks do that is done in the upper half",
        find=lambda folder: _ranked(folder, "late"),
        known={EARLY: Between(high=0.2), LATE: Between(low=0.8)},
    ),
    Truth(
        claim="rank correlation of an update's norm and what it does",
        find=lambda folder: _ranked(folder, "rho"),
        known={EARLY: NOTHING, LATE: NOTHING},
    ),
)
