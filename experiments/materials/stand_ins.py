"""Clips that say nothing, in place of a recording: silence and white noise of its length."""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from hooked_alm import HookedALM
from hooked_alm.audio import read_audio
from hooked_alm.errors import InputError
from hooked_alm.inputs import AudioClip


def silence_like(
    model: HookedALM, path: Path, seconds: float | None = None, *, truncate: bool = True
) -> AudioClip:
    """Digital silence, as long as the model hears of a file.

    Args:
        model: that is to hear it.
        path: of the recording.
        seconds: of it that are heard; None is what the model hears at most.
        truncate: cut a longer one instead of refusing it.

    Raises:
        InputError: a model without ears, or a file that it cannot hear.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*silent")  # it is meant to be
        clip = model.read_clip(np.zeros_like(_heard(model, path, seconds, truncate)))
    return replace(clip, name=f"silence like {path.name}")


def noise_like(model: HookedALM, path: Path, seconds: float | None, seed: str) -> AudioClip:
    """White noise of a recording's length and level, the same whenever it is made from a seed."""
    heard = _heard(model, path, seconds, truncate=True)
    digest = hashlib.sha256(seed.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    level = np.sqrt(np.square(heard, dtype=np.float64).mean())
    noise = np.clip(level * rng.standard_normal(heard.shape), -1, 1)
    return model.read_clip(noise.astype(np.float32))


def _heard(
    model: HookedALM, path: Path, seconds: float | None, truncate: bool
) -> Float32[np.ndarray, " sample"]:
    """Samples of a file at the model's rate."""
    if model.prompts is None:
        raise InputError("silent: the model hears no audio, or its folder has no processor files")
    rate = model.prompts.feature_extractor.sampling_rate
    longest = model.prompts.front_end.tokens.max_seconds if seconds is None else seconds
    return read_audio(path, sampling_rate=rate, max_seconds=longest, truncate=truncate).samples
