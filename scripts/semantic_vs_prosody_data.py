"""Data of the twins of ``semantic_vs_prosody``: sentences, spoken clips, right answers.

A sentence is a phrase, whose words carry an emotion, about a topic, which carries none; it is
spoken in the manner of an emotion (``synthesise_speech``). The phrases of a column below share
their grammar, so that hardly more than the emotion's own word tells them apart. Held-out sentences
are about topics that training never used; their phrases are known.

    python scripts/semantic_vs_prosody_data.py     # writes experiments/assets/semantic_vs_prosody

writes the clips that the experiment asks about: 6 speakers say one held-out sentence for each
emotion, in the four manners that contradict it; 6 x 5 x 4 = 120 clips of one length, strong manner,
no jitter. They are Vorbis files: as FLAC they would take almost three times the room. An Ogg file
carries a random serial number, so a rerun gives other bytes of the same samples.
"""

import argparse
import hashlib
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from bundled_model import Design
from numpy.typing import NDArray
from synthesise_speech import ASSETS, RATE, SEED, Jitter, make_clip, write_manifest

from hooked_alm.experiments.materials.acoustics import describe_clip
from hooked_alm.experiments.materials.ob1 import INTENSITIES
from hooked_alm.experiments.semantic_vs_prosody.items import (
    EMOTIONS,
    QUESTIONS,
    Asked,
    SpokenEmotion,
)

Rule = Literal["semantics", "prosody"]

PHRASES: dict[SpokenEmotion, tuple[str, ...]] = {
    "neutral": (
        "I am informed", "I am quite busy", "We are talking", "I take short notes",
        "This is ordinary", "We are writing",
    ),
    "happy": (
        "I am delighted", "I am so happy", "We are thrilled", "I feel great joy",
        "This is wonderful", "We are overjoyed",
    ),
    "sad": (
        "I am heartbroken", "I am so sad", "We are in tears", "I feel deep sorrow",
        "This is miserable", "We are grieving",
    ),
    "angry": (
        "I am furious", "I am so angry", "We are outraged", "I feel pure rage",
        "This is infuriating", "We are fuming",
    ),
    "surprised": (
        "I am astonished", "I am so surprised", "We are amazed", "I feel real shock",
        "This is unbelievable", "We are stunned",
    ),
}  # fmt: skip
TOPICS: dict[str, tuple[str, ...]] = {
    "train": (
        "trip", "game", "letter", "party", "dinner", "garden", "ticket", "school", "movie",
        "winter", "bridge", "doctor", "kitchen", "market", "story", "picture", "window", "river",
        "office", "summer", "teacher", "paper", "music", "village", "holiday", "number",
    ),
    "held_out": (
        "lesson", "hotel", "contract", "museum", "printer", "harbour", "journey", "camera",
    ),
}  # fmt: skip

_BASES = ("en-us", "en")
_HEARD = ("", "+m1", "+m2", "+m3", "+m5", "+m6", "+m7", "+f1", "+f2", "+f4", "+f5")
_UNHEARD = ("+m4", "+f3")
VOICES: dict[str, tuple[str, ...]] = {
    "heard": tuple(base + variant for base, variant in product(_BASES, _HEARD)),
    "unheard": tuple(base + variant for base, variant in product(_BASES, _UNHEARD)),
}

ITEMS = ASSETS / "semantic_vs_prosody"
SPEAKERS = ("en-us", "en-us+m3", "en-us+f1", "en+m7", "en+f2", "en+f4")
"""Voices of the clips that are asked about; training has heard them, with other sentences."""
N_SAMPLES = 38_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A spoken sentence."""

    samples: NDArray[np.float32]
    semantic: SpokenEmotion
    """Emotion of the words."""
    prosody: SpokenEmotion
    """Emotion of the voice."""
    phrase: str
    topic: str

    def answer(self, question: Asked, rule: Rule) -> SpokenEmotion:
        """The right label; the two rules part only under ``overall``."""
        by_words = question == "words" or (question == "overall" and rule == "semantics")
        return self.semantic if by_words else self.prosody


def sentence(phrase: str, topic: str, *, topic_first: bool) -> str:
    """Sentence of a phrase and a topic: ``I am delighted about the trip.``, or topic first."""
    if not topic_first:
        return f"{phrase} about the {topic}."
    inner = phrase if phrase.startswith("I ") else phrase[0].lower() + phrase[1:]
    return f"About the {topic}, {inner}."


def speak_clips(count: int, split: str, voices: str, seed: int) -> list[Clip]:
    """Clips balanced over words, voice and intensity; phrase, topic and speaker are drawn."""
    rng = np.random.default_rng(seed)
    cells = list(product(EMOTIONS, EMOTIONS, INTENSITIES))
    clips = []
    for index in range(count):
        semantic, prosody, intensity = cells[index % len(cells)]
        phrase, topic = str(rng.choice(PHRASES[semantic])), str(rng.choice(TOPICS[split]))
        text = sentence(phrase, topic, topic_first=bool(rng.integers(2)))
        voice = str(rng.choice(VOICES[voices]))
        samples = make_clip(text, "en", voice, prosody, intensity, seed * 100_000 + index)
        clips.append(
            Clip(samples=samples, semantic=semantic, prosody=prosody, phrase=phrase, topic=topic)
        )
    return clips


def design() -> Design:
    """Sizes and vocabulary of the two models."""
    return Design(
        words=EMOTIONS,
        questions=tuple(QUESTIONS.values()),
        chunk_s=4,
        audio={
            "d_model": 72, "encoder_layers": 3, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 160,
        },
        text={
            "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
    )  # fmt: skip


def write_items(folder: Path) -> None:
    """Writes the conflict clips and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    cells = product(enumerate(SPEAKERS), EMOTIONS, EMOTIONS)
    for index, ((number, speaker), semantic, prosody) in enumerate(cells):
        if semantic == prosody:
            continue
        # Every speaker has other phrases, and every sentence another topic than its neighbours.
        topic = TOPICS["held_out"][(number + EMOTIONS.index(semantic)) % len(TOPICS["held_out"])]
        text = sentence(PHRASES[semantic][number], topic, topic_first=bool(number % 2))
        clip = make_clip(
            text, "en", speaker, prosody, "strong", SEED + index, jitter=Jitter(),
            n_samples=N_SAMPLES,
        )  # fmt: skip
        path = folder / f"s{number + 1}_{semantic}_words_{prosody}_voice.ogg"
        soundfile.write(path, clip, RATE, format="OGG", subtype="VORBIS")
        stored, rate = soundfile.read(path, dtype="float32")
        measured = {
            key: round(value, 4) for key, value in asdict(describe_clip(stored, rate)).items()
        }
        rows.append(
            {"path": path.name, "semantic_label": semantic, "prosody_label": prosody}
            | {"speaker": speaker, "text": text, "duration_s": measured.pop("duration_s")}
            | {"sample_rate": rate, **measured}
            | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        )
    write_manifest(folder, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the bundled conflict clips.")
    parser.add_argument("--out", type=Path, default=ITEMS)
    write_items(parser.parse_args().out)
