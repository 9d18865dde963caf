"""Step-Audio 2 mini from recordings on: chunks, their markers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cases import step_audio_2
from cases.step_audio_2 import CASE, chunks, n_tokens
from composed_lm import log_mel, noise, tokenizer_with
from hooked_alm import ConversionError, HookedALM, InputError
from tiny import MELS, edit_config

WORDS = ("<|BOT|>", "<|EOT|>", "<audio_start>", "<audio_end>", "<audio_patch>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the family's case, with a tokenizer whose ids its config names."""
    root = tmp_path_factory.mktemp("step_audio_2") / "made"
    root.mkdir()
    CASE.save(root, torch.float32)
    tokenizer = tokenizer_with(*WORDS)
    start, end, patch = tokenizer.convert_tokens_to_ids(list(WORDS[2:]))
    ids = {"audio_start_id": start, "audio_end_id": end, "audio_patch_id": patch}
    out = edit_config(root, root.parent / "model", lambda config: config | ids)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


def published(model: HookedALM, recording: Any, text: str) -> dict[str, Any]:
    """What the published inference code makes of a recording and a question."""
    samples = torch.as_tensor(recording)
    mels = [
        log_mel(F.pad(samples[at : at + 400000], (0, 479)), MELS)
        for at in range(0, len(samples), 400000)
    ]
    heard = "".join(
        f"<audio_start>{'<audio_patch>' * n_tokens(mel.shape[1] - 2)}<audio_end>" for mel in mels
    )
    prompt = f"<|BOT|>human\n{heard}{text}<|EOT|><|BOT|>assistant\n"
    width = max(mel.shape[1] for mel in mels)
    return {
        "input_ids": torch.tensor([model.tokenizer(prompt)["input_ids"]]),
        "wavs": torch.stack([F.pad(mel, (0, width - mel.shape[1])) for mel in mels]),
        "wav_lens": torch.tensor([mel.shape[1] - 2 for mel in mels]),
    }


@torch.no_grad()
@pytest.mark.parametrize("seconds", [0.83, 25.0, 26.3, 25.0005])
def test_a_recording_becomes_what_the_published_code_makes_of_it(
    model: HookedALM, seconds: float
) -> None:
    """The last of these ends in a chunk too short for a position, whose markers stay."""
    recording = noise(seconds)
    x = model.prepare(recording, "What emotion?")
    expected = published(model, recording, "What emotion?")
    assert torch.equal(x.tokens, expected["input_ids"])
    found = model.hf_arguments(x)
    assert torch.equal(found["wav_lens"], expected["wav_lens"])
    assert torch.equal(found["wavs"], expected["wavs"])
    assert torch.equal(model(model.encode(**found)), model(x))
    y = model.encode(**expected)
    assert (y.spans.clips, len(y.clips)) == (x.spans.clips, 1)
    assert model(x).isfinite().all()


def test_a_long_recording_has_one_time_axis(model: HookedALM) -> None:
    """Positions of a clip count on over the markers between its chunks."""
    x = model.prepare(noise(27), "What?")
    ((before, between),) = x.spans.clips[0]
    assert between[0] - before[1] == 2
    assert [a for a, _ in x.spans["audio_struct"][0]] == [before[0] - 1, before[1], between[1]]
    assert x.spans.seconds(0, 24.96, 25.1) == [
        (before[1] - 1, before[1]),
        (between[0], between[0] + 1),
    ]


def test_over_long_recordings_are_refused_or_cut(model: HookedALM) -> None:
    """The tiny context holds two chunks."""
    with pytest.raises(InputError, match="lasts 50.100 s, expected at most 50 s"):
        model.prepare(noise(50.1), "What?")
    x = model.prepare(noise(50.1), "What?", truncate=True)
    assert x.clips[0].n_frames == (2500, 2500)


def test_two_clips_side_by_side_stay_two(model: HookedALM) -> None:
    """Only a whole chunk goes on."""
    x = model.prepare([[noise(0.5), noise(0.9, seed=1)]], "Which?")
    again = model.encode(**model.hf_arguments(x))
    assert [clip.n_frames for clip in again.clips] == [(50,), (90,)]
    assert again.spans.clips == x.spans.clips


def test_wrong_inputs_are_refused(model: HookedALM) -> None:
    inputs = published(model, noise(0.5), "What?")
    with pytest.raises(InputError, match="wavs and wav_lens belong together"):
        model.encode(**{**inputs, "wav_lens": None})
    with pytest.raises(InputError, match="1 audio start tokens .* wavs 2 chunks"):
        model.encode(**{**inputs, "wavs": inputs["wavs"].repeat(2, 1, 1)})
    with pytest.raises(InputError, match="got labels, expected only"):
        model.encode(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("audio_encoder_config", "kernel_size", 7, "does not act on kernel_size = 7"),
        ("audio_encoder_config", "adapter_stride", 4, "does not act on adapter_stride = 4"),
        ("audio_encoder_config", "dropout", 0.1, "does not act on dropout = 0.1"),
        ("audio_encoder_config", "llm_dim", 64, r"64 wide \(llm_dim\), the decoder 60"),
        ("text_config", "attention_scale", 2, "does not act on attention_scale = 2"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    folder: Path, tmp_path: Path, part: str, field: str, value: Any, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part][field] = value
    broken = edit_config(folder, tmp_path / "model", lambda _: config)
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(broken)


def test_published_numbers() -> None:
    """What no tiny checkpoint shows; 16384 positions hold 52 chunks of 313 and two markers."""
    front_end = step_audio_2.published()
    assert (front_end.start, front_end.tokens.placeholder) == (151688, 151690)
    assert front_end.tokens.max_seconds == 52 * 25
    assert front_end.projector.linear1.weight.shape == (2048, 1280)


def test_chunks_are_counted_as_the_case_counts_them() -> None:
    assert chunks(5130) == [2500, 2500, 130]
