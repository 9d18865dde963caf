"""How well dictionaries reconstruct rows of clips."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import get_args

from torch import Tensor

from hooked_alm.methods.dictionary.quality import Inference, QualityCounts

from ..workbench.results import Row
from .dictionary_partners import Dictionaries
from .row_source import RowSource


def quality_rows(
    rows: RowSource,
    clips: Sequence[int],
    point: str,
    saes: Dictionaries,
    *,
    inferences: Sequence[Inference] = get_args(Inference),
    named: str = "seed",
    also: Callable[[Tensor], None] = lambda rows: None,
) -> Iterator[Row]:
    """How well each dictionary reconstructs rows of some clips, in use and as in training.

    Args:
        rows: of all clips.
        clips: those that are read, by their numbers.
        point: of the rows.
        saes: of these.
        inferences: see ``quality.Inference``.
        named: column of the dictionaries' names.
        also: is given every batch of rows, too.
    """
    counts = {
        (name, inference): QualityCounts(sae, inference)
        for name, sae in saes.items()
        for inference in inferences
    }
    for part in rows.parts(clips):
        found = rows.values(part)[point]
        for one in counts.values():
            one.add(found)
        also(found)
    for (name, inference), one in counts.items():
        yield {"point": point, named: name, "inference": inference, **asdict(one.quality())}
