"""Rows without directions to find: the null of what a dictionary finds in others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowNoise:
    """Gaussian noise of some rows' mean and covariance, and of nothing else; on the CPU."""

    mean: Float[Tensor, " d_in"]
    factor: Float[Tensor, "d_in d_in"]
    """A square root of the covariance: ``factor @ factor.T``."""

    @classmethod
    def like(cls, rows: Float[Tensor, "row d_in"]) -> "RowNoise":
        """Noise like some rows."""
        centred = rows - rows.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        return cls(rows.mean(0).cpu(), (vectors * values.clamp_min(0).sqrt()).cpu())

    def drawn(self, n_rows: int, key: Sequence[int]) -> Float[Tensor, "row d_in"]:
        """Rows that follow from a key, such as a seed and a step."""
        seed = int(np.random.SeedSequence([*key]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return self.mean + torch.randn(n_rows, len(self.mean), generator=generator) @ self.factor.T
