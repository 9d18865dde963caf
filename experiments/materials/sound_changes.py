"""Changes of a recording that leave all but one thing as it was: noise, band, level, pitch, pace.

Pitch, pitch range and pace are changed by pitch-synchronous overlap-add: the sound is cut into
grains of two periods around marks a period apart, and the grains are laid at new marks.

Source: TD-PSOLA, Moulines and Charpentier 1990, "Pitch-synchronous waveform processing techniques
for text-to-speech synthesis using diphones"; `acoustics.track_f0` for the periods.
"""

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy import signal

from .acoustics import FRAME_S, HOP_S, Signal, track_f0

FULL_SCALE = 2**15
BAND_ORDER = 8
UNVOICED_S = 0.010
"""Distance of marks where there is no pitch."""


def level_db(samples: Signal) -> float:
    """RMS level relative to full scale; -inf for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return 10 * float(np.log10(power)) if power else -np.inf


def in_16_bits(samples: Signal) -> Float32[np.ndarray, " sample"]:
    """The samples as a 16-bit file holds them; what is beyond full scale is cut."""
    whole = np.clip(np.round(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    return (whole / FULL_SCALE).astype(np.float32)


def add_noise(samples: Signal, snr_db: int | float, seed: int) -> Signal:
    """The sound in white noise, whose power is exactly ``snr_db`` below its own."""
    noise = np.random.default_rng(seed).standard_normal(samples.size)
    # What of the noise goes with the sound would be more or less of the sound.
    noise -= samples * (noise @ samples) / max(float(samples @ samples), np.finfo(float).tiny)
    gain = 10 ** ((level_db(samples) - level_db(noise) - snr_db) / 20)
    return samples + gain * noise


def signal_to_noise(clean: Signal, noisy: Signal) -> float:
    """Power of what two sounds share over that of the rest, in dB, at whatever level either is.

    NaN for sounds of unequal length or silence; inf where nothing is left.
    """
    power = float(clean @ clean)
    if clean.shape != noisy.shape or not power:
        return np.nan
    shared = clean * (float(noisy @ clean) / power)
    rest = level_db(noisy - shared)
    return level_db(shared) - rest if np.isfinite(rest) else np.inf


def band_limit(samples: Signal, rate: int, low_hz: int | float, high_hz: int | float) -> Signal:
    """The sound between two frequencies (Butterworth, forwards and backwards: no delay)."""
    high = min(high_hz, 0.49 * rate)
    sos = signal.butter(BAND_ORDER, [low_hz, high], "bandpass", fs=rate, output="sos")
    return np.asarray(signal.sosfiltfilt(sos, samples))


def resynthesise(
    samples: Signal,
    rate: int,
    *,
    pitch: int | float = 1,
    spread: int | float = 1,
    pace: int | float = 1,
) -> Signal:
    """The sound with another pitch, pitch range or pace; as long as it was.

    With all three at 1 it is the sound itself.

    Args:
        samples: mono, shape (n,).
        rate: sampling rate in Hz.
        pitch: factor of the fundamental frequency.
        spread: factor of its distance from the median, in octaves.
        pace: factor of the speed; 1 or more, silence fills the end.
    """
    track = track_f0(samples, rate)
    marks, f0 = _marks(samples.size, rate, track)
    edges = [*marks.tolist(), samples.size]
    is_voiced = np.isfinite(f0)
    middle = np.median(track[np.isfinite(track)]) if is_voiced.any() else np.nan
    factors = np.where(is_voiced, pitch * (f0 / middle) ** (spread - 1), 1.0)
    out, weight = np.zeros(samples.size), np.zeros(samples.size)
    at, end = 0.0, samples.size / pace
    while at < end:
        mark = int(np.abs(marks - at * pace).argmin())
        before, behind = edges[max(mark - 1, 0)], edges[mark + 1]
        window = _rise_and_fall(edges[mark] - before, behind - edges[mark], mark == len(marks) - 1)
        first = round(at) - (edges[mark] - before)
        low, high = max(first, 0), min(first + window.size, out.size)
        part = slice(low - first, max(high - first, 0))
        out[low:high] += window[part] * samples[before:behind][part]
        weight[low:high] += window[part]
        at += float((behind - edges[mark]) / factors[mark])
    return out / np.maximum(weight, 1.0)


def _marks(
    n: int, rate: int, track: Signal
) -> tuple[Int[np.ndarray, " mark"], Float[np.ndarray, " mark"]]:
    """Samples a period apart, or `UNVOICED_S`, from the first on; and the pitch there, or NaN."""
    marks, f0, at = [], [], 0
    while at < n:
        frame = round((at / rate - FRAME_S / 2) / HOP_S)
        marks.append(at)
        f0.append(float(track[min(max(frame, 0), track.size - 1)]) if track.size else np.nan)
        at += round(rate / f0[-1] if np.isfinite(f0[-1]) else UNVOICED_S * rate)
    return np.array(marks), np.array(f0)


def _rise_and_fall(rise: int, fall: int, is_last: bool) -> Signal:
    """The window of a grain: 1 at its mark, 0 at those beside it; grains that stay add up to 1."""
    up, down = np.arange(rise) / max(rise, 1) - 1, np.arange(fall) / max(fall, 1)
    return np.asarray(
        0.5 + 0.5 * np.cos(np.pi * np.concatenate([up, 0 * down if is_last else down]))
    )
