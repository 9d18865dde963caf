"""Log-mel spectrograms for a front-end whose own extractor wants torchaudio."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from hooked_alm.errors import InputError
from hooked_alm.text_files import extractor_config


@dataclass(frozen=True, kw_only=True)
class LogMel:
    """Log-mel spectrogram, two frames side by side.

    Source: transformers 5.23 ``GraniteSpeechFeatureExtractor``, which needs torchaudio;
    filters and products here are transformers' and torch's own.
    """

    sampling_rate: int = 16000
    n_fft: int = 512
    win_length: int = 400
    hop_length: int = 160
    n_mels: int = 80

    @classmethod
    def from_folder(cls, folder: Path) -> "LogMel":
        """The extractor that a checkpoint folder describes."""
        found = extractor_config(folder)
        assert found is not None  # whoever asks has seen it
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in found[1].items() if name in known})

    def __call__(self, samples: np.ndarray) -> Float[Tensor, "feature frame"]:
        """Features of one recording.

        Raises:
            InputError: shorter than half a window of the Fourier transform.
        """
        if len(samples) <= self.n_fft // 2:
            raise InputError(
                f"hearing {len(samples)} samples: expected more than {self.n_fft // 2}, half a "
                "window of the spectrogram. Give a longer clip."
            )
        spectrum = torch.stft(
            torch.from_numpy(samples),
            self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            window=torch.hann_window(self.win_length),
            return_complex=True,
        )
        mel = self._filters().T @ spectrum.abs().square()
        log_mel = mel.clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.max() - 8.0) / 4 + 1
        n_pairs = log_mel.shape[1] // 2  # an odd last frame is left out
        return log_mel.T[: 2 * n_pairs].reshape(n_pairs, 2 * self.n_mels).T

    def _filters(self) -> Float[Tensor, "frequency mel"]:
        filters = mel_filter_bank(
            num_frequency_bins=self.n_fft // 2 + 1,
            num_mel_filters=self.n_mels,
            min_frequency=0.0,
            max_frequency=self.sampling_rate / 2,
            sampling_rate=self.sampling_rate,
            mel_scale="htk",
        )
        return torch.from_numpy(filters).float()
