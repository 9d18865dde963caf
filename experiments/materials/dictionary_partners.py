"""Whether dictionaries of a point have found the same directions, and what chance finds."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm.methods.dictionary.autoencoder import SparseAutoencoder
from hooked_alm.methods.dictionary.stability import (
    Matching,
    match_dictionaries,
    random_directions,
)

from ..workbench.results import Row

Dictionaries = Mapping[int, SparseAutoencoder]
"""Seed -> a dictionary of the same point."""


def partner_rows(
    point: str, source: str, directions: Mapping[int, Tensor], dead: Mapping[int, Sequence[int]]
) -> Iterator[Row]:
    """Partners of every living latent among those of every other dictionary of the point."""
    gone = {
        seed: torch.zeros(len(one), dtype=torch.bool).index_fill(0, torch.tensor(
            dead[seed], dtype=torch.long), True)
        for seed, one in directions.items()
    }  # fmt: skip
    for first, second in combinations(directions, 2):
        for how in get_args(Matching):
            found = match_dictionaries(
                directions[first], directions[second], how, dead=(gone[first], gone[second])
            )
            for latent, cosine in enumerate(found.cosine.tolist()):
                if not gone[first][latent]:
                    yield {
                        "point": point, "source": source, "first": first, "second": second,
                        "how": how, "latent": latent, "cosine": cosine,
                    }  # fmt: skip


def copy_row(point: str, seed: int, directions: Float[Tensor, "latent d_in"]) -> Row:
    """How far partners in a shuffled copy of a dictionary are from being the same."""
    order = torch.randperm(len(directions), generator=torch.Generator().manual_seed(seed))
    found = match_dictionaries(directions, directions[order])
    return {"point": point, "seed": seed, "difference": float((1 - found.cosine).abs().max())}


def untrained(saes: Dictionaries) -> dict[int, Tensor]:
    """Directions of no training, as many as the dictionaries have."""
    return {
        seed: random_directions(sae.cfg.d_sae, sae.cfg.d_in, seed=1_000_003 + seed)
        for seed, sae in saes.items()
    }
