"""Ultravox: both norms of the projector, the parts in the checkpoint or elsewhere."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, WhisperConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.ultravox import UltravoxConfig, UltravoxFrontEnd
from tiny import MELS, randomise
from whisper_llama_parts import (
    D_AUDIO,
    D_MODEL,
    FRAMES,
    LLAMA,
    WHISPER,
    HearingLlama,
    encoder_of,
    load_llama,
    save_llama,
    save_whisper,
    write,
)

STACK, D_PROJECTOR = 8, 46
EOS = 2
"""What fills the audio positions; it also ends turns of the text."""


def n_tokens(frames: int) -> int:
    """One per 16 frames, of every window anew."""
    return sum(-(-n // 16) for n in windows(frames))


def windows(frames: int) -> list[int]:
    return [FRAMES] * (frames // FRAMES) + ([frames % FRAMES] if frames % FRAMES else [])


def projector_tensors(*, is_mid: bool) -> dict[str, Tensor]:
    """All parameters of the projector, norms near their initial 0.4."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return 0.15 * torch.randn(*shape, generator=generator)

    norm = ("ln_mid", D_PROJECTOR // 2) if is_mid else ("ln_post", D_MODEL)
    return {
        "ln_pre.weight": 0.4 + random(STACK * D_AUDIO),
        "linear_1.weight": random(D_PROJECTOR, STACK * D_AUDIO),
        f"{norm[0]}.weight": 0.4 + random(norm[1]),
        "linear_2.weight": random(D_MODEL, D_PROJECTOR // 2),
    }


def save(
    folder: Path, dtype: torch.dtype, *, is_mid: bool, own_encoder: bool, own_text: bool
) -> None:
    """A checkpoint, with the parts inside that are ``own``, else beside it."""
    text = save_llama(folder / "text_model", dtype, tied=is_mid)
    encoder = save_whisper(folder / "audio_model", dtype)
    named = {"multi_modal_projector": projector_tensors(is_mid=is_mid)}
    config: dict[str, Any] = dict(
        architectures=["UltravoxModel"], model_type="ultravox", hidden_size=D_PROJECTOR,
        stack_factor=STACK, projector_act="swiglu", projector_ln_mid=is_mid, norm_init=0.4,
        audio_token_index=32000, ignore_index=-100, audio_model_lora_config={"r": 0},
        text_model_lora_config={"r": 0}, auto_map={"AutoModel": "ultravox_model.UltravoxModel"},
        audio_model_id=None if own_encoder else "somebody/whisper",
        text_model_id=None if own_text else "somebody/llama",
    )  # fmt: skip
    if own_encoder:
        randomise(encoder, seed=5)  # finetuned: not the one beside it
        named["audio_tower"] = dict(encoder.named_parameters())
        config["audio_config"] = dict(WHISPER, model_type="whisper", _name_or_path="o/whisper")
    if own_text:
        named["language_model"] = dict(text.named_parameters())
        config["text_config"] = dict(LLAMA, model_type="llama")
    tensors = {f"{part}.{k}": v.detach() for part, of in named.items() for k, v in of.items()}
    write(folder, config, tensors, dtype)


def components(folder: Path, *, own_encoder: bool, own_text: bool) -> dict[str, str]:
    elsewhere = {"audio_model": own_encoder, "text_model": own_text}
    return {name: str(folder / name) for name, is_own in elsewhere.items() if not is_own}


def encode(encoder: WhisperEncoder, features: Tensor, frames: Tensor) -> Tensor:
    """Whisper without its demand for 30 s; keys of padding are masked."""
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)
    length = hidden.shape[1]
    hidden = hidden + encoder.embed_positions(torch.arange(length))
    n_real = encoder._get_feat_extract_output_lengths(frames)
    is_pad = torch.arange(length)[None] >= n_real[:, None]
    mask = torch.zeros(len(frames), 1, 1, length, dtype=hidden.dtype)
    mask = mask.masked_fill(is_pad[:, None, None], torch.finfo(hidden.dtype).min)
    for layer in encoder.layers:
        hidden = layer(hidden, attention_mask=mask)
    normed: Tensor = encoder.layer_norm(hidden)
    return normed


def project(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Pad to whole stacks, norm, W1, gate by the second half, norm before or after W2."""

    def norm(name: str, x: Tensor) -> Tensor:
        module = LlamaRMSNorm(x.shape[-1], eps=1e-6)
        module.weight.data = weights[f"{name}.weight"]
        normed: Tensor = module(x)
        return normed

    short = -hidden.shape[1] % STACK
    zeros = hidden.new_zeros(len(hidden), short, hidden.shape[2])
    stacked = torch.cat([hidden, zeros], dim=1).flatten(1).unflatten(1, (-1, STACK * D_AUDIO))
    both = F.linear(norm("ln_pre", stacked), weights["linear_1.weight"])
    half = both.shape[-1] // 2
    gated = F.silu(both[..., half:]) * both[..., :half]
    if "ln_mid.weight" in weights:
        return F.linear(norm("ln_mid", gated), weights["linear_2.weight"])
    return norm("ln_post", F.linear(gated, weights["linear_2.weight"]))


def reference(
    folder: Path, dtype: torch.dtype, attention: str, *, is_mid: bool, own_encoder: bool
) -> HearingLlama:
    encoder = encoder_of(folder / "audio_model", torch.float32, attention)
    if own_encoder:
        randomise(encoder, seed=5)
    encoder = encoder.to(dtype)
    weights = {k: v.to(dtype) for k, v in projector_tensors(is_mid=is_mid).items()}

    def embed(inputs: Inputs, table: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embeds = table(inputs["input_ids"]).clone()
        if "audio_values" in inputs:
            hidden = encode(encoder, inputs["audio_values"].to(dtype), inputs["audio_lens"])
            heard = project(weights, hidden)
            window = 0
            for row, n in enumerate(inputs["audio_batch_size"].tolist()):
                for _ in range(n):
                    start = int(inputs["audio_token_start_idx"][window])
                    length = int(inputs["audio_token_len"][window])
                    embeds[row, start : start + length] = heard[window, :length]
                    window += 1
        return embeds, inputs["attention_mask"], inputs["position_ids"]

    return HearingLlama(load_llama(folder / "text_model", dtype, attention), embed)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(clips, n_text, lambda n: [EOS] * n_tokens(n))
    batch: Inputs = left_padded(rows)
    if not frames:
        return batch
    width = batch["input_ids"].shape[1]
    starts, sizes, counts = [], [], []
    for row, heard, n in zip(rows, clips, n_text, strict=True):
        at = width - len(row) + n // 2
        pieces = [size for one in heard for size in windows(one)]
        for size in pieces:
            starts.append(at)
            sizes.append(size)
            at += -(-size // 16)
        counts.append(len(pieces))
    generator = torch.Generator().manual_seed(2)
    batch |= {
        "audio_values": torch.randn(len(sizes), MELS, max(sizes), generator=generator),
        "audio_lens": torch.tensor(sizes),
        "audio_token_start_idx": torch.tensor(starts),
        "audio_token_len": torch.tensor([-(-size // 16) for size in sizes]),
        "audio_batch_size": torch.tensor(counts),
    }
    return batch


@cache
def published() -> UltravoxFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        config = UltravoxConfig(
            audio_config=WhisperConfig(
                d_model=1280, encoder_layers=1, encoder_attention_heads=20, num_mel_bins=128
            ),
            text_config=LlamaConfig(num_hidden_layers=1),
            projector_ln_mid=True,
        )
        return UltravoxFrontEnd(config, frozenset())


def tokens_of(seconds: float) -> int:
    """Positions of all its windows."""
    frames = round(100 * seconds)
    most = published().feature_shape[1]
    return sum(published().n_tokens(min(most, frames - at)) for at in range(0, frames, most))


def swap_halves(model: HookedALM) -> None:
    """Take the first half for the gate."""
    weight = model.audio.projector.linear_1.weight
    weight.data = weight.data.roll(D_PROJECTOR // 2, 0)


def forget_norm(model: HookedALM) -> None:
    """Leave out the projector's second norm."""
    projector = model.audio.projector
    projector.ln_mid = projector.ln_post = torch.nn.Identity()


def hear_padding(model: HookedALM) -> None:
    """Leave the padding of the shorter clips unmasked."""
    encoder = model.audio.encoder
    whole = type(encoder).forward
    encoder.forward = lambda mel, is_real: whole(encoder, mel)


def case(name: str, *, is_mid: bool, own_encoder: bool, own_text: bool) -> Case:
    own: dict[str, Any] = {"own_encoder": own_encoder, "own_text": own_text}
    text = "language_model." if own_text else "text_model/"
    return Case(
        name=name,
        save=partial(save, is_mid=is_mid, **own),
        reference=partial(reference, is_mid=is_mid, own_encoder=own_encoder),
        inputs=inputs,
        clips=(23, 60, 260),
        components=partial(components, **own),
        is_tied=is_mid,
        head=f"{text}lm_head.weight",
        bias="multi_modal_projector.ln_pre.weight",
        faults={
            "gate half": swap_halves,
            "projector norm": forget_norm,
            "padding heard": hear_padding,
        },
        # Windows of 30 s, without a longest clip.
        seconds={1: 7, 5: 32, 10: 63, 30: 188, 60: 376},
        tokens_of=tokens_of,
    )


CASES = (
    case("Ultravox 0.5", is_mid=True, own_encoder=True, own_text=False),
    case("Ultravox 0.4", is_mid=False, own_encoder=False, own_text=False),
    case("Ultravox merged", is_mid=False, own_encoder=True, own_text=True),
)
