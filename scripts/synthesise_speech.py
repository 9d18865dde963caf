"""Speaks sentences with a chosen emotion, and writes the bundled OB1 clips.

    python scripts/synthesise_speech.py     # writes experiments/assets/ob1

espeak-ng (package ``espeakng-loader``) speaks; emotion is prosody alone, the words stay neutral.
Each emotion is a deviation from the neutral setting, ``MANNERS`` below; ``strong`` takes it 1.6
times as far. Pitch and range are espeak's 0-99 scales, rate is a factor, level is in dB:

    emotion    pitch range  rate  level  tilt (dB/octave)  tremor  drive  rise
    neutral       0     0   1.00    0        0               0       0     0
    cheerful    +16   +28   1.08   +1.5     +1               0       0     0
    sad         -14   -22   0.88   -3       -2               0       0     0
    angry        +2    +8   1.08   +4       +1.5             0       2     0
    terrified   +22    -8   1.14    0        0               1       0     0
    surprised   +18   +14   0.95    0        0               0       0     0.2

``happy`` is ``cheerful`` under another name. ``tilt`` turns the spectrum about 500 Hz (bright or
dull), ``drive`` is a soft clipper (a rough voice), ``tremor`` is a 7 Hz wobble of pitch (4 %) and
loudness (35 %), ``rise`` lets the pitch climb from that share below to that share above. A voice is
one espeak voice; the OB1 clips use one voice per language (``en-us``, and ``cmn`` for Mandarin)
and, within a language, have the same number of samples: their rate is fitted to the length, so rate
is no cue there. In other clips ``rate_link`` draws how far rate follows the emotion.

espeak carries state from one utterance to the next, so what is reproducible bit for bit is a run of
calls in one process, not a call by itself.
"""

import argparse
import csv
import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from hooked_alm.experiments.materials.acoustics import describe_clip
from hooked_alm.experiments.materials.ob1 import SENTENCES, Intensity, Language, ob1_clip_names

Samples = NDArray[np.float64]

RATE = 16_000
SEED = 20
ASSETS = Path(__file__).resolve().parents[1] / "experiments" / "assets"
BASE_PITCH, BASE_RANGE = 50, 45
BASE_WPM: dict[Language, int] = {"en": 170, "zh": 180}
BASE_LEVEL_DBFS = -24.0
STRONG = 1.6
OB1_VOICE: dict[Language, str] = {"en": "en-us", "zh": "cmn"}
OB1_SAMPLES: dict[Language, int] = {"en": 48_000, "zh": 56_000}
LEAD_S, TAIL_S = 0.10, 0.08
"""Least silence before and after the speech of a fitted clip, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """Deviation of an emotion from neutral; units in the module docstring."""

    pitch: float = 0
    range: float = 0
    rate: float = 0
    """Relative change: 0.1 is ten per cent faster."""
    level_db: float = 0
    tilt_db: float = 0
    tremor: float = 0
    drive: float = 0
    rise: float = 0


MANNERS: dict[str, Manner] = {
    "neutral": Manner(),
    "cheerful": Manner(pitch=16, range=28, rate=0.08, level_db=1.5, tilt_db=1.0),
    "sad": Manner(pitch=-14, range=-22, rate=-0.12, level_db=-3.0, tilt_db=-2.0),
    "angry": Manner(pitch=2, range=8, rate=0.08, level_db=4.0, tilt_db=1.5, drive=2.0),
    "terrified": Manner(pitch=22, range=-8, rate=0.14, tremor=1.0),
    "surprised": Manner(pitch=18, range=14, rate=-0.05, rise=0.2),
}
MANNERS["happy"] = MANNERS["cheerful"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Offsets of one clip from its emotion's setting, so that no two clips are alike."""

    pitch: float = 0
    range: float = 0
    rate: float = 1.0
    rate_link: float = 1.0
    """Degree to which rate follows the emotion: 0 not at all, 1 fully."""
    level_db: float = 0
    tilt_db: float = 0
    tremor_hz: float = 7.0
    lead_s: float = LEAD_S
    tail_s: float = TAIL_S
    noise_dbfs: float = -70.0


def draw_jitter(rng: np.random.Generator) -> Jitter:
    """A random clip's offsets: too small to turn one emotion into another."""
    return Jitter(
        pitch=rng.uniform(-4, 4),
        range=rng.uniform(-5, 5),
        rate=rng.uniform(0.80, 1.10),
        rate_link=rng.uniform(0, 1),
        level_db=rng.uniform(-1, 1),
        tilt_db=rng.uniform(-0.3, 0.3),
        tremor_hz=rng.uniform(6.0, 8.0),
        lead_s=rng.uniform(0.03, 0.25),
        tail_s=rng.uniform(0.03, 0.25),
        noise_dbfs=rng.uniform(-75, -60),
    )


class Espeak:
    """The espeak-ng library, called through ctypes; one per process."""

    SYNCHRONOUS, CHARS_UTF8 = 2, 1
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = self._lib.espeak_Initialize(self.SYNCHRONOUS, 200, data, 0)
        if self.rate <= 0:
            raise RuntimeError(
                f"starting espeak-ng: got rate {self.rate}, expected a positive one."
            )
        self._parts: list[NDArray[np.int16]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        # Kept on self: the library holds the pointer, and Python would free it.
        self._callback = kind(self._collect)
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, *, pitch: int, spread: int, wpm: int) -> Samples:
        """The utterance at the library's own rate, without the silence around it."""
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"choosing an espeak voice: got {voice!r}, which it does not know.")
        settings = (self.RATE, wpm), (self.VOLUME, 60), (self.PITCH, pitch), (self.RANGE, spread)
        for parameter, value in settings:
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._parts.clear()
        # Choosing a voice seeds the breath noise of some (f2, f3, f5) from the clock.
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
        data = text.encode() + b"\0"
        self._lib.espeak_Synth(data, len(data), 0, 1, 0, self.CHARS_UTF8, None, None)
        return trim(np.concatenate(self._parts) / 32768, self.rate)


@cache
def espeak() -> Espeak:
    """The process's one engine."""
    return Espeak()


def trim(samples: Samples, rate: int) -> Samples:
    """Cut leading and trailing silence off: 10 ms blocks 50 dB under the loudest one."""
    block = rate // 100
    blocks = samples[: samples.size // block * block].reshape(-1, block)
    level = np.sqrt((blocks**2).mean(axis=1))
    loud = np.flatnonzero(level > level.max() * 10 ** (-50 / 20))
    return samples[loud[0] * block : (loud[-1] + 1) * block]


def make_clip(
    text: str,
    language: Language,
    voice: str,
    emotion: str,
    intensity: Intensity,
    seed: int,
    *,
    jitter: Jitter | None = None,
    n_samples: int | None = None,
) -> NDArray[np.float32]:
    """Speak a clip: mono, 16 kHz, full scale 1.0.

    Args:
        text: words to speak.
        language: language of the text.
        voice: an espeak voice name, for example ``cmn+f2``.
        emotion: manner of speaking, a key of ``MANNERS``.
        intensity: ``strong`` takes the emotion's deviation further.
        seed: seed of the noise floor, and of the jitter when none is given.
        jitter: offsets of this clip; drawn from ``seed`` if None.
        n_samples: exact length; the rate is then fitted, and the rest is silence.
    """
    rng = np.random.default_rng(seed)
    jitter = jitter if jitter is not None else draw_jitter(rng)
    manner, by = MANNERS[emotion], STRONG if intensity == "strong" else 1.0
    pitch = _whole(BASE_PITCH + by * manner.pitch + jitter.pitch, 0, 99)
    spread = _whole(BASE_RANGE + by * manner.range + jitter.range, 0, 99)
    if n_samples is None:
        follow = 1 + by * manner.rate * jitter.rate_link
        wpm = _whole(BASE_WPM[language] * jitter.rate * follow, 80, 400)
        speech = espeak().say(text, voice, pitch=pitch, spread=spread, wpm=wpm)
    else:
        room_s = n_samples / RATE - LEAD_S - TAIL_S
        speech = fit_rate(text, voice, pitch=pitch, spread=spread, room_s=room_s)
    speech = shape_voice(speech, manner, by, jitter)
    level = BASE_LEVEL_DBFS + by * manner.level_db + jitter.level_db
    speech *= 10 ** (level / 20) / np.sqrt(np.mean(speech**2))

    lead, tail = round(jitter.lead_s * RATE), round(jitter.tail_s * RATE)
    if n_samples is not None:
        tail = n_samples - lead - speech.size
        assert tail >= 0, "the fitted speech does not fit"
    clip = np.concatenate([np.zeros(lead), speech, np.zeros(tail)])
    clip += rng.standard_normal(clip.size) * 10 ** (jitter.noise_dbfs / 20)
    return np.clip(clip, -0.999, 0.999).astype(np.float32)


def fit_rate(text: str, voice: str, *, pitch: int, spread: int, room_s: float) -> Samples:
    """The utterance at the slowest whole rate at which it lasts no longer than ``room_s``."""
    low, high = 80, 400
    best: Samples | None = None
    while low < high:
        wpm = (low + high) // 2
        speech = espeak().say(text, voice, pitch=pitch, spread=spread, wpm=wpm)
        if speech.size / espeak().rate <= room_s:
            high, best = wpm, speech
        else:
            low = wpm + 1
    if best is None:
        raise ValueError(f"fitting {text!r} into {room_s:.2f} s: no rate is fast enough.")
    return best


def shape_voice(speech: Samples, manner: Manner, by: float, jitter: Jitter) -> Samples:
    """Apply tremor, rise, drive and tilt, then resample to 16 kHz."""
    time = np.arange(speech.size) / espeak().rate
    if manner.tremor:
        omega, depth = 2 * np.pi * jitter.tremor_hz, by * manner.tremor
        # Warping time by sin(wt)/w changes the local speed, hence the pitch, by cos(wt).
        warped = time + 0.04 * depth * np.sin(omega * time) / omega
        speech = np.interp(warped, time, speech) * (1 + 0.35 * depth * np.sin(omega * time))
    if manner.rise:
        # Local speed, hence pitch, goes from 1 - depth to 1 + depth; the length stays.
        depth = by * manner.rise
        speech = np.interp(time + depth * (time**2 / time[-1] - time), time, speech)
    if manner.drive:
        speech = np.tanh(by * manner.drive * speech / (3 * speech.std()))
    tilt = by * manner.tilt_db + jitter.tilt_db
    spectrum = np.fft.rfft(speech)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(speech.size, 1 / espeak().rate), 60) / 500)
    speech = np.fft.irfft(spectrum * 10 ** (tilt * octaves / 20), speech.size)
    resampled: Samples = soxr.resample(speech, espeak().rate, RATE, quality="HQ")
    return resampled


def _whole(value: float, low: int, high: int) -> int:
    return int(np.clip(round(value), low, high))


def write_ob1(folder: Path) -> None:
    """Writes the 18 clips and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, name in enumerate(ob1_clip_names()):
        clip = make_clip(
            SENTENCES[name.language], name.language, OB1_VOICE[name.language], name.emotion,
            name.intensity, SEED + index, jitter=Jitter(), n_samples=OB1_SAMPLES[name.language],
        )  # fmt: skip
        path = folder / f"{name.stem}.wav"
        soundfile.write(path, clip, RATE, subtype="PCM_16")
        stored, rate = soundfile.read(path, dtype="float32")
        measured = {
            key: round(value, 4) for key, value in asdict(describe_clip(stored, rate)).items()
        }
        rows.append(
            {"path": path.name, "language": name.language, "emotion": name.emotion}
            | {"intensity": name.intensity, "duration_s": measured.pop("duration_s")}
            | {"sample_rate": rate, **measured}
            | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        )
    write_manifest(folder, rows)


def write_manifest(folder: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write what is known of a folder's clips, a row each."""
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the bundled OB1 clips.")
    parser.add_argument("--out", type=Path, default=ASSETS / "ob1")
    write_ob1(parser.parse_args().out)
