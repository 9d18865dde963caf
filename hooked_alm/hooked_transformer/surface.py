"""The rest of HookedTransformer's surface, so that code written for it runs on ``HookedALM``.

The flags and their setters, the loss, and what the analysis tools of TransformerLens 4.3 ask for.
Strings are in ``tokens``, weights in ``weights``, their folding in ``folding``.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..axes import FullLogits, TokenIds
from ..errors import InputError
from ..inputs import ALMInput
from ..points import point_of
from .folding import WeightProcessing
from .tokens import TokenMethods

if TYPE_CHECKING:
    from ..config import HookedALMConfig


class HookedTransformerSurface(TokenMethods, WeightProcessing):
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        blocks: Any
        embed: Any
        unembed: Any
        ln_final: Any
        audio: Any

    def is_cached_by_default(self, name: str) -> bool:
        """Whether a cache without names keeps the point: all but costly ones whose flag is off."""
        flag = point_of(name).flag
        return flag is None or bool(getattr(self.cfg, flag))

    def loss_fn(
        self, logits: FullLogits, x: ALMInput | TokenIds, per_token: bool = False
    ) -> Float[Tensor, ""] | Float[Tensor, "batch target"]:
        """Mean next-token cross-entropy, over targets that are real text.

        Audio placeholders are positions, not words: predicting one is never scored.

        Args:
            logits: logits of the run.
            x: prompt of the run, or ids that are all text.
            per_token: ``[batch, pos - 1]`` instead of the mean, 0 at targets that are not scored,
                as in TransformerLens; their number is not the mean's denominator.

        Raises:
            InputError: logits of another prompt.
        """
        prompt: ALMInput = cast(Any, self).to_input(x)
        if prompt.shape != logits.shape[:2]:
            raise InputError(
                f"scoring logits {list(logits.shape)}: the prompt has {list(prompt.shape)} "
                "positions. Give the one of the run."
            )
        targets = prompt.tokens[:, 1:].to(logits.device)
        mask = prompt.attention_mask.to(logits.device)
        scored = (mask[:, 1:] * mask[:, :-1]).bool()
        scored &= ~prompt.spans.heard[:, 1:].to(scored.device)
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        return nll.where(scored, 0.0) if per_token else nll[scored].mean()

    def freeze(self) -> None:
        """Let no parameter have gradients, those of the audio encoder included; hooks still do."""
        cast(nn.Module, self).requires_grad_(False)

    def all_head_labels(self) -> list[str]:
        """Names of all heads: ``L0H0``, ``L0H1``, ..."""
        return [
            f"L{layer}H{head}"
            for layer in range(self.cfg.n_layers)
            for head in range(self.cfg.n_heads)
        ]

    def blocks_with(self, submodule: str) -> list[tuple[int, nn.Module]]:
        """Blocks that have a submodule of that name, with their index: all of them, or none."""
        return [(i, block) for i, block in enumerate(self.blocks) if hasattr(block, submodule)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases written to the residual stream before a block.

        In most families the sum is zero until ``fold_value_biases``: q, k and v alone have biases,
        inside the attention. Whisper's output projections and MLPs have some, too.

        Args:
            layer: block whose input is meant; ``n_layers`` is the input of the final norm.
            mlp_input: the input of the block's MLP instead, after its attention.
            include_mlp_biases: whether those of the MLPs are among them.

        Raises:
            InputError: a layer that does not exist.
        """
        n_attn = layer + mlp_input
        if not 0 <= layer <= n_attn <= self.cfg.n_layers:
            raise InputError(
                f"adding up biases: got layer={layer}, mlp_input={mlp_input}, expected a layer "
                f"from 0 to {self.cfg.n_layers - mlp_input}."
            )
        total = self.embed.weight.new_zeros(self.cfg.d_model, dtype=torch.float32)
        for index, block in enumerate(self.blocks[:n_attn]):
            total = total + block.attn.b_O.to(total)
            if self.cfg.cross_attention:
                total = total + block.cross_attn.b_O.to(total)
            if include_mlp_biases and index < layer:
                total = total + block.mlp.b_out.to(total)
        return total.to(self.embed.weight.dtype)

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """The direction that raises each token's logit, in the stream divided by its norm.

        It is the token's column of the unembedding times the final norm's scale, so that direct
        logit attribution is right without folding the scale into the unembedding first (which is
        what TransformerLens' cache assumes was done).

        Args:
            tokens: a string that is one token, an id, or ids of any shape.

        Returns:
            ``[*tokens, d_model]``; ``[d_model]`` for one token.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens)
        rows = self.unembed.directions(ids.squeeze() if ids.numel() == 1 else ids)
        # Where a cache is, which they are for.
        return (rows * self.ln_final.w.to(rows.device)).to(self.cfg.device)

    def input_to_embed(
        self, input: Any, **reading: Any
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor, None, Tensor]:
        """The residual stream that enters block 0, audio merged in, in HookedTransformer's tuple.

        ``model(resid, start_at_layer=0, inputs=input)`` runs the rest.

        Args:
            input: what ``model(input)`` takes.
            reading: arguments of ``to_input``.

        Returns:
            The stream; token ids and attention mask ``[batch, pos]``; and between them None, where
            HookedTransformer has a position embedding.
        """
        model = cast(Any, self)
        x: ALMInput = model.to_input(input, **reading)
        return model(x, stop_at_layer=0), x.tokens, None, x.attention_mask

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Cache ``hook_result`` by default; hooked by name it fires either way."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Cache the split inputs by default; hooked by name they fire either way."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Cache ``hook_mlp_in`` by default; hooked by name it fires either way."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Cache ``hook_attn_in`` by default.

        Raises:
            InputError: query and kv heads differ in number, so that one input cannot serve both.
        """
        if use_attn_in and self.cfg.n_groups > 1:
            raise InputError(
                "using attn_in on a model with grouped kv heads: one input per query head cannot "
                "feed fewer kv heads. Use split q, k and v inputs, or ungroup first with "
                "set_ungroup_grouped_query_attention(True)."
            )
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Compute keys and values once per query head; hooks and ``cfg`` then show that many.

        The weights stay grouped; results change only by rounding.
        """
        cfg = self.cfg
        stored = self.blocks[0].attn.n_stored_kv_heads
        cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention
        cfg.n_key_value_heads = cfg.n_heads if ungroup_grouped_query_attention else stored
