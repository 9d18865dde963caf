"""The pre-norm block of decoders and of audio encoders."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from einops import repeat
from torch import nn

from ..axes import Resid
from ..config import LayerType, StackConfig
from ..hooks import HookPoint, is_hooked, tap
from .attention import Attention, AttentionContext, SplitInputs
from .cross_attention import CrossAttention
from .mlp import MLP, GatedMLP
from .norm import LayerNorm, RMSNorm, norm_of


class Block(nn.Module):
    """Block ``x + attn(ln1(x))``, then ``x + mlp(ln2(x))``, in the variants of its config.

    With cross-attention: ``x + attn(ln1(x))``, ``x + cross_attn(ln2(x))``, ``x + mlp(ln3(x))``.

    Hook points, ``[batch, pos, d_model]`` unless said: ``hook_resid_pre``, ``hook_attn_out``,
    ``hook_resid_mid``, ``hook_mlp_out``, ``hook_resid_post``; on demand: ``hook_q_input
    [batch, pos, head, d_model]``, ``hook_k_input`` and ``hook_v_input [batch, pos, kv_head,
    d_model]`` (the residual stream as each head reads it, before ``ln1``), ``hook_attn_in`` (the
    three at once, without grouped kv heads only) and ``hook_mlp_in`` (before the MLP's norm). With
    cross-attention also ``hook_cross_attn_out`` and, behind it, ``hook_resid_mid_cross``; on demand
    ``hook_cross_attn_in`` (before ``ln2``).

    HookedTransformer normalises each split input by itself, so that ``ln1``'s points fire three
    times and a cache keeps the values' call. Here they fire once, on the shared stream, after the
    split inputs; what hooks made of those is normalised by its own scale, past no point.

    Source: transformers 5.23 ``Qwen2DecoderLayer``, ``WhisperEncoderLayer``,
    ``WhisperDecoderLayer``.
    """

    hook_out_is_single_residual_stream = True  # asked for by TransformerLens' analysis tools

    def __init__(self, cfg: StackConfig, layer: int, layer_type: LayerType) -> None:
        """Allocate attention, MLP and their norms; ``layer`` is its place in a KV cache."""
        super().__init__()
        self.cfg = cfg
        self.ln1 = norm_of(cfg)
        self.attn = Attention(cfg, layer, layer_type)
        self.ln2 = norm_of(cfg)
        self.mlp = GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint()
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        if cfg.cross_attention:
            self.hook_cross_attn_in = HookPoint()
            self.cross_attn = CrossAttention(cfg, layer, layer_type)
            self.hook_cross_attn_out = HookPoint()
            self.hook_resid_mid_cross = HookPoint()
            self.ln3 = norm_of(cfg)
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Resid, context: AttentionContext) -> Resid:
        """The residual stream one block deeper."""
        resid_pre = self.hook_resid_pre(x)
        split = self._split_inputs(resid_pre)
        attn_out = self.attn(self.ln1(resid_pre), context, split)
        # Never in place: every hook point's tensor may be held by a cache.
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        if self.cfg.cross_attention:
            cross_in = _tapped(self.hook_cross_attn_in, resid_mid)
            cross_out = self.hook_cross_attn_out(self.cross_attn(self.ln2(cross_in), context))
            resid_mid = self.hook_resid_mid_cross(resid_mid + cross_out)
        mlp_out = self.mlp(self.mlp_norm(_tapped(self.hook_mlp_in, resid_mid)))
        resid_post = resid_mid + self.hook_mlp_out(mlp_out)
        if self.cfg.clamps_fp16 and resid_post.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max - 1000
            resid_post = resid_post.clamp(-limit, limit)
        return self.hook_resid_post(resid_post)

    @property
    def mlp_norm(self) -> RMSNorm | LayerNorm:
        """The norm that the MLP reads through."""
        return self.ln3 if self.cfg.cross_attention else self.ln2

    def _split_inputs(self, resid: Resid) -> SplitInputs:
        """Per-head inputs that hooks changed, normalised as ``ln1`` would."""
        if not (
            is_hooked(self.hook_q_input)
            or is_hooked(self.hook_k_input)
            or is_hooked(self.hook_v_input)
            or is_hooked(self.hook_attn_in)
        ):
            return {}
        heads = {"q": self.cfg.n_heads, "k": self.cfg.n_key_value_heads}
        heads["v"] = heads["k"]
        changed: dict[str, torch.Tensor] = {}
        if is_hooked(self.hook_attn_in):
            fork = tap(self.hook_attn_in, _fork(resid, self.cfg.n_heads))
            if fork is not None:
                changed = dict.fromkeys(heads, fork)
        for name, n_heads in heads.items():
            point: HookPoint = getattr(self, f"hook_{name}_input")
            if is_hooked(point):
                value = changed[name].clone() if name in changed else _fork(resid, n_heads)
                fork = tap(point, value)
                if fork is not None:
                    changed[name] = fork
        return {name: self.ln1.affine(self.ln1.normalize(one)) for name, one in changed.items()}


class Blocks(nn.ModuleList):
    """The blocks, typed."""

    def __iter__(self) -> Iterator[Block]:
        """Iterate over the blocks, first to last."""
        return cast(Iterator[Block], super().__iter__())

    def __getitem__(self, layer: Any) -> Any:
        """A block by its index, or a slice of the blocks."""
        return super().__getitem__(layer)


def _tapped(point: HookPoint, resid: Resid) -> Resid:
    """The stream, or what hooks of a point on demand make of a copy of it."""
    changed = tap(point, resid.clone()) if is_hooked(point) else None
    return resid if changed is None else changed


def _fork(resid: Resid, n_heads: int) -> torch.Tensor:
    # A real copy per head: hooks write into it.
    return repeat(resid, "b p d -> b p h d", h=n_heads).clone()
