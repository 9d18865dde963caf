"""What attention and MLP of each block add to the stream, measured by what they add it to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ..result import MethodResult
from .lens import readout_positions

OfBlocks = Float[Tensor, "block batch pos"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Contributions(MethodResult):
    """Lengths of what each block adds, as shares of the stream that enters it, and cosines."""

    attn: OfBlocks
    """‖attn‖ / ‖x‖."""
    mlp: OfBlocks
    """‖mlp‖ / ‖x‖, of the stream that enters the block, not the MLP."""
    both: OfBlocks
    """‖attn + mlp‖ / ‖x‖."""
    attn_cosine: OfBlocks
    """Cosine of attn and x: −1 erases, 1 repeats."""
    mlp_cosine: OfBlocks
    centred: bool
    """Whether each vector's mean was taken off first."""


@torch.no_grad()
def block_contributions(
    model: HookedALM,
    x: ALMInput,
    positions: Int[Tensor, "batch pos"] | None = None,
    *,
    centred: bool | None = None,
) -> Contributions:
    """Contributions of every block of the path in use; one forward.

    A model with LayerNorm takes off each row's mean wherever it reads the stream: a constant that
    is added to a bias changes no output and every length (C41). There vectors are centred first.

    Args:
        model: to run.
        x: prompts.
        positions: per row; None is the readout.
        centred: take off each vector's mean; None does so where the model has LayerNorm.

    Source: Behind the Scenes, harryporry77/Behind-the-Scenes@affd12b; M-LO-3, C41.
    """
    where = readout_positions(x) if positions is None else positions
    if centred is None:
        centred = model.path_cfg.normalization_type == "LN"
    points = [
        [hook_name(point, block) for block in model.path]
        for point in ("resid_pre", "attn_out", "mlp_out")
    ]
    names = [name for of_point in points for name in of_point]
    _, kept = model.run_with_cache(x, names_filter=names, return_cache_object=False)
    rows = torch.arange(len(x))[:, None]
    stream, attn, mlp = (
        torch.stack([kept[name][rows, where].double().cpu() for name in of_point])
        for of_point in points
    )
    return contributions_of(stream, attn, mlp, centred=centred)


def contributions_of(
    stream: Float[Tensor, "block batch pos d_model"],
    attn: Float[Tensor, "block batch pos d_model"],
    mlp: Float[Tensor, "block batch pos d_model"],
    *,
    centred: bool,
) -> Contributions:
    """Contributions from what enters every block, and what its parts add."""
    if centred:
        stream, attn, mlp = (one - one.mean(-1, keepdim=True) for one in (stream, attn, mlp))
    size = stream.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity
    return Contributions(
        attn=attn.norm(dim=-1) / size, mlp=mlp.norm(dim=-1) / size,
        both=(attn + mlp).norm(dim=-1) / size, attn_cosine=cosine(attn, stream, dim=-1),
        mlp_cosine=cosine(mlp, stream, dim=-1), centred=centred,
    )  # fmt: skip
