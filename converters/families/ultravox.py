"""Ultravox: Whisper encoder without padding, stacking projector, LLaMA decoder.

Source: fixie-ai/ultravox, ``ultravox_model.py`` and ``ultravox_processing.py`` of v0.5.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hooked_alm.audio import Waveform
from hooked_alm.checkpoint import SafetensorsCheckpoint
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders, whisper_llama
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..blocks.whisper_llama import AUDIO_MODEL, TEXT_MODEL, WhisperLlamaConfig
from ..family import Card, Family, Published
from ..rules import Rename
from ..strict_config import account_for

ENCODER_STRIDE = 2
"""Mel frames per position of the encoder."""
FRAME_SECONDS = 0.01
PROJECTOR_EPS = 1e-6
"""Epsilon of the projector's norms; no config names it."""


class UltravoxConfig(WhisperLlamaConfig):
    """Config of ``config.json``, with the published defaults."""

    model_type = "ultravox"
    hidden_size: int = 4096
    stack_factor: int = 8
    projector_act: str = "swiglu"
    projector_ln_mid: bool = False
    num_projector_layers: int = 0
    audio_latency_block_size: int | None = None


class UltravoxProjector(nn.Module):
    """Several encoder positions side by side, then a gated MLP of two layers.

    Up to v0.4.1 its second norm follows the second layer, from v0.5 it precedes it.
    """

    def __init__(self, config: UltravoxConfig) -> None:
        """Lay the projector out."""
        super().__init__()
        text: Any = config.text_config
        audio: Any = config.audio_config
        self.stack_factor = config.stack_factor
        d_in, d_mid = audio.d_model * config.stack_factor, config.hidden_size // 2
        self.ln_pre = LlamaRMSNorm(d_in, PROJECTOR_EPS)
        self.linear_1 = nn.Linear(d_in, config.hidden_size, bias=False)
        self.linear_2 = nn.Linear(d_mid, text.hidden_size, bias=False)
        is_mid = config.projector_ln_mid
        self.ln_mid = LlamaRMSNorm(d_mid, PROJECTOR_EPS) if is_mid else nn.Identity()
        self.ln_post = nn.Identity() if is_mid else LlamaRMSNorm(text.hidden_size, PROJECTOR_EPS)

    def forward(self, hidden: Float[Tensor, "window pos d_audio"]) -> Float[Tensor, "window p d"]:
        """Project stacked frames; the second half of what the first layer gives is the gate."""
        hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.stack_factor))
        stacked = hidden.reshape(len(hidden), -1, self.stack_factor * hidden.shape[-1])
        value, gate = self.linear_1(self.ln_pre(stacked)).chunk(2, dim=-1)
        projected: Tensor = self.ln_post(self.linear_2(self.ln_mid(F.silu(gate) * value)))
        return projected


class UltravoxFrontEnd(FrontEnd):
    """Windows of at most 30 s, padded to the longest of the batch; the padding is masked.

    What the encoder makes of the padding fills a clip's last stack, and depends on how much it is.
    """

    depends_on_longest = True

    def __init__(self, config: UltravoxConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip: there are none."""
        stride = ENCODER_STRIDE * config.stack_factor
        super().__init__(
            AudioTokens(
                placeholder=None,  # the processor fills with the end-of-turn token
                markers=markers,
                seconds_per_token=stride * FRAME_SECONDS,
                max_seconds=None,
                text="<|audio|>",
                prepend_bos=False,
            )
        )
        self.stride = stride
        self.encoder = AudioEncoder(encoder_config(config.audio_config, takes_shorter=True))
        self.projector = UltravoxProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and the frames of a full window, which need not be filled."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: one per whole or begun stack."""
        return -(-n_frames // self.stride)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Windows cut from the spectrogram of the recording; the last of several is padded."""
        samples = waveform.samples
        hop = extractor.hop_length
        samples = F.pad(torch.from_numpy(samples), (0, max(2 * hop - len(samples), 0))).numpy()
        extracted = extractor(
            samples,
            sampling_rate=waveform.sampling_rate,
            padding="longest",
            pad_to_multiple_of=hop,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        (mel,), most = extracted["input_features"], self.feature_shape[1]
        n_frames = int(extracted["attention_mask"].sum())
        sizes = [min(most, n_frames - start) for start in range(0, n_frames, most)]
        if len(sizes) > 1:
            mel = F.pad(mel, (0, len(sizes) * most - mel.shape[-1]))
        return torch.stack(mel.chunk(len(sizes), dim=-1)), sizes

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all windows in one batch, as the published model does."""
        features = self.hook_encoder_in(windows.features)
        is_real = self.encoder.real_positions(windows.n_frames, features.shape[-1])
        hidden = self.hook_encoder_out(self.encoder(features, is_real))
        return self.hook_projector_out(self.projector(self.hook_projector_in(hidden)))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        audio_values: Float[Tensor, "window mel frame"] | None = None,
        audio_lens: Int[Tensor, " window"] | None = None,
        audio_token_start_idx: Int[Tensor, " window"] | None = None,
        audio_token_len: Int[Tensor, " window"] | None = None,
        audio_batch_size: Int[Tensor, " batch"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        A full window and the one right behind it are one clip.

        Raises:
            InputError: some of the audio arguments without the others, or that contradict each
                other.
        """
        audio = {
            "audio_values": audio_values,
            "audio_lens": audio_lens,
            "audio_token_start_idx": audio_token_start_idx,
            "audio_token_len": audio_token_len,
            "audio_batch_size": audio_batch_size,
        }
        ids, mask = ids_and_mask(input_ids, attention_mask, refused, ", ".join(audio))
        missing = [name for name, value in audio.items() if value is None]
        if 0 < len(missing) < len(audio):
            raise InputError(
                f"encoding a processor's output: {', '.join(missing)} are missing, expected all of "
                f"{', '.join(audio)}, or none for a prompt without audio."
            )
        is_audio = torch.zeros_like(ids, dtype=torch.bool)
        clips: list[AudioClip] = []
        if audio_values is not None:
            sizes, starts, lengths, counts = (
                value.tolist()
                for value in (audio_lens, audio_token_start_idx, audio_token_len, audio_batch_size)
                if value is not None
            )
            for row, windows in self._clips_by_row(sizes, starts, lengths, counts):
                for w in windows:
                    is_audio[row, starts[w] : starts[w] + lengths[w]] = True
                name = f"clip {len(clips)}"
                clips.append(
                    self.clip(audio_values[windows], [sizes[w] for w in windows], name=name)
                )
        return self.input_from_features(ids, mask, position_ids, clips, is_audio)

    def _clips_by_row(
        self, sizes: list[int], starts: list[int], lengths: list[int], counts: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Row and windows of each clip."""
        expected = [self.n_tokens(n) for n in sizes]
        if lengths != expected or len(starts) != len(sizes) or sum(counts) != len(sizes):
            raise InputError(
                f"encoding a processor's output: got audio_token_len {lengths}, "
                f"audio_token_start_idx {starts} and audio_batch_size {counts} for windows of "
                f"{sizes} frames, expected lengths {expected}, as many starts, and counts that sum "
                "to as many. Pass what the processor returned."
            )
        window = 0
        for row, count in enumerate(counts):
            clips: list[list[int]] = []
            for w in range(window, window + count):
                follows = clips and starts[w] == starts[w - 1] + lengths[w - 1]
                if follows and sizes[w - 1] == self.feature_shape[1]:
                    clips[-1].append(w)
                else:
                    clips.append([w])
            window += count
            yield from ((row, clip) for clip in clips)

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments that say where every window begins, and how many a row has."""
        if not x.clips:
            return {}
        starts, counts, clips = [], [0] * len(x), iter(x.clips)
        for row, places in enumerate(x.spans.clips):
            for (at, _), *_ in places:
                for n_frames in next(clips).n_frames:
                    starts.append(at)
                    counts[row] += 1
                    at += self.n_tokens(n_frames)
        return {
            "audio_token_start_idx": torch.tensor(starts),
            "audio_batch_size": torch.tensor(counts),
        }

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Windows, padded to the longest, their frames and their positions."""
        sizes = [n for clip in clips for n in clip.n_frames]
        return {
            "audio_values": self.features_and_mask(clips)[0],
            "audio_lens": torch.tensor(sizes),
            "audio_token_len": torch.tensor([self.n_tokens(n) for n in sizes]),
        }


def decoder_config(
    config: UltravoxConfig, published: Published, **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    account_for(
        config,
        published,
        handled={
            *("audio_config", "text_config", "audio_model_id", "text_model_id", "hidden_size"),
            *("stack_factor", "projector_ln_mid"),
        },
        irrelevant={
            "custom_pipelines": "names the publisher's own code, which is never run",
            "audio_token_index": "the forward takes places, not ids",
            "norm_init": "training only",
            "loss_config": "training only",
            "vocab_size": "the text model's",
            "text_model_lora_config": "training only: adapters that are not merged are left over",
            "audio_model_lora_config": "training only: adapters that are not merged are left over",
        },
    )
    return whisper_llama.decoder_config(config, **identity)


def _own_or(own: str, key: str) -> Callable[[Published, Path], str | Path | None]:
    """Locator of a part: the checkpoint, if that has tensors ``own``, else what the config says."""

    def where(published: Published, folder: Path) -> str | Path | None:
        is_own = any(name.startswith(own) for name in SafetensorsCheckpoint(folder))
        return folder if is_own else published.get(key) or None

    return where


FAMILY = Family(
    name="Ultravox",
    architectures=("UltravoxModel",),
    config_class=UltravoxConfig,
    decoder_config=decoder_config,
    front_end=UltravoxFrontEnd,
    components={
        TEXT_MODEL: _own_or("language_model.", "text_model_id"),
        AUDIO_MODEL: _own_or("audio_tower.", "audio_model_id"),
    },
    rules=(
        *decoders.decoder_rules(
            rf"(?:{TEXT_MODEL}/|language_model\.)model\.",
            head=rf"(?:{TEXT_MODEL}/|language_model\.)lm_head",
        ),
        *whisper_llama.whisper_rules(rf"{AUDIO_MODEL}/"),
        *encoder_rules(r"audio_tower\."),
        Rename(r"multi_modal_projector\.(.+)", r"audio.projector.\1"),
    ),
    tokenizer=TEXT_MODEL,
    feature_extractor=whisper_llama.feature_extractor,
    audio_text="<|audio|>\n",
    card=Card(
        audio="6.25/s, in windows of 30 s",
        readout="`\\n\\n` after the assistant's header",
        reference="composed",
        notes="the language model is not in the checkpoint: it comes from `text_model_id`, or "
        '`components={"text_model": folder}`',
    ),
)
