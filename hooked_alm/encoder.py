"""The hooked audio encoder of Whisper and its kin."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .components.attention import AttentionContext
from .components.block import Block, Blocks
from .components.norm import norm_of
from .config import EncoderConfig
from .errors import InputError
from .hooked_transformer.weights import BlockWeights
from .hooks import HookPoint
from .masks import key_mask

States = Float[Tensor, "window pos d_audio"]


class AudioEncoder(BlockWeights, nn.Module):
    """Whisper-type encoder: two convolutions, positions, blocks, pooling, a final norm.

    ::

        conv1, conv2     spectrogram -> [window, pos, d_audio], half as many positions as frames
        embed_positions  added -> hook_embed
        blocks.{layer}   ln1 -> attn -> ln2 -> mlp, every position seen by every other
        (pooling)
        ln_final

    Hook points: ``hook_embed [window, pos, d_audio]``, and those of a ``Block`` and a
    ``LayerNorm``. ``W_Q [layer, head, d_audio, d_head]`` and its kin are the blocks' weights. The
    streams are laid out in memory position by position; Hugging Face's are not,
    which changes no value.

    Source: transformers 5.23 ``WhisperEncoder``, ``Qwen2AudioEncoder`` (mask and pooling),
    ``VoxtralEncoder`` (positions added in their own dtype).
    """

    def __init__(self, cfg: EncoderConfig) -> None:
        """Lay the encoder out."""
        super().__init__()
        self.cfg = cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.embed_positions.requires_grad_(False)
        self.hook_embed = HookPoint()
        self.blocks = Blocks(Block(cfg, layer, "full_attention") for layer in range(cfg.n_layers))
        self.ln_final = norm_of(cfg)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Shape ``(mel, frame)`` of a full window: the second convolution halves the rate."""
        return self.cfg.n_mels, 2 * self.cfg.n_ctx

    def forward(
        self,
        mel: Float[Tensor, "window mel frame"],
        is_real: Bool[Tensor, "window half_frame"] | None = None,
    ) -> Float[Tensor, "window audio_pos d_audio"]:
        """States of every position, pooled and normalised.

        Args:
            mel: spectrograms; they are cast to the weights' dtype.
            is_real: which outputs of the second convolution may be attended to; None is all.

        Raises:
            InputError: spectrograms of a length that the encoder does not take.
        """
        *_, hidden = self.states(mel, is_real)
        if self.cfg.pooling > 1:
            hidden = F.avg_pool1d(hidden.permute(0, 2, 1), self.cfg.pooling).permute(0, 2, 1)
        return self.ln_final(hidden)

    def states(
        self,
        mel: Float[Tensor, "window mel frame"],
        is_real: Bool[Tensor, "window half_frame"] | None = None,
    ) -> Iterator[States]:
        """States that enter the first block and leave each, without the final norm; see there."""
        hidden = self.hook_embed(self._embedded(mel))
        yield hidden
        context = self._context(hidden, is_real)
        for block in self.blocks:
            hidden = block(hidden, context)
            yield hidden

    def _embedded(self, mel: Float[Tensor, "window mel frame"]) -> States:
        n_mels, longest = self.window_shape
        n = mel.shape[-1]
        if mel.shape[1] != n_mels or n > longest or (n != longest and not self.cfg.takes_shorter):
            raise InputError(
                f"encoding a spectrogram: got [mel {mel.shape[1]}, frame {n}], expected "
                f"[mel {n_mels}, frame {longest}"
                + (" or fewer]." if self.cfg.takes_shorter else "]. Pad it to the full length.")
            )
        hidden = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        hidden = F.gelu(self.conv2(hidden)).permute(0, 2, 1)
        positions = self.embed_positions.weight[: hidden.shape[1]]
        return (hidden + positions).to(hidden.dtype).contiguous()

    def _context(self, hidden: States, is_real: Tensor | None) -> AttentionContext:
        def mask(implementation: str) -> Any:
            return None if is_real is None else key_mask(implementation, hidden, is_real)

        explicit = any(block.attn.needs_scores for block in self.blocks)
        return AttentionContext(
            rotary=None,
            kernel_masks={"full_attention": mask(self.cfg.attn_implementation)},
            additive_masks={"full_attention": mask("eager")} if explicit else {},
        )
