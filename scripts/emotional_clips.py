"""Writes the clips of ``class_neurons``: five emotions by each of twenty speakers.

    python scripts/emotional_clips.py     # writes experiments/assets/emotions

English sentences that no bundled model was trained on, by voices that they have heard. A speaker
says one sentence; all clips are equally long. They are Vorbis files, whose random
serial number gives a rerun other bytes of the same samples.
"""

import argparse
import hashlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
from bundled_data import VOICES, sentences
from synthesise_speech import ASSETS, LEAD_S, RATE, draw_jitter, make_clip, write_manifest

from hooked_alm.experiments.materials.ob1 import EMOTIONS

N_SPEAKERS, N_SAMPLES, SEED = 20, 41_600, 90


def write_clips(folder: Path) -> None:
    """Writes the clips and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(SEED), []
    texts = rng.permutation(sentences("en", "held_out")).tolist()
    speakers = VOICES["heard"]["en"][:N_SPEAKERS]
    for number, ((place, speaker), emotion) in enumerate(product(enumerate(speakers), EMOTIONS)):
        text = texts[place % len(texts)]
        clip = make_clip(
            text, "en", speaker, emotion, "normal", SEED * 100_000 + number,
            jitter=replace(draw_jitter(rng), lead_s=LEAD_S), n_samples=N_SAMPLES,
        )  # fmt: skip
        path = folder / f"{speaker.replace('+', '_')}_{emotion}.ogg"
        soundfile.write(path, clip, RATE, format="OGG", subtype="VORBIS", compression_level=0.8)
        rows.append({
            "path": path.name, "language": "en", "emotion": emotion, "speaker": speaker,
            "sentence": text, "duration_s": N_SAMPLES / RATE, "sample_rate": RATE,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        })  # fmt: skip
    write_manifest(folder, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write five emotions by twenty speakers.")
    parser.add_argument("--out", type=Path, default=ASSETS / "emotions")
    write_clips(parser.parse_args().out)
