"""LLaMA-Omni from the waveform on, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from cases import llama_omni
from hooked_alm import HookedALM, InputError
from tiny import MELS
from whisper_llama_parts import FRAMES, noise, save_tokenizer

CASE = llama_omni.CASE
TEXT = "Hear!"
SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
SPEECH = -200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama_omni") / "model"
    folder.mkdir()
    CASE.save(folder, torch.float32)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    model = HookedALM.from_pretrained(folder, components=CASE.components(folder))
    model.audio.max_length = None  # the published prompt is longer than the tiny model's limit
    return model


def processed(folder: Path, seconds: float) -> dict[str, Any]:
    """What the published code does: the system text of its own, one BOS of every piece dropped."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    prompt = (
        f"<|begin_of_text|>{header('system')}{SYSTEM}<|eot_id|>"
        f"{header('user')}<speech>\n{TEXT}<|eot_id|>{header('assistant')}"
    )
    left, right = (tokenizer(piece)["input_ids"] for piece in prompt.split("<speech>"))
    assert left[0] == left[1] == right[0] == tokenizer.bos_token_id
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    speech = extractor(noise(seconds), sampling_rate=16000, return_tensors="pt")["input_features"]
    ids = torch.tensor([[*left, SPEECH, *right[1:]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "speech": speech.transpose(1, 2),
        "speech_lengths": torch.tensor([[FRAMES]]),
    }


@pytest.mark.parametrize("seconds", [0.2, 1.0])
@torch.no_grad()
def test_prepare_gives_what_the_published_code_gives(
    folder: Path, model: HookedALM, seconds: float
) -> None:
    """However short, a clip is heard with the silence after it."""
    x = model.prepare(noise(seconds), TEXT)
    expected = model.encode(**processed(folder, seconds))
    assert torch.equal(x.tokens, expected.tokens)
    assert x.spans.clips == expected.spans.clips
    assert x.clips[0].n_tokens == FRAMES // 2 // 5
    (start, _), *_ = x.spans.clips[0][0]
    assert x.spans.seconds(0, 0.1, 0.3) == [(start + 1, start + 3)]
    assert torch.equal(model(x), model(expected))
    again = model.encode(**model.hf_arguments(x))
    assert torch.equal(again.tokens, x.tokens)
    assert torch.equal(model.hf_arguments(x)["input_ids"], processed(folder, seconds)["input_ids"])


@torch.no_grad()
def test_the_way_back_of_a_batch(model: HookedALM) -> None:
    x = model.prepare([[noise(0.3), noise(0.4, 4)], [noise(0.5, 5)], None], [TEXT, "So?", TEXT])
    again = model.encode(**model.hf_arguments(x))
    assert again.spans.clips == x.spans.clips
    real = x.attention_mask.bool()
    assert torch.equal(again.attention_mask, x.attention_mask)
    assert torch.equal(model(again)[real], model(x)[real])


def test_long_clips_are_refused_or_cut(model: HookedALM) -> None:
    with pytest.raises(InputError, match="1 s"):
        model.prepare(noise(1.3), TEXT)
    cut = model.prepare(noise(1.3), TEXT, truncate=True).clips[0]
    assert cut.notes
    assert torch.equal(cut.features, model.prepare(noise(1.3)[:16000], TEXT).clips[0].features)


def test_arguments_that_do_not_fit_are_refused(folder: Path, model: HookedALM) -> None:
    given = processed(folder, 0.5)
    with pytest.raises(InputError, match="1 ids -200, 0 clips and 0 speech_lengths"):
        model.encode(input_ids=given["input_ids"])
    with pytest.raises(InputError, match="1 ids -200, 2 clips and 1 speech_lengths"):
        model.encode(**given | {"speech": given["speech"].repeat(2, 1, 1)})
    with pytest.raises(InputError, match="1 clips and 0 speech_lengths"):
        model.encode(**given | {"speech_lengths": None})
    with pytest.raises(InputError, match="position_ids of its own"):
        model.encode(**given, position_ids=torch.zeros_like(given["input_ids"]))
    limited = HookedALM.from_pretrained(folder, components=CASE.components(folder))
    with pytest.raises(InputError, match="expected at most 60"):
        limited(limited.encode(**given))
    with pytest.raises(InputError, match="expected at most 60"):
        limited(limited.prepare(noise(0.3), TEXT))
    fits = CASE.inputs([[100], [67]], [50, 20])  # 60 positions with the audio; the answer is beyond
    assert limited.generate(
        limited.encode(**fits), 3, return_type="tokens", eos_token_id=None
    ).shape == (2, 3)
