"""Rows of activations that no model made, for tests of what keeps and reads them."""

import numpy as np
import torch

from hooked_alm.methods.activations.rows import ActivationRows

WIDTHS = {"p": 3, "q": 10}


def rows(
    n: int = 5, *, first: int = 0, dtype: torch.dtype = torch.float32, n_speakers: int = 4
) -> ActivationRows:
    """Rows whose first number is their own; every third is text, one clip has four."""
    number = np.arange(first, first + n)
    values = {
        name: torch.randn(n, width, generator=torch.Generator().manual_seed(first)).to(dtype)
        for name, width in WIDTHS.items()
    }
    values["p"][:, 0] = torch.from_numpy(number).to(dtype)
    is_text = number % 3 == 2
    clip = number // 4

    def texts(prefix: str, of: np.ndarray) -> np.ndarray:
        return np.array([f"{prefix}{i}" for i in of], dtype=object)

    index = {
        "clip": texts("clip", clip), "prompt": clip, "position": number % 4,
        "seconds": np.where(is_text, np.nan, (number % 4) * 0.04),
        "span": np.where(is_text, "text", "audio").astype(object),
        "speaker": texts("speaker", clip % n_speakers),
    }  # fmt: skip
    return ActivationRows("module", values, {"p": (3,), "q": (2, 5)}, index)
