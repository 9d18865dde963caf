"""Attention that chosen positions pay to each span (block S-6), without T x T scores."""

from collections.abc import Sequence
from functools import partial

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import InputError
from ...hooks import Hook, HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from .lens import readout_positions


class AttentionMeter:
    """Hooks that sum attention by span while a model runs, for `attention_mass`."""

    def __init__(
        self,
        model: HookedALM,
        x: ALMInput,
        spans: Sequence[str],
        *,
        layers: Sequence[int] | None = None,
        queries: Int[Tensor, "batch query"] | None = None,
    ) -> None:
        """Holds nothing yet; see `attention_mass`.

        Raises:
            InputError: a block, a position or a span that does not exist, or no block.
        """
        model.refuse_encoder("measuring attention to spans")
        self.layers = range(len(model.path)) if layers is None else layers
        wrong = [layer for layer in self.layers if not 0 <= layer < len(model.path)]
        if wrong or not self.layers:
            raise InputError(
                f"measuring attention in blocks {wrong}: the model has blocks 0 to "
                f"{len(model.path) - 1}. Name at least one of them."
            )
        where = (readout_positions(x) if queries is None else queries).to(x.device)
        if bool(((where < -x.shape[1]) | (where >= x.shape[1])).any()):
            raise InputError(
                f"measuring attention of positions {where.tolist()}: the prompts have positions 0 "
                f"to {x.shape[1] - 1}; negative ones count from the end."
            )
        self.model, self.x = model, x
        self.where = torch.where(where < 0, where + x.shape[1], where)
        self.segments = torch.stack([x.spans.mask(name) for name in spans], dim=-1).to(x.device)
        self._held: dict[int, Tensor] = {}
        self._masses: dict[int, Tensor] = {}

    @property
    def hooks(self) -> list[Hook]:
        """Hooks for one forward."""
        found: list[Hook] = []
        for layer in self.layers:
            block = self.model.path[layer]
            found += [(hook_name("rot_q", block), partial(self._hold_queries, layer=layer))]
            found += [(hook_name("rot_k", block), partial(self._sum_over_spans, layer=layer))]
        return found

    def mass(self) -> Float[Tensor, "layer batch head query span"]:
        """What the forward has shown."""
        return torch.stack([self._masses[layer] for layer in self.layers])

    def _hold_queries(self, q: Tensor, hook: HookPoint, layer: int) -> None:
        batch = torch.arange(len(self.x), device=self.x.device)[:, None]
        self._held[layer] = q.to(self.x.device)[batch, self.where]

    def _sum_over_spans(self, k: Tensor, hook: HookPoint, layer: int) -> None:
        visible = visible_keys(self.model, self.x, layer, self.where)
        keys = k.to(self.x.device)
        pattern = attention_rows(self.model, layer, self._held.pop(layer), keys, visible)
        segments = self.segments.to(pattern.dtype)
        self._masses[layer] = torch.einsum("bhqk,bks->bhqs", pattern, segments)


@torch.no_grad()
def attention_mass(
    model: HookedALM,
    x: ALMInput,
    spans: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    queries: Int[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "layer batch head query span"]:
    """Attention probability that falls on each span, summed over the span's keys.

    Attention is no evidence of causal use, and a longer span gets more of it; see
    ``attention_density``.

    Args:
        model: to run, with any attention kernel.
        x: prompts.
        spans: names; if they partition the real positions, the masses sum to 1.
        layers: None is all.
        queries: positions that attend, per row, negative ones from the end; None is the readout.
            Pads see no key, and their masses are NaN.

    Returns:
        Masses from 0 to 1 by query head: grouped kv heads are expanded.

    Raises:
        InputError: a block, a position or a span that does not exist, or no block.
    """
    meter = AttentionMeter(model, x, spans, layers=layers, queries=queries)
    with model.hooks(fwd_hooks=meter.hooks):
        model(x, stop_at_layer=max(meter.layers) + 1)
    return meter.mass()


def visible_keys(
    model: HookedALM, x: ALMInput, layer: int, queries: Int[Tensor, "batch query"]
) -> Bool[Tensor, "batch query key_pos"]:
    """True at the keys that a query sees: real, not later, and inside the block's window."""
    keys = torch.arange(x.shape[1], device=x.device)
    behind = queries[..., None] - keys
    seen = (behind >= 0) & x.attention_mask.bool()[:, None]
    window = model.block(layer).attn.sliding_window
    return seen if window is None else seen & (behind < window)


def attention_rows(
    model: HookedALM,
    layer: int,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    visible: Bool[Tensor, "batch query key_pos"],
) -> Float[Tensor, "batch head query key_pos"]:
    """Rows of the pattern, in fp32, from rotated queries and keys."""
    attn = model.block(layer).attn
    keys = repeat(k, "b p k e -> b p (k g) e", g=attn.num_key_value_groups)
    scores = torch.einsum("bqhe,bphe->bhqp", q.float(), keys.float()) * attn.scaling
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)


def attention_density(
    mass: Float[Tensor, "layer batch head query span"], x: ALMInput, spans: Sequence[str]
) -> Float[Tensor, "layer batch head query span"]:
    """Mass relative to what even attention would give: ``mass * real positions / span length``.

    NaN where a row lacks the span.
    """
    n_real = x.attention_mask.sum(1).to(mass.device, mass.dtype)
    sizes = torch.stack([x.spans.mask(name).sum(1) for name in spans], dim=-1).to(mass)
    share = sizes / n_real[:, None]
    return mass / share.masked_fill(share == 0, torch.nan)[None, :, None, None, :]
