"""Sizes of an adapter's updates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class BlockUpdate(NamedTuple):
    """The update of a linear layer in a block."""

    path: str
    """Name of the layer in the model."""
    block: int
    """Of the path in use."""
    module: str
    """Name in the block, such as ``attn.q_proj``."""
    update: LowRank


def block_updates(model: HookedALM) -> Iterator[BlockUpdate]:
    """Every update in the blocks of the path in use."""
    for name, update in updates_of(model):
        for number, block in enumerate(model.path):
            if name.startswith(f"{block}."):
                yield BlockUpdate(name, number, name.removeprefix(f"{block}."), update)


@torch.no_grad()
def update_sizes(model: HookedALM) -> list[UpdateSize]:
    """The size of every update in the blocks of the path in use; products are never formed.

    The singular values of ``B A`` are those of ``R_B R_A^T`` of the factors' QR decompositions.
    """
    found = []
    for path, block, module, update in block_updates(model):
        values = singular_values(update)
        weight = model.get_submodule(path).parametrizations.weight.original
        found.append(UpdateSize(
            block=block, module=module, rank=len(update.a), frobenius=float(values.norm()),
            spectral=float(values.max()), of_weight=float(weight.double().norm()),
        ))  # fmt: skip
    return found


def singular_values(update: LowRank) -> Float[Tensor, " rank"]:
    """Singular values of ``scaling B A``, the largest first; float64."""
    _, r_b = torch.linalg.qr(update.b.double())
    _, r_a = torch.linalg.qr(update.a.double().T)
    return torch.linalg.svdvals(r_b @ r_a.T) * abs(update.scaling)
