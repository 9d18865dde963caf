"""Grouped-query attention that runs a fused kernel until scores or pattern are intervened on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..axes import Heads, Resid
from ..config import LayerType, StackConfig
from ..hooks import HookPoint, is_hooked, tap
from .norm import RMSNorm
from .rotary import RotaryTables, rotate

HeadsFirst = Float[Tensor, "batch head pos d_head"]
KeyValues = Float[Tensor, "batch kv_head key_pos d_head"]
SplitInputs = Mapping[str, Tensor]
"""Normalised inputs ``[batch, pos, head, d_model]`` of ``q``, ``k`` or ``v``, where hooks changed
them."""


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """Inputs of every block's attention besides the residual stream."""

    rotary: RotaryTables | None
    """None where the stack's input has its positions in it."""
    kernel_masks: Mapping[LayerType, Any]
    """Masks as the kernel wants them: None where its own causal masking is enough."""
    additive_masks: Mapping[LayerType, Float[Tensor, "batch 1 query_pos key_pos"] | None]
    """Masks to be added to explicit scores; made only when a block asks."""
    chunks: Sequence[int] | None = None
    """Lengths of pieces of the positions, each of which sees itself alone; None is one piece."""
    cache: Any = None
    """transformers ``Cache`` of earlier keys and values, or None."""
    memory: Float[Tensor, "_batch memory_pos d_memory"] | None = None
    """What cross-attention reads; None where there is none, or the cache has its keys already."""
    memory_cache: Any = None
    """transformers ``EncoderDecoderCache`` that keeps the memory's keys and values, or None."""
    attend: Callable[..., Heads] | None = None
    """Function of ``(attention, q, k, v)`` that mixes values instead of the kernel: the patch
    engine's way to run rows of many runs as one."""
    attend_memory: Callable[..., Heads] | None = None
    """Function of ``(attention, q)`` that does so for cross-attention, whose memories it knows."""
    moved: dict[torch.device, "AttentionContext"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The context on other devices, for the blocks that run there."""

    def to(self, device: torch.device | str | int, **_: Any) -> "AttentionContext":
        """The context on a device; accelerate moves what modules are given by this name."""
        device = torch.device(device)
        if device not in self.moved:
            rotary = self.rotary
            self.moved[device] = replace(
                self,
                rotary=None if rotary is None else (rotary[0].to(device), rotary[1].to(device)),
                kernel_masks=_moved(self.kernel_masks, device),
                additive_masks=_moved(self.additive_masks, device),
                memory=None if self.memory is None else self.memory.to(device),
            )
        return self.moved[device]


class Attention(nn.Module):
    """Multi-head or grouped-query attention, with rotary positions or without.

    Hook points, in firing order (``key_pos`` counts cached positions too):
        ``hook_q [batch, pos, head, d_head]``, ``hook_k``, ``hook_v [batch, pos, kv_head, d_head]``
        with bias, before q/k norm, rotation and scale; with rotary positions ``hook_rot_q``,
        ``hook_rot_k`` after them. With q/k norm, ``q_norm`` and ``k_norm`` have the points of an
        ``RMSNorm`` over ``d_head``.
        ``hook_attn_scores``, ``hook_pattern [batch, head, query_pos, key_pos]``, on demand: scores
        after scale and mask, pattern after softmax. Masked scores are the dtype's minimum, and pad
        queries attend evenly, as in Hugging Face.
        ``hook_z [batch, pos, head, d_head]``: what the output projection reads.
        ``hook_result [batch, pos, head, d_model]``, on demand: what each head writes; their
        sum and ``b_O`` are the output.

    Source: transformers 5.23 ``Qwen2Attention``, ``Qwen3Attention`` (q/k norm),
    ``WhisperAttention`` (biases, scaled queries) and ``eager_attention_forward``.
    """

    def __init__(self, cfg: StackConfig, layer: int, layer_type: LayerType) -> None:
        """Allocate the four projections."""
        super().__init__()
        self.cfg, self.layer_idx, self.layer_type = cfg, layer, layer_type
        self.sliding_window = cfg.sliding_window if layer_type == "sliding_attention" else None
        self.n_stored_kv_heads = cfg.n_key_value_heads
        # Read by transformers' attention functions, like num_key_value_groups.
        self.is_causal = cfg.attention_dir == "causal"
        given = cfg.attention_multiplier
        scale: float = cfg.d_head**-0.5 if given is None else given
        self.query_scale = scale if cfg.scales_queries else 1.0
        self.scaling = 1.0 if cfg.scales_queries else scale
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        self.q_proj = nn.Linear(cfg.d_model, d_q, bias="q" in cfg.attn_bias)
        self.k_proj = nn.Linear(cfg.d_model, d_kv, bias="k" in cfg.attn_bias)
        self.v_proj = nn.Linear(cfg.d_model, d_kv, bias="v" in cfg.attn_bias)
        self.o_proj = nn.Linear(d_q, cfg.d_model, bias="o" in cfg.attn_bias)
        self.q_norm = RMSNorm(cfg.d_head, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        if cfg.positional_embedding_type == "rotary":
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    def forward(
        self, x: Resid, context: AttentionContext, split: SplitInputs | None = None
    ) -> Resid:
        """What the attention writes to the residual stream, from the normalised ``x``."""
        split = split or {}
        q = self.hook_q(self._project(self.q_proj, x, split.get("q")))
        k = self.hook_k(self._project(self.k_proj, x, split.get("k")))
        v = self.hook_v(self._project(self.v_proj, x, split.get("v"))).transpose(1, 2)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
            q = self.hook_rot_q(q.transpose(1, 2)).transpose(1, 2)
            k = self.hook_rot_k(k.transpose(1, 2)).transpose(1, 2)
        q = q if self.query_scale == 1 else q * self.query_scale
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer_idx)
        return self._written(self.hook_z(self._attend(q, k, v, context)))

    def _written(self, z: Heads) -> Resid:
        """What the heads' outputs add to the residual stream."""
        if is_hooked(self.hook_result):
            result = tap(self.hook_result, torch.einsum("bphe,hed->bphd", z, self.W_O))
            if result is not None:
                return result.sum(dim=2) + self.b_O
        out = self.o_proj(z.flatten(2))
        return out if self.cfg.residual_multiplier == 1 else out * self.cfg.residual_multiplier

    def project(self, part: Literal["q", "k", "v"], x: Resid) -> Heads:
        """Values of ``hook_q`` (k, v) for the normalised ``x``; fires no hook."""
        return self._project(getattr(self, f"{part}_proj"), x, None)

    def queries(self, x: Resid, rotary: RotaryTables | None) -> HeadsFirst:
        """Queries of the normalised ``x`` as the kernel takes them; fires no hook of theirs."""
        q = self.q_norm(self.project("q", x)).transpose(1, 2)
        q = q if rotary is None else rotate(q, rotary)
        return q if self.query_scale == 1 else q * self.query_scale

    def keys_values(self, x: Resid, rotary: RotaryTables | None) -> tuple[KeyValues, KeyValues]:
        """Keys as the kernel takes them, and values, of the normalised ``x``."""
        k = self.hook_k(self._project(self.k_proj, x, None))
        v = self.hook_v(self._project(self.v_proj, x, None)).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        return k if rotary is None else rotate(k, rotary), v

    @property
    def needs_scores(self) -> bool:
        """Whether explicit scores must be computed, in addition to the kernel or instead of it."""
        return (
            self.cfg.attn_implementation == "eager"
            or is_hooked(self.hook_attn_scores)
            or is_hooked(self.hook_pattern)
        )

    @property
    def num_key_value_groups(self) -> int:
        """Query heads per kv head, as transformers' attention functions ask for it."""
        return self.cfg.n_groups

    def _project(self, linear: nn.Linear, x: Resid, per_head: Tensor | None) -> Heads:
        if per_head is None:
            heads = linear(x).view(*x.shape[:-1], -1, self.cfg.d_head)
            is_grouped = self.cfg.ungroup_grouped_query_attention and linear is not self.q_proj
            return heads.repeat_interleave(self._n_stored_groups, 2) if is_grouped else heads
        weight, bias = self._by_head(linear)
        n_copies = per_head.shape[2] // len(weight)  # more than one when kv heads are ungrouped
        weight, bias = (part.repeat_interleave(n_copies, 0) for part in (weight, bias))
        return torch.einsum("bphd,hde->bphe", per_head, weight) + bias

    @property
    def _n_stored_groups(self) -> int:
        return self.cfg.n_heads // self.n_stored_kv_heads

    def _by_head(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Stored weight ``[head, d_model, d_head]`` and bias ``[head, d_head]`` of a projection."""
        weight = rearrange(linear.weight, "(h e) d -> h d e", e=self.cfg.d_head)
        bias: Tensor | None = linear.bias
        if bias is None:
            return weight, weight.new_zeros(len(weight), self.cfg.d_head)
        return weight, rearrange(bias, "(h e) -> h e", e=self.cfg.d_head)

    def _attend(
        self, q: HeadsFirst, k: KeyValues, v: KeyValues, context: AttentionContext
    ) -> Heads:
        """Mix values over positions; explicit scores only where they are needed."""
        if context.attend is not None:
            return context.attend(self, q, k, v)
        if context.chunks is None:
            # In memory as Hugging Face's cache lays them, which its forward fills unless told not
            # to: kernels may round otherwise for other strides.
            k, v = k.contiguous(), v.contiguous()
            pieces = [(q, k, v)]
        else:
            split = (part.split(list(context.chunks), dim=2) for part in (q, k, v))
            pieces = [*zip(*split, strict=True)]
        if self.needs_scores:
            scores = [self._scores(*piece[:2], context) for piece in pieces]
            pattern = self._intervened_pattern(scores)
            if pattern is not None:
                return self._mix(pattern, v)
            if self.cfg.attn_implementation == "eager":
                patterns = map(self.softmax, scores)
                mixed = [self._mix(p, piece[2]) for p, piece in zip(patterns, pieces, strict=True)]
                return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        mixed = [self._by_kernel(*piece, context) for piece in pieces]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def _by_kernel(
        self, q: HeadsFirst, k: KeyValues, v: KeyValues, context: AttentionContext
    ) -> Heads:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        z, _ = ALL_ATTENTION_FUNCTIONS[self.cfg.attn_implementation](
            self,
            q,
            k,
            v,
            context.kernel_masks[self.layer_type],
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        return z

    def _intervened_pattern(self, scores: Sequence[Tensor]) -> Tensor | None:
        """The pattern to use, or None if the hooks on scores and pattern only looked.

        Args:
            scores: of every chunk; hooks see them as one, in which chunks do not see each other.
        """
        changed = None
        if is_hooked(self.hook_attn_scores):
            lowest = torch.finfo(scores[0].dtype).min
            changed = tap(self.hook_attn_scores, _on_diagonal(scores, lowest))
        pattern = None if changed is None else self.softmax(changed)
        if is_hooked(self.hook_pattern):
            shown = pattern
            if shown is None:
                shown = _on_diagonal([self.softmax(one) for one in scores], 0.0)
            replaced = tap(self.hook_pattern, shown)
            pattern = pattern if replaced is None else replaced
        return pattern

    def _scores(self, q: HeadsFirst, k: KeyValues, context: AttentionContext) -> Tensor:
        scores = torch.matmul(q, _ungroup(k, self.cfg.n_groups).transpose(2, 3)) * self.scaling
        mask = context.additive_masks[self.layer_type]
        return scores if mask is None else scores + mask

    def softmax(self, scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Pattern of the masked scores."""
        dtype = torch.float32 if self.cfg.softmax_in_float32 else scores.dtype
        return F.softmax(scores, dim=-1, dtype=dtype).to(scores.dtype)

    def _mix(self, pattern: Tensor, v: KeyValues) -> Heads:
        z = torch.matmul(pattern, _ungroup(v, self.cfg.n_groups))
        return z.transpose(1, 2).contiguous()

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """View of the query projection."""
        return self._by_head(self.q_proj)[0]

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key projection of every query head: kv heads repeated over their group."""
        return self._by_head(self.k_proj)[0].repeat_interleave(self._n_stored_groups, 0)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value projection of every query head: kv heads repeated over their group."""
        return self._by_head(self.v_proj)[0].repeat_interleave(self._n_stored_groups, 0)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """View of the output projection, unless the config multiplies what it writes."""
        weight = rearrange(self.o_proj.weight, "d (h e) -> h e d", e=self.cfg.d_head)
        by = self.cfg.residual_multiplier
        return weight if by == 1 else weight * by

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query bias, or zeros."""
        return self._by_head(self.q_proj)[1]

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key bias of every query head, or zeros."""
        return self._by_head(self.k_proj)[1].repeat_interleave(self._n_stored_groups, 0)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value bias of every query head, or zeros."""
        return self._by_head(self.v_proj)[1].repeat_interleave(self._n_stored_groups, 0)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the projection has none."""
        bias: Tensor | None = self.o_proj.bias
        return self.o_proj.weight.new_zeros(self.cfg.d_model) if bias is None else bias


def _moved(masks: Mapping[LayerType, Any], device: torch.device) -> dict[LayerType, Any]:
    return {kind: one.to(device) if hasattr(one, "to") else one for kind, one in masks.items()}


def _ungroup(x: KeyValues, n_groups: int) -> Float[Tensor, "batch head key_pos d_head"]:
    """Repeat each kv head for the query heads that read it."""
    return x if n_groups == 1 else repeat(x, "b k p e -> b (k g) p e", g=n_groups)


def _on_diagonal(pieces: Sequence[Tensor], fill: float) -> Float[Tensor, "batch head query key"]:
    """Scores or patterns of chunks as one matrix, with one number between different chunks."""
    if len(pieces) == 1:
        return pieces[0]
    n = sum(piece.shape[2] for piece in pieces)
    whole = pieces[0].new_full((*pieces[0].shape[:2], n, n), fill)
    start = 0
    for piece in pieces:
        stop = start + piece.shape[2]
        whole[:, :, start:stop, start:stop] = piece
        start = stop
    return whole
