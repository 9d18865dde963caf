"""Writes the clips of ``component_patching``: sentences that call for another word than they say.

    python scripts/confusable_clips.py     # writes experiments/assets/confusable

Of each pair of words that differ in a vowel, both frames (``whisper_data.FRAMES_OF_WORDS``): once
with the word that the frame does not call for, and, as its minimal pair, with the other one, spoken
alike. 12 speakers, of whom training has heard 8. An Ogg file carries a random serial number, so a
rerun gives other bytes of the same samples.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from spoken_clips import SPEAKERS
from synthesise_speech import ASSETS, RATE, make_clip, write_manifest
from whisper_data import CHUNK_S, FRAMES_OF_WORDS, PEOPLE, TIMES

CONFUSABLE = ASSETS / "confusable"
SEED = 71


@dataclass(frozen=True)
class Sentence:
    """A sentence that calls for one word and says another, and who speaks it."""

    name: str
    template: str
    acoustic: str
    contextual: str
    speaker: str

    def text(self, word: str) -> str:
        """The sentence with a word."""
        return self.template.format(word)


def bundled_confusable() -> list[Sentence]:
    """The sentences of the clips, in their order: each frame once."""
    rng = np.random.default_rng(SEED)
    found = []
    for pair, frames in FRAMES_OF_WORDS.items():
        for calls_for, frame in enumerate(frames):
            who, when = PEOPLE[rng.integers(len(PEOPLE))], TIMES[rng.integers(len(TIMES))]
            contextual, acoustic = pair[calls_for], pair[1 - calls_for]
            found.append(Sentence(
                f"{contextual}_as_{acoustic}", f"{who} {frame} {{}}{when}.", acoustic, contextual,
                SPEAKERS[len(found) % len(SPEAKERS)],
            ))  # fmt: skip
    return found


def write_clips(folder: Path) -> None:
    """Writes the clips and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, [*_written(folder)])


def _written(folder: Path) -> Iterator[dict[str, str | float]]:
    for number, one in enumerate(bundled_confusable()):
        donor = f"{one.name}_donor.ogg"
        for name, word in ((f"{one.name}.ogg", one.acoustic), (donor, one.contextual)):
            # The same seed twice: the two differ in their word alone.
            samples = make_clip(
                one.text(word), "en", one.speaker, "neutral", "normal", SEED * 100_000 + number
            )
            assert len(samples) <= CHUNK_S * RATE
            path = folder / name
            soundfile.write(path, samples, RATE, format="OGG", subtype="VORBIS")
            is_asked = word == one.acoustic
            yield {
                "path": name, "text": one.text(word), "speaker": one.speaker,
                "acoustic_word": word if is_asked else "",
                "contextual_word": one.contextual if is_asked else "",
                "donor": donor if is_asked else "",
                "duration_s": round(len(samples) / RATE, 4), "sample_rate": RATE,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the sentences with the other word.")
    parser.add_argument("--out", type=Path, default=CONFUSABLE)
    write_clips(parser.parse_args().out)
