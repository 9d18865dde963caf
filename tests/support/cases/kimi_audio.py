"""Kimi-Audio: two unmodified ``Qwen2Model``, the second reading a hidden state of the first."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from family_case import Case, Inputs, Run, left_padded, residuals, rows_of
from hooked_alm import HookedALM
from tiny import VOCAB, randomise

FORK, TRUNK, BRANCH, D, D_IN = 2, 5, 3, 60, 26
BEGIN, END, BLANK, ASSISTANT, OFFSET, N_CODES = 320, 321, 322, 323, 324, 12
EPS = 3e-5
"""Of every norm; the default of neither transformers' nor torch's."""
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=34, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=211, rms_norm_eps=EPS, rope_theta=5000.0,
)  # fmt: skip
SCALE = 0.15


def parts() -> dict[str, Tensor]:
    """Embedding, heads and adaptor, random."""
    draw = torch.Generator().manual_seed(7)
    sizes = {
        "embed": (VOCAB, D), "text_head": (VOCAB, D), "audio_head": (VOCAB, D), "w1": (D, D_IN),
        "b1": (D,), "w2": (D, D), "b2": (D,), "ln_w": (D,), "ln_b": (D,),
    }  # fmt: skip
    made = {name: SCALE * torch.randn(size, generator=draw) for name, size in sizes.items()}
    return {**made, "ln_w": 1 + made["ln_w"]}


def save(folder: Path, dtype: torch.dtype) -> None:
    """The published names; the two stacks also as folders that ``reference`` loads."""
    made = parts()
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
        "kimia_mimo_transformer_from_layer_index": FORK, "kimia_adaptor_input_dim": D_IN,
        "kimia_media_begin": BEGIN, "kimia_media_end": END, "kimia_text_blank": BLANK,
        "kimia_token_offset": OFFSET, "kimia_text_output_vocab": OFFSET,
        "kimia_audio_output_vocab": VOCAB - OFFSET, "kimia_mimo_audiodelaytokens": 5,
        "use_whisper_feature": True, "dtype": str(dtype).removeprefix("torch."), **SIZES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


class Composed:
    """The model in a few lines of algebra around the two stacks."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        self.trunk, self.branch = (
            Qwen2Model.from_pretrained(
                folder.parent / name, dtype=dtype, attn_implementation=attention
            ).eval()
            for name in ("trunk", "branch")
        )
        self.parts = {name: value.to(dtype) for name, value in parts().items()}
        self.dtype = dtype

    def embeddings(self, inputs: Inputs) -> Tensor:
        """``x0`` of every position."""
        p = self.parts
        embeds = F.embedding(inputs["input_ids"], p["embed"])
        heard = inputs.get("is_continuous_mask")
        segments = iter(inputs.get("whisper_input_feature", ()))
        root = torch.tensor(math.sqrt(2.0)).to(self.dtype)
        if heard is not None:
            for row in range(len(embeds)):
                positions = heard[row].nonzero().flatten()
                f = next(segments).to(self.dtype)[: len(positions)]
                w = F.linear(F.silu(F.linear(f, p["w1"], p["b1"])), p["w2"], p["b2"])
                w = F.layer_norm(w, (D,), p["ln_w"], p["ln_b"], eps=EPS)
                embeds[row, positions] = (embeds[row, positions] + w) * root
        return embeds + F.embedding(inputs["text_input_ids"], p["embed"])

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
    """Of the path from a waveform, chunk by chunk, with an encoder that returns zeros."""
    from hooked_alm.converters.families.kimi_audio import whisper_features

    features = whisper_features(
        torch.zeros(round(16000 * seconds)), lambda chunk: torch.zeros(1500, 2)
    )
    assert features.shape[1] == 8
    return len(features)


CASE = Case(
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
