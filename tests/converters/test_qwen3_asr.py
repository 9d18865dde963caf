"""Qwen3-ASR beyond ``test_families.py``: from the waveform on, and folders of the first release."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
)

from cases.qwen3_asr import CHUNK, CONFIG, in_first_release, n_tokens
from family_case import save_hf
from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.converters.parity import verify
from tiny import MELS, N_BPE, SPECIALS, build_tokenizer, edit_config

RATE = 16000
PLACEHOLDER, BEGIN, END = range(N_BPE + len(SPECIALS), N_BPE + len(SPECIALS) + 3)
TEMPLATE = (
    "{% for m in messages if m['role'] == 'system' %}<|im_start|>system\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "<|im_start|>user\n{% for m in messages if m['content'] is not string %}"
    "{% for c in m['content'] if c['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% endfor %}{% endfor %}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like the published one it has no place for a user's words."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its processor, as transformers saves both."""
    folder = tmp_path_factory.mktemp("qwen3-asr") / "model"
    config = Qwen3ASRConfig(**{**CONFIG, "audio_token_id": PLACEHOLDER})
    save_hf(Qwen3ASRForConditionalGeneration(config), folder, torch.float32)
    processor().save_pretrained(folder)
    return folder


def processor() -> Qwen3ASRProcessor:
    """Hugging Face's, around the tiny tokenizer."""
    tokenizer = build_tokenizer()
    names = ["<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIALS[3:], *names]})
    assert tokenizer.convert_tokens_to_ids(names) == [PLACEHOLDER, BEGIN, END]
    tokenizer.audio_token, tokenizer.audio_bos_token, tokenizer.audio_eos_token = names
    extractor = Qwen3ASRFeatureExtractor(feature_size=MELS, n_window=CHUNK // 2)
    return Qwen3ASRProcessor(
        feature_extractor=extractor, tokenizer=tokenizer, chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return Qwen3ASRForConditionalGeneration.from_pretrained(folder).eval()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


def processed(made: Qwen3ASRProcessor, clips: list[np.ndarray]) -> Any:
    """What Hugging Face's processor makes of one clip a row."""
    talk = [{"role": "user", "content": [{"type": "audio", "audio": "clip"}]}]
    prompt = made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return made(text=[prompt] * len(clips), audio=clips)


@pytest.mark.parametrize("seconds", [0.005, 0.05, 0.5, 0.5001, 1.0, 1.2345, 2.99, 3.0, 3.01])
@torch.no_grad()
def test_equal_from_the_waveform_on(model: HookedALM, hf: Any, seconds: float) -> None:
    """Ids, features and logits; the shortest clips are filled up to half a second."""
    clip = noise(seconds)
    x = model.prepare(clip)
    ours, theirs = model.hf_arguments(x), processed(processor(), [clip])
    for name in ("input_ids", "attention_mask", "input_features", "input_features_mask"):
        assert torch.equal(ours[name], theirs[name]), name
    assert x.clips[0].n_tokens == n_tokens(max(50, int(100 * seconds)))
    expected = hf(**theirs, position_ids=ours["position_ids"]).logits
    assert torch.equal(model(x), expected)
    again = model.encode(**theirs)
    assert torch.equal(model(again), expected)
    assert again.spans.clips == x.spans.clips


@torch.no_grad()
def test_clips_of_a_batch(model: HookedALM, hf: Any) -> None:
    """Of one length: the processor's batch. Otherwise each as if it were alone."""
    clips = [noise(1.3, 1), noise(1.3, 2)]
    x, theirs = model.prepare([*clips]), processed(processor(), clips)
    assert torch.equal(model.hf_arguments(x)["input_features"], theirs["input_features"])
    positions = model.hf_arguments(x)["position_ids"]
    assert torch.equal(model(x), hf(**theirs, position_ids=positions).logits)
    clips = [noise(1.30005, 1), noise(2.4, 2)]
    x, theirs = model.prepare([*clips]), processed(processor(), clips)
    alone = [processed(processor(), [clip]) for clip in clips]
    for clip, one in zip(x.clips, alone, strict=True):
        assert torch.equal(clip.features, one["input_features"])
        assert clip.n_tokens == int((one["input_ids"] == PLACEHOLDER).sum())
    beside = theirs["input_features"][:1, :, : x.clips[0].features.shape[-1]]
    assert not torch.equal(beside, x.clips[0].features)


def test_two_clips_in_a_prompt(model: HookedALM) -> None:
    x = model.prepare([[noise(0.6), noise(1.2)]])
    first, second = ([BEGIN, *[PLACEHOLDER] * n_tokens(n), END] for n in (60, 120))
    ids = x.tokens[0].tolist()
    at = ids.index(BEGIN)
    assert ids[at : at + len(first) + len(second)] == first + second
    assert [stop - start for ((start, stop),) in x.spans.clips[0]] == [n_tokens(60), n_tokens(120)]


def test_spans(model: HookedALM) -> None:
    """A second has thirteen positions; context has its place in the system's message."""
    talk = [
        {"role": "system", "content": "happy"},
        {"role": "user", "content": [{"type": "audio", "audio": noise(2.5)}]},
    ]
    x = model.prepare(conversation=talk)
    ((start, stop),) = x.spans["audio"][0]
    assert stop - start == 26 + 7
    assert x.spans.positions("audio_struct", 0) == [start - 1, stop]
    assert x.spans.seconds(0, 1.0, 2.0) == [(start + 13, start + 26)]
    assert x.spans.positions("readout", 0) == [x.shape[1] - 1]
    assert model.tokenizer.decode(x.tokens[0, -1]) == "\n"
    assert "happy" in model.tokenizer.decode(x.tokens[0])
    with pytest.raises(InputError, match="it rewrites the text of a message"):
        model.prepare(noise(1.0), "What emotion?")


def test_silence_is_counted(model: HookedALM) -> None:
    assert model.read_clip(noise(0.25)).notes[-1] == "padded with silence: 3 of 7 positions"
    for seconds in (0.5, 0.97, 1.0, 1.01, 2.93):
        assert not any("silence" in note for note in model.read_clip(noise(seconds)).notes)


def test_longer_than_the_limit(model: HookedALM) -> None:
    published = model.audio.tokens
    assert published.max_seconds == 1200
    model.audio.tokens = replace(published, max_seconds=2.0)
    try:
        with pytest.raises(InputError, match=r"expected at most 2 s\. Cut .* truncate=True"):
            model.prepare(noise(2.5))
        x = model.prepare(noise(2.5), truncate=True)
    finally:
        model.audio.tokens = published
    assert torch.equal(x.tokens, model.prepare(noise(2.5)[: 2 * RATE]).tokens)
    assert (x.clips[0].n_tokens, x.clips[0].seconds) == (26, 2)


# -------------------------------------------------------------------------------- first release


def first_release(folder: Path, out: Path) -> Path:
    """The same checkpoint, as it was first published: all nested, and Whisper's extractor named."""
    out.mkdir()
    for file in folder.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
    renamed = {
        f"thinker.{k}" if k == "lm_head.weight" else in_first_release(k): v
        for k, v in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    text: dict[str, Any] = {
        **CONFIG["text_config"], "model_type": "qwen3_asr_text", "rope_theta": 10000.0,
        "rope_scaling": {"interleaved": True, "mrope_interleaved": True, "rope_type": "default",
                         "mrope_section": [2, 2, 1], "type": "default"},
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "moe_intermediate_size": 768, "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001, "output_router_logits": False,
    }  # fmt: skip
    audio = {
        **CONFIG["audio_config"], "model_type": "qwen3_asr_audio_encoder", "conv_chunksize": 500,
        "max_source_positions": 1500, "num_hidden_layers": 2,
    }  # fmt: skip
    del audio["max_position_embeddings"]
    thinker = {
        "audio_config": audio, "text_config": text, "audio_token_id": PLACEHOLDER,
        "audio_start_token_id": BEGIN, "audio_end_token_id": END, "user_token_id": 872,
        "initializer_range": 0.02, "model_type": "qwen3_asr_thinker", "dtype": "float32",
    }  # fmt: skip
    config = {
        "architectures": ["Qwen3ASRForConditionalGeneration"], "model_type": "qwen3_asr",
        "support_languages": ["Chinese", "English"], "thinker_config": thinker,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MELS,
                 "chunk_length": 30, "hop_length": 160, "n_fft": 400, "sampling_rate": RATE,
                 "n_samples": 30 * RATE, "nb_max_frames": 3000}  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(extractor))
    (out / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return out


@torch.no_grad()
def test_a_folder_of_the_first_release(folder: Path, model: HookedALM, tmp_path: Path) -> None:
    """The same model, and the same prompts."""
    old = HookedALM.from_pretrained(first_release(folder, tmp_path / "old"))
    for seconds in (0.2, 1.2345):
        ours, theirs = (one.prepare(noise(seconds)) for one in (old, model))
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(old(ours), model(theirs))
        assert ours.spans.positions("audio_struct", 0) == theirs.spans.positions("audio_struct", 0)


def test_transformers_does_not_read_the_first_release(folder: Path, tmp_path: Path) -> None:
    """It would fill what it does not find with random numbers, and differ."""
    assert verify(str(folder)).is_equal
    with pytest.raises(ConversionError, match=r"ConditionalGeneration finds \d+ of its weights"):
        verify(str(first_release(folder, tmp_path / "old")))


def test_fields_of_the_first_release(folder: Path, tmp_path: Path) -> None:
    """The forced aligner, whose head is no vocabulary, and whatever else is unknown."""
    old = first_release(folder, tmp_path / "old")
    unknown: list[tuple[tuple[str, ...], str]] = [
        (("thinker_config",), "classify_num"),
        (("thinker_config", "text_config"), "warp_factor"),
        (("thinker_config", "audio_config"), "warp_factor"),
        ((), "warp_factor"),
    ]
    for index, (part, field) in enumerate(unknown):

        def change(config: dict[str, Any], part: Any = part, field: str = field) -> None:
            for name in part:
                config = config[name]
            config[field] = 9

        broken = edit_config(old, tmp_path / str(index), change)
        with pytest.raises(ConversionError, match=f"does not act on {field} = 9"):
            HookedALM.from_pretrained(broken)
