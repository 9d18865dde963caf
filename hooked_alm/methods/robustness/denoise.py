"""Noise taken off a waveform: a defence on the input, and a donor that needs no clean clip.

Source: noisereduce 3.0 (Sainburg 2020), stationary spectral gating with the clip as its own
noise; M-SP-3, M-SP-4.
"""

import numpy as np
from jaxtyping import Float
from scipy.signal import fftconvolve, istft, stft

N_FFT = 1024
N_STD = 1.5
"""Standard deviations above a band's mean level, in dB, at which it is heard."""
FLOOR_DB = 80.0
"""Below a band's loudest moment, levels are this much lower at most."""
SMOOTH_HZ, SMOOTH_MS = 500.0, 50.0


def spectral_gate(
    samples: Float[np.ndarray, " sample"], sampling_rate: int
) -> Float[np.ndarray, " sample"]:
    """Samples in which every band is heard only where it is well above its mean level.

    A cell of the spectrogram passes where its level in dB exceeds the mean of its band by 1.5
    standard deviations; the mask is smoothed by a triangle of 500 Hz by 50 ms.

    Args:
        samples: of a clip; one shorter than a window of 1024 comes back as it is.
        sampling_rate: in Hz.
    """
    if len(samples) < N_FFT:
        return samples
    shape = {"nperseg": N_FFT, "noverlap": N_FFT - N_FFT // 4}
    spectrum = stft(samples.astype(np.float64), padded=False, **shape)[2]
    level = 20 * np.log10(np.abs(spectrum) + np.finfo(np.float64).eps)
    level = np.maximum(level, level.max(axis=-1, keepdims=True) - FLOOR_DB)
    threshold = level.mean(axis=1) + N_STD * level.std(axis=1)
    mask = (level > threshold[:, None]).astype(np.float64)
    n_bands = max(int(SMOOTH_HZ / (sampling_rate / (N_FFT / 2))), 1)
    n_frames = max(int(SMOOTH_MS / (N_FFT / 4 / sampling_rate * 1000)), 1)
    weights = np.outer(_triangle(n_bands), _triangle(n_frames))
    mask = fftconvolve(mask, weights / weights.sum(), mode="same")
    heard = istft(spectrum * mask, **shape)[1][: len(samples)]
    return np.pad(heard, (0, len(samples) - len(heard))).astype(samples.dtype)


def _triangle(n: int) -> Float[np.ndarray, " cell"]:
    """Weights that rise to 1 over ``n`` cells and fall again, without the zeros at its ends."""
    rise = np.linspace(0, 1, n + 1, endpoint=False)
    return np.concatenate([rise, np.linspace(1, 0, n + 2)])[1:-1]
