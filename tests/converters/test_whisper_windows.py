"""Clips of several windows, from the waveform on: as transformers' processors make them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import WhisperFeatureExtractor

from cases.audio_flamingo_3 import CONFIG as AUDIO_FLAMINGO_3
from cases.glm_asr import CONFIG as GLM_ASR
from cases.music_flamingo import CONFIG as MUSIC_FLAMINGO
from family_case import save_hf
from hooked_alm import HookedALM, InputError
from hooked_alm.converters.families import audio_flamingo_3, glm_asr, music_flamingo
from tiny import MELS, VOCAB, build_tokenizer

RATE = 16000
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% if m['content'] | selectattr('type', 'equalto', 'audio') | list %}<sound>{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "{% for m in messages %}<|user|>\n{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A family, and the files of its processor."""

    slug: str
    config: dict[str, Any]
    special: tuple[str, ...]
    """Placeholder first, then markers, then roles."""
    n_markers: int
    template: str
    seconds: int
    """Of a window."""
    max_seconds: float

    @property
    def processor_class(self) -> Any:
        return getattr(transformers, f"{self.slug}Processor")

    @property
    def model_class(self) -> Any:
        return getattr(transformers, f"{self.slug}ForConditionalGeneration")

    def processor(self) -> Any:
        tokenizer = build_tokenizer()
        known = list(tokenizer.added_tokens_encoder)
        tokenizer.add_special_tokens({"additional_special_tokens": [*known, *self.special]})
        assert len(tokenizer) <= VOCAB
        extractor = WhisperFeatureExtractor(
            feature_size=MELS, chunk_length=self.seconds, return_attention_mask=True
        )
        return self.processor_class(
            feature_extractor=extractor, tokenizer=tokenizer, chat_template=self.template
        )

    def save(self, folder: Path) -> None:
        processor = self.processor()
        ids = processor.tokenizer.convert_tokens_to_ids(list(self.special))
        names = ("audio_token_id", "audio_bos_token_id", "audio_eos_token_id")
        known = {n: i for n, i in zip(names, ids, strict=False) if n in self.config}
        config = {**self.config, **known}
        save_hf(self.model_class(self.model_class.config_class(**config)), folder, torch.float32)
        processor.save_pretrained(folder)


SUBJECTS = {
    subject.slug: subject
    for subject in (
        Subject(
            slug="AudioFlamingo3", config=AUDIO_FLAMINGO_3, special=("<sound>",),
            n_markers=0, template=CHATML, seconds=1, max_seconds=audio_flamingo_3.MAX_SECONDS,
        ),
        Subject(
            slug="MusicFlamingo", config=MUSIC_FLAMINGO,
            special=("<sound>", "<|sound_bos|>", "<|sound_eos|>"),
            n_markers=2, template=CHATML, seconds=1, max_seconds=music_flamingo.MAX_SECONDS,
        ),
        Subject(
            slug="GlmAsr", config=GLM_ASR,
            special=("<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|user|>",
                     "<|assistant|>"),
            n_markers=2, template=GLM, seconds=2, max_seconds=glm_asr.MAX_SECONDS,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Ours and theirs, of one checkpoint."""

    subject: Subject
    model: HookedALM
    processor: Any
    hf: Any

    def theirs(self, clips: list[np.ndarray], texts: list[str], **options: Any) -> Any:
        """What the processor makes of one clip and one text a row."""
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [
                    {"type": "audio", "audio": "clip"}, {"type": "text", "text": text},
                ]}],
                tokenize=False, add_generation_prompt=True,
            )
            for text in texts
        ]  # fmt: skip
        return self.processor(text=prompts, audio=clips, **options)


@pytest.fixture(scope="module", params=SUBJECTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    subject = SUBJECTS[request.param]
    folder = tmp_path_factory.mktemp("windows") / subject.slug
    subject.save(folder)
    return Made(
        subject,
        HookedALM.from_pretrained(folder),
        subject.processor_class.from_pretrained(folder),
        subject.model_class.from_pretrained(folder).eval(),
    )


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


def assert_same(ours: dict[str, Tensor], theirs: Any) -> None:
    for name in ("input_ids", "attention_mask", "input_features", "input_features_mask"):
        assert torch.equal(ours[name], theirs[name]), name


TEXTS = ["What emotion?", "Answer with one word."]


@torch.no_grad()
def test_prepared_as_the_processor_does_and_run_as_the_model_does(made: Made) -> None:
    """Clips of several windows, of a part of one, and of whole ones."""
    window = RATE * made.subject.seconds
    for sizes in ([int(2.4 * window), int(0.7 * window)], [3 * window, window]):
        clips = [noise(n, seed) for seed, n in enumerate(sizes)]
        x = made.model.prepare([*clips], TEXTS)
        theirs = made.theirs(clips, TEXTS)
        ours = made.model.hf_arguments(x)
        assert_same(ours, theirs)
        assert [len(clip.n_frames) for clip in x.clips] == [-(-n // window) for n in sizes]
        real = theirs["attention_mask"].bool()
        expected = made.hf(**theirs, position_ids=ours["position_ids"]).logits[real]
        assert torch.equal(made.model(x)[real], expected)
        again = made.model.encode(**theirs)
        assert torch.equal(made.model(again)[real], expected)
        assert again.spans.clips == x.spans.clips


@torch.no_grad()
def test_a_last_window_too_short_for_a_position(made: Made) -> None:
    """Ten samples beyond whole windows: a window more, and no position."""
    window = RATE * made.subject.seconds
    clip = noise(2 * window + 10)
    x, whole = (made.model.prepare(one, TEXTS[0]) for one in (clip, clip[: 2 * window]))
    theirs = made.theirs([clip], TEXTS[:1])
    assert_same(made.model.hf_arguments(x), theirs)
    assert torch.equal(x.tokens, whole.tokens)
    assert x.clips[0].n_frames == (*whole.clips[0].n_frames, 1)
    again = made.model.encode(**theirs)
    assert again.clips[0].n_frames == x.clips[0].n_frames
    assert again.clips[0].n_tokens == whole.clips[0].n_tokens
    logits = made.model(x)
    if made.subject.slug == "MusicFlamingo":
        with pytest.raises(IndexError):  # transformers 5.23 finds no sample for such a window
            made.hf(**theirs)
        assert logits.isfinite().all()
    else:
        assert torch.equal(logits, made.hf(**theirs).logits)


def test_longer_than_the_processor_takes(made: Made) -> None:
    """It would cut; we refuse, and cut on request."""
    window = RATE * made.subject.seconds
    front_end = made.model.audio
    published = front_end.tokens
    clip = noise(int(3.5 * window))
    made.processor.max_audio_len = 3 * made.subject.seconds
    try:
        front_end.tokens = replace(published, max_seconds=3.0 * made.subject.seconds)
        with pytest.raises(InputError, match=r"expected at most .* s\. Cut .* truncate=True"):
            made.model.prepare(clip, TEXTS[0])
        x = made.model.prepare(clip, TEXTS[0], truncate=True)
        theirs = made.theirs([clip], TEXTS[:1])
    finally:
        front_end.tokens = published
    assert_same(made.model.hf_arguments(x), theirs)
    assert len(x.clips[0].n_frames) == 3


def test_limits_are_those_of_the_processor(made: Made) -> None:
    """Which takes whole windows of 30 s only."""
    longest = inspect.signature(made.subject.processor_class).parameters["max_audio_len"].default
    assert made.model.audio.tokens.max_seconds == made.subject.max_seconds == longest // 30 * 30


def test_spans(made: Made) -> None:
    """Markers are no audio; time goes on from window to window."""
    clip = noise(int(2.4 * RATE * made.subject.seconds))
    x = made.model.prepare(clip, "Happy or sad?")
    (audio,), markers = x.spans["audio"][0], x.spans.positions("audio_struct", 0)
    n_tokens = x.clips[0].n_tokens
    assert audio[1] - audio[0] == n_tokens
    ends = [audio[0] - 1, audio[1]]
    assert markers == (ends if made.subject.n_markers else [])
    per_token = made.model.audio.tokens.seconds_per_token
    assert x.spans.seconds(0, 0.0, n_tokens * per_token) == [audio]
    tokens = x.tokens[0, x.spans.positions("text", 0)]
    assert made.model.tokenizer.decode(tokens) == "Happy or sad?"
    assert x.spans.positions("readout", 0) == [x.shape[1] - 1]
    assert made.model.tokenizer.decode(x.tokens[0, -1]) == "\n"


def test_prompts_without_audio(made: Made) -> None:
    x = made.model.prepare(text="Happy or sad?")
    assert not x.clips
    assert not (x.tokens == made.model.audio.tokens.placeholder).any()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a window too many": (
        lambda b: {
            "input_features": b["input_features"].repeat(2, 1, 1),
            "input_features_mask": b["input_features_mask"].repeat(2, 1),
        },
        r"windows were given, the placeholders have room for 3\.",
    ),
    "a window too few": (
        lambda b: {
            "input_features": b["input_features"][:2],
            "input_features_mask": b["input_features_mask"][:2],
        },
        r"does not fit the windows that are next, of \[\d+, \d+\] positions",
    ),
    "windows cut short": (
        lambda b: {
            "input_features": b["input_features"][..., :-8],
            "input_features_mask": b["input_features_mask"][..., :-8],
        },
        r"expected \[window, 8, \d+\]\. Pad every window",
    ),
    "no mask": (lambda b: {"input_features_mask": None}, "their mask belong together"),
    "labels": (lambda b: {"labels": b["input_ids"]}, "got labels, expected only"),
}


@pytest.mark.parametrize("what", WRONG)
def test_windows_that_do_not_fit(made: Made, what: str) -> None:
    change, message = WRONG[what]
    clip = noise(int(2.4 * RATE * made.subject.seconds))
    batch = dict(made.theirs([clip], TEXTS[:1]))
    with pytest.raises(InputError, match=message):
        made.model.encode(**{**batch, **change(batch)})


def test_all_of_the_front_end_is_where_the_model_is(made: Made) -> None:
    """Also its tables of positions, which are no parameters."""
    elsewhere = HookedALM.from_pretrained(made.model.cfg.model_name, device="meta")
    tables = list(elsewhere.audio.buffers())
    assert all(value.is_meta for value in (*tables, *elsewhere.parameters()))
    assert bool(tables) == (made.subject.slug != "AudioFlamingo3")
