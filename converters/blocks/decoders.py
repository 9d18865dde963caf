"""Rules that families share: the Qwen2, Qwen3 and LLaMA decoders."""

from collections.abc import Set
from typing import Any

from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError

from ..rules import Frequencies, Rename, Rule
from ..strict_config import account_for

_LAYER = {
    r"input_layernorm\.weight": "ln1.weight",
    r"post_attention_layernorm\.weight": "ln2.weight",
    r"self_attn\.([qkvo]_proj)\.(weight|bias)": r"attn.\2.\3",
    r"self_attn\.([qk]_norm)\.weight": r"attn.\2.weight",
    r"mlp\.(gate_proj|up_proj|down_proj)\.weight": r"mlp.\2.weight",
}


def block_rules(layers: str, stack: str) -> list[Rule]:
    """Rules for a stack of blocks: ``{layers}.0....`` to ``{stack}.0....``."""
    return [
        *(
            Rename(layers + r"\.(\d+)\." + pattern, stack + r".\1." + target)
            for pattern, target in _LAYER.items()
        ),
        Frequencies(layers + r"\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ]


def decoder_rules(prefix: str, head: str = r"lm_head") -> list[Rule]:
    """Rules for a Qwen2, Qwen3 or LLaMA decoder.

    Args:
        prefix: regular expression, without groups, for what precedes ``layers.``.
        head: regular expression for the name of the unembedding, without ``.weight``.
    """
    return [
        *block_rules(prefix + r"layers", "blocks"),
        Rename(prefix + r"embed_tokens\.weight", "embed.weight"),
        Rename(prefix + r"norm\.weight", "ln_final.weight"),
        Rename(head + r"\.weight", "unembed.weight"),
        Frequencies(prefix + r"rotary_emb\.inv_freq"),
    ]


_HANDLED = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "use_sliding_window",
    "sliding_window", "max_window_layers", "layer_types", "model_type",
})  # fmt: skip


def decoder_config(
    text_config: Any,
    published: dict[str, Any],
    *,
    qkv_bias: bool,
    qk_norm: bool,
    handled: Set[str] = frozenset(),
    **identity: Any,
) -> HookedALMConfig:
    """Sizes and variants of a Qwen2, Qwen3 or LLaMA decoder.

    Args:
        text_config: transformers' config of the decoder; it supplies what a sparse file leaves out.
        published: the decoder's part of ``config.json`` as written, to refuse what is unknown.
        qkv_bias: whether q, k and v have a bias, as in Qwen2; a LLaMA or Qwen3 config that asks for
            it is refused.
        qk_norm: whether q and k are normed per head, as in Qwen3.
        handled: further fields of the config, which the caller acts on.
        identity: what the caller decides (name, architecture, dtype, device, attention
            implementation, tying, multipliers).
    """
    account_for(text_config, published, handled=_HANDLED | handled)
    head_dim = getattr(text_config, "head_dim", None)
    if head_dim is None:
        head_dim = text_config.hidden_size // text_config.num_attention_heads
    return HookedALMConfig(
        n_layers=text_config.num_hidden_layers,
        d_model=text_config.hidden_size,
        n_heads=text_config.num_attention_heads,
        n_key_value_heads=text_config.num_key_value_heads,
        d_head=head_dim,
        d_mlp=text_config.intermediate_size,
        d_vocab=text_config.vocab_size,
        n_ctx=text_config.max_position_embeddings,
        eps=float(text_config.rms_norm_eps),
        act_fn=text_config.hidden_act,
        attn_bias="qkv" if qkv_bias else "",
        qk_norm=qk_norm,
        rope_parameters=dict(text_config.rope_parameters),
        layer_types=_layer_types(text_config),
        sliding_window=getattr(text_config, "sliding_window", None),
        **identity,
    )


def _layer_types(text_config: Any) -> tuple[Any, ...]:
    """Types of the layers; where the class knows none, each attends to everything before it.

    Raises:
        ConversionError: types that the class would ignore.
    """
    plain = ("full_attention",) * text_config.num_hidden_layers
    declared = tuple(getattr(text_config, "layer_types", None) or plain)
    if declared != plain and "layer_types" not in type(text_config)().to_dict():
        raise ConversionError(
            f"reading a {type(text_config).__name__}: got layer_types {declared!r:.60}, but in "
            "this architecture every layer attends to all before it. Take the published config."
        )
    return declared


def text_decoder_config(
    config: Any, published: dict[str, Any], *, qkv_bias: bool, qk_norm: bool, **identity: Any
) -> HookedALMConfig:
    """Sizes and variants of a text-only model, whose config file is the decoder's."""
    return decoder_config(
        config,
        published,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )
