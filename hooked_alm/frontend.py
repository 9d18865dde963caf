"""From audio clips to embeddings in the residual stream.

A family brings its audio encoder and projector, as Hugging Face wrote them, as a ``FrontEnd``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .errors import InputError
from .hooks import HookPoint
from .inputs import ALMInput, AudioClip, positions_from_mask, weights_version
from .spans import AudioTokens, span_flags, span_map


class FrontEnd(nn.Module, ABC):
    """Audio encoder and projector of one family.

    Hook points, on demand: ``hook_encoder_in [clip, mel, frame]``, ``hook_encoder_out`` and
    ``hook_projector_in [clip, audio_pos, d_audio]``, ``hook_projector_out [clip, audio_pos,
    d_model]``. Positions beyond a clip's ``n_tokens`` are padding.
    """

    def __init__(self, tokens: AudioTokens) -> None:
        """``tokens`` says how the prompt marks audio."""
        super().__init__()
        self.tokens = tokens
        self.special_ids: frozenset[int] = frozenset()
        """Ids that are no text; known once there is a tokenizer."""
        self.hook_encoder_in = HookPoint()
        self.hook_encoder_out = HookPoint()
        self.hook_projector_in = HookPoint()
        self.hook_projector_out = HookPoint()

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, int]:
        """``(mel, frame)`` of the spectrogram that the encoder takes, padding included."""

    @abstractmethod
    def n_tokens(self, n_frames: int) -> int:
        """Positions that a clip of ``n_frames`` mel frames fills."""

    @abstractmethod
    def encode(
        self, features: Float[Tensor, "clip mel frame"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip audio_pos d_model"]:
        """Run encoder and projector, past the hook points."""

    @abstractmethod
    def input_from_hf(self, **processor_output: Any) -> ALMInput:
        """An input from the arguments of the family's Hugging Face ``forward``."""

    def embed_clips(self, clips: Sequence[AudioClip]) -> Float[Tensor, "clip audio_pos d_model"]:
        """Embeddings of the clips, each encoded once and then reused; the result is a copy.

        Clips are encoded together, without gradient, and a clip that occurs twice once. An encoding
        is kept with the clip and reused wherever the same clips come together, so that results do
        not depend on what ran before. While an ``audio.*`` point, or a module of the encoder, is
        hooked, everything is encoded afresh, and nothing is kept.
        """
        if self._is_hooked():
            fresh = zip(self._encode(clips), clips, strict=True)
            return pad_sequence([e[: clip.n_tokens] for e, clip in fresh], batch_first=True)
        version = weights_version(self)
        distinct = list(dict.fromkeys(clips))  # by identity: one clip may be heard in several rows
        frames = tuple(clip.n_frames for clip in distinct)
        known = [clip.encodings(self, version) for clip in distinct]
        if any((frames, index) not in encodings for index, encodings in enumerate(known)):
            with torch.no_grad():
                together = self._encode(distinct)
            for index, (clip, encodings) in enumerate(zip(distinct, known, strict=True)):
                encodings[frames, index] = together[index, : clip.n_tokens].clone()
        at = {clip: index for index, clip in enumerate(distinct)}
        embeddings = [known[at[clip]][frames, at[clip]] for clip in clips]
        return pad_sequence(embeddings, batch_first=True)

    def _is_hooked(self) -> bool:
        # Hook points are modules, and their hooks PyTorch's.
        return any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self.modules()
        )

    def _encode(self, clips: Sequence[AudioClip]) -> Float[Tensor, "clip audio_pos d_model"]:
        device = next(self.parameters()).device
        features = torch.stack([clip.features for clip in clips]).to(device)
        backward_hooks = (m._backward_hooks or m._backward_pre_hooks for m in self.modules())
        if torch.is_grad_enabled() and any(backward_hooks):
            # Also where the encoder is frozen. A copy: hooks may not write into a leaf.
            features = features.requires_grad_().clone()
        return self.encode(features, torch.tensor([c.n_frames for c in clips], device=device))

    def input_from_features(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        position_ids: Int[Tensor, "batch pos"] | None,
        clips: Sequence[AudioClip],
    ) -> ALMInput:
        """Ids and clips, brought together.

        Ids alone do not tell the instruction from the template, so every token that is neither
        audio nor special counts as ``text``.

        Raises:
            InputError: the placeholders of a row do not fit its clips.
        """
        rows = _rows_of_clips(tokens == self.tokens.placeholder, clips)
        flags = [
            span_flags(ids, mask, self.tokens, [i not in self.special_ids for i in ids], {})
            for ids, mask in zip(tokens.tolist(), attention_mask.tolist(), strict=True)
        ]
        return ALMInput(
            tokens=tokens,
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask)
            if position_ids is None
            else position_ids,
            spans=span_map(flags, tokens.shape[1], self.tokens.seconds_per_token),
            clips=tuple(clips),
            clip_rows=tuple(rows),
        )


def _rows_of_clips(is_audio: Tensor, clips: Sequence[AudioClip]) -> list[int]:
    """Hand clips to rows in order, each row taking as many as its placeholders need."""
    rows: list[int] = []
    for row, n_placeholders in enumerate(is_audio.sum(dim=1).tolist()):
        needed, first = n_placeholders, len(rows)
        while needed > 0 and len(rows) < len(clips):
            needed -= clips[len(rows)].n_tokens
            rows.append(row)
        if needed != 0:
            raise InputError(
                f"merging audio into row {row}: it has {n_placeholders} audio placeholders, the "
                f"clips that remain for it give {[c.n_tokens for c in clips[first : len(rows)]]} "
                "positions in order. Expand one placeholder per audio position, as the "
                "processor does, and pass a clip for every placeholder run."
            )
    if len(rows) != len(clips):
        raise InputError(
            f"merging audio: {len(clips)} clips were given, the prompts have room for {len(rows)}."
        )
    return rows
