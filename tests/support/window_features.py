"""Random windows of the tiny checkpoints whose encoder hears a clip in several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny import MAX_SOURCE_POSITIONS, MELS

WINDOW = 2 * MAX_SOURCE_POSITIONS
"""Frames: one second, as that is the tiny extractors' ``chunk_length``."""


def windows(frames: Sequence[int], window: int = WINDOW) -> tuple[Tensor, Tensor]:
    """Features ``[window, mel, frame]`` and mask ``[window, frame]`` of clips of so many frames."""
    sizes = [min(window, n - start) for n in frames for start in range(0, n, window)]
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(len(sizes), MELS, window, generator=generator)
    return features, (torch.arange(window) < torch.tensor(sizes)[:, None]).long()
