"""The rest of HookedTransformer's surface, so that code written for it runs on ``HookedALM``.

Weights under TransformerLens' names and stacked over layers, the flags and their setters, tokenizer
methods, and what the analysis tools of TransformerLens 4.3 ask a model for. Grouped key/value
weights appear once per query head, as HookedTransformer shows them.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .axes import Logits
from .errors import InputError
from .hooks import FLAGGED_POINTS, FactoredMatrix
from .inputs import ALMInput

if TYPE_CHECKING:
    from .config import HookedALMConfig


class HookedTransformerSurface:
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        blocks: Any
        embed: Any
        unembed: Any
        ln_final: Any
        tokenizer: Any
        audio: Any

    def is_cached_by_default(self, name: str) -> bool:
        """Whether a cache without names keeps the point: all but costly ones whose flag is off."""
        flag = FLAGGED_POINTS.get(name.rpartition(".")[2])
        return flag is None or bool(getattr(self.cfg, flag))

    def loss_fn(self, logits: Logits, x: ALMInput) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy, over targets that are real text.

        Audio placeholders are positions, not words: predicting one is never scored.
        """
        targets = x.tokens[:, 1:]
        scored = (x.attention_mask[:, 1:] * x.attention_mask[:, :-1]).bool()
        if self.audio is not None:
            scored &= targets != self.audio.tokens.placeholder
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        return nll[scored].mean()

    def _stacked(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding table."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Zeros: no model of this class has an unembedding bias."""
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query projections."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key projections, one per query head."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value projections, one per query head."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output projections."""
        return self._stacked("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases; zeros where the family has none."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases, one per query head."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases, one per query head."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Zeros: no output projection has a bias."""
        return self._stacked("attn", "b_O")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Gate projections."""
        return self._stacked("mlp", "W_gate")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Up projections."""
        return self._stacked("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Down projections."""
        return self._stacked("mlp", "W_out")

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of every head: which position attends to which, before rotation."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head: what is moved from an attended position."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self) -> list[str]:
        """``L0H0``, ``L0H1``, ..."""
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
        """Sum of the biases written to the residual stream before a block: zeros here.

        Only q, k and v have biases in these models, and those stay inside the attention.
        """
        return self.embed.weight.new_zeros(self.cfg.d_model)

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
        ids = torch.as_tensor(tokens, device=self.unembed.weight.device)
        return self.unembed.weight[ids.squeeze() if ids.numel() == 1 else ids] * self.ln_final.w

    def to_tokens(self, text: str | list[str], prepend_bos: bool = False) -> Tensor:
        """Token ids ``[batch, pos]`` of text, padded on the left."""
        texts = [text] if isinstance(text, str) else list(text)
        tokenizer = self._tokenizer()
        if prepend_bos:
            texts = [(tokenizer.bos_token or "") + one for one in texts]
        batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left")
        return batch["input_ids"].to(self.cfg.device)

    def to_string(self, tokens: Any) -> Any:
        """Text of ids ``[pos]``, or a list of texts of ids ``[batch, pos]``."""
        ids = torch.as_tensor(tokens)
        tokenizer = self._tokenizer()
        return tokenizer.batch_decode(ids) if ids.ndim == 2 else tokenizer.decode(ids.reshape(-1))

    def to_str_tokens(self, text: Any, prepend_bos: bool = False) -> list[str]:
        """Every token as text, of a string or of ids ``[pos]`` or ``[1, pos]``."""
        ids = self.to_tokens(text, prepend_bos) if isinstance(text, str) else torch.as_tensor(text)
        return self._tokenizer().batch_decode(ids.reshape(-1, 1))

    def to_single_token(self, text: str) -> int:
        """The id of a string that is exactly one token.

        Raises:
            InputError: it is several, or none.
        """
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"looking up the token {text!r}: the tokenizer makes {len(ids)} of it."
            )
        return int(ids[0])

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                f"tokenising text for {self.cfg.model_name!r}: its folder has no tokenizer."
            )
        return self.tokenizer

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
