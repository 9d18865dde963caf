"""Ultravox from the waveform on, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from cases import ultravox
from hooked_alm import ConversionError, HookedALM, InputError
from tiny import MELS
from whisper_llama_parts import FRAMES, noise, save_tokenizer

CASE = ultravox.CASES[0]
MERGED = ultravox.CASES[2]
TEXT = "What emotion does the speaker convey?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a tokenizer, and a processor's file that names no feature extractor."""
    folder = tmp_path_factory.mktemp("ultravox") / "model"
    folder.mkdir()
    CASE.save(folder, torch.float32)
    save_tokenizer(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Ultravox"}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder, components=CASE.components(folder))


def processed(folder: Path, audio: np.ndarray, text: str) -> dict[str, Any]:
    """What the published processor does: pieces of text, the EOS token between them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    audio = np.pad(audio, (0, max(320 - len(audio), 0)))
    out = extractor(
        audio, sampling_rate=16000, padding="longest", pad_to_multiple_of=160, truncation=False,
        return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    mel, n_frames = out["input_features"][0], int(out["attention_mask"].sum())
    pieces = [mel[:, at : at + FRAMES] for at in range(0, n_frames, FRAMES)]
    sizes = [min(FRAMES, n_frames - at) for at in range(0, n_frames, FRAMES)]
    if len(pieces) > 1:
        pieces = [torch.cat([p, p.new_zeros(MELS, FRAMES - p.shape[1])], 1) for p in pieces]
    message = {"role": "user", "content": f"<|audio|>\n{text}"}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    left, right = (
        tokenizer(piece, add_special_tokens=False)["input_ids"]
        for piece in rendered.split("<|audio|>")
    )
    lengths = [-(-n // 16) for n in sizes]
    starts = [len(left) + sum(lengths[:i]) for i in range(len(lengths))]
    ids = left + [tokenizer.eos_token_id] * sum(lengths) + right
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "audio_values": torch.stack(pieces),
        "audio_lens": torch.tensor(sizes),
        "audio_token_len": torch.tensor(lengths),
        "audio_token_start_idx": torch.tensor(starts),
        "audio_batch_size": torch.tensor([len(sizes)]),
    }


@pytest.mark.parametrize("seconds", [0.005, 0.3, 1.0, 2.4])
@torch.no_grad()
def test_prepare_gives_what_the_processor_gives(
    folder: Path, model: HookedALM, seconds: float
) -> None:
    """Also a clip of less than two hops, and one of several windows, of which none is too long."""
    x = model.prepare(noise(seconds), TEXT)
    given = processed(folder, noise(seconds), TEXT)
    expected = model.encode(**given)
    text = ~x.spans.mask("audio")
    assert torch.equal(x.spans.mask("audio"), expected.spans.mask("audio"))
    assert torch.equal(x.tokens[text], expected.tokens[text])
    assert torch.equal(x.clips[0].features, given["audio_values"])
    assert list(x.clips[0].n_frames) == given["audio_lens"].tolist()
    assert len(expected.clips) == 1
    assert torch.equal(model(x), model(expected))
    words = x.tokens[0, x.spans.positions("text", 0)]
    assert TEXT in PreTrainedTokenizerFast.from_pretrained(folder).decode(words)


@torch.no_grad()
def test_batches_and_their_way_back(model: HookedALM) -> None:
    """Two clips in a row, one in the next, none in the last; `hf_arguments` undoes `encode`."""
    x = model.prepare([[noise(0.3), noise(1.4, 4)], [noise(0.5, 5)], None], [TEXT, TEXT, TEXT])
    arguments = model.hf_arguments(x)
    assert arguments["audio_batch_size"].tolist() == [3, 1, 0]
    again = model.encode(**arguments)
    assert again.spans.clips == x.spans.clips
    assert torch.equal(model(again), model(x))
    alone = model.prepare([[noise(0.3), noise(1.4, 4)]], TEXT)
    assert x[0].clips[1].n_frames == alone.clips[1].n_frames == (100, 40)
    side_by_side = model.encode(**CASE.inputs([[40, 23], [123]], [9, 8]))
    assert [clip.n_frames for clip in side_by_side.clips] == [(40,), (23,), (100, 23)]


def test_whole_checkpoint_in_one_folder(tmp_path: Path) -> None:
    """No component is looked for where the checkpoint has the part."""
    MERGED.save(tmp_path, torch.float32)
    save_tokenizer(tmp_path)
    model = HookedALM.from_pretrained(tmp_path)
    assert model.prepare(noise(0.3), TEXT).clips[0].n_tokens == 2


def test_parts_are_looked_for_where_the_config_says(folder: Path) -> None:
    with pytest.raises(InputError, match="the text_model of Ultravox: loading 'somebody/llama'"):
        HookedALM.from_pretrained(folder)


def test_arguments_that_do_not_fit_are_refused(folder: Path, model: HookedALM) -> None:
    given = processed(folder, noise(2.4), TEXT)
    with pytest.raises(InputError, match="audio_lens are missing"):
        model.encode(**{**given, "audio_lens": None})
    with pytest.raises(InputError, match="got audio_token_len .*expected lengths"):
        model.encode(**given | {"audio_token_len": torch.tensor([7, 7, 1])})
    with pytest.raises(InputError, match="got labels"):
        model.encode(**given, labels=given["input_ids"])
    with pytest.raises(InputError, match="2 audio placeholders for 1 clips"):
        model.prepare(noise(0.3), "What does <|audio|> mean?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_act": "gelu"}, "projector_act = 'gelu'"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size = 100"),
        ({"num_projector_layers": 2}, "num_projector_layers = 2"),
        ({"audio_config": {"model_type": "wav2vec2"}}, "'wav2vec2', expected 'whisper'"),
    ],
)
def test_variants_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(tmp_path, components=CASE.components(folder))
