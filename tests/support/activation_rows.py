"""Rows of activations that no model made, for tests of what keeps and reads them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.writer import ActivationWriter

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


SIZES = (7, 4, 0, 9)
"""Rows of each shard."""
BATCHES = [(sum(SIZES[:i]), n) for i, n in enumerate(SIZES)]


def collect(batch: tuple[int, int]) -> ActivationRows:
    return rows(batch[1], first=batch[0])


def written(folder: Path, dtype: Any = "float16") -> Path:
    ActivationWriter(folder, dtype=dtype, about={"model": "m"}).write_all(BATCHES, collect)
    return folder


def write_slowly(folder: str) -> None:
    """The store, with its shards some time apart."""

    def slow(batch: tuple[int, int]) -> ActivationRows:
        time.sleep(0.2)
        return collect(batch)

    ActivationWriter(folder, dtype="float16", about={"model": "m"}).write_all(BATCHES, slow)
