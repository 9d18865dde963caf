"""Whisper's encoder for spectrograms of any length, pooled by two: Qwen-Audio and Step-Audio 2."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..rules import Rename

_BLOCK = {
    r"attn\.query": "self_attn.q_proj",
    r"attn\.key": "self_attn.k_proj",
    r"attn\.value": "self_attn.v_proj",
    r"attn\.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    r"mlp\.0": "fc1",
    r"mlp\.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


class PooledWhisper(WhisperEncoder):
    """transformers' layers, with padding masked, and the final norm behind a pooling by two."""

    def __init__(
        self, *, n_mels: int, n_ctx: int, n_state: int, n_head: int, n_layer: int, attention: str
    ) -> None:
        """Sizes by the names of the published configs; ``attention`` is the implementation."""
        super().__init__(
            WhisperConfig(
                num_mel_bins=n_mels,
                max_source_positions=n_ctx,
                d_model=n_state,
                encoder_attention_heads=n_head,
                encoder_layers=n_layer,
                encoder_ffn_dim=4 * n_state,
                attn_implementation=attention,
            )
        )

    def forward(
        self, mel: Float[Tensor, "window mel frame"], is_real: Bool[Tensor, "window half_frame"]
    ) -> Float[Tensor, "window audio_pos d_audio"]:
        """Encode; ``is_real`` says which outputs of the second convolution may be attended to."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).permute(0, 2, 1)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=is_real.long()
        )
        for layer in self.layers:
            hidden = layer(hidden, mask)
        pooled = F.avg_pool1d(hidden.permute(0, 2, 1), kernel_size=2).permute(0, 2, 1)
        return self.layer_norm(pooled)


def whisper_rules(prefix: str, target: str, *, positions: str, norm: str) -> list[Rename]:
    """Rules for the names that OpenAI gives the encoder's tensors.

    Args:
        prefix: regular expression, without groups, for what precedes ``blocks.``.
        target: the module that holds the ``PooledWhisper``, with its dot.
        positions: name of the table of positions.
        norm: name of the norm behind the pooling.
    """
    blocks = [
        Rename(prefix + r"blocks\.(\d+)\." + theirs + r"\.(.+)", rf"{target}layers.\1.{ours}.\2")
        for theirs, ours in _BLOCK.items()
    ]
    return [
        *blocks,
        Rename(prefix + r"(conv[12]\.(?:weight|bias))", target + r"\1"),
        Rename(prefix + positions, target + "embed_positions.weight"),
        Rename(prefix + norm + r"\.(weight|bias)", target + r"layer_norm.\1"),
    ]
