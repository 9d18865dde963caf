"""What one forward says of every head: how large its output is, and what it writes.

Of head ``h`` at a position: ``z`` is what the output projection reads (``hook_z``); its
contribution to the residual stream is ``W_h z``, with ``W_h`` the head's columns of the projection.

Source: seed 004; M-004-1 to M-004-3; C34.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ..result import MethodResult

TokenAgg = Literal["last", "all"]
Weighting = Literal["samples", "tokens"]
HeadOutput = Literal["hook_z", "pattern_times_v"]

OUTPUT, CONTRIBUTION, COSINE = "head_output_norm", "head_resid_contrib_norm", "cosine"
HEAD_QUANTITIES = (OUTPUT, CONTRIBUTION, COSINE)
KEPT = "kept"
POINTS: Mapping[HeadOutput, tuple[str, ...]] = {
    "hook_z": ("z", "attn_out"),
    "pattern_times_v": ("pattern", "v", "attn_out"),
}
"""What has to be cached of a block."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Norms(MethodResult):
    """Norms of one batch; a sample is an item, or one token of an item."""

    heads: Mapping[str, Float[np.ndarray, "sample layer head"]]
    """``head_output_norm`` ‖z‖; ``head_resid_contrib_norm`` ‖W_h z‖; ``cosine`` of the contribution
    with the attention's whole output, 0 where a head writes nothing."""
    kept: Float[np.ndarray, "sample layer"]
    """‖attention output‖ / Σ_h ‖W_h z‖: 1 if all heads write in one direction."""
    rows: Int[np.ndarray, " sample"]
    """Row of the batch that the sample comes from."""
    identity_error: float
    """Largest |Σ_h ‖W_h z‖ cos_h / ‖attention output‖ − 1|, which is 0 but for rounding."""


class HeadMeter:
    """Measures the heads of a model; each call is one ``run_with_cache``."""

    def __init__(
        self,
        model: HookedALM,
        *,
        token_agg: TokenAgg = "last",
        weighting: Weighting = "samples",
        head_output: HeadOutput = "hook_z",
    ) -> None:
        """Factorise the output projections, once."""
        model.refuse_encoder("measuring heads")
        self.model, self.head_output = model, head_output
        self.token_agg, self.weighting = token_agg, weighting
        self.factors = [contribution_factors(block.attn.W_O) for block in model.blocks]

    @torch.no_grad()
    def __call__(self, x: ALMInput) -> Norms:
        """The norms of every row, in fp32 whatever the model's dtype."""
        mask = x.attention_mask.bool()
        # Of the last token, nothing else is kept; a mask decides where that is.
        one = self.token_agg == "last" and self.head_output == "hook_z" and bool(mask[:, -1].all())
        layers = range(self.model.cfg.n_layers)
        _, cache = self.model.run_with_cache(
            x,
            return_type=None,
            return_cache_object=False,
            names_filter=[name for layer in layers for name in self._points(layer)],
            pos_slice=(-1, None) if one else None,
        )
        mask = mask[:, -1:] if one else mask
        found = [self._layer(cache, layer, mask) for layer in layers]
        home = found[-1].device
        # One transfer; every layer was summed up where its weights are.
        values = torch.stack([part.to(home) for part in found], dim=1).cpu().numpy()
        n_heads = self.model.cfg.n_heads
        *heads, kept, error = np.split(values, np.cumsum([n_heads] * 3 + [1]), axis=2)
        by_token = self.weighting == "tokens"
        return Norms(
            heads=dict(zip(HEAD_QUANTITIES, heads, strict=True)),
            kept=kept[..., 0],
            rows=mask.nonzero()[:, 0].cpu().numpy() if by_token else np.arange(len(mask)),
            identity_error=float(error.max()),
        )

    def _layer(
        self, cache: dict[str, Tensor], layer: int, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "sample value"]:
        """Output, contribution and cosine of each head, what is kept, and the identity's error."""
        *read, attn_out = (cache[name] for name in self._points(layer))
        z, attn_out = read[0], attn_out.float()
        if self.head_output == "pattern_times_v":
            pattern, v = read
            v = repeat(v, "b k h e -> b (h g) k e", g=pattern.shape[1] // v.shape[2])
            z = torch.matmul(pattern, v).transpose(1, 2)
        z = z.float()
        contribution = contribution_norms(z, self.factors[layer])
        whole = attn_out.norm(dim=-1, keepdim=True)
        # Along the attention's output, of what each head writes: its projection is z · (W_hᵀ out).
        W_O = self.model.blocks[layer].attn.W_O.float()
        projected = (attn_out @ rearrange(W_O, "h e d -> d (h e)")).unflatten(-1, z.shape[2:])
        along = (projected * z).sum(-1) / _not_zero(whole)
        cosine = along / _not_zero(contribution)
        kept = whole / _not_zero(contribution.sum(-1, keepdim=True))
        parts = torch.cat([z.norm(dim=-1), contribution, cosine, kept], dim=-1)
        error = (along.sum(-1, keepdim=True) / _not_zero(whole) - 1).abs() * (whole > 0)
        mask = mask.to(parts.device)
        if self.weighting == "tokens":
            return torch.cat([parts, error], dim=-1)[mask]
        worst = torch.where(mask[..., None], error, 0.0).amax(dim=1)
        return torch.cat([aggregate(parts, mask, self.token_agg), worst], dim=-1)

    def _points(self, layer: int) -> list[str]:
        return [hook_name(point, f"blocks.{layer}") for point in POINTS[self.head_output]]


def contribution_factors(
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head d_head d_head"]:
    """Per head the factor ``R`` of ``W_h = Q R``: ‖W_h z‖ = ‖R z‖, at d_head / d_model of the cost.

    The same as √(zᵀ W_hᵀ W_h z), but without the digits that the square root of a difference loses.
    """
    return torch.linalg.qr(W_O.detach().float().transpose(1, 2), mode="r").R


def contribution_norms(
    z: Float[Tensor, "batch pos head d_head"], factors: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "batch pos head"]:
    """‖W_h z‖ of every head, without bias (M-004-2)."""
    return torch.einsum("bphe,hfe->bphf", z, factors).norm(dim=-1)


def aggregate(
    values: Float[Tensor, "batch pos value"],
    mask: Bool[Tensor, "batch pos"],
    token_agg: TokenAgg,
) -> Float[Tensor, "batch value"]:
    """One number an item: at its last real token, or the mean over its real tokens (M-004-3)."""
    if token_agg == "all":
        # Not a product with the mask: pads may hold NaN.
        total = torch.where(mask[..., None], values, 0.0).sum(dim=1)
        return total / mask.sum(dim=1, keepdim=True)
    at = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, at, -1).amax(dim=1)
    return values[torch.arange(len(values), device=values.device), last]


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1.0, value)
