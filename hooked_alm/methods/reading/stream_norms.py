"""Norms of the residual stream row by row, massive rows apart."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER
from ..result import MethodResult

OfDepths = Float[np.ndarray, "depth batch"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StreamNorms(MethodResult):
    """Norms of the stream at depths 0..L of a path; NaN at rows that do not run."""

    norms: Float[np.ndarray, "depth batch pos"]
    is_massive: Bool[np.ndarray, "depth batch pos"]
    """Rows whose norm is more than a multiple of the median row's of their prompt."""

    def total(self, among: Bool[np.ndarray, "*batch pos"] | None = None) -> OfDepths:
        """Frobenius norms of the stream over some of its rows; None is all."""
        chosen = np.ones_like(self.is_massive) if among is None else among
        of_rows: OfDepths = np.sqrt(np.nansum(np.where(chosen, self.norms, 0.0) ** 2, axis=-1))
        return of_rows

    def without_massive(self) -> OfDepths:
        """Frobenius norms over the rows that are not massive."""
        return self.total(~self.is_massive)

    def massive_share(self) -> OfDepths:
        """Share of the squared norm that massive rows have."""
        return (self.total(self.is_massive) / self.total()) ** 2


@torch.no_grad()
def stream_norms(model: HookedALM, x: ALMInput, *, factor: float = 5.0) -> StreamNorms:
    """Norms of every row at every depth of the path in use, the encoder's with ``towards``.

    A few rows carry most of the norm from some depth on, whatever is heard: sinks of attention. Of
    an encoder they are often behind the clip. Norms, means and similarities of whole streams are
    theirs.

    Args:
        model: to run.
        x: prompts; positions of the result are those of ``model.positions_of(x)``.
        factor: multiple of the median norm of a prompt's rows from which on a row is massive.

    Source: Sun et al. 2024, "Massive activations in large language models", who count elements;
    rows are counted here.
    """
    names = model.depth_names()
    _, kept = model.run_with_cache(x, names_filter=names, return_cache_object=False)
    real, rows = model.positions_of(x).is_real, None
    if names[0].startswith(ENCODER):
        rows = model.encoder_rows(x)

    def by_row(name: str) -> Tensor:
        value = kept[name] if rows is None else rows.by_prompt(name, kept[name])
        return value.double().norm(dim=-1).cpu()

    norms = np.stack([by_row(name).numpy() for name in names])
    norms[:, ~real] = np.nan
    median = np.nanmedian(norms, axis=-1, keepdims=True)
    return StreamNorms(norms=norms, is_massive=np.nan_to_num(norms) > factor * median)
