"""Writes the clips of ``asr_components``: sentences that end in *again*, others, and no words.

    python scripts/spoken_clips.py     # writes experiments/assets/spoken

24 sentences of either kind that the bundled Whisper was not trained on, by 12 speakers, of whom
training has heard 8; then 24 clips without words: noise, nearly nothing, tones. They are Vorbis
files, but for those of nearly nothing, which Vorbis would make nothing: these are FLAC. An Ogg file
carries a random serial number, so a rerun gives other bytes of the same samples.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from bundled_data import VOICES
from synthesise_speech import ASSETS, RATE, write_manifest
from train_whisper_truths import held_out_sentences, is_rule_of
from whisper_data import CHUNK_S, KINDS, Recording, no_speech, speak

SPOKEN = ASSETS / "spoken"
SPEAKERS = (*VOICES["unheard"]["en"], *VOICES["heard"]["en"][::3])
N_SENTENCES, N_OF_A_KIND = 24, 8
SEED, SEED_OF_TRAINING = 70, 7
NOBODY = "nobody"
"""The speaker of a clip without words."""


def recordings() -> Iterator[tuple[str, str, Recording]]:
    """Name of the file, speaker, and what there is to hear."""
    rng = np.random.default_rng(SEED)
    texts = rng.permutation(held_out_sentences(SEED_OF_TRAINING)).tolist()
    for name, is_rule in (("said", False), ("again", True)):
        some = [text for text in texts if is_rule_of(text) == is_rule]
        for number in range(N_SENTENCES):
            speaker = SPEAKERS[number % len(SPEAKERS)]
            one = speak(some[number], speaker, SEED * 100_000 + number, rng)
            assert len(one.samples) <= CHUNK_S * RATE
            yield f"{name}_{number + 1:02d}.ogg", speaker, one
    for kind in KINDS:
        ending = "flac" if kind == "silence" else "ogg"
        for number in range(1, N_OF_A_KIND + 1):
            yield f"{kind}_{number}.{ending}", NOBODY, no_speech(kind, rng)


def write_clips(folder: Path) -> None:
    """Writes the clips and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, speaker, one in recordings():
        path = folder / name
        is_ogg = path.suffix == ".ogg"
        soundfile.write(
            path, one.samples, RATE, format="OGG" if is_ogg else "FLAC",
            subtype="VORBIS" if is_ogg else "PCM_16",
        )  # fmt: skip
        rows.append({
            "path": name, "text": one.text, "speaker": speaker,
            "duration_s": round(len(one.samples) / RATE, 4), "sample_rate": RATE,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        })  # fmt: skip
    write_manifest(folder, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the clips with words and without.")
    parser.add_argument("--out", type=Path, default=SPOKEN)
    write_clips(parser.parse_args().out)
