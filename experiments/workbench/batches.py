"""Batches: which prompts run together, decided before any of them runs."""

from collections.abc import Hashable, Sequence
from typing import Annotated

from pydantic import Field

BatchSize = Annotated[
    int,
    Field(ge=1, le=10_000, description="prompts that run together; numbers of a batch differ from "
          "those of single prompts by rounding"),
]  # fmt: skip
UnitBatches = Annotated[
    int,
    Field(ge=1, le=10**6, description="batches that are kept together; a killed run loses fewer"),
]
BatchPositions = Annotated[
    int | None,
    Field(ge=1, le=10**9, description="positions of a batch, padding included; None is no bound"),
]  # fmt: skip


def bucketed(
    lengths: Sequence[int],
    size: int,
    positions: int | None = None,
    *,
    kinds: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Batches of prompts that are about as long as each other, the shortest first, by their index.

    Args:
        lengths: of the prompts.
        size: of a batch, at most.
        positions: that a batch fills at most, padding included; a longer prompt runs alone.
        kinds: of the prompts; those of a batch are of one.
    """
    kinds = kinds or [None] * len(lengths)
    order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (order[kinds[i]], lengths[i])):
        batch = batches[-1] if batches else []
        # The new one is the longest so far.
        filled = (len(batch) + 1) * lengths[index]
        is_full = len(batch) == size or (positions is not None and filled > positions)
        if batch and not is_full and kinds[batch[0]] == kinds[index]:
            batch.append(index)
        else:
            batches.append([index])
    return batches
