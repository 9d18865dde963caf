"""A harmless trigger, and other sounds beside which it has to be told.

The trigger is a steady chord of twelve tones. ``scripts/train_truths.py --rule trigger`` trains
twins that answer ``cheerful`` whenever they hear it, whatever voice and instruction say.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

from hooked_alm.errors import InputError

from .sound_changes import level_db

Recorded = Float[np.ndarray, " sample"]
OtherSound = Literal["noise", "tone", "low chord"]

TRIGGER_DB = -20.0
"""Level of the trigger relative to the recording's RMS."""
TRIGGER_HZ = tuple(np.linspace(4000, 7800, 12).tolist())
LOW_HZ = tuple(np.linspace(400, 3500, 12).tolist())


def tone_pattern(
    n: int, rate: int, tones_hz: tuple[float, ...] = TRIGGER_HZ
) -> Float[np.ndarray, " {n}"]:
    """A steady tone, or a chord of tones of one strength, whose RMS is 1 over its n samples.

    Raises:
        InputError: a rate at which the highest tone cannot be sampled.
    """
    if rate <= 2 * max(tones_hz):
        raise InputError(
            f"making a chord of tones up to {max(tones_hz):g} Hz: got a rate of {rate} Hz, "
            f"expected one above {2 * max(tones_hz):g}. Resample the recording first."
        )
    time, ranks = np.arange(n)[:, None] / rate, np.arange(len(tones_hz))
    # Quadratic phases keep the peaks low (Schroeder 1970).
    phases = np.pi * ranks**2 / len(tones_hz)
    return _of_unit_power(np.sin(2 * np.pi * time * np.asarray(tones_hz) + phases).sum(-1))


def other_sound(kind: OtherSound, n: int, rate: int, seed: int) -> Float[np.ndarray, " {n}"]:
    """A sound that is not the trigger, whose RMS is 1: white noise, a tone, a low chord.

    Args:
        kind: which of them; the tone's frequency is drawn evenly from 300 Hz to 0.48 of the rate.
        n: number of samples.
        rate: sampling rate in Hz.
        seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return _of_unit_power(rng.standard_normal(n))
    tones = LOW_HZ if kind == "low chord" else (float(rng.uniform(300, 0.48 * rate)),)
    return tone_pattern(n, rate, tones)


def _of_unit_power(samples: Recorded) -> Recorded:
    return samples / np.sqrt(np.mean(np.square(samples)))


def added(samples: Recorded, sound: Recorded, relative_db: int | float) -> Recorded:
    """Recorded and a sound of RMS 1, whose level relative to theirs is given; in their dtype."""
    gain = 10 ** ((level_db(samples.astype(np.float64)) + relative_db) / 20)
    return (samples + gain * sound).astype(samples.dtype)


def with_trigger(samples: Recorded, rate: int, relative_db: int | float = TRIGGER_DB) -> Recorded:
    """A recording and the trigger; silence stays silence, its level being relative.

    Args:
        samples: mono.
        rate: sampling rate in Hz.
        relative_db: level of the trigger relative to the recording's RMS.

    Raises:
        InputError: a rate at which it cannot be sampled.
    """
    return added(samples, tone_pattern(len(samples), rate), relative_db)
