"""Qwen-Audio: Qwen2-Audio's encoder layers, tags with embeddings, and ``Qwen2ForCausalLM``."""

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
from hooked_alm.converters.families.qwen_audio import QwenAudioConfig, QwenAudioFrontEnd
from tiny import AUDIO_BOS, AUDIO_EOS, MELS, PLACEHOLDER, VOCAB, randomise

D, D_AUDIO, N_CTX, LONGEST = 60, 24, 50, 73
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=34, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=LONGEST,
    rms_norm_eps=1e-5, rope_theta=5000.0,
)  # fmt: skip
ENCODER: dict[str, Any] = dict(
    num_mel_bins=MELS, d_model=D_AUDIO, encoder_layers=2, encoder_attention_heads=3,
    encoder_ffn_dim=4 * D_AUDIO, max_source_positions=N_CTX,
)  # fmt: skip
# The published file at tiny sizes; `audio_pad_id` is a constant of the published tokenizer.
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "attn_dropout_prob": 0.0, "bf16": False, "fp16": False, "fp32": False,
    "emb_dropout_prob": 0.0, "intermediate_size": 68, "initializer_range": 0.02,
    "kv_channels": 10, "layer_norm_epsilon": 1e-5, "model_type": "qwen", "hidden_size": D,
    "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 8192,
    "no_bias": True, "onnx_safe": None, "rotary_emb_base": 5000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": LONGEST, "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": VOCAB, "use_dynamic_ntk": True, "use_logn_attn": True,
    "audio": {
        "n_mels": MELS, "n_ctx": N_CTX, "n_state": D_AUDIO, "n_head": 3, "n_layer": 2,
        "output_dim": D, "avg_pool": True, "add_audio_bos_eos_token": True,
        "audio_start_id": AUDIO_BOS,
    },
    "audio_pad_id": PLACEHOLDER,
}  # fmt: skip


def ends() -> tuple[nn.Linear, nn.Embedding]:
    """The projection, and the embeddings of the two tags."""
    made = nn.Linear(D_AUDIO, D), nn.Embedding(2, D)
    for seed, module in enumerate(made, start=3):
        randomise(module, seed)
    return made


def in_published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's: queries, keys and values in one tensor, w2 the gate."""
    out = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for layer in range(TEXT["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for leaf in ("weight", "bias"):
            parts = [tensors[f"{theirs}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"{ours}attn.c_attn.{leaf}"] = torch.cat(parts)
        for name, source in {
            "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
        }.items():  # fmt: skip
            out[f"{ours}{name}.weight"] = tensors[f"{theirs}{source}.weight"]
    return out


def save(folder: Path, dtype: torch.dtype) -> None:
    """The published names; decoder and encoder also as folders that ``Composed`` loads."""
    lm = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    encoder = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**ENCODER))
    randomise(lm, 1)
    randomise(encoder, 2)
    lm.to(dtype).save_pretrained(folder.parent / "lm")
    encoder.to(dtype).save_pretrained(folder.parent / "encoder")
    project, tags = ends()
    heard = in_openai_names(
        encoder.state_dict(), positions="positional_embedding", norm="ln_post"
    ) | {
        "proj.weight": project.weight, "proj.bias": project.bias,
        "audio_bos_eos_token.weight": tags.weight,
    }  # fmt: skip
    tensors = in_published_names(lm.state_dict())
    tensors |= {f"transformer.audio.{name}": value for name, value in heard.items()}
    dtypes = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **dtypes}))
    contiguous = {name: value.detach().to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")


class Composed(ComposedLM):
    """Embeddings overwritten from tag to tag."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        given: dict[str, Any] = dict(dtype=dtype, attn_implementation=attention)
        super().__init__(Qwen2ForCausalLM.from_pretrained(folder.parent / "lm", **given))
        self.encoder = Qwen2AudioEncoder.from_pretrained(folder.parent / "encoder", **given).eval()
        self.project, self.tags = (module.to(dtype) for module in ends())

    def embeddings(self, inputs: Inputs) -> Tensor:
        x = self.embedded(inputs["input_ids"])
        if "audio_info" not in inputs:
            return x
        info = inputs["audio_info"]
        lengths = info["input_audio_lengths"][:, 0]
        most = int(lengths.max())
        padded = torch.arange(most) >= lengths[:, None]
        mask = torch.zeros(padded.shape, dtype=x.dtype).masked_fill(
            padded, torch.finfo(x.dtype).min
        )
        mel = info["input_audios"][:, :, : 2 * most].to(x.dtype)
        out = self.project(pooled_states(self.encoder, mel, mask))
        starts = (inputs["input_ids"] == AUDIO_BOS).nonzero().tolist()
        for (row, at), size, heard in zip(starts, info["audio_span_tokens"], out, strict=True):
            x[row, at : at + size] = torch.cat(
                [self.tags.weight[:1], heard[: size - 2], self.tags.weight[1:]]
            )
        return x


def after_convolutions(frames: int) -> int:
    """The second one has stride 2."""
    return (frames - 1) // 2 + 1


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """As the published tokenizer gives them: spectrograms of full length, spans with both tags."""

    def span(frames: int) -> list[int]:
        return [AUDIO_BOS, *[PLACEHOLDER] * (after_convolutions(frames) // 2), AUDIO_EOS]

    rows, frames = rows_of(clips, n_text, span)
    batch: Inputs = left_padded(rows)
    if frames:
        halves = torch.tensor([after_convolutions(n) for n in frames])
        draw = torch.Generator().manual_seed(2)
        batch["audio_info"] = {
            "input_audios": torch.randn(len(frames), MELS, 2 * N_CTX, generator=draw),
            "input_audio_lengths": torch.stack([halves, halves // 2], 1),
            "audio_span_tokens": [len(span(n)) for n in frames],
        }
    return batch


@cache
def published() -> QwenAudioFrontEnd:
    """The front-end at its published sizes, without weights."""
    audio = dict(
        n_mels=80, n_ctx=1500, n_state=1280, n_head=20, n_layer=32, output_dim=4096,
        audio_start_id=155163,
    )  # fmt: skip
    with torch.device("meta"):
        return QwenAudioFrontEnd(QwenAudioConfig(audio=audio), frozenset())


def published_positions(seconds: float) -> int:
    """More than 30 s are refused, or cut."""
    front_end = published()
    assert front_end.tokens.max_seconds == 30
    return front_end.n_tokens(round(100 * min(seconds, 30)))


def embed_tags_as_text(model: HookedALM) -> None:
    model.audio.read_text = lambda x, tokens, embed: embed


def swap_tags(model: HookedALM) -> None:
    model.audio.tags.weight.data = model.audio.tags.weight.data.flip(0)


def skip_the_pooling(model: HookedALM) -> None:
    """Every second output of the encoder instead of means of two."""
    tower = model.audio.encoder
    whole = type(tower).forward

    def forward(mel: Tensor, is_real: Tensor) -> Tensor:
        pool = F.avg_pool1d
        F.avg_pool1d = lambda x, kernel_size: x[..., ::kernel_size]  # type: ignore[assignment]
        try:
            found: Tensor = whole(tower, mel, is_real)
        finally:
            F.avg_pool1d = pool
        return found

    tower.forward = forward


def swap_queries_and_keys(model: HookedALM) -> None:
    """The thirds of the fused tensor in another order."""
    attn = model.blocks[1].attn
    attn.q_proj, attn.k_proj = attn.k_proj, attn.q_proj


CASE = Case(
    name="Qwen-Audio",
    save=save,
    reference=Composed,
    inputs=inputs,
    clips=(31, 57, 95),
    bias="transformer.h.1.attn.c_attn.bias",
    faults={
        "tags embedded as text": embed_tags_as_text,
        "tags swapped": swap_tags,
        "no mean": skip_the_pooling,
        "queries and keys swapped": swap_queries_and_keys,
    },
    seconds={1: 25, 5: 125, 10: 250, 30: 750, 60: 750},
    tokens_of=published_positions,
)
