"""What dictionaries are worth on rows that they have not learnt."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import get_args

from hooked_alm.methods.dictionary.quality import Inference, QualityCounts

from ..materials.clip_rows import HeldOutClips
from ..materials.dictionary_partners import Dictionaries
from ..materials.row_source import RowSource
from ..workbench.results import Row


def quality_rows(
    rows: RowSource, split: HeldOutClips, point: str, saes: Dictionaries
) -> Iterator[Row]:
    """How well each dictionary reconstructs the held-out rows, in use and as in training."""
    counts = {
        (seed, inference): QualityCounts(sae, inference)
        for seed, sae in saes.items()
        for inference in get_args(Inference)
    }
    for part in rows.parts(split.held_out):
        found = rows.values(part)[point]
        for one in counts.values():
            one.add(found)
    for (seed, inference), one in counts.items():
        yield {"point": point, "seed": seed, "inference": inference, **asdict(one.quality())}
