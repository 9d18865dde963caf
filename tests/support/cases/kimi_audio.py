"""Kimi-Audio: two unmodified ``Qwen2Model``, the second reading a hidden state of the first."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Qwen2Config,
    Qwen2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from family_case import Case, Inputs, Run, left_padded, residuals, rows_of
from hooked_alm import HookedALM
from hooked_alm.audio import Waveform
from hooked_alm.converters.families.kimi_audio import KimiAudioConfig, KimiAudioFrontEnd
from tiny import VOCAB, randomise

JOINED, D_AUDIO, MELS, CONTEXT = 4, 24, 8, 50
"""States of the tiny Whisper at every position, their width, bins, and states of a chunk."""
FORK, TRUNK, BRANCH, D, D_IN = 2, 5, 3, 60, 26
BEGIN, END, BLANK, ASSISTANT, OFFSET, N_CODES = 320, 321, 322, 323, 324, 12
EPS = 3e-5
"""Of every norm; the default of neither transformers' nor torch's."""
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=34, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=211, rms_norm_eps=EPS, rope_theta=5000.0,
)  # fmt: skip
SCALE = 0.15


def parts(d_in: int) -> dict[str, Tensor]:
    """Embedding, heads and adaptor, random."""
    draw = torch.Generator().manual_seed(7)
    sizes = {
        "embed": (VOCAB, D), "text_head": (VOCAB, D), "audio_head": (VOCAB, D), "w1": (D, d_in),
        "b1": (D,), "w2": (D, D), "b2": (D,), "ln_w": (D,), "ln_b": (D,),
    }  # fmt: skip
    made = {name: SCALE * torch.randn(size, generator=draw) for name, size in sizes.items()}
    return {**made, "ln_w": 1 + made["ln_w"]}


def save(folder: Path, dtype: torch.dtype, d_in: int = D_IN) -> None:
    """The published names; the two stacks also as folders that ``reference`` loads."""
    made = parts(d_in)
    tensors = {
        "model.embed_tokens.weight": made["embed"],
        "lm_head.weight": made["text_head"],
        "mimo_output.weight": made["audio_head"],
        **{f"model.vq_adaptor.layers.{i}.{leaf}": made[name] for i, leaf, name in (
            (0, "weight", "w1"), (0, "bias", "b1"), (3, "weight", "w2"), (3, "bias", "b2"),
            (4, "weight", "ln_w"), (4, "bias", "ln_b"),
        )},
    }  # fmt: skip
    for name, n_layers, seed in (("trunk", TRUNK, 3), ("branch", BRANCH, 4)):
        stack = Qwen2Model(Qwen2Config(num_hidden_layers=n_layers, **SIZES))
        randomise(stack, seed)
        stack.to(dtype).save_pretrained(folder.parent / name)
        mimo = "mimo_" if name == "branch" else ""
        for key, value in stack.state_dict().items():
            if not key.startswith("embed_tokens"):
                renamed = key.replace("layers.", f"{mimo}layers.", 1)
                tensors["model." + (f"{mimo}{key}" if key == "norm.weight" else renamed)] = value
        for layer in range(n_layers):
            tensors[f"model.{mimo}layers.{layer}.self_attn.rotary_emb.inv_freq"] = (
                stack.rotary_emb.inv_freq.to(torch.bfloat16, copy=True)
            )
    config = {
        "architectures": ["MoonshotKimiaForCausalLM"], "model_type": "kimi_audio",
        "auto_map": {"AutoModelForCausalLM": "modeling_moonshot_kimia.MoonshotKimiaForCausalLM"},
        "num_hidden_layers": TRUNK, "kimia_mimo_layers": BRANCH, "hidden_act": "silu",
        "kimia_mimo_transformer_from_layer_index": FORK, "kimia_adaptor_input_dim": d_in,
        "kimia_media_begin": BEGIN, "kimia_media_end": END, "kimia_text_blank": BLANK,
        "kimia_token_offset": OFFSET, "kimia_text_output_vocab": OFFSET,
        "kimia_audio_output_vocab": VOCAB - OFFSET, "kimia_mimo_audiodelaytokens": 5,
        "use_whisper_feature": True, "dtype": str(dtype).removeprefix("torch."), **SIZES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def save_with_whisper(folder: Path, dtype: torch.dtype) -> None:
    """The same, and the fine-tuned Whisper in its folder."""
    save(folder, dtype, JOINED * D_AUDIO)
    whisper = WhisperModel(WhisperConfig(
        vocab_size=33, num_mel_bins=MELS, d_model=D_AUDIO, max_source_positions=CONTEXT,
        encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=38, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3,
    ))  # fmt: skip
    randomise(whisper, 5)
    whisper.to(dtype).save_pretrained(folder / "whisper-large-v3")


class Composed:
    """The model in a few lines of algebra around the two stacks, and Whisper's encoder."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        self.encoder, d_in = None, D_IN
        if (folder / "whisper-large-v3").exists():
            whisper = WhisperModel.from_pretrained(
                folder / "whisper-large-v3", dtype=dtype, attn_implementation=attention
            )
            self.encoder, d_in = whisper.eval().encoder, JOINED * D_AUDIO
        self.trunk, self.branch = (
            Qwen2Model.from_pretrained(
                folder.parent / name, dtype=dtype, attn_implementation=attention
            ).eval()
            for name in ("trunk", "branch")
        )
        self.parts = {name: value.to(dtype) for name, value in parts(d_in).items()}
        self.dtype = dtype

    def embeddings(self, inputs: Inputs) -> Tensor:
        """``x0`` of every position."""
        p = self.parts
        embeds = F.embedding(inputs["input_ids"], p["embed"])
        heard = inputs.get("is_continuous_mask")
        segments = iter(inputs.get("whisper_input_feature", ()) or self.heard(inputs))
        root = torch.tensor(math.sqrt(2.0)).to(self.dtype)
        if heard is not None:
            for row in range(len(embeds)):
                positions = heard[row].nonzero().flatten()
                f = next(segments).to(self.dtype)[: len(positions)]
                w = F.linear(F.silu(F.linear(f, p["w1"], p["b1"])), p["w2"], p["b2"])
                w = F.layer_norm(w, (D,), p["ln_w"], p["ln_b"], eps=EPS)
                embeds[row, positions] = (embeds[row, positions] + w) * root
        return embeds + F.embedding(inputs["text_input_ids"], p["embed"])

    def heard(self, inputs: Inputs) -> list[Tensor]:
        """Features of every recording: four states side by side, chunk after chunk."""
        recordings = inputs.get("input_features", ())
        if not recordings:
            return []
        assert self.encoder is not None
        states = self.encoder(torch.cat(recordings).to(self.dtype)).last_hidden_state
        joined = states[:, : CONTEXT // JOINED * JOINED].reshape(len(states), -1, JOINED * D_AUDIO)
        return [part.flatten(0, 1) for part in joined.split([len(one) for one in recordings])]

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Run:
        """Both heads."""
        shared = {k: inputs[k] for k in ("attention_mask", "position_ids")}
        x = self.embeddings(inputs)
        states: list[Tensor] = []

        def text() -> Tensor:
            out = self.trunk(inputs_embeds=x, output_hidden_states=True, **shared)
            states.extend(out.hidden_states)
            return F.linear(out.last_hidden_state, self.parts["text_head"])

        def audio() -> Tensor:
            out = self.branch(inputs_embeds=states[FORK + 1], **shared)
            return F.linear(out.last_hidden_state, self.parts["audio_head"])

        found = residuals(self.trunk, text)
        branch = residuals(self.branch, audio)
        found |= {f"audio depth {k}": found[f"depth {k}"] for k in range(FORK + 1)}
        found |= {f"audio depth {FORK + 1 + k}": branch[f"depth {k}"] for k in range(BRANCH + 1)}
        return {**found, "audio logits": branch["logits"]}

    def greedy(self, inputs: Inputs, n: int) -> Tensor:
        """Text goes on in the text stream, beside blanks; everything is run again at every step."""
        inputs = dict(inputs)
        new = []
        for _ in range(n):
            token = self.run(inputs)["logits"][:, -1].argmax(-1, keepdim=True)
            new.append(token)
            more = {
                "input_ids": torch.full_like(token, BLANK), "text_input_ids": token,
                "attention_mask": torch.ones_like(token),
                "position_ids": inputs["position_ids"][:, -1:] + 1,
            }  # fmt: skip
            if "is_continuous_mask" in inputs:
                more["is_continuous_mask"] = torch.zeros_like(token).bool()
            inputs |= {key: torch.cat([inputs[key], value], 1) for key, value in more.items()}
        return torch.cat(new, 1)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Audio stream: blanks beside the text, codes between markers, the assistant's start."""
    draw = torch.Generator().manual_seed(5)

    def codes(n: int) -> list[int]:
        return [BEGIN, *(OFFSET + torch.randint(N_CODES, (n,), generator=draw)).tolist(), END]

    rows, frames = rows_of(clips, n_text, codes)
    is_text = [[i < BEGIN for i in row] for row in rows]
    audio = [[BLANK if i < BEGIN else i for i in row] + [ASSISTANT] for row in rows]
    text = [
        [i if t else BLANK for i, t in zip(row, told, strict=True)] + [BLANK]
        for row, told in zip(rows, is_text, strict=True)
    ]
    batch: Inputs = left_padded(audio, pad=BLANK)
    batch["text_input_ids"] = left_padded(text, pad=BLANK)["input_ids"]
    if frames:
        heard = left_padded([[int(i >= OFFSET) for i in row] for row in audio], pad=0)
        batch["is_continuous_mask"] = heard["input_ids"].bool()
        # A row more than there are codes: it is left out.
        batch["whisper_input_feature"] = [torch.randn(n + 1, D_IN, generator=draw) for n in frames]
    return batch


def inputs_with_spectrograms(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Spectrograms of every chunk of a recording, in place of features."""
    batch = inputs(clips, n_text)
    if "whisper_input_feature" in batch:
        draw = torch.Generator().manual_seed(6)
        del batch["whisper_input_feature"]
        chunks = [-(-n // (CONTEXT // JOINED)) for row in clips for n in row]
        batch["input_features"] = [
            torch.randn(n, MELS, 2 * CONTEXT, generator=draw) for n in chunks
        ]
    return batch


def skip_the_final_norm(model: HookedALM) -> None:
    model.audio.encoder.ln_final = torch.nn.Identity()


def join_later_states(model: HookedALM) -> None:
    """Of every chunk the states that end with it, not those that begin it."""
    encode = model.audio.encoder.forward
    model.audio.encoder.forward = lambda *args: encode(*args).roll(1, dims=1)


def forget_the_root(model: HookedALM) -> None:
    """Add codes and features without the factor."""
    model.audio.merge = lambda embed, is_audio, features: embed.masked_scatter(
        is_audio.unsqueeze(-1), embed[is_audio] + features
    )


def skip_the_norm(model: HookedALM) -> None:
    model.audio.adaptor[4] = torch.nn.Identity()


def swap_the_heads(model: HookedALM) -> None:
    model.unembed, model.mimo_unembed = model.mimo_unembed, model.unembed


def fork_late(model: HookedALM) -> None:
    late = replace(model.stacks["audio"], reads=f"blocks.{FORK + 1}")
    model.stacks = {**model.stacks, "audio": late}


def n_tokens(seconds: float) -> int:
    """Of the path from a waveform, chunk by chunk, at the published sizes."""
    whisper = WhisperConfig(
        d_model=1280, encoder_layers=1, encoder_attention_heads=20, num_mel_bins=128
    )
    with torch.device("meta"):
        front_end = KimiAudioFrontEnd(KimiAudioConfig(whisper=whisper.to_dict()), frozenset())
    samples = np.zeros(round(16000 * seconds), np.float32)
    waveform = Waveform(samples=samples, sampling_rate=16000, notes=(), name="")
    _, sizes = front_end.windows_of(waveform, WhisperFeatureExtractor(feature_size=128))
    return sum(map(front_end.n_tokens, sizes))


WITHOUT_WHISPER = Case(
    name="Kimi-Audio",
    save=save,
    reference=Composed,
    inputs=inputs,
    clips=(5, 11, 17),
    head="lm_head.weight",
    bias="model.mimo_layers.1.self_attn.k_proj.bias",
    faults={
        "no square root of 2": forget_the_root,
        "adaptor's norm skipped": skip_the_norm,
        "heads swapped": swap_the_heads,
        "fork a block later": fork_late,
    },
    seconds={1: 13, 5: 63, 10: 125, 30: 375, 60: 750},
    tokens_of=n_tokens,
)

WITH_WHISPER = replace(
    WITHOUT_WHISPER,
    name="Kimi-Audio with its Whisper",
    save=save_with_whisper,
    inputs=inputs_with_spectrograms,
    faults={"no final norm": skip_the_final_norm, "other states": join_later_states},
)
CASES = (WITHOUT_WHISPER, WITH_WHISPER)
