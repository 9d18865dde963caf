"""Changes of sounds whose pitch, power and duration are known by construction."""

import numpy as np
import pytest
import soundfile

from hooked_alm.bundled import CLIPS
from hooked_alm.experiments.materials.acoustics import track_f0
from hooked_alm.experiments.materials.sound_changes import (
    add_noise,
    band_limit,
    in_16_bits,
    level_db,
    resynthesise,
    signal_to_noise,
)

RATE = 16_000
MEDIAN_HZ, SPREAD_ST = 120, 3.6


def buzz() -> np.ndarray:
    """Two seconds of harmonics, whose pitch swings around 120 Hz, by 3.6 semitones."""
    time = np.arange(2 * RATE) / RATE
    hertz = MEDIAN_HZ * 2 ** (SPREAD_ST / 12 * np.sin(3 * np.pi * time))
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    return 0.1 * sum(np.sin(k * phase) / k for k in range(1, 12))


def pitch_of(samples: np.ndarray) -> tuple[float, float]:
    """Median in Hz, and standard deviation in semitones."""
    f0 = track_f0(samples, RATE)
    f0 = f0[np.isfinite(f0)]
    return float(np.median(f0)), float(np.std(12 * np.log2(f0)))


def clip(name: str) -> np.ndarray:
    return soundfile.read(CLIPS / f"{name}.wav")[0]


def test_unchanged_grains_add_up_to_the_sound() -> None:
    for samples in (buzz(), clip("zh_angry_strong"), np.zeros(RATE), np.full(100, 0.5)):
        np.testing.assert_allclose(resynthesise(samples, RATE), samples, atol=1e-15, rtol=0)


@pytest.mark.parametrize("factor", [0.8, 1.26])
def test_pitch_moves_by_its_factor_and_nothing_else(factor: float) -> None:
    found = resynthesise(buzz(), RATE, pitch=factor)
    assert len(found) == 2 * RATE
    before, after = pitch_of(buzz()), pitch_of(found)
    assert after[0] == pytest.approx(factor * before[0], rel=0.01)
    assert after[1] == pytest.approx(before[1], rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_pitch_range_is_scaled_around_the_median(factor: float) -> None:
    before, after = pitch_of(buzz()), pitch_of(resynthesise(buzz(), RATE, spread=factor))
    assert after[0] == pytest.approx(before[0], rel=0.01)
    assert after[1] == pytest.approx(factor * before[1], rel=0.02)


def test_a_faster_sound_ends_earlier_at_its_pitch() -> None:
    found = resynthesise(buzz(), RATE, pace=1.25)
    assert len(found) == 2 * RATE
    end = np.flatnonzero(np.abs(found) > 1e-3)[-1] / RATE
    assert end == pytest.approx(2 / 1.25, abs=0.02)  # two periods
    assert pitch_of(found)[0] == pytest.approx(MEDIAN_HZ, rel=0.02)
    # Where it swings, it swings 1.25 times as fast: a fifth of the way, it is where a quarter was.
    track, original = track_f0(found, RATE), track_f0(buzz(), RATE)
    assert track[80] == pytest.approx(original[100], rel=0.03)


def test_speech_is_changed_as_a_buzz_is() -> None:
    before = pitch_of(clip("en_sad_normal"))[0]
    after = pitch_of(resynthesise(clip("en_sad_normal"), RATE, pitch=1.26))[0]
    assert after == pytest.approx(1.26 * before, rel=0.01)


def test_noise_has_the_power_that_was_asked_for() -> None:
    samples = clip("en_sad_normal")
    noisy = add_noise(samples, 10, seed=3)
    noise = noisy - samples
    power = 10 * np.log10((samples**2).mean() / (noise**2).mean())
    assert power == pytest.approx(10, abs=1e-9)
    assert not np.array_equal(noisy, add_noise(samples, 10, seed=4))
    # At whatever level it is played.
    assert signal_to_noise(samples, 3 * noisy) == pytest.approx(10, abs=1e-9)
    assert signal_to_noise(samples, samples) == np.inf
    assert np.isnan(signal_to_noise(samples, samples[1:]))
    assert np.isnan(signal_to_noise(np.zeros(9), np.ones(9)))


def test_a_band_keeps_what_is_in_it() -> None:
    time = np.arange(RATE) / RATE
    tones = {hertz: np.sin(2 * np.pi * hertz * time) for hertz in (100, 1000, 6000)}
    found = band_limit(sum(tones.values()), RATE, 300, 3400)
    inner = slice(RATE // 4, -RATE // 4)
    kept = {hertz: 2 * (found * tone)[inner].mean() for hertz, tone in tones.items()}
    assert kept[1000] == pytest.approx(1, abs=1e-3)  # and no delay, which would turn it
    assert kept[100] == pytest.approx(0, abs=1e-3)
    assert kept[6000] == pytest.approx(0, abs=1e-3)


def test_levels_and_16_bits() -> None:
    assert level_db(np.full(5, 0.1)) == pytest.approx(-20)
    assert level_db(np.zeros(5)) == -np.inf
    found = in_16_bits(np.array([0.0, 1 / 32768, 1.4 / 32768, 2.0, -2.0]))
    assert found.tolist() == [0.0, 1 / 32768, 1 / 32768, 32767 / 32768, -1.0]
