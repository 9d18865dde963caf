"""The spectral gate: quiet noise goes, and a burst stays."""

import numpy as np

from hooked_alm.methods.robustness.denoise import spectral_gate

RATE = 16_000


def test_noise_goes_and_a_burst_stays() -> None:
    """A short burst in a noisy clip; one that lasts half of it counts as its noise."""
    rng, time = np.random.default_rng(0), np.arange(RATE) / RATE
    noise, burst = rng.normal(0, 0.01, RATE), rng.normal(0, 0.3, RATE)
    quiet, loud = time < 0.3, (time > 0.45) & (time < 0.5)
    for stop, kept in ((0.55, True), (0.95, False)):
        clip = (noise + burst * ((time > 0.4) & (time < stop))).astype(np.float32)
        found = spectral_gate(clip, RATE)
        assert found.dtype == np.float32
        assert found.shape == clip.shape
        assert np.square(found[quiet]).mean() < 0.1 * np.square(clip[quiet]).mean()
        assert (np.square(found[loud]).mean() > 0.5 * np.square(clip[loud]).mean()) == kept


def test_silence_and_what_is_too_short() -> None:
    assert not spectral_gate(np.zeros(5000, np.float32), RATE).any()
    short = np.ones(500, np.float32)
    np.testing.assert_array_equal(spectral_gate(short, RATE), short)
