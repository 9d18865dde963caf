"""Step-Audio 2 mini: Qwen2-Audio's encoder layers run on chunks, and ``Qwen2ForCausalLM``."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig, Qwen2Config, Qwen2ForCausalLM

from composed_lm import ComposedLM, in_openai_names, pooled_states
from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.step_audio_2 import StepAudio2Config, StepAudio2FrontEnd
from tiny import AUDIO_BOS, AUDIO_EOS, MELS, PLACEHOLDER, VOCAB, randomise

D, D_AUDIO, N_CTX, CHUNK = 60, 24, 1261, 2500
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=34, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=641, rms_norm_eps=1e-5,
    rope_theta=5000.0,
)  # fmt: skip
ENCODER: dict[str, Any] = dict(
    num_mel_bins=MELS, d_model=D_AUDIO, encoder_layers=2, encoder_attention_heads=3,
    encoder_ffn_dim=4 * D_AUDIO, max_source_positions=N_CTX,
)  # fmt: skip
# The published file, as far as it is known, at tiny sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["StepAudio2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_step_audio_2.StepAudio2ForCausalLM"},
    "model_type": "step_audio_2", "use_sliding_window": False, "sliding_window": 2048,
    "max_window_layers": None,
    "audio_encoder_config": {
        "n_mels": MELS, "n_audio_ctx": N_CTX, "n_audio_state": D_AUDIO, "n_audio_head": 3,
        "n_audio_layer": 2, "n_codebook_size": 4096, "llm_dim": D, "kernel_size": 3,
        "adapter_stride": 2,
    },
    "text_config": {**TEXT, "num_attention_groups": 2, "max_seq_len": 641, "rope_scaling": None,
                    "eos_token_id": 321, "pad_token_id": 320},
    "audio_start_id": AUDIO_BOS, "audio_end_id": AUDIO_EOS, "audio_patch_id": PLACEHOLDER,
}  # fmt: skip


class Adapter(nn.Module):
    """The projector between encoder and decoder, as published."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D_AUDIO, D_AUDIO, 3, 2, 1)
        self.linear1, self.linear2 = nn.Linear(D_AUDIO, 2048), nn.Linear(2048, D)
        randomise(self, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.linear2(F.relu(self.linear1(x)))


def save(folder: Path, dtype: torch.dtype) -> None:
    """The published names; decoder and encoder also as folders that ``Composed`` loads."""
    lm, encoder = Qwen2ForCausalLM(Qwen2Config(**TEXT)), encoder_layers("sdpa")
    randomise(lm, 1)
    randomise(encoder, 2)
    lm.to(dtype).save_pretrained(folder.parent / "lm")
    encoder.to(dtype).save_pretrained(folder.parent / "encoder")
    heard = in_openai_names(
        encoder.state_dict(), positions="positional_embedding.weight", norm="after_norm"
    )
    tensors = {
        **lm.state_dict(),
        **{f"encoder.{name}": value for name, value in heard.items()},
        **{f"adapter.{name}": value.to(dtype) for name, value in Adapter().state_dict().items()},
    }
    dtypes = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **dtypes}))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def encoder_layers(attention: str) -> Qwen2AudioEncoder:
    return Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**ENCODER, attn_implementation=attention))


class Composed(ComposedLM):
    """Embeddings overwritten behind every start token."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        given: dict[str, Any] = dict(dtype=dtype, attn_implementation=attention)
        super().__init__(Qwen2ForCausalLM.from_pretrained(folder.parent / "lm", **given))
        self.encoder = Qwen2AudioEncoder.from_pretrained(folder.parent / "encoder", **given).eval()
        self.adapter = Adapter().to(dtype)

    def embeddings(self, inputs: Inputs) -> Tensor:
        x = self.embedded(inputs["input_ids"])
        if "wavs" not in inputs:
            return x
        wavs, lengths = inputs["wavs"].to(x.dtype), inputs["wav_lens"]
        n = wavs.shape[-1]
        real = torch.arange(n) < lengths[:, None]
        real = real[:, (n + 1) % 2 :: 2]
        mask = torch.zeros(real.shape, dtype=x.dtype).masked_fill(~real, torch.finfo(x.dtype).min)
        out = self.adapter(pooled_states(self.encoder, wavs, mask))
        sizes = ((lengths + 1) // 2 // 2 - 1) // 2 + 1
        starts = (inputs["input_ids"] == AUDIO_BOS).nonzero().tolist()
        for (row, at), size, heard in zip(starts, sizes.tolist(), out, strict=True):
            x[row, at + 1 : at + 1 + size] = heard[:size]
        return x


def n_tokens(frames: int) -> int:
    """Of a chunk: three strides of 2, the first rounding up, the second down, the third up."""
    return -(-(-(-frames // 2) // 2) // 2)


def chunks(frames: int) -> list[int]:
    """A clip is cut every 25 s."""
    return [min(CHUNK, frames - at) for at in range(0, frames, CHUNK)]


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Every chunk between markers; its spectrogram has two frames more than its length."""

    def bracketed(frames: int) -> list[int]:
        return [
            i for n in chunks(frames) for i in (AUDIO_BOS, *[PLACEHOLDER] * n_tokens(n), AUDIO_EOS)
        ]

    rows, frames = rows_of(clips, n_text, bracketed)
    batch: Inputs = left_padded(rows)
    if frames:
        lengths = torch.tensor([n for clip in frames for n in chunks(clip)])
        width = int(lengths.max()) + 2
        wavs = torch.randn(len(lengths), MELS, width, generator=torch.Generator().manual_seed(2))
        beyond = torch.arange(width) >= lengths[:, None] + 2
        batch["wavs"] = wavs.masked_fill(beyond[:, None], 0.0)
        batch["wav_lens"] = lengths
    return batch


@cache
def published() -> StepAudio2FrontEnd:
    """The front-end at its published sizes, without weights."""
    encoder = dict(n_audio_state=1280, n_audio_head=20, n_audio_layer=32, llm_dim=3584)
    text = dict(hidden_size=3584, max_position_embeddings=16384)
    with torch.device("meta"):
        return StepAudio2FrontEnd(
            StepAudio2Config(audio_encoder_config=encoder, text_config=text), frozenset()
        )


def published_positions(seconds: float) -> int:
    """25 s are 2500 frames and two more, which do not count."""
    front_end = published()
    return sum(front_end.n_tokens(n) for n in chunks(round(100 * seconds)))


def forget_the_convolution(model: HookedALM) -> None:
    """Every second pooled state instead."""
    projector = model.audio.projector
    projector.forward = lambda x: projector.linear2(F.relu(projector.linear1(x[:, ::2])))


def take_another_activation(model: HookedALM) -> None:
    projector = model.audio.projector
    projector.forward = lambda x: projector.linear2(
        F.gelu(projector.linear1(F.gelu(projector.conv(x.transpose(1, 2))).transpose(1, 2)))
    )


def hear_the_padding(model: HookedALM) -> None:
    """Attend to padded frames as well."""
    tower = model.audio.encoder
    whole = type(tower).forward
    tower.forward = lambda mel, is_real: whole(tower, mel, torch.ones_like(is_real))


def forget_the_encoder_norm(model: HookedALM) -> None:
    model.audio.encoder.ln_final = nn.Identity()


CASE = Case(
    name="Step-Audio 2 mini",
    save=save,
    reference=Composed,
    inputs=inputs,
    # The last is odd, in a batch of even length: the mask's first frame then matters.
    clips=(77, 161, CHUNK + 131),
    bias="model.layers.1.self_attn.k_proj.bias",
    faults={
        "adapter's convolution skipped": forget_the_convolution,
        "activation": take_another_activation,
        "padding heard": hear_the_padding,
        "encoder's norm skipped": forget_the_encoder_norm,
    },
    seconds={1: 13, 5: 63, 10: 125, 30: 376, 60: 751},
    tokens_of=published_positions,
)
