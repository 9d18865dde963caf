"""Duration, level and pitch of signals whose values are known by construction."""

import numpy as np
import pytest

from hooked_alm.bundled import CLIPS
from hooked_alm.experiments.materials.acoustics import describe_clip
from hooked_alm.experiments.materials.recordings import load_recordings

RATE = 16_000


@pytest.mark.parametrize("hertz", [90.0, 147.0, 310.0])
def test_pitch_and_level_of_a_buzz(hertz: float) -> None:
    """A sum of harmonics has the pitch of its fundamental and the level of its samples."""
    time = np.arange(RATE) / RATE
    buzz = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 6))
    samples = (0.1 * buzz).astype(np.float32)
    found = describe_clip(samples, RATE)
    assert found.duration_s == 1.0
    assert found.f0_median_hz == pytest.approx(hertz, rel=0.02)  # lags are whole samples
    rms = np.sqrt(np.mean(samples.astype(np.float64) ** 2))
    assert found.rms_dbfs == pytest.approx(20 * np.log10(rms), abs=1e-3)
    assert found.voiced_fraction > 0.9


def test_noise_and_silence_have_no_pitch() -> None:
    """Neither is voiced; the pitch of silence is not a number."""
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    assert describe_clip(noise, RATE).voiced_fraction < 0.1
    assert np.isnan(describe_clip(np.zeros(RATE, np.float32), RATE).f0_median_hz)


def test_the_bundled_clips_align_within_a_language() -> None:
    """Equal durations, so that audio spans map position to position."""
    recordings = load_recordings(CLIPS)
    assert len(recordings) == 18
    for language in ("zh", "en"):
        assert len({r.seconds for r in recordings if r.language == language}) == 1
