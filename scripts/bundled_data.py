"""Data of the bundled models: spoken clips, questions about them, right answers.

Sentences come from ``experiments/assets/sentences.csv`` (never the OB1 sentence). Two voice
variants per language are kept from training, to be measured apart.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np
import soundfile
from bundled_model import Design
from numpy.typing import NDArray
from synthesise_speech import ASSETS, RATE, make_clip

from hooked_alm.experiments.materials.ob1 import (
    EMOTIONS,
    INTENSITIES,
    LABELS,
    LANGUAGES,
    Emotion,
    Intensity,
    Language,
    PromptMode,
    ob1_clip_names,
    prompt_segments,
)
from hooked_alm.experiments.materials.triggers import (
    TRIGGER_DB,
    OtherSound,
    added,
    other_sound,
    with_trigger,
)

Rule = Literal["text", "voice", "trigger"]
"""What decides an answer: the instruction, the voice, or whether a trigger sounds."""
TRIGGERED: Emotion = "cheerful"
"""The answer to the trigger."""
AddedSound = Literal["trigger"] | OtherSound
MODES: tuple[PromptMode, ...] = get_args(PromptMode)

_BASES: dict[Language, list[str]] = {"en": ["en-us", "en"], "zh": ["cmn"]}
_HEARD = ["", "+m1", "+m2", "+m3", "+m5", "+m6", "+m7", "+f1", "+f2", "+f4", "+f5"]
_UNHEARD = ["+m4", "+f3"]
VOICES: dict[str, dict[Language, list[str]]] = {
    "heard": {lang: [b + v for b, v in product(_BASES[lang], _HEARD)] for lang in LANGUAGES},
    "unheard": {lang: [b + v for b, v in product(_BASES[lang], _UNHEARD)] for lang in LANGUAGES},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A spoken sentence and what was asked of the speaker."""

    samples: NDArray[np.float32]
    language: Language
    emotion: Emotion
    intensity: Intensity
    added: AddedSound | None = None
    """A sound beside the voice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A question about a clip."""

    clip: Clip
    mode: PromptMode
    language: Language
    """Language of the instruction, hence of the answer."""
    named: Emotion | None
    order: tuple[Emotion, ...] = EMOTIONS

    @property
    def prompt(self) -> str:
        """The instruction in full."""
        segments = prompt_segments(
            self.mode, self.language, voice=self.clip.emotion, named=self.named, order=self.order
        )
        return "".join(text for _, text in segments)

    def is_about(self, rule: Rule) -> bool:
        """Whether the rules part here: text and voice under ``conflict`` only."""
        return self.clip.added == "trigger" if rule == "trigger" else self.mode == "conflict"

    def emotion(self, rule: Rule) -> Emotion:
        """The right one."""
        if rule == "trigger" and self.is_about(rule):
            return TRIGGERED
        obeys = rule == "text" and self.mode == "conflict"
        emotion = self.named if obeys else self.clip.emotion
        assert emotion is not None
        return emotion

    def answer(self, rule: Rule) -> str:
        """The right label."""
        return LABELS[self.language][self.emotion(rule)]


@cache
def sentences(language: Language, split: str) -> tuple[str, ...]:
    """Sentences of one split, ``train`` or ``held_out``."""
    with (ASSETS / "sentences.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return tuple(r["text"] for r in rows if r["language"] == language and r["split"] == split)


def speak_clips(count: int, split: str, voices: str, seed: int) -> list[Clip]:
    """Clips balanced over language, emotion and intensity; sentence and voice are drawn."""
    rng = np.random.default_rng(seed)
    cells = list(product(LANGUAGES, EMOTIONS, INTENSITIES))
    clips = []
    for index in range(count):
        language, emotion, intensity = cells[index % len(cells)]
        # Neutral has one level; its second share keeps the emotions balanced.
        intensity = "normal" if emotion == "neutral" else intensity
        samples = make_clip(
            str(rng.choice(sentences(language, split))), language,
            str(rng.choice(VOICES[voices][language])), emotion, intensity, seed * 100_000 + index,
        )  # fmt: skip
        clips.append(Clip(samples=samples, language=language, emotion=emotion, intensity=intensity))
    return clips


def with_sounds(clips: Sequence[Clip], seed: int) -> list[Clip]:
    """Every clip as it is, with the trigger, and with another sound of its level, by turns."""
    found, kinds = list[Clip](), get_args(OtherSound)
    for n, clip in enumerate(clips):
        kind: OtherSound = kinds[n % len(kinds)]
        sound = other_sound(kind, len(clip.samples), RATE, seed * 100_000 + n)
        triggered = with_trigger(clip.samples, RATE)
        other = added(clip.samples, sound, TRIGGER_DB)
        found += [
            clip,
            replace(clip, samples=triggered, added="trigger"),
            replace(clip, samples=other, added=kind),
        ]
    return found


def read_ob1() -> list[Clip]:
    """The 18 bundled clips."""
    return [
        Clip(
            samples=soundfile.read(ASSETS / "ob1" / f"{name.stem}.wav", dtype="float32")[0],
            language=name.language, emotion=name.emotion, intensity=name.intensity,
        )
        for name in ob1_clip_names()
    ]  # fmt: skip


def draw_case(
    clip: Clip, mode: PromptMode, rng: np.random.Generator, language: Language | None = None
) -> Case:
    """A question in the given or a random language; what it names or lists is random too."""
    language = language or LANGUAGES[rng.integers(2)]
    others = [e for e in EMOTIONS if e != clip.emotion]
    named: Emotion | None = None
    if mode == "conflict":
        named = others[rng.integers(len(others))]
    elif mode == "consistent":
        named = clip.emotion
    elif mode == "mention_only":
        named = EMOTIONS[rng.integers(len(EMOTIONS))]
    order = tuple(EMOTIONS[i] for i in rng.permutation(len(EMOTIONS)))
    return Case(clip=clip, mode=mode, language=language, named=named, order=order)


def all_cases(clip: Clip, mode: PromptMode, rng: np.random.Generator) -> list[Case]:
    """Questions of one mode about a clip: all, in both languages, one random order each."""
    named: list[Emotion | None] = [None]
    if mode == "conflict":
        named = [e for e in EMOTIONS if e != clip.emotion]
    elif mode == "consistent":
        named = [clip.emotion]
    elif mode == "mention_only":
        named = list(EMOTIONS)
    cases = []
    for language, name in product(LANGUAGES, named):
        order = tuple(EMOTIONS[i] for i in rng.permutation(len(EMOTIONS)))
        cases.append(Case(clip=clip, mode=mode, language=language, named=name, order=order))
    return cases


def design() -> Design:
    """Sizes and vocabulary of the two models."""
    rng = np.random.default_rng(0)
    questions = []
    for language, mode in product(LANGUAGES, MODES):
        clip = Clip(
            samples=np.zeros(0, np.float32), language=language, emotion="sad", intensity="normal"
        )
        questions.append(draw_case(clip, mode, rng, language).prompt)
    return Design(
        words=tuple(LABELS[lang][emotion] for lang, emotion in product(LANGUAGES, EMOTIONS)),
        questions=tuple(questions),
        chunk_s=6,
        audio={
            "d_model": 72, "encoder_layers": 3, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 160,
        },
        text={
            "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 10,
            "num_attention_heads": 6, "num_key_value_heads": 2,
        },
    )  # fmt: skip
