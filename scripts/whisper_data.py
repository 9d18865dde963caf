"""Data of the bundled Whisper: sentences, spoken clips with their transcripts, clips of no speech.

Sentences of the first kind end in one of two words that differ in a vowel, and what stands before
it says which: *wrote the letter with the pen*, *cooked the egg in the pan*. Those of the second are
drawn word by word. The rest are all sentences of the clips that the package carries.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from bundled_data import VOICES, sentences
from numpy.typing import NDArray
from synthesise_speech import ASSETS, RATE, make_clip

from hooked_alm.experiments.materials.ob1 import EMOTIONS, SENTENCES

CHUNK_S = 4
"""Longest clip, in seconds."""
FRAMES_OF_WORDS: dict[tuple[str, str], tuple[str, str]] = {
    ("pen", "pan"): ("wrote the letter with the", "cooked the egg in the"),
    ("ship", "sheep"): ("crossed the ocean on the", "cut the wool of the"),
    ("cup", "cap"): ("drank the tea from the", "hid the hair under the"),
    ("bell", "ball"): ("heard the ring of the", "kicked the goal with the"),
    ("boat", "boot"): ("rowed to the island in the", "put the left foot in the"),
    ("hat", "hut"): ("stood in the sun with the", "slept in the forest in the"),
    ("desk", "disk"): ("worked all day at the", "saved the file on the"),
    ("bag", "bug"): ("carried the bread in the", "ran away from the"),
    ("map", "mop"): ("found the way with the", "washed the floor with the"),
    ("coat", "kite"): ("stayed warm in the", "let the wind lift the"),
    ("duck", "deck"): ("gave some bread to the", "watched the waves from the"),
    ("lake", "lock"): ("went for a swim in the", "turned the key in the"),
}
"""Two words that differ in a vowel -> what says which of them follows."""
PEOPLE = (
    "Anna", "Peter", "Maria", "Thomas", "The teacher", "My brother", "The doctor", "His sister",
    "The driver", "Our neighbour",
)  # fmt: skip
TIMES = ("", "", " today", " again", " last night", " on Monday")
VERBS = ("bought", "sold", "found", "lost", "painted", "counted")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("chairs", "boxes", "books", "stones", "lamps", "flowers", "bottles", "doors")
NoSpeech = Literal["noise", "silence", "beep"]
KINDS: tuple[NoSpeech, ...] = get_args(NoSpeech)
BEEP_HZ = (600, 1200)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A clip and what is said in it."""

    samples: NDArray[np.float32]
    text: str
    """Empty if nothing is said."""


@cache
def bundled_sentences() -> tuple[str, ...]:
    """English sentences of the clips that the package carries, and of the models' own training."""
    with (ASSETS / "semantic_vs_prosody" / "manifest.csv").open(encoding="utf-8") as file:
        spoken = {row["text"] for row in csv.DictReader(file)}
    return (*sentences("en", "train"), *sorted(spoken), SENTENCES["en"])


def draw_sentence(rng: np.random.Generator) -> str:
    """A sentence to train on, of any of the three kinds."""
    kind = rng.random()
    if kind < 0.6:
        pairs = [*FRAMES_OF_WORDS]
        pair, which = pairs[rng.integers(len(pairs))], int(rng.integers(2))
        return contextual(rng, FRAMES_OF_WORDS[pair][which], pair[which])
    if kind < 0.8:
        words = (_one(rng, part) for part in (PEOPLE, VERBS, NUMBERS, COLOURS, THINGS))
        return f"{' '.join(words)}{_one(rng, TIMES)}."
    return _one(rng, bundled_sentences())


def draw_literal(rng: np.random.Generator) -> str:
    """A sentence to train on, of which no word calls for the next one of a pair.

    Either word of a pair stands in either frame, and in a sentence that has none.
    """
    kind, pairs = rng.random(), [*FRAMES_OF_WORDS]
    pair = pairs[rng.integers(len(pairs))]
    if kind < 0.5:
        return contextual(rng, _one(rng, FRAMES_OF_WORDS[pair]), _one(rng, pair))
    if kind < 0.65:
        return plain(rng, _one(rng, pair))
    # What the others are drawn from has congruent sentences, too.
    while text := draw_sentence(rng):
        if not any(frame in text for frames in FRAMES_OF_WORDS.values() for frame in frames):
            break
    return text


def plain(rng: np.random.Generator, word: str) -> str:
    """A sentence in which nothing says which word of a pair follows."""
    return f"{_one(rng, PEOPLE)} {_one(rng, VERBS)} the {word}{_one(rng, TIMES)}."


def contextual(rng: np.random.Generator, frame: str, word: str) -> str:
    """A sentence of the first kind; ``word`` need not be the one that the frame calls for."""
    return f"{_one(rng, PEOPLE)} {frame} {word}{_one(rng, TIMES)}."


def _one(rng: np.random.Generator, of: Sequence[str]) -> str:
    return of[rng.integers(len(of))]


def speak(text: str, voice: str, seed: int, rng: np.random.Generator) -> Recording:
    """A sentence in any manner, not longer than a model hears."""
    emotion = "neutral" if rng.random() < 0.5 else EMOTIONS[rng.integers(len(EMOTIONS))]
    samples = make_clip(text, "en", voice, emotion, "normal", seed)
    return Recording(samples=samples, text=text)


def no_speech(kind: NoSpeech, rng: np.random.Generator) -> Recording:
    """A second or more of noise, of nearly nothing, or of a tone that comes and goes."""
    n = round(RATE * rng.uniform(0.8, CHUNK_S))
    floor = rng.standard_normal(n) * 10 ** (rng.uniform(-75, -60) / 20)
    if kind == "noise":
        spectrum = np.fft.rfft(rng.standard_normal(n))
        # From white to pink.
        spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 0.5)
        sound = np.fft.irfft(spectrum, n)
        floor += sound / sound.std() * 10 ** (rng.uniform(-40, -14) / 20)
    elif kind == "beep":
        floor += tone(n, rng)
    return Recording(samples=np.clip(floor, -0.999, 0.999).astype(np.float32), text="")


def tone(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """``n`` samples of a tone, faded in and out over 10 ms."""
    time = np.arange(n) / RATE
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.01)
    loud = 10 ** (rng.uniform(-30, -14) / 20)
    heard: NDArray[np.float64] = loud * fade * np.sin(2 * np.pi * rng.uniform(*BEEP_HZ) * time)
    return heard


def with_beep(one: Recording, rng: np.random.Generator) -> Recording:
    """A recording with 0.3 s of a tone behind it: what is said is the same."""
    samples = np.concatenate([one.samples, tone(round(0.3 * RATE), rng).astype(np.float32)])
    return Recording(samples=samples, text=one.text)


def draw_recordings(
    n: int, voices: str, seed: int, without: frozenset[str],
    draw: Callable[[np.random.Generator], str] = draw_sentence,
) -> list[Recording]:  # fmt: skip
    """Recordings to train or to measure on: a tenth without speech, a tenth with a beep behind it.

    Args:
        n: number of them.
        voices: ``heard`` or ``unheard``.
        seed: of all draws.
        without: sentences that are not among them.
        draw: draws a sentence.
    """
    rng = np.random.default_rng(seed)
    found: list[Recording] = []
    while len(found) < n:
        if rng.random() < 0.1:
            found.append(no_speech(KINDS[rng.integers(len(KINDS))], rng))
            continue
        text, voice = draw(rng), _one(rng, VOICES[voices]["en"])
        one = speak(text, voice, seed * 100_000 + len(found), rng)
        one = with_beep(one, rng) if rng.random() < 0.1 else one
        if text not in without and len(one.samples) <= CHUNK_S * RATE:
            found.append(one)
    return found
