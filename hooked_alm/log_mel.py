"""Whisper's log-mel spectrogram with a gradient: from a waveform to a front-end's windows."""

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .audio import Waveform
from .errors import InputError
from .frontend import FrontEnd

LONGEST = 2**24
"""Samples that float32 can count: over 17 minutes at 16 kHz."""


def log_mel(
    samples: Float[Tensor, "*window sample"], extractor: Any
) -> Float[Tensor, "*window mel frame"]:
    """Log-mel spectrogram, by the operations of transformers' extractor: the same values.

    Bins far below the loudest one of their window are set to a floor that depends on it, and pass
    their gradient to it; where nothing is heard there is none.

    Args:
        samples: windows as the extractor pads them.
        extractor: ``WhisperFeatureExtractor``.

    Source: transformers 5.23 ``WhisperFeatureExtractor._torch_extract_fbank_features``.
    """
    window = torch.hann_window(extractor.n_fft, device=samples.device)
    spectrum = torch.stft(
        samples, extractor.n_fft, extractor.hop_length, window=window, return_complex=True
    )
    power = (spectrum[..., :-1].abs() ** 2).contiguous()
    filters = torch.from_numpy(extractor.mel_filters).to(samples.device, torch.float32)
    mel = torch.clamp(filters.T @ power, min=1e-10).log10()
    loudest = mel.amax(dim=(-2, -1), keepdim=True)
    return (torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0


def samples_with_gradient(source: Any, sampling_rate: int) -> Float[Tensor, " sample"] | None:
    """The samples of a clip where they are a tensor that requires a gradient, else None.

    Args:
        source: what ``read_audio`` takes.
        sampling_rate: the model's, in Hz.

    Raises:
        InputError: such a tensor that would have to be mixed down or resampled.
    """
    samples, rate = source if isinstance(source, tuple) else (source, sampling_rate)
    if not (isinstance(samples, Tensor) and samples.requires_grad):
        return None
    if samples.ndim != 1 or rate != sampling_rate:
        raise InputError(
            f"hearing samples with a gradient: got shape {list(samples.shape)} at {rate} Hz, "
            f"expected one channel [sample] at the model's {sampling_rate} Hz. Mix down and "
            "resample before the tensor that requires the gradient, or by torch behind it."
        )
    return samples


def windows_with_gradient(
    front_end: FrontEnd, extractor: Any, waveform: Waveform, samples: Float[Tensor, " sample"]
) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
    """``front_end.windows_of``, as a function of ``samples`` that has a gradient.

    The front-end cuts, and the extractor pads, the numbers of the samples instead of the samples;
    where they have come to lie is where the spectrogram reads.

    Args:
        front_end: of a family whose extractor is Whisper's.
        extractor: of its checkpoint.
        waveform: what was read of the samples; it may be shorter.
        samples: at the model's rate.

    Raises:
        InputError: another extractor, or a recording that is too long.
    """
    if not hasattr(extractor, "_torch_extract_fbank_features") or extractor.dither:
        raise InputError(
            "hearing samples with a gradient: this model's features are made by "
            f"{type(extractor).__name__}, expected Whisper's log-mel spectrogram without dither. "
            "Give samples that require none."
        )
    n = len(waveform.samples)
    if n >= LONGEST:
        raise InputError(
            f"hearing {n} samples with a gradient: expected fewer than {LONGEST}. Cut the clip."
        )
    numbered = replace(waveform, samples=np.arange(1, n + 1, dtype=np.float32))
    # Number 0 is what the extractor pads with.
    heard = torch.cat([samples.new_zeros(1), samples[:n]]).cpu().float()

    def features(numbers: np.ndarray, device: str = "cpu") -> Tensor:
        return log_mel(heard[torch.from_numpy(numbers).long()], extractor)

    reader = copy(extractor)
    reader._torch_extract_fbank_features = features
    return front_end.windows_of(numbered, reader)
