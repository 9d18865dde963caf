"""Speak sentences into windows of 30 s: speech for dictionaries of a Whisper's encoder.

    python scripts/packed_speech.py OUT --windows 720

OUT has FLAC files and a ``manifest.csv`` (path, speaker, text), a speaker to a file, each speaker
as often as the others. Sentences are those of ``whisper_data``; between them are 0.1 to 0.4 s of a
noise floor. All 1500 frames of a window hear speech, so that a million rows are 667 windows.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
from bundled_data import VOICES
from numpy.typing import NDArray
from synthesise_speech import RATE, write_manifest
from whisper_data import draw_sentence, speak

WINDOW_S = 30
SPEAKERS = (*VOICES["heard"]["en"], *VOICES["unheard"]["en"])


def window(number: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], str]:
    """Samples of a window by one speaker, and what is said in it; the last sentence is cut off."""
    n, parts, texts, length = WINDOW_S * RATE, list[NDArray[np.float32]](), list[str](), 0
    speaker = SPEAKERS[number % len(SPEAKERS)]
    while length < n:
        text = draw_sentence(rng)
        said = speak(text, speaker, 1000 * number + len(texts), rng).samples
        pause = rng.standard_normal(round(RATE * rng.uniform(0.1, 0.4))) * 10 ** (-65 / 20)
        parts += [said, pause.astype(np.float32)]
        length += len(said) + len(pause)
        texts.append(text)
    return np.concatenate(parts)[:n], " ".join(texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=720)
    parser.add_argument("--seed", type=int, default=40)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(given.seed), []
    for number in range(given.windows):
        samples, text = window(number, rng)
        soundfile.write(given.out / f"w{number:04d}.flac", samples, RATE, subtype="PCM_16")
        speaker = SPEAKERS[number % len(SPEAKERS)]
        rows.append({"path": f"w{number:04d}.flac", "speaker": speaker, "text": text})
    write_manifest(given.out, rows)


if __name__ == "__main__":
    main()
