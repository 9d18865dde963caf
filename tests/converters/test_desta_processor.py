"""DeSTA2 and DeSTA2.5-Audio from waveform and transcript on, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from cases.desta import CASES, QUERIES, published
from family_case import Case
from hooked_alm import ConversionError, HookedALM, InputError
from tiny import MELS
from whisper_llama_parts import noise, save_tokenizer

BY_NAME = {case.name: case for case in CASES}
TEXT, TRANSCRIPT = "How does it sound?", " the speaker was happy, the recording long"


class Subject:
    """A checkpoint whose tokenizer is the language model's."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        folder.mkdir()
        case.save(folder, torch.float32)
        self.tokenizer: PreTrainedTokenizerFast = save_tokenizer(folder / "text_model")
        self.model = HookedALM.from_pretrained(folder, components=case.components(folder))

    def processed(self) -> dict[str, Any]:
        """What the published code hands to its language model for `conversation()`."""
        extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
        out = extractor(noise(0.4), sampling_rate=16000, return_tensors="pt")
        return (self._of_2 if self.case.name == "DeSTA2" else self._of_2_5)(out["input_features"])

    def _of_2(self, features: Tensor) -> dict[str, Any]:
        rendered = self._rendered([("audio", "/a/path.wav"), ("user", TEXT)])
        left, right = rendered.split("/a/path.wav")
        out = self.tokenizer(left + TRANSCRIPT + right, return_tensors="pt")
        n_before = len(self.tokenizer(left + TRANSCRIPT)["input_ids"])
        n_left = len(self.tokenizer(left)["input_ids"])
        return {
            **out,
            "input_features": features,
            "audio_position": [[len(self.tokenizer.tokenize(left))]],
            "transcript": [[(n_left, n_before)]],
        }

    def _of_2_5(self, features: Tensor) -> dict[str, Any]:
        rendered = self._rendered([("user", f"<start_audio><|AUDIO|><end_audio>\n{TEXT}")])
        left, right = (
            self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            for piece in rendered.split("<|AUDIO|>")
        )
        text = self.tokenizer.encode(TRANSCRIPT, add_special_tokens=False, return_tensors="pt")
        place = self.tokenizer.convert_tokens_to_ids("<|reserved_special_token_87|>")
        ids = torch.tensor([[*left, *[place] * (QUERIES + text.shape[1]), *right]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "batch_features": features,
            "batch_transcription_ids": [text],
            "batch_start_positions": [(0, len(left))],
        }

    def _rendered(self, messages: list[tuple[str, str]]) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        return rendered


def conversation(seconds: float = 0.4, **more: Any) -> list[dict[str, Any]]:
    audio = {"type": "audio", "audio": noise(seconds), "transcript": TRANSCRIPT} | more
    return [{"role": "user", "content": [audio, {"type": "text", "text": TEXT}]}]


@pytest.fixture(scope="module", params=BY_NAME)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(BY_NAME[request.param], tmp_path_factory.mktemp("desta") / "model")


@torch.no_grad()
def test_prepare_gives_what_the_published_code_gives(subject: Subject) -> None:
    model = subject.model
    x = model.prepare(conversation=conversation())
    given = subject.processed()
    expected = model.encode(**given)
    assert torch.equal(x.tokens[~x.spans.mask("audio")], expected.tokens[~x.spans.mask("audio")])
    assert x.spans.clips == expected.spans.clips
    assert x.spans["transcript"] == expected.spans["transcript"]
    assert torch.equal(model(x), model(expected))
    words = subject.tokenizer.decode(x.tokens[0, x.spans.positions("transcript", 0)])
    assert words == TRANSCRIPT
    assert subject.tokenizer.decode(x.tokens[0, x.spans.positions("text", 0)]).strip() == TEXT
    assert not (x.spans.mask("transcript") & x.spans.mask("text", "struct")).any()
    assert (x.spans.mask("audio_struct") | ~x.spans.mask("transcript")).all()
    gap = x.spans.positions("transcript", 0)[0] - x.spans.positions("audio", 0)[-1]
    # DeSTA2 counts the left text without its BOS: its last token comes after the audio.
    assert gap == (2 if subject.case.name == "DeSTA2" else 1)


def test_the_layers_that_the_published_models_read() -> None:
    """Counted from 0, the encoder's input: DeSTA2 reads one layer lower than it meant."""
    assert published(True).taps == (2, 5, 8, 11)  # outputs of layers 1, 4, 7, 10
    assert published(False).taps == (8, 16, 24, 32)  # outputs of layers 7, 15, 23, 31


@torch.no_grad()
def test_the_way_back(subject: Subject) -> None:
    model = subject.model
    silent = conversation(0.9, transcript="")
    spoken = [{"role": "user", "content": TEXT}]
    x = model.prepare(conversation=[conversation(), silent, spoken])
    again = model.encode(**model.hf_arguments(x))
    assert again.spans.clips == x.spans.clips
    assert again.spans["transcript"] == x.spans["transcript"]
    assert x.spans["transcript"][1:] == [[], []]
    real = x.attention_mask.bool()
    assert torch.equal(model(again)[real], model(x)[real])


def test_audio_that_cannot_be_used(subject: Subject) -> None:
    model = subject.model
    with pytest.raises(InputError, match="without a transcript"):
        model.prepare(noise(0.4), TEXT)
    with pytest.raises(InputError, match="1 s"):
        model.prepare(conversation=conversation(1.2))
    assert model.prepare(conversation=conversation(1.2), truncate=True).clips[0].notes
    x = model.prepare(conversation=conversation())
    with pytest.raises(InputError, match="no time axis"):
        x.spans.seconds(0, 0.0, 0.2)


def test_arguments_that_do_not_fit_are_refused(subject: Subject) -> None:
    given = subject.processed()
    wrong: dict[str, Any] = {"audio_position": [[999]]}
    if subject.case.name != "DeSTA2":
        wrong = {"batch_start_positions": [(0, given["input_ids"].shape[1] - QUERIES)]}
    with pytest.raises(InputError, match="encoding a prompt for DeSTA2"):
        subject.model.encode(**given | wrong)
    with pytest.raises(InputError, match="got labels"):
        subject.model.encode(**given, labels=given["input_ids"])


def test_two_clips(subject: Subject) -> None:
    """DeSTA2 was published for one a prompt."""
    twice = conversation()
    twice[0]["content"].insert(0, twice[0]["content"][0])
    if subject.case.name == "DeSTA2":
        with pytest.raises(InputError, match="got 2 clips, and 1 places"):
            subject.model.prepare(conversation=twice)
    else:
        x = subject.model.prepare(conversation=twice)
        assert [len(clips) for clips in x.spans.clips] == [2]
        assert len(x.spans["transcript"][0]) == 2


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (".", {"use_lora": True}, "use_lora = True"),
        (".", {"encoder's id": "x/y"}, "got .*_model_id 'x/y'"),
        ("text_model", {"model_type": "qwen3"}, "'qwen3', expected 'llama'"),
        ("text_model", {"attention_bias": True}, "attention_bias = True"),
        ("audio_model", {"model_type": "wavlm"}, "'wavlm', expected 'whisper'"),
        ("audio_model", {"encoder_layers": 8}, "it has 8"),
        ("audio_model", {"is_streaming": True}, "is_streaming = True"),
    ],
)
def test_variants_are_refused(
    subject: Subject, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    for source in (subject.folder, subject.folder / "text_model", subject.folder / "audio_model"):
        copy = tmp_path / source.relative_to(subject.folder)
        copy.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
    if "encoder's id" in change:
        is_first = subject.case.name == "DeSTA2"
        change = {"whisper_model_id" if is_first else "encoder_model_id": change["encoder's id"]}
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(tmp_path, components=subject.case.components(tmp_path))
