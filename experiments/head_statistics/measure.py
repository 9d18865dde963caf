"""What one forward says of every head: how large its output is, and what it writes.

Of head ``h`` at a position: ``z`` is what the output projection reads (``hook_z``); its
contribution to the residual stream is ``W_h z``, with ``W_h`` the head's columns of the projection.

Source: seed document 004; methods cards M-004-1 to M-004-3; defect C34.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.points import hook_name

from .settings import HeadOutput, TokenAgg, Weighting

OUTPUT, CONTRIBUTION, COSINE = "head_output_norm", "head_resid_contrib_norm", "cosine"
HEAD_QUANTITIES = (OUTPUT, CONTRIBUTION, COSINE)
KEPT = "kept"
POINTS: Mapping[HeadOutput, tuple[str, ...]] = {
    "hook_z": ("attn.hook_z", "hook_attn_out"),
    "pattern_times_v": ("attn.hook_pattern", "attn.hook_v", "hook_attn_out"),
}
"""Of a block: what has to be cached."""
Axes = Float[Tensor, "batch pos head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Norms:
    """Of one batch; a sample is an item, or one token of an item."""

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
        """Factorise the output projections, once.

        Raises:
            InputError: weights that are on no device, as accelerate leaves what it offloads.
        """
        self.model = model
        self.token_agg, self.weighting, self.head_output = token_agg, weighting, head_output
        weights = [block.attn.o_proj.weight for block in model.blocks]
        if any(weight.is_meta for weight in weights):
            raise InputError(
                "measuring heads: the device_map offloads some blocks, whose weights cannot be "
                "read. Give a device_map that keeps all of them on devices."
            )
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
            names_filter=[f"blocks.{i}.{p}" for i in layers for p in POINTS[self.head_output]],
            pos_slice=(-1, None) if one else None,
        )
        mask = mask[:, -1:] if one else mask
        found = [self._layer(cache, layer, mask) for layer in layers]
        home = found[-1].device
        # One transfer; every layer was summed up where its weights are.
        values = torch.stack([part.to(home) for part in found], dim=2).cpu().numpy()
        output, contribution, cosine, kept, error = np.split(
            values, np.cumsum([self.model.cfg.n_heads] * 3 + [1]), axis=1
        )
        by_layer = {OUTPUT: output, CONTRIBUTION: contribution, COSINE: cosine}
        return Norms(
            heads={name: value.swapaxes(1, 2) for name, value in by_layer.items()},
            kept=kept[:, 0],
            rows=self._rows(mask),
            identity_error=float(error.max()),
        )

    def _rows(self, mask: Bool[Tensor, "batch pos"]) -> Int[np.ndarray, " sample"]:
        if self.weighting == "tokens":
            return mask.nonzero()[:, 0].cpu().numpy()
        return np.arange(len(mask))

    def _layer(
        self, cache: dict[str, Tensor], layer: int, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "sample value"]:
        """Output, contribution and cosine of each head, what is kept, and the identity's error."""
        attn_out = cache[hook_name("attn_out", f"blocks.{layer}")].float()
        z = self._head_outputs(cache, layer).float()
        contribution = contribution_norms(z, self.factors[layer])
        whole = attn_out.norm(dim=-1, keepdim=True)
        # Along the attention's output, of what each head writes: its projection is z · (W_hᵀ out).
        W_O = self.model.blocks[layer].attn.W_O.float()
        projected = (attn_out @ rearrange(W_O, "h e d -> d (h e)")).unflatten(-1, z.shape[2:])
        along = (projected * z).sum(-1) / _not_zero(whole)
        parts = torch.cat(
            [
                output_norms(z),
                contribution,
                along / _not_zero(contribution),
                whole / _not_zero(contribution.sum(-1, keepdim=True)),
            ],
            dim=-1,
        )
        error = (along.sum(-1, keepdim=True) / _not_zero(whole) - 1).abs() * (whole > 0)
        mask = mask.to(parts.device)
        if self.weighting == "tokens":
            return torch.cat([parts, error], dim=-1)[mask]
        worst = torch.where(mask[..., None], error, 0.0).amax(dim=1)
        return torch.cat([aggregate(parts, mask, self.token_agg), worst], dim=-1)

    def _head_outputs(
        self, cache: dict[str, Tensor], layer: int
    ) -> Float[Tensor, "batch pos head d_head"]:
        block = f"blocks.{layer}"
        if self.head_output == "hook_z":
            return cache[hook_name("z", block)]
        pattern, v = cache[hook_name("pattern", block)], cache[hook_name("v", block)]
        v = repeat(v, "b k h e -> b (h g) k e", g=pattern.shape[1] // v.shape[2])
        return torch.matmul(pattern, v).transpose(1, 2)


def output_norms(z: Float[Tensor, "batch pos head d_head"]) -> Axes:
    """‖z‖ of every head (M-004-1)."""
    return z.norm(dim=-1)


def contribution_factors(
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head d_head d_head"]:
    """Per head the factor ``R`` of ``W_h = Q R``: ‖W_h z‖ = ‖R z‖, at d_head / d_model of the cost.

    The same as √(zᵀ W_hᵀ W_h z), but without the digits that the square root of a difference loses.
    """
    return torch.linalg.qr(W_O.detach().float().transpose(1, 2), mode="r").R


def contribution_norms(
    z: Float[Tensor, "batch pos head d_head"], factors: Float[Tensor, "head d_head d_head"]
) -> Axes:
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
