"""DeSTA2 and DeSTA2.5-Audio: layers of Whisper through a Q-Former, and a transcript."""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, LlamaConfig, WhisperConfig
from transformers.models.bert.modeling_bert import BertEncoder

from family_case import Case, Inputs, left_padded, rows_of
from hooked_alm import HookedALM
from hooked_alm.converters.families.desta2 import Desta2Config, Desta2FrontEnd
from hooked_alm.converters.families.desta2_5 import Desta25Config, Desta25FrontEnd
from tiny import MELS, randomise
from whisper_llama_parts import (
    D_AUDIO,
    D_MODEL,
    FRAMES,
    WHISPER,
    HearingLlama,
    encoder_of,
    load_llama,
    padded_left,
    save_llama,
    save_whisper,
    write,
)

QUERIES, LAYERS, ENCODER_LAYERS = 7, 2, 12
TAPS = (2, 5, 8, 11)
"""Of whisper-small, whose name the config has."""
TRANSCRIPT = [31, 7, 200, 55]
PLACEHOLDER = 3


def connector_tensors() -> dict[str, Tensor]:
    """All parameters of the connector, under the published names."""
    qformer = qformer_of("eager")
    randomise(qformer, seed=9)
    tensors = {f"qformer.{k}": v.detach() for k, v in qformer.named_parameters()}
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors |= {f"layer_prompts.{i}": random(1, QUERIES, D_AUDIO) for i in range(len(TAPS))}
    return tensors | {
        "layer_weights": random(QUERIES, len(TAPS)),
        "proj.0.weight": 1 + 0.1 * random(D_AUDIO),
        "proj.0.bias": 0.1 * random(D_AUDIO),
        "proj.1.weight": 0.15 * random(D_MODEL, D_AUDIO),
        "proj.1.bias": random(D_MODEL),
    }


def qformer_of(attention: str) -> BertEncoder:
    config = BertConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=WHISPER["encoder_attention_heads"],
        hidden_size=D_AUDIO,
        add_cross_attention=True,
        is_decoder=True,
        attn_implementation=attention,
    )
    return BertEncoder(config).eval()


def save_2(folder: Path, dtype: torch.dtype) -> None:
    save_llama(folder / "text_model", dtype)
    save_whisper(folder / "audio_model", dtype, layers=ENCODER_LAYERS)
    config = dict(
        architectures=["DestaModel"], model_type="DestaModel", prompt_size=QUERIES,
        llama_model_id="meta-llama/Meta-Llama-3-8B-Instruct",
        whisper_model_id="openai/whisper-small", torch_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in connector_tensors().items()}
    torch.save(tensors, folder / "qformer_connector.pth")


def save_2_5(folder: Path, dtype: torch.dtype) -> None:
    save_llama(folder / "text_model", dtype)
    save_whisper(folder / "audio_model", dtype, layers=ENCODER_LAYERS)
    config = dict(
        architectures=["DeSTA25AudioModel"], model_type="desta25", prompt_size=QUERIES,
        connector_mode="qformer_1", qformer_num_hidden_layers=LAYERS, use_lora=False,
        llm_model_id="somebody/llama", encoder_model_id="openai/whisper-small",
        audio_locator="<|AUDIO|>", placeholder_token="<|reserved_special_token_87|>",
    )  # fmt: skip
    tensors = {f"perception.connector.{k}": v for k, v in connector_tensors().items()}
    write(folder, config, tensors, dtype)


def components(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("text_model", "audio_model")}


def reference(folder: Path, dtype: torch.dtype, attention: str, *, first: int) -> HearingLlama:
    """``first`` is where the encoder's states are counted from: 0 for its input, 1 for layer 0."""
    encoder = encoder_of(folder / "audio_model", dtype, attention)
    tensors = {name: tensor.to(dtype) for name, tensor in connector_tensors().items()}
    # Published with plain attention, in which the queries see each other both ways.
    qformer = qformer_of("eager").to(dtype)
    qformer.load_state_dict(
        {k.removeprefix("qformer."): v for k, v in tensors.items() if k.startswith("qformer.")}
    )

    def listen(features: Tensor) -> Tensor:
        states = encoder(features.to(dtype), output_hidden_states=True).hidden_states
        assert len(states) == ENCODER_LAYERS + 1
        found = []
        for i, tap in enumerate(TAPS):
            queries = tensors[f"layer_prompts.{i}"].expand(len(features), -1, -1)
            state = states[tap + first]
            if tap + first == ENCODER_LAYERS:
                state = before_final_norm["state"]
            found.append(qformer(queries, encoder_hidden_states=state).last_hidden_state)
        shares = F.softmax(tensors["layer_weights"], dim=-1)
        # [window, query, layer, d] in this layout: bfloat16 sums round by the order in memory.
        by_layer = torch.stack(found, dim=0).permute(1, 2, 0, 3)
        mixed = (by_layer * shares[None, :, :, None]).sum(dim=2)
        normed = F.layer_norm(mixed, (D_AUDIO,), tensors["proj.0.weight"], tensors["proj.0.bias"])
        return F.linear(normed, tensors["proj.1.weight"], tensors["proj.1.bias"])

    before_final_norm: dict[str, Tensor] = {}
    encoder.layer_norm.register_forward_pre_hook(
        lambda module, args: before_final_norm.update(state=args[0])
    )

    def embed(inputs: Inputs, table: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embeds, mask = table(inputs["input_ids"]).clone(), inputs["attention_mask"]
        if "input_features" in inputs:
            clips = iter(listen(inputs["input_features"]))
            rows = []
            for row, real, (at,) in zip(embeds, mask.bool(), inputs["audio_position"], strict=True):
                text = row[real]
                rows.append(torch.cat([text[:at], next(clips), text[at:]]))
            return padded_left(rows)
        if "batch_features" in inputs:
            heard = listen(inputs["batch_features"])
            for clip, text, (row, start) in zip(
                heard,
                inputs["batch_transcription_ids"],
                inputs["batch_start_positions"],
                strict=True,
            ):
                both = torch.cat([clip, table(text[0])])
                embeds[row, start : start + len(both)] = both
        return embeds, mask, inputs["position_ids"]

    return HearingLlama(load_llama(folder / "text_model", dtype, attention), embed)


def inputs_2(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """Audio one token before its transcript's left neighbour, as the published code places it."""
    rows, frames = rows_of(clips, n_text, lambda n: TRANSCRIPT)
    batch: Inputs = left_padded(rows)
    if frames:
        batch["input_features"] = random_features(len(frames))
        batch["audio_position"] = [[n // 2 - 1] for n in n_text]
        batch["transcript"] = [[(n // 2, n // 2 + len(TRANSCRIPT))] for n in n_text]
    return batch


def inputs_2_5(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(clips, n_text, lambda n: [PLACEHOLDER] * (QUERIES + len(TRANSCRIPT)))
    batch: Inputs = left_padded(rows)
    if frames:
        width = batch["input_ids"].shape[1]
        batch["batch_features"] = random_features(len(frames))
        batch["batch_transcription_ids"] = [torch.tensor([TRANSCRIPT]) for _ in frames]
        batch["batch_start_positions"] = [
            (i, width - len(row) + n // 2)
            for i, (row, n) in enumerate(zip(rows, n_text, strict=True))
        ]
    return batch


def random_features(n: int) -> Tensor:
    return torch.randn(n, MELS, FRAMES, generator=torch.Generator().manual_seed(2))


@cache
def published(is_first: bool) -> Desta2FrontEnd | Desta25FrontEnd:
    """The front-ends at their published sizes, without weights."""
    text = LlamaConfig(num_hidden_layers=1)
    sizes = ((768, 12, 12, 80), (1280, 32, 20, 128))[0 if is_first else 1]
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "num_mel_bins")
    audio = WhisperConfig(**dict(zip(names, sizes, strict=True)))
    with torch.device("meta"):
        if is_first:
            config = Desta2Config(text_config=text, audio_config=audio)
            return Desta2FrontEnd(config, frozenset())
        return Desta25FrontEnd(Desta25Config(text_config=text, audio_config=audio), frozenset())


def tap_one_off(model: HookedALM, by: int) -> None:
    model.audio.taps = tuple(tap + by for tap in model.audio.taps)


def forget_norm(model: HookedALM) -> None:
    model.audio.connector.proj[0] = nn.Identity()


def see_only_before(model: HookedALM) -> None:
    """Let transformers' fused attention take the Q-Former for a causal one."""
    model.audio.connector.qformer.config._attn_implementation = "sdpa"


def even_weights(model: HookedALM) -> None:
    model.audio.connector.layer_weights.data.zero_()


FAULTS: dict[str, Callable[[HookedALM], None]] = {
    "projector norm": forget_norm,
    "causal queries": see_only_before,
    "layers weighted alike": even_weights,
}
# One window whatever its length: a longer clip is refused, or cut on request.
SECONDS = dict.fromkeys((1, 5, 10, 30, 60), 64)
CLIPS = (FRAMES, FRAMES, FRAMES)
"""No time axis: every clip has as many positions."""

CASES = (
    Case(
        name="DeSTA2",
        save=save_2,
        reference=partial(reference, first=0),
        inputs=inputs_2,
        clips=CLIPS,
        components=components,
        head="text_model/lm_head.weight",
        bias="proj.1.bias",
        faults=FAULTS | {"layers counted right": partial(tap_one_off, by=1)},
        seconds=SECONDS,
        tokens_of=lambda seconds: published(True).n_tokens(round(100 * seconds)),
    ),
    Case(
        name="DeSTA2.5-Audio",
        save=save_2_5,
        reference=partial(reference, first=1),
        inputs=inputs_2_5,
        clips=CLIPS,
        components=components,
        head="text_model/lm_head.weight",
        bias="perception.connector.proj.1.bias",
        faults=FAULTS | {"layers counted wrong": partial(tap_one_off, by=-1)},
        seconds=SECONDS,
        tokens_of=lambda seconds: published(False).n_tokens(round(100 * seconds)),
    ),
)
