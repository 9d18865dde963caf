"""Sizes of an adapter's updates."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...components.lora import LowRank, updates_of
from ...model import HookedALM


@dataclass(frozen=True, kw_only=True)
class UpdateSize:
    """How large the update of one linear layer is."""

    block: int
    """Of the path in use."""
    module: str
    """Name in the block, such as ``attn.q_proj``."""
    rank: int
    frobenius: float
    """Frobenius norm of ``scaling B A``."""
    spectral: float
    """Its largest singular value."""
    of_weight: float
    """Frobenius norm of the weight it is added to."""


@torch.no_grad()
def update_sizes(model: HookedALM) -> list[UpdateSize]:
    """The size of every update in the blocks of the path in use; products are never formed.

    The singular values of ``B A`` are those of ``R_B R_A^T`` of the factors' QR decompositions.
    """
    found = []
    for name, update in updates_of(model):
        for number, block in enumerate(model.path):
            if name.startswith(f"{block}."):
                values = singular_values(update)
                weight = model.get_submodule(name).parametrizations.weight.original
                found.append(UpdateSize(
                    block=number, module=name.removeprefix(f"{block}."), rank=len(update.a),
                    frobenius=float(values.norm()), spectral=float(values.max()),
                    of_weight=float(weight.double().norm()),
                ))  # fmt: skip
    return found


def singular_values(update: LowRank) -> Float[Tensor, " rank"]:
    """Singular values of ``scaling B A``, the largest first; float64."""
    _, r_b = torch.linalg.qr(update.b.double())
    _, r_a = torch.linalg.qr(update.a.double().T)
    return torch.linalg.svdvals(r_b @ r_a.T) * abs(update.scaling)
