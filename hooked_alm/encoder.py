"""Hooked audio encoders: of Whisper and its kin, and of Qwen2.5-Omni."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .components.attention import AttentionContext
from .components.block import Block, Blocks
from .components.norm import norm_of
from .config import EncoderConfig
from .errors import InputError
from .hooked_transformer.weights import BlockWeights
from .hooks import HookPoint
from .masks import key_mask
from .turns import restored

States = Float[Tensor, "window pos d_audio"]


class WindowPart(NamedTuple):
    """Positions of an encoder's states that see each other."""

    window: int
    """Index along the first axis."""
    start: int
    """First position along the second axis."""
    n_pos: int
    n_seen: int
    """Number of the first of them that may be attended to."""


class HookedEncoder(BlockWeights, nn.Module):
    """What audio encoders of Whisper's type share: convolutions, blocks, a final norm.

    Hook points: ``hook_embed``, behind the convolutions and the positions, and those of a ``Block``
    and a ``LayerNorm``. ``W_Q [layer, head, d_audio, d_head]`` and its kin are the blocks' weights.
    """

    is_packed = False
    """Whether windows stand one behind the other in one sequence, not along the first axis."""

    parts: Callable[..., list[list["WindowPart"]]]
    """Parts of the states, by window, of the arguments of ``forward``."""

    def __init__(self, cfg: EncoderConfig) -> None:
        """Lay the encoder out."""
        super().__init__()
        self.cfg = cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, kernel_size=3, stride=2, padding=1)
        self.hook_embed = HookPoint()
        self.blocks = Blocks(Block(cfg, layer, "full_attention") for layer in range(cfg.n_layers))
        self.ln_final = norm_of(cfg)
        self._resumed: States | None = None

    @contextmanager
    def resumed(self, streams: States) -> Iterator[None]:
        """Start behind the last block, from some states of its points' shape, within the context.

        The spectrograms are then looked at for nothing.
        """
        with restored(partial(setattr, self, "_resumed", None)):
            self._resumed = streams
            yield

    @property
    def window_shape(self) -> tuple[int, int]:
        """Shape ``(mel, frame)`` of a full window: the second convolution halves the rate."""
        return self.cfg.n_mels, 2 * self.cfg.n_ctx

    @property
    def needs_scores(self) -> bool:
        """Whether a block computes explicit scores."""
        return any(block.attn.needs_scores for block in self.blocks)


class AudioEncoder(HookedEncoder):
    """Whisper's encoder and its kin: every position of a window sees every other.

    ::

        conv1, conv2     spectrogram -> [window, pos, d_audio], half as many positions as frames
        embed_positions  added -> hook_embed
        blocks.{layer}   ln1 -> attn -> ln2 -> mlp
        (pooling)
        ln_final

    The streams are laid out in memory position by position; Hugging Face's are not, which changes
    no value.

    Source: transformers 5.23 ``WhisperEncoder``, ``Qwen2AudioEncoder`` (mask and pooling),
    ``VoxtralEncoder`` (positions added in their own dtype).
    """

    def __init__(self, cfg: EncoderConfig) -> None:
        """Lay the encoder out."""
        super().__init__(cfg)
        self.embed_positions = nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.embed_positions.requires_grad_(False)

    @staticmethod
    def real_positions(
        n_frames: Int[Tensor, " window"], width: int
    ) -> Bool[Tensor, "window half_frame"]:
        """True at outputs of the second convolution that are of frames, not of padding.

        Args:
            n_frames: frames of each window that are not padding.
            width: frames of the widest, padding included.
        """
        place = torch.arange(halved(width), device=n_frames.device)
        return place < halved(n_frames)[:, None]

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
        for state in self.states(mel, is_real) if self._resumed is None else [self._resumed]:
            hidden = state  # the last: earlier ones are let go
        if self.cfg.pooling > 1:
            hidden = F.avg_pool1d(hidden.permute(0, 2, 1), self.cfg.pooling).permute(0, 2, 1)
        return self.ln_final(hidden)

    def states(
        self,
        mel: Float[Tensor, "window mel frame"],
        is_real: Bool[Tensor, "window half_frame"] | None = None,
    ) -> Iterator[States]:
        """States that enter the first block and leave each; arguments as ``forward`` has them."""
        hidden = self.hook_embed(self._embedded(mel))
        yield hidden
        context = self._context(hidden, is_real)
        for block in self.blocks:
            hidden = block(hidden, context)
            yield hidden

    def parts(
        self,
        mel: Float[Tensor, "window mel frame"],
        is_real: Bool[Tensor, "window half_frame"] | None = None,
    ) -> list[list[WindowPart]]:
        """The states of every window; arguments as ``forward`` has them."""
        n = halved(mel.shape[-1])
        real = [n] * len(mel) if is_real is None else is_real.sum(-1).tolist()
        return [[WindowPart(i, 0, n, n_seen)] for i, n_seen in enumerate(real)]

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

        return AttentionContext(
            rotary=None,
            kernel_masks={"full_attention": mask(self.cfg.attn_implementation)},
            additive_masks={"full_attention": mask("eager")} if self.needs_scores else {},
        )


class ChunkedEncoder(HookedEncoder):
    """Qwen2.5-Omni's encoder: chunks of ``n_ctx`` positions, which do not see each other.

    Its states are averaged in pairs, whatever ``pooling`` says, and clips may have any length.
    The chunks of all clips stand one behind the other in one sequence, so that its points have a
    batch of one: ``[1, packed_pos, d_audio]``. A clip's last chunk is as long as it needs.

    Source: transformers 5.23 ``Qwen2_5OmniAudioEncoder``.
    """

    is_packed = True

    def __init__(self, cfg: EncoderConfig) -> None:
        """Lay the encoder out; the positions, which start anew in every chunk, are computed."""
        super().__init__(cfg)
        rate = np.log(10_000) / (cfg.d_model // 2 - 1)
        scales = torch.exp(-rate * torch.arange(cfg.d_model // 2).float())
        angles = torch.arange(cfg.n_ctx)[:, None] * scales[None]
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.register_buffer("positions", table, persistent=False)
        self.positions: Tensor

    def forward(
        self, mels: Sequence[Float[Tensor, "_mel _frame"]]
    ) -> list[Float[Tensor, "_audio_pos d_audio"]]:
        """States of every clip, means of pairs, normalised.

        Args:
            mels: spectrograms of the clips, without padding; they are cast to the weights' dtype.
        """
        hidden = self._states(mels) if self._resumed is None else self._resumed
        pairs = []
        for clip in hidden[0].split([halved(mel.shape[1]) for mel in mels]):
            n = len(clip) // 2
            pairs.append((clip[: 2 * n : 2] + clip[1 : 2 * n : 2]) / 2)
        normalized = self.ln_final(torch.cat(pairs)[None])[0]
        return [*normalized.split([len(clip) for clip in pairs])]

    def parts(self, mels: Sequence[Float[Tensor, "_mel _frame"]]) -> list[list[WindowPart]]:
        """Chunks of every clip in the encoder's states; arguments as ``forward`` has them."""
        lengths = [[halved(len(one)) for one in self._chunks([mel])] for mel in mels]
        starts = iter(accumulate((n for some in lengths for n in some), initial=0))
        return [[WindowPart(0, next(starts), n, n) for n in some] for some in lengths]

    def _chunks(self, mels: Sequence[Tensor]) -> list[Tensor]:
        return [chunk.T for mel in mels for chunk in mel.split(2 * self.cfg.n_ctx, dim=1)]

    def _states(self, mels: Sequence[Tensor]) -> States:
        """States behind the last block, of all chunks in one sequence."""
        chunks = self._chunks(mels)
        hidden = self.hook_embed(self._embedded(chunks)[None])
        context = AttentionContext(
            rotary=None,
            kernel_masks={"full_attention": None},
            additive_masks={"full_attention": None},
            chunks=[halved(len(chunk)) for chunk in chunks],
        )
        for block in self.blocks:
            hidden = block(hidden, context)
        return hidden

    def _embedded(self, chunks: Sequence[Tensor]) -> Float[Tensor, "packed_pos d_audio"]:
        """Positions of all chunks, of which the convolutions see one each."""
        mel = pad_sequence([*chunks], batch_first=True).mT.to(self.conv1.weight.dtype)
        n_frames = torch.tensor([len(chunk) for chunk in chunks], device=mel.device)
        is_real = torch.arange(mel.shape[2], device=mel.device) < n_frames[:, None]
        hidden = F.gelu(self.conv1(mel)) * is_real[:, None].long()
        hidden = F.gelu(self.conv2(hidden)).mT
        hidden = hidden + self.positions[: hidden.shape[1]].to(hidden.dtype)
        real = [one[: halved(len(c))] for one, c in zip(hidden, chunks, strict=True)]
        return torch.cat(real)


def halved(n_frames: Any) -> Any:
    """Positions behind a convolution of stride 2."""
    return (n_frames - 1) // 2 + 1
