"""What a clip sounds like, in five numbers: duration, level, pitch, pitch spread, voicing.

Loudness and pitch give an emotion away before any model has heard it; a report lists them beside
its results, for the bundled clips and for a user's own recordings alike.

Fundamental frequency: normalised autocorrelation of 40 ms Hann-windowed frames every 10 ms, divided
by the window's own autocorrelation (Boersma 1993, "Accurate short-term analysis of the fundamental
frequency", equation 9), with the peak refined by a parabola.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]

FRAME_S = 0.040
HOP_S = 0.010
F0_MIN_HZ = 60.0
F0_MAX_HZ = 500.0
VOICED_AT = 0.55
"""Normalised autocorrelation from which a frame counts as voiced."""
FLOOR_DB = -35.0
"""Frames this far under the loudest one are silence."""
OCTAVE_SLACK = 0.90
"""The shortest lag reaching this share of the best peak wins: multiples of a period score alike."""
SILENCE_RMS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipDescription:
    """Acoustic summary of one clip; pitch is nan where nothing is voiced."""

    duration_s: float
    rms_dbfs: float
    """Level of the whole clip relative to full scale; -inf for digital silence."""
    f0_median_hz: float
    f0_iqr_hz: float
    """75th minus 25th percentile of the voiced frames."""
    voiced_fraction: float
    """Voiced frames over all frames."""


HEARD = tuple(one.name for one in fields(ClipDescription))
"""What `describe_clip` tells of a clip, by the names that tables of clips have."""


def describe_clip(samples: NDArray[np.floating], rate: int) -> ClipDescription:
    """Duration, level, pitch and voicing of one clip.

    Args:
        samples: mono, full scale 1.0, shape (n,).
        rate: sampling rate in Hz.
    """
    x = np.asarray(samples, dtype=np.float64)
    rms = float(np.sqrt(np.mean(x**2))) if x.size else 0.0
    f0 = track_f0(x, rate)
    voiced = f0[np.isfinite(f0)]
    low, median, high = np.percentile(voiced, [25, 50, 75]) if voiced.size else [np.nan] * 3
    return ClipDescription(
        duration_s=x.size / rate,
        rms_dbfs=20 * float(np.log10(rms)) if rms > 0 else -np.inf,
        f0_median_hz=float(median),
        f0_iqr_hz=float(high - low),
        voiced_fraction=voiced.size / f0.size if f0.size else 0.0,
    )


def track_f0(samples: NDArray[np.floating], rate: int) -> Signal:
    """Fundamental frequency in Hz per 10 ms frame, nan where unvoiced; empty under 40 ms.

    Args:
        samples: mono, shape (n,).
        rate: sampling rate in Hz.
    """
    x = np.asarray(samples, dtype=np.float64)
    length, hop = round(FRAME_S * rate), round(HOP_S * rate)
    if x.size < length:
        return np.empty(0)
    frames = np.lib.stride_tricks.sliding_window_view(x, length)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    power = np.sqrt(np.mean(frames**2, axis=1))
    loud = (power > SILENCE_RMS) & (power > power.max() * 10 ** (FLOOR_DB / 20))

    lag_min, lag_max = int(rate / F0_MAX_HZ), int(np.ceil(rate / F0_MIN_HZ))
    correlation = _autocorrelation(frames, lag_max + 2)
    f0 = np.full(len(frames), np.nan)
    for i in np.flatnonzero(loud):
        lag = _best_lag(correlation[i], lag_min, lag_max)
        if lag is not None:
            f0[i] = rate / lag
    return f0


def _autocorrelation(frames: Signal, lags: int) -> Signal:
    """Autocorrelation at lags 0..lags-1, free of the window's taper and of the frame's energy."""
    length = frames.shape[1]
    size = 1 << (2 * length - 1).bit_length()
    window = np.hanning(length)

    def correlate(x: Signal) -> Signal:
        return np.fft.irfft(np.abs(np.fft.rfft(x, size)) ** 2, size)[..., :lags]

    taper = correlate(window)
    raw = correlate(frames * window)
    energy = np.maximum(raw[:, :1], 1e-20)
    return raw / energy * (taper[0] / taper)


def _best_lag(r: Signal, lag_min: int, lag_max: int) -> float | None:
    """Lag in samples of the pitch period, or None for an unvoiced frame."""
    inner = r[lag_min : lag_max + 1]
    left, right = r[lag_min - 1 : lag_max], r[lag_min + 1 : lag_max + 2]
    peaks = np.flatnonzero((inner > left) & (inner >= right) & (inner > VOICED_AT))
    if not peaks.size:
        return None
    first = peaks[inner[peaks] >= OCTAVE_SLACK * inner[peaks].max()][0]
    before, top, after = left[first], inner[first], right[first]
    curve = before - 2 * top + after
    return float(lag_min + first + (0.5 * (before - after) / curve if curve < 0 else 0.0))
