"""Voxtral from the waveform on, without mistral_common."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)

from cases.voxtral import CONFIG, STACKED
from family_case import save_hf
from hooked_alm import HookedALM, InputError
from tiny import MELS
from window_features import WINDOW

RATE = 16000
PER_WINDOW = WINDOW // 2 // STACKED
BOS, INST, INST_END, AUDIO, BEGIN_AUDIO = 1, 3, 4, 24, 25
N_SPECIAL = 30
TOKENS = [*(bytes([i]) for i in range(256)), b"ha", b"happ", b"happy", b"ap", b"pp", b"py"]


def write_tekken(folder: Path) -> None:
    """A vocabulary in Mistral's format: special tokens first, then bytes and a few words."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<{i}>" for i in range(5, 24))]
    special += ["[AUDIO]", "[BEGIN_AUDIO]"]
    vocabulary = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
            "default_vocab_size": N_SPECIAL + len(TOKENS),
            "default_num_special_tokens": N_SPECIAL,
        },
        "special_tokens": [{"rank": i, "token_str": token} for i, token in enumerate(special)],
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode()}
            for i, token in enumerate(TOKENS)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(vocabulary))


def ids_of(text: str) -> list[int]:
    """By hand: one token a byte, but for one word."""
    return [N_SPECIAL + TOKENS.index(piece) for piece in re.findall(b"happy|.", text.encode())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voxtral") / "model"
    config = VoxtralConfig(**{**CONFIG, "audio_token_id": AUDIO})
    save_hf(VoxtralForConditionalGeneration(config), folder, torch.float32)
    write_tekken(folder)
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


def user(text: str, n_windows: int = 0) -> list[int]:
    """Ids of a user's turn."""
    audio = [BEGIN_AUDIO, *[AUDIO] * (n_windows * PER_WINDOW)] if n_windows else []
    return [INST, *audio, *ids_of(text), INST_END]


def test_prompts(model: HookedALM) -> None:
    """A text, a clip and a text, and two turns."""
    x = model.prepare(text="happy?")
    assert x.tokens.tolist() == [[BOS, *user("happy?")]]
    x = model.prepare([noise(2.4), noise(0.3)], "happy?")
    rows = [[BOS, *user("happy?", n)] for n in (3, 1)]
    n_pad = len(rows[0]) - len(rows[1])
    assert x.tokens[0].tolist() == rows[0]
    assert x.tokens[1, n_pad:].tolist() == rows[1]
    assert x.attention_mask[1].tolist() == [0] * n_pad + [1] * len(rows[1])
    x = model.prepare([[noise(0.3), noise(1.2)]], "a")
    heard = [[BEGIN_AUDIO, *[AUDIO] * (n * PER_WINDOW)] for n in (1, 2)]
    assert x.tokens.tolist() == [[BOS, INST, *heard[0], *heard[1], *ids_of("a"), INST_END]]
    turns = [
        {"role": "user", "content": [{"type": "audio", "audio": noise(1)}]},
        {"role": "assistant", "content": "sad"},
        {"role": "user", "content": "a b"},
    ]
    x = model.prepare(conversation=turns)
    assert x.tokens.tolist() == [[BOS, *user("", 1), *ids_of("sad"), 2, *user("a b")]]


def test_messages_that_the_template_refuses(model: HookedALM) -> None:
    with pytest.raises(InputError, match=r"refuses these messages \(Voxtral has the roles user"):
        model.prepare(conversation=[{"role": "system", "content": "Be brief."}])


def test_features_are_those_of_the_processor(model: HookedALM, folder: Path) -> None:
    """The part of it that needs no mistral_common: one spectrogram, cut into windows."""
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    processor = VoxtralProcessor(extractor, AutoTokenizer.from_pretrained(folder))
    options = {**processor.audio_kwargs, "pad_to_multiple_of": RATE, "max_source_positions": WINDOW}
    clips = [noise(2.4), noise(1.0, 1), noise(0.3, 2)]
    clips[0][:RATE] *= 3
    clips[0][2 * RATE :] *= 1e-4  # below the floor that the first second sets
    expected = processor._retrieve_input_features(clips, **options)
    x = model.prepare([*clips], "happy?")
    assert torch.equal(model.hf_arguments(x)["input_features"], expected)
    apart = [extractor([clips[0][i : i + RATE]], sampling_rate=RATE) for i in (0, RATE, 2 * RATE)]
    assert not np.array_equal(expected[2], apart[2]["input_features"][0])


@torch.no_grad()
def test_prepared_prompts_run_as_hugging_face_runs_them(model: HookedALM, folder: Path) -> None:
    x = model.prepare([[noise(2.4), noise(0.7)], noise(0.3)], "happy?")
    hf = VoxtralForConditionalGeneration.from_pretrained(folder).eval()
    real = x.attention_mask.bool()
    assert torch.equal(model(x)[real], hf(**model.hf_arguments(x)).logits[real])


def test_silence_is_counted(model: HookedALM) -> None:
    """A position hears 0.1 s here, so that a window of a second has ten."""
    long, short = model.prepare([noise(1.6), noise(0.35)], "a").clips
    assert long.notes[-1] == "padded with silence: 4 of 20 positions"
    assert short.notes[-1] == "padded with silence: 6 of 10 positions"
    whole = model.read_clip(noise(1.0))
    assert not any("silence" in note for note in whole.notes)


def test_spans(model: HookedALM) -> None:
    x = model.prepare(noise(1.5), "happy?")
    assert x.spans.positions("audio", 0) == list(range(3, 3 + 2 * PER_WINDOW))
    assert x.spans.positions("audio_struct", 0) == [2]
    assert x.tokens[0, x.spans.positions("text", 0)].tolist() == ids_of("happy?")
    assert x.tokens[0, x.spans.positions("readout", 0)].tolist() == [INST_END]
    again = model.encode(input_ids=x.tokens, **model.audio.hf_arguments(x.clips))
    assert again.spans.positions("text", 0) == x.spans.positions("text", 0)


def test_longer_than_the_limit(model: HookedALM) -> None:
    published = model.audio.tokens
    assert published.max_seconds == 2400
    model.audio.tokens = replace(published, max_seconds=2.0)
    try:
        with pytest.raises(InputError, match=r"expected at most 2 s\. Cut .* truncate=True"):
            model.prepare(noise(2.5), "happy?")
        x = model.prepare(noise(2.5), "happy?", truncate=True)
    finally:
        model.audio.tokens = published
    cut = model.prepare(noise(2.5)[: 2 * RATE], "happy?")
    assert torch.equal(x.tokens, cut.tokens)
    assert torch.equal(x.clips[0].features, cut.clips[0].features)


def test_arguments_of_hugging_face_alone(model: HookedALM) -> None:
    """It takes no mask of the features."""
    x = model.prepare(noise(1.5), "happy?")
    batch = {"input_ids": x.tokens, **model.audio.hf_arguments(x.clips)}
    mask = torch.ones(2, WINDOW)
    with pytest.raises(InputError, match="got input_features_mask, expected only"):
        model.encode(**batch, input_features_mask=mask)
    with pytest.raises(InputError, match=rf"expected \[window, {MELS}, {WINDOW}\]"):
        model.encode(**{**batch, "input_features": batch["input_features"][..., :-8]})


def test_without_tokenizer_files(folder: Path, tmp_path: Path) -> None:
    """Also the folder's second set of weights is none of our business."""
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "consolidated.safetensors").write_bytes(b"no weights")
    model = HookedALM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no processor files .* or use `encode`"):
        model.prepare(noise(1.5), "happy?")
