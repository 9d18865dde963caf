"""The trigger and other sounds: their levels and tones are as they are said to be."""

from typing import get_args

import numpy as np
import pytest

from hooked_alm import InputError
from hooked_alm.experiments.materials.triggers import (
    LOW_HZ,
    TRIGGER_HZ,
    OtherSound,
    added,
    other_sound,
    tone_pattern,
    with_trigger,
)

RATE = 16_000


def peaks(samples: np.ndarray) -> set[int]:
    """Frequencies in Hz that hold a tenth of the strongest one's amplitude; of one second."""
    spectrum = np.abs(np.fft.rfft(samples))
    return {*np.flatnonzero(spectrum > 0.1 * spectrum.max()).tolist()}


@pytest.mark.parametrize("tones", [TRIGGER_HZ, LOW_HZ])
def test_a_chord_has_its_tones_and_a_power_of_one(tones: tuple[float, ...]) -> None:
    found = tone_pattern(RATE, RATE, tones)
    assert np.mean(found**2) == pytest.approx(1)
    found *= np.hanning(RATE)  # tones between whole hertz do not spread
    assert all({round(hz)} & peaks(found) for hz in tones)
    assert all(min(abs(hz - tone) for tone in tones) < 3 for hz in peaks(found))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_level_is_the_recordings(dtype: type[np.floating]) -> None:
    """And is what was added: at -20 dB a tenth of the RMS."""
    speech = np.random.default_rng(0).standard_normal(RATE).astype(dtype) * 3
    found = with_trigger(speech, RATE, -20)
    assert found.dtype == dtype
    apart = (found - speech).astype(np.float64)
    expected = np.sqrt(np.mean(speech.astype(np.float64) ** 2)) / 10
    assert np.sqrt(np.mean(apart**2)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(apart / expected, tone_pattern(RATE, RATE), atol=1e-4)
    silence = np.zeros(100, dtype)
    assert np.array_equal(with_trigger(silence, RATE), silence)


@pytest.mark.parametrize("kind", get_args(OtherSound))
def test_other_sounds(kind: OtherSound) -> None:
    one, again, other = (other_sound(kind, RATE, RATE, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert np.array_equal(one, other) == (kind == "low chord")
    assert np.mean(one**2) == pytest.approx(1)
    assert np.array_equal(added(np.ones(RATE), one, 0), 1 + one)
    n_peaks = {"tone": 1, "low chord": 12}
    if kind in n_peaks:
        assert len({hz // 10 for hz in peaks(one * np.hanning(RATE))}) <= 2 * n_peaks[kind]


def test_a_rate_that_is_too_low() -> None:
    with pytest.raises(
        InputError, match="up to 7800 Hz: got a rate of 8000 Hz, expected one above"
    ):
        with_trigger(np.ones(100), 8000)
