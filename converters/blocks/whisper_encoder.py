"""Whisper-type encoders of checkpoints, and Whisper's decoder: sizes, and names of tensors."""

from typing import Any

from hooked_alm.config import AttentionImplementation, EncoderConfig

from ..rules import Rename

_HUGGING_FACE = {
    r"self_attn\.(?P<part>[qkv])_proj": r"attn.\g<part>_proj",
    r"self_attn\.out_proj": "attn.o_proj",
    "self_attn_layer_norm": "ln1",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "ln2",
}
_WITH_CROSS_ATTENTION = {
    **_HUGGING_FACE,
    r"encoder_attn\.(?P<part>[qkv])_proj": r"cross_attn.\g<part>_proj",
    r"encoder_attn\.out_proj": "cross_attn.o_proj",
    "encoder_attn_layer_norm": "ln2",
    "final_layer_norm": "ln3",
}
_OPENAI = {
    r"attn\.query": "attn.q_proj",
    r"attn\.key": "attn.k_proj",
    r"attn\.value": "attn.v_proj",
    r"attn\.out": "attn.o_proj",
    "attn_ln": "ln1",
    r"mlp\.0": "mlp.up_proj",
    r"mlp\.2": "mlp.down_proj",
    "mlp_ln": "ln2",
}


def encoder_config(config: Any, **variant: Any) -> EncoderConfig:
    """Sizes of an encoder from transformers' config of it.

    Args:
        config: of a Whisper, or of an encoder with its names.
        variant: further fields of ``EncoderConfig``.
    """
    return EncoderConfig(
        n_layers=config.encoder_layers,
        d_model=config.d_model,
        n_heads=config.encoder_attention_heads,
        n_key_value_heads=config.encoder_attention_heads,
        d_head=config.d_model // config.encoder_attention_heads,
        d_mlp=config.encoder_ffn_dim,
        n_ctx=config.max_source_positions,
        n_mels=config.num_mel_bins,
        act_fn=config.activation_function,
        attn_implementation=config._attn_implementation or "sdpa",
        **variant,
    )


def openai_encoder_config(
    *,
    n_mels: int,
    n_ctx: int,
    n_state: int,
    n_head: int,
    n_layer: int,
    attention: AttentionImplementation | None,
) -> EncoderConfig:
    """Sizes of a pooled encoder by OpenAI's names; ``attention`` is the implementation."""
    return EncoderConfig(
        n_layers=n_layer, d_model=n_state, n_heads=n_head, n_key_value_heads=n_head,
        d_head=n_state // n_head, d_mlp=4 * n_state, n_ctx=n_ctx, n_mels=n_mels, act_fn="gelu",
        attn_implementation=attention or "sdpa", pooling=2, takes_shorter=True,
    )  # fmt: skip


def encoder_rules(prefix: str, *, norm: str = "layer_norm") -> list[Rename]:
    """Rules for the names that transformers gives the encoder's tensors.

    Args:
        prefix: regular expression, without groups, for what precedes ``layers.``.
        norm: name of the final norm.
    """
    blocks = _block_rules(rf"{prefix}layers", _HUGGING_FACE, "audio.encoder.blocks")
    return [*blocks, *_rules(prefix, "embed_positions.weight", norm)]


def decoder_rules(prefix: str) -> list[Rename]:
    """Rules for the names that transformers gives the tensors of Whisper's decoder.

    Args:
        prefix: regular expression, without groups, for what precedes ``layers.``.
    """
    return [
        *_block_rules(rf"{prefix}layers", _WITH_CROSS_ATTENTION, "blocks"),
        Rename(prefix + r"embed_tokens\.weight", "embed.weight"),
        Rename(prefix + r"embed_positions\.weight", "pos_embed.weight"),
        Rename(prefix + r"layer_norm\.(weight|bias)", r"ln_final.\1"),
    ]


def openai_encoder_rules(prefix: str, *, positions: str, norm: str) -> list[Rename]:
    """Rules for the names that OpenAI gives the encoder's tensors.

    Args:
        prefix: regular expression, without groups, for what precedes ``blocks.``.
        positions: name of the table of positions.
        norm: name of the final norm.
    """
    blocks = _block_rules(rf"{prefix}blocks", _OPENAI, "audio.encoder.blocks")
    return [*blocks, *_rules(prefix, positions, norm)]


def _block_rules(blocks: str, names: dict[str, str], stack: str) -> list[Rename]:
    return [
        Rename(
            rf"{blocks}\.(\d+)\.{theirs}\.(?P<kind>weight|bias)",
            rf"{stack}.\1.{ours}.\g<kind>",
        )
        for theirs, ours in names.items()
    ]


def _rules(prefix: str, positions: str, norm: str) -> list[Rename]:
    """Rules for what of an encoder stands outside of its blocks."""
    return [
        Rename(prefix + r"(conv[12]\.(?:weight|bias))", r"audio.encoder.\1"),
        Rename(prefix + positions, "audio.encoder.embed_positions.weight"),
        Rename(prefix + norm + r"\.(weight|bias)", r"audio.encoder.ln_final.\1"),
    ]
