"""SALMONN: Whisper of transformers, its BERT over windows, and LLaMA with LoRA added by hand."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, LlamaConfig, WhisperConfig
from transformers.models.bert.modeling_bert import BertEncoder

from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.salmonn import SalmonnConfig, SalmonnFrontEnd
from tiny import MELS, randomise
from whisper_llama_parts import (
    D_AUDIO,
    D_MODEL,
    FRAMES,
    LLAMA,
    HearingLlama,
    encoder_of,
    load_llama,
    padded_left,
    save_llama,
    save_whisper,
)

SPEECH, D_BEATS, D_QUERY, RANK = -200, 14, 30, 2
N_CTX, KERNEL, STRIDE = FRAMES // 2, 7, 5
N_TOKENS = (N_CTX - KERNEL) // STRIDE + 1
# The `model` section of the published file, at tiny sizes.
CONFIG: dict[str, Any] = dict(
    architectures=["SALMONN"], llama_path="", whisper_path="", beats_path="beats.pt", ckpt="",
    freeze_whisper=True, freeze_beats=True, use_speech_Qformer=True, freeze_speech_QFormer=False,
    window_level_Qformer=True, num_speech_query_token=1, second_per_window=0.02 * KERNEL,
    second_stride=0.02 * STRIDE, speech_llama_proj_model="", freeze_speech_llama_proj=False,
    lora=True, lora_rank=RANK, lora_alpha=4 * RANK, lora_dropout=0.1, multi_prompt=True,
    prompt_template="USER: {}\nASSISTANT:", prompt_path="", test_prompt_path="", max_txt_len=300,
    end_sym="</s>", beats_dim=D_BEATS, qformer_dim=D_QUERY, qformer_heads=3, qformer_layers=2,
)  # fmt: skip


def bert(attention: str = "sdpa") -> BertEncoder:
    """The Q-Former without its queries' norm."""
    config = BertConfig(
        hidden_size=D_QUERY, num_attention_heads=3, num_hidden_layers=2,
        intermediate_size=4 * D_QUERY, is_decoder=True, add_cross_attention=True,
        attn_implementation=attention,
    )  # fmt: skip
    made = BertEncoder(config).eval()
    for layer in made.layer:
        reads = layer.crossattention.self
        for name in ("key", "value"):
            setattr(reads, name, torch.nn.Linear(D_AUDIO + D_BEATS, D_QUERY))
    randomise(made, 11)
    return made


def ends() -> dict[str, Tensor]:
    """Norms, queries, projection and LoRA, by their published names."""
    draw = torch.Generator().manual_seed(7)
    sizes: dict[str, tuple[int, ...]] = {
        "ln_speech.weight": (D_AUDIO,), "ln_speech.bias": (D_AUDIO,),
        "ln_audio.weight": (D_BEATS,), "ln_audio.bias": (D_BEATS,),
        "speech_query_tokens": (1, 1, D_QUERY),
        "speech_Qformer.bert.embeddings.LayerNorm.weight": (D_QUERY,),
        "speech_Qformer.bert.embeddings.LayerNorm.bias": (D_QUERY,),
        "speech_llama_proj.weight": (D_MODEL, D_QUERY), "speech_llama_proj.bias": (D_MODEL,),
    }  # fmt: skip
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, d_out in (("q", 60), ("v", 20)):
            stem = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
            sizes |= {
                f"{stem}A.default.weight": (RANK, D_MODEL),
                f"{stem}B.default.weight": (d_out, RANK),
            }
    return {name: 0.3 * torch.randn(size, generator=draw) for name, size in sizes.items()}


def save(folder: Path, dtype: torch.dtype) -> None:
    """What was trained in ``salmonn_v1.pth``, the rest in folders of its own."""
    save_whisper(folder / "audio_model", dtype)
    save_llama(folder / "text_model", dtype)
    tensors = ends()
    for name, value in bert().state_dict().items():
        name = name.replace(".intermediate.", ".intermediate_query.")
        own, _, rest = name.removeprefix("layer.").partition(".")
        rest = rest.replace("output.", "output_query.") if rest.startswith("output.") else rest
        tensors[f"speech_Qformer.bert.encoder.layer.{own}.{rest}"] = value
    dtypes = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **dtypes}))
    stored = {name: value.to(dtype) for name, value in tensors.items()}
    torch.save({"model": stored}, folder / "salmonn_v1.pth")


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HearingLlama:
    whisper = encoder_of(folder / "audio_model", dtype, attention)
    lora = ends()
    qformer, w = bert(attention).to(dtype), {k: v.to(dtype) for k, v in lora.items()}
    lm = load_llama(folder / "text_model", dtype, attention)
    for layer, block in enumerate(lm.model.layers):
        for name in ("q", "v"):
            stem = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
            a, b = (lora[f"{stem}{factor}.default.weight"] for factor in "AB")
            weight = getattr(block.self_attn, f"{name}_proj").weight
            weight.data = (weight.float() + 4 * (b @ a)).to(dtype)  # rounded once

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def listen(inputs: Inputs) -> Tensor:
        speech = norm(whisper(inputs["spectrogram"].to(dtype)).last_hidden_state, "ln_speech")
        heard = torch.zeros(*speech.shape[:2], D_BEATS, dtype=dtype)
        for clip, n in enumerate(inputs["audio_lens"].tolist()):
            heard[clip, :n] = norm(inputs["audio_embeds"][clip, :n].to(dtype), "ln_audio")
        both = torch.cat([speech, heard], -1)
        starts = range(0, N_CTX - KERNEL + 1, STRIDE)
        windows = torch.stack([both[:, at : at + KERNEL] for at in starts], 1).flatten(0, 1)
        query = w["speech_query_tokens"].expand(len(windows), -1, -1)
        query = norm(query, "speech_Qformer.bert.embeddings.LayerNorm", 1e-12)
        answers = qformer(query, encoder_hidden_states=windows).last_hidden_state
        rows = F.linear(answers, w["speech_llama_proj.weight"], w["speech_llama_proj.bias"])
        return rows.reshape(len(both), -1, D_MODEL)

    def embed(inputs: Inputs, table: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if "spectrogram" not in inputs:
            return table(ids), mask, inputs["position_ids"]
        clips = iter(listen(inputs))
        return padded_left(
            [
                torch.cat(
                    [
                        next(clips) if i == SPEECH else table(torch.tensor([i]))
                        for i in row[real].tolist()
                    ]
                )
                for row, real in zip(ids, mask.bool(), strict=True)
            ]
        )

    return HearingLlama(lm, embed)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Spectrograms of full length; a clip's frames are those of its BEATs features."""
    rows, frames = rows_of(clips, n_text, lambda n: [SPEECH])
    batch: Inputs = left_padded(rows)
    if frames:
        draw = torch.Generator().manual_seed(2)
        batch["spectrogram"] = torch.randn(len(frames), MELS, FRAMES, generator=draw)
        batch["audio_embeds"] = torch.randn(len(frames), max(frames), D_BEATS, generator=draw)
        batch["audio_lens"] = torch.tensor(frames)
    return batch


@cache
def published() -> SalmonnFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        config = SalmonnConfig(
            beats_path="BEATs.pt",
            audio_config=WhisperConfig(d_model=1280, encoder_layers=1, encoder_attention_heads=20),
            text_config=LlamaConfig(num_hidden_layers=1),
        )
        return SalmonnFrontEnd(config, frozenset())


def published_positions(seconds: float) -> int:
    """The same for every clip; more than 30 s are refused, or cut."""
    front_end = published()
    assert front_end.tokens.max_seconds == 30
    return front_end.n_tokens(round(50 * min(seconds, 30)))


def forget_the_lora(model: HookedALM) -> None:
    """Of one layer's values."""
    tensors = ends()
    stem = "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_"
    a, b = (tensors[f"{stem}{factor}.default.weight"] for factor in "AB")
    model.blocks[1].attn.v_proj.weight.data -= 4 * b @ a


def fill_up_before_the_norm(model: HookedALM) -> None:
    """Padding then has the norm's bias."""
    encode = model.audio.encode
    model.audio.encode = lambda windows: encode(
        windows._replace(n_frames=torch.full_like(windows.n_frames, N_CTX))
    )


def forget_the_norm_of_speech(model: HookedALM) -> None:
    model.audio.ln_speech = torch.nn.Identity()


def forget_the_queries_norm(model: HookedALM) -> None:
    model.audio.qformer.layernorm.weight.data.fill_(1)


CASE = Case(
    name="SALMONN",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(13, 31, N_CTX),
    components=lambda folder: {name: str(folder / name) for name in ("text_model", "audio_model")},
    layouts={"without adapter names": lambda name: name.replace(".default", "")},
    head="text_model/lm_head.weight",
    bias="speech_llama_proj.bias",
    faults={
        "LoRA forgotten": forget_the_lora,
        "BEATs filled up before the norm": fill_up_before_the_norm,
        "norm of speech skipped": forget_the_norm_of_speech,
        "norm of queries skipped": forget_the_queries_norm,
    },
    # Every clip is filled up to 30 s.
    seconds=dict.fromkeys((1, 5, 10, 30, 60), 88),
    tokens_of=published_positions,
)
