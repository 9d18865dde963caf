"""Rows whose dictionary is known: sparse sums of planted directions, or no structure at all."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

N_DIRECTIONS, D_IN, N_ACTIVE = 64, 32, 3


def directions() -> Float[Tensor, "direction d_in"]:
    """The planted ones; their seed is no training's, whose first directions they would be."""
    generator = torch.Generator().manual_seed(999)
    return F.normalize(torch.randn(N_DIRECTIONS, D_IN, generator=generator), dim=-1)


def planted_rows(n: int, generator: torch.Generator) -> Float[Tensor, "row d_in"]:
    """Rows of three directions each, of sizes from 0.5 to 1.5."""
    chosen = torch.rand(n, N_DIRECTIONS, generator=generator).topk(N_ACTIVE, -1).indices
    sizes = torch.rand(n, N_ACTIVE, generator=generator) + 0.5
    return torch.zeros(n, N_DIRECTIONS).scatter(1, chosen, sizes) @ directions()


def gaussian_rows(n: int, generator: torch.Generator) -> Float[Tensor, "row d_in"]:
    """Rows of no structure."""
    return torch.randn(n, D_IN, generator=generator)
