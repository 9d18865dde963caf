"""Samples of a clip, from arrays or decoded: checked, downmixed, resampled, cut to length.

What is done to them is added to ``notes``; see `audio`.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from .errors import InputError

AudioArray = np.ndarray | torch.Tensor

SILENCE_PEAK = 1e-4
"""A clip whose every |sample| is below this (-80 dBFS) is called silent."""
LOUD_PEAK = 2.0
"""Floating-point samples above this are more likely unscaled PCM than a loud recording."""

RATES = (1_000, 1_000_000)
"""Lowest and highest rate of a recording, in Hz. Others are damaged headers, or kHz for Hz."""
MOST_CHANNELS = 64
"""Arrays of microphones have as many; a spectrogram, or a damaged header, more."""
_HUGE = 2.0**32
"""No sample is as large, in whatever unit; features of one that is would overflow."""


def unpack(
    source: object, sampling_rate: int
) -> tuple[Float32[np.ndarray, "channel sample"], int, list[str]]:
    """The samples of an in-memory clip, its rate, and notes on what was done to get there.

    Args:
        source: an array, or an array with its rate.
        sampling_rate: rate of a bare array, in Hz.

    Raises:
        InputError: neither, or a shape, dtype or rate that cannot be used.
    """
    notes: list[str] = []
    if isinstance(source, tuple) and len(source) == 2:
        samples, rate = source
        check_rate(rate, "the rate beside the array")
    else:
        samples, rate = source, sampling_rate
        notes.append(f"a bare array: taken to be at {sampling_rate} Hz")
    if not isinstance(samples, AudioArray):
        raise InputError(
            f"reading audio: got {type(source).__name__}, expected a path, the bytes of a file or "
            "an open one, a numpy array, a torch tensor, (array, sampling rate), or a mapping of "
            "array and sampling_rate. Pass a list of clips one by one."
        )
    array = as_array(samples)
    if array.dtype in (np.int16, np.int32):
        notes.append(f"{array.dtype} samples scaled to [-1, 1)")
        # Division by a power of two: the same float32 that libsndfile makes of the same PCM.
        array = array / float(-np.iinfo(array.dtype).min)
    elif not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"reading audio: got an array of {array.dtype}, expected floating point in [-1, 1], "
            "int16 or int32. Convert the samples first."
        )
    with np.errstate(over="ignore"):  # an overflow is infinite, and reported as such
        return _channels_first(array.astype(np.float32), notes), int(rate), notes


def as_array(samples: AudioArray | list[Any]) -> np.ndarray:
    """Samples of any dtype, lists of them as a dataset has them included, as an array.

    Raises:
        InputError: lists of different lengths, masked samples, or a tensor without values at hand.
    """
    try:
        if isinstance(samples, torch.Tensor):
            tensor = samples.detach().cpu()
            is_short = tensor.is_floating_point() and tensor.itemsize < 4
            return (tensor.float() if is_short else tensor).numpy()
        if np.ma.is_masked(samples):
            raise ValueError("some are masked")
        return np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"reading audio: got samples that are no array ({str(error)[:200]}), expected one of "
            "floating point, or channels of one length. Convert the samples first."
        ) from error


def _channels_first(array: np.ndarray, notes: list[str]) -> Float32[np.ndarray, "channel sample"]:
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2 or (array.shape[0] == array.shape[1] and array.size):
        raise InputError(
            f"reading audio: got an array of shape {array.shape}, expected (samples,), (channels, "
            "samples) or (samples, channels) with fewer channels than samples. Reshape it, or "
            "downmix it yourself."
        )
    if array.shape[0] < array.shape[1]:
        return array
    notes.append(f"shape {array.shape} read as (samples, channels)")
    return array.T


def check_samples(channels: Float32[np.ndarray, "channel sample"], rate: int, what: str) -> None:
    """Refuse a clip, by what it is called, that a model cannot hear.

    Raises:
        InputError: no samples, NaN, infinite or absurdly large ones, or too many channels.
    """
    if channels.size == 0:
        raise InputError(
            f"reading audio: {what} has no samples, expected a recording. Check how it was cut."
        )
    if len(channels) > MOST_CHANNELS:
        raise InputError(
            f"reading audio: {what} has {len(channels)} channels, expected at most "
            f"{MOST_CHANNELS}. Give the samples of a recording, not its spectrogram; if a file's "
            "header is damaged, export it again."
        )
    bad = ~(np.abs(channels) < _HUGE).all(axis=0)
    if bad.any():
        first = int(bad.argmax())
        raise InputError(
            f"reading audio: got NaN, infinite or absurdly large values in {int(bad.sum())} of "
            f"{bad.size} samples of {what}, the first at sample {first} ({first / rate:.3f} s); "
            "expected finite ones in [-1, 1]. Export the recording again."
        )


def downmix(
    channels: Float32[np.ndarray, "channel sample"], notes: list[str]
) -> Float32[np.ndarray, " sample"]:
    """The mean of the channels."""
    if len(channels) == 1:
        return channels[0]
    notes.append(f"{len(channels)} channels downmixed by their mean")
    return channels.mean(axis=0)


def resample(
    samples: Float32[np.ndarray, " sample"], rate: int, target: int, notes: list[str]
) -> Float32[np.ndarray, " resampled"]:
    """The clip at another rate, in Hz."""
    if rate != target:
        import soxr

        notes.append(f"resampled from {rate} Hz to {target} Hz (soxr HQ)")
        length = math.ceil(len(samples) * target / rate)
        samples = soxr.resample(samples, rate, target, quality="soxr_hq")
        samples = np.pad(samples, (0, max(0, length - len(samples))))[:length]
    return np.ascontiguousarray(samples, dtype=np.float32)


def fit_length(
    samples: Float32[np.ndarray, " sample"],
    rate: int,
    max_seconds: int | float | None,
    truncate: bool,
    what: str,
    notes: list[str],
) -> Float32[np.ndarray, " kept"]:
    """A clip that is not longer than ``max_seconds``.

    Raises:
        InputError: it is, and is not to be cut.
    """
    if max_seconds is None or len(samples) <= (limit := round(max_seconds * rate)):
        return samples
    if not truncate:
        raise too_long(what, len(samples) / rate, max_seconds)
    notes.append(f"truncated from {len(samples) / rate:.3f} s to {max_seconds:g} s")
    return samples[:limit].copy()


def too_long(what: str, seconds: float, limit: int | float) -> InputError:
    """The error of a clip that is longer than its limit, in seconds."""
    return InputError(
        f"reading audio: {what} lasts {seconds:.3f} s, expected at most {limit:g} s. "
        "Cut the recording, or pass truncate=True (-s truncate=true) to use its beginning."
    )


def warn_of_level(samples: Float32[np.ndarray, " sample"], what: str, notes: list[str]) -> None:
    """Say that a clip is silent, or far above full scale."""
    peak = float(np.abs(samples).max())
    if peak < SILENCE_PEAK:
        warn(f"silent: its peak is {peak:.2g} of full scale", what, notes)
    elif peak > LOUD_PEAK:
        warn(f"its peak is {peak:.4g} times full scale: unscaled PCM?", what, notes)


def warn(note: str, what: str, notes: list[str]) -> None:
    """Say something odd about a clip, as a note and as a warning."""
    notes.append(note)
    # Past read_audio, to the line that asked for the clip.
    warnings.warn(f"{what}: {note}", UserWarning, stacklevel=4)


def check_rate(rate: object, which: str) -> None:
    """Refuse a rate that no recording has.

    Raises:
        InputError: not a whole number of Hz, or outside `RATES`.
    """
    if (
        isinstance(rate, bool)
        or not isinstance(rate, int | np.integer)
        or not RATES[0] <= rate <= RATES[1]
    ):
        raise InputError(
            f"reading audio: got {rate!r} for {which}, expected a positive whole number of Hz, "
            f"from {RATES[0]} to {RATES[1]}. 16000 is the usual one."
        )
