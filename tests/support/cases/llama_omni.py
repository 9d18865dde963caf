"""LLaMA-Omni: whole Whisper, five frames a position, rows inserted for the id -200."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, WhisperConfig

from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.llama_omni import LlamaOmniConfig, LlamaOmniFrontEnd
from tiny import MELS
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
    write,
)

GROUP, D_PROJECTOR, SPEECH = 5, 2048, -200


def n_tokens(frames: int) -> int:
    return (frames + 1) // 2 // GROUP


def projector_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "linear1.weight": (D_PROJECTOR, GROUP * D_AUDIO),
        "linear1.bias": (D_PROJECTOR,),
        "linear2.weight": (D_MODEL, D_PROJECTOR),
        "linear2.bias": (D_MODEL,),
    }
    scale = {1: 1.0, 2: 0.05}  # of biases and of matrices
    return {
        name: scale[len(shape)] * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def save(folder: Path, dtype: torch.dtype) -> None:
    save_whisper(folder / "audio_model", dtype)
    text = save_llama(folder / "text", dtype)  # for the reference; the checkpoint has it, too
    tensors = {name: tensor.detach() for name, tensor in text.named_parameters()}
    tensors |= {f"model.speech_projector.{k}": v for k, v in projector_tensors().items()}
    tensors |= {"speech_generator.output_proj.weight": torch.ones(3, 4)}
    config: dict[str, Any] = dict(
        LLAMA, architectures=["OmniSpeech2SLlamaForCausalLM"], model_type="omni_speech2s_llama",
        speech_encoder="models/speech_encoder/large-v3.pt", speech_encoder_type="whisper",
        speech_encoder_ds_rate=GROUP, speech_encoder_hidden_size=D_AUDIO,
        speech_projector_type="linear", speech_generator_type="ctc", unit_vocab_size=3,
        ctc_decoder_config="(2,4,2,4)", ctc_upsample_factor=25, ctc_loss_weight=1.0,
        tokenizer_model_max_length=60, tokenizer_padding_side="right", speech_normalize=False,
    )  # fmt: skip
    write(folder, config, tensors, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HearingLlama:
    encoder = encoder_of(folder / "audio_model", dtype, attention)
    w = {name: tensor.to(dtype) for name, tensor in projector_tensors().items()}

    def listen(speech: Tensor, lengths: Tensor) -> list[Tensor]:
        hidden = encoder(speech.to(dtype).permute(0, 2, 1)).last_hidden_state
        groups = hidden.unflatten(1, (-1, GROUP)).flatten(2)
        inner = F.linear(groups, w["linear1.weight"], w["linear1.bias"]).relu()
        rows = F.linear(inner, w["linear2.weight"], w["linear2.bias"])
        return [row[: n_tokens(n)] for row, n in zip(rows, lengths.tolist(), strict=True)]

    def embed(inputs: Inputs, table: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if "speech" not in inputs:
            return table(ids), mask, inputs["position_ids"]
        clips = iter(listen(inputs["speech"], inputs["speech_lengths"]))
        rows = []
        for row, real in zip(ids, mask.bool(), strict=True):
            parts = [
                next(clips) if i == SPEECH else table(torch.tensor([i])) for i in row[real].tolist()
            ]
            rows.append(torch.cat(parts))
        return padded_left(rows)

    return HearingLlama(load_llama(folder / "text", dtype, attention), embed)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(clips, n_text, lambda n: [SPEECH])
    batch: Inputs = left_padded(rows)
    if frames:
        generator = torch.Generator().manual_seed(2)
        batch["speech"] = torch.randn(len(frames), FRAMES, MELS, generator=generator)
        batch["speech_lengths"] = torch.tensor(frames)
    return batch


@cache
def published() -> LlamaOmniFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        config = LlamaOmniConfig(
            audio_config=WhisperConfig(
                d_model=1280, encoder_layers=1, encoder_attention_heads=20, num_mel_bins=128
            ),
            text_config=LlamaConfig(num_hidden_layers=1),
        )
        return LlamaOmniFrontEnd(config, frozenset())


def take_another_activation(model: HookedALM) -> None:
    projector = model.audio.projector
    projector.forward = lambda hidden: projector.linear2(
        F.gelu(projector.linear1(hidden.unflatten(1, (-1, GROUP)).flatten(2)))
    )


def forget_final_norm(model: HookedALM) -> None:
    model.audio.encoder.ln_final = torch.nn.Identity()


CASE = Case(
    name="LLaMA-Omni",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(39, 67, 100),  # the first has a whole group only if its frames are rounded up
    components=lambda folder: {"audio_model": str(folder / "audio_model")},
    bias="model.speech_projector.linear1.bias",
    faults={"activation": take_another_activation, "encoder norm": forget_final_norm},
    # Every clip is filled up to 30 s. A longer one is refused, or cut on request.
    seconds=dict.fromkeys((1, 5, 10, 30, 60), 300),
    tokens_of=lambda seconds: published().n_tokens(published().feature_shape[1]),
)
