"""MiMo-Audio: three unmodified Qwen2 stacks, and sums of embeddings of codes."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from composed_lm import ComposedLM, tokenizer_with
from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.mimo_audio import MiMoAudioConfig, MiMoAudioFrontEnd
from tiny import AUDIO_BOS, AUDIO_EOS, PLACEHOLDER, VOCAB, edit_config, randomise

D, D_LOCAL, GROUP, SIZES, EMPTY = 54, 18, 4, (23, 21, 13, 11), (22, 20, 12, 10)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=34, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=211,
    rms_norm_eps=1e-5, rope_theta=5000.0,
)  # fmt: skip
LOCAL: dict[str, Any] = dict(
    vocab_size=1, hidden_size=D_LOCAL, intermediate_size=4 * D_LOCAL, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=3, head_dim=6, rms_norm_eps=1e-5, rope_theta=5000.0,
)  # fmt: skip
# The published file at tiny sizes; the last ids are constants of the published tokenizer.
CONFIG: dict[str, Any] = {
    **TEXT, "architectures": ["MiMoAudioModel"], "model_type": "qwen2", "attention_bias": True,
    "attention_dropout": 0.0, "audio_channels": len(SIZES), "delay_pattern": "0-1-2-3",
    "group_size": GROUP, "hidden_act": "silu", "initializer_range": 0.02,
    "input_full_attention": True, "input_local_dim": D_LOCAL, "input_local_layers": 2,
    "local_attn_dropout": 0.1, "local_attn_heads": 3, "local_dim": 12, "local_ffn_dim": 44,
    "local_layers": 2, "rope_scaling": None, "sliding_window": None, "max_window_layers": 28,
    "speech_vocab_size": "-".join(map(str, SIZES)), "speech_zeroemb_idx": "-".join(map(str, EMPTY)),
    "tie_word_embeddings": False, "use_sliding_window": False, "empty_id": PLACEHOLDER,
    "sosp_id": AUDIO_BOS, "eosp_id": AUDIO_EOS,
}  # fmt: skip


def tables() -> dict[str, Tensor]:
    """Embeddings of codes, and the projection of groups."""
    draw = torch.Generator().manual_seed(7)
    made = {
        f"speech_embeddings.{channel}.weight": 0.15 * torch.randn(size, D_LOCAL, generator=draw)
        for channel, size in enumerate(SIZES)
    }
    weight = 0.15 * torch.randn(D, GROUP * D_LOCAL, generator=draw)
    return made | {"speech_group_downcast.weight": weight}


def save(folder: Path, dtype: torch.dtype) -> None:
    """The published names; the stacks also as folders that ``Composed`` loads."""
    lm, patch = Qwen2ForCausalLM(Qwen2Config(**TEXT)), Qwen2Model(Qwen2Config(**LOCAL))
    randomise(lm, 5)
    randomise(patch, 2)
    lm.to(dtype).save_pretrained(folder.parent / "lm")
    patch.to(dtype).save_pretrained(folder.parent / "patch")
    tensors = {**lm.state_dict(), **tables()}
    tensors |= {
        f"input_local_transformer.{name}": value
        for name, value in patch.state_dict().items()
        if not name.startswith("embed_tokens")
    }
    # Speech generation, which is left out.
    tensors |= {
        "local_transformer.norm.weight": torch.ones(12),
        "local_transformer.layers.0.mlp.up_proj.weight": torch.ones(44, 12),
        "local_transformer_lm_heads.0.weight": torch.ones(SIZES[0], 12),
        "hidden_states_downcast.weight": torch.ones(12, D),
        "speech_embeddings_to_local.weight": torch.ones(12, D_LOCAL),
    }
    dtypes = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **dtypes}))
    contiguous = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")


def with_tokenizer(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint that ``save`` wrote, with a tokenizer whose ids its config names."""
    words = {"sosp_id": "<|sosp|>", "eosp_id": "<|eosp|>", "empty_id": "<|empty|>"}
    tokenizer = tokenizer_with(*words.values())
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    edit_config(folder, out, lambda config: config | ids)
    tokenizer.save_pretrained(out)
    return out


class Composed(ComposedLM):
    """All groups of all rows through the local stack at once, text as well; then masked."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        given: dict[str, Any] = dict(dtype=dtype, attn_implementation=attention)
        super().__init__(Qwen2ForCausalLM.from_pretrained(folder.parent / "lm", **given))
        self.patch = Qwen2Model.from_pretrained(folder.parent / "patch", **given).eval()
        self.tables = {name: value.to(dtype) for name, value in tables().items()}

    def embeddings(self, inputs: Inputs) -> Tensor:
        ids = inputs["input_ids"]
        text = ids[:, 0, ::GROUP]
        speaks = (text == PLACEHOLDER)[..., None, None]
        codes = ids[:, 1:].unflatten(-1, (-1, GROUP))  # batch channel group frame
        e = torch.zeros(*text.shape, GROUP, D_LOCAL, dtype=self.lm.dtype)
        for channel, empty in enumerate(EMPTY):
            table = self.tables[f"speech_embeddings.{channel}.weight"]
            counts = (codes[:, channel] != empty)[..., None]
            e = e + F.embedding(codes[:, channel], table) * counts
        z = self.patch(
            inputs_embeds=(e * speaks).flatten(0, 1), is_causal=False, use_cache=False
        ).last_hidden_state
        z = z.reshape(e.shape) * speaks
        down = F.linear(z.flatten(2), self.tables["speech_group_downcast.weight"])
        return down + self.embedded(text) * ~speaks[..., 0]


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Text in the first of every group, codes in all four; a code in seven is the empty one."""
    rows, _ = rows_of(
        clips, n_text, lambda n: [AUDIO_BOS, *[PLACEHOLDER] * (n // GROUP), AUDIO_EOS]
    )
    batch: Inputs = left_padded(rows)
    text = batch["input_ids"]
    draw = torch.Generator().manual_seed(2)
    ids = torch.full((len(rows), 1 + len(SIZES), GROUP * text.shape[1]), -100)
    ids[:, 0, ::GROUP] = text
    heard = (text == PLACEHOLDER).repeat_interleave(GROUP, 1)
    for channel, (size, empty) in enumerate(zip(SIZES, EMPTY, strict=True), start=1):
        drawn = torch.randint(size, heard.shape, generator=draw)
        drawn[torch.rand(heard.shape, generator=draw) < 1 / 7] = empty
        ids[:, channel] = drawn.where(heard, torch.tensor(empty))
    return {**batch, "input_ids": ids}


@cache
def published() -> MiMoAudioFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return MiMoAudioFrontEnd(MiMoAudioConfig(hidden_size=4096), frozenset())


def published_positions(seconds: float) -> int:
    """25 frames a second, in whole groups, between two markers."""
    front_end = published()
    frames = round(25 * seconds)
    return front_end.n_tokens(frames + -frames % front_end.group_size) + 2


def hear_causally(model: HookedALM) -> None:
    model.audio.is_causal = True


def count_empty_codes(model: HookedALM) -> None:
    model.audio.empty_codes = [-1] * len(SIZES)


def reverse_groups(model: HookedALM) -> None:
    """The frames of a group in another order before the projection."""
    weight = model.audio.projector.weight
    weight.data = weight.data.unflatten(1, (GROUP, -1)).flip(1).flatten(1)


def forget_the_local_norm(model: HookedALM) -> None:
    model.audio.patch_encoder.norm = torch.nn.Identity()


CASE = Case(
    name="MiMo-Audio",
    save=save,
    reference=Composed,
    inputs=inputs,
    clips=(12, 28, 52),
    bias="input_local_transformer.layers.1.self_attn.q_proj.bias",
    faults={
        "causal groups": hear_causally,
        "empty codes counted": count_empty_codes,
        "frames reversed": reverse_groups,
        "local norm skipped": forget_the_local_norm,
    },
    seconds={1: 9, 5: 34, 10: 65, 30: 190, 60: 377},
    tokens_of=published_positions,
)
