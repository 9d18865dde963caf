"""Spectrograms with a gradient: the extractor's values, and Hugging Face's gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from hooked_alm import HookedALM, InputError
from hooked_alm.bundled import model_folder
from hooked_alm.log_mel import log_mel

RATE = 16_000
MODEL = "bundled:follows_voice"


@pytest.fixture(scope="module")
def model() -> HookedALM:
    return HookedALM.from_pretrained(MODEL)


def speech_like(n: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.05, n)
    return (noise + 0.3 * np.sin(2 * np.pi * 220 * np.arange(n) / RATE)).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize(
    "samples", [speech_like(30 * RATE), np.zeros(30 * RATE, np.float32), speech_like(7001)]
)
def test_values_are_the_extractors(mels: int, samples: np.ndarray) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mels)
    theirs = extractor(
        [samples], sampling_rate=RATE, padding="do_not_pad", truncation=False, return_tensors="pt"
    )
    ours = torch.from_numpy(samples).requires_grad_()
    found = log_mel(ours[None], extractor)
    assert torch.equal(found, theirs["input_features"])
    found.sum().backward()
    assert ours.grad is not None
    assert torch.isfinite(ours.grad).all()
    assert bool(ours.grad.any()) == bool(samples.any())  # at the floor there is none


@pytest.mark.parametrize("n", [4000, 16_001, 47_999])
def test_a_clip_is_the_same_with_a_gradient(model: HookedALM, n: int) -> None:
    """Padding, notes and length, too; and what is heard of it, afresh and kept nowhere."""
    samples = torch.from_numpy(speech_like(n)).requires_grad_()
    clip, plain = model.read_clip(samples), model.read_clip(samples.detach())
    assert torch.equal(clip.features, plain.features)
    about = [(c.n_frames, c.n_tokens, c.name, c.seconds, c.notes) for c in (clip, plain)]
    assert about[0] == about[1]
    x, y = (model.prepare(one, "What is it?") for one in (clip, plain))
    logits = model(x)
    assert torch.equal(logits, model(y))
    assert not clip._encoded
    logits[0, -1, 7].backward()
    assert samples.grad is not None
    assert torch.isfinite(samples.grad).all()
    assert samples.grad.abs().max() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_hugging_faces(attention: str) -> None:
    """Of a logit at the waveform, through its model fed by the same spectrogram."""
    model = HookedALM.from_pretrained(MODEL, attn_implementation=attention)
    hf: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
        model_folder(MODEL), attn_implementation=attention
    ).eval()
    waves = [torch.from_numpy(speech_like(20_000, seed=3)).requires_grad_() for _ in range(2)]
    x = model.prepare(waves[0], "What is it?")
    model(x)[0, -1, 11].backward()
    extractor: Any = model.prompts.feature_extractor  # type: ignore[union-attr]
    padded = torch.nn.functional.pad(waves[1], (0, extractor.n_samples - len(waves[1])))
    arguments = model.hf_arguments(x) | {"input_features": log_mel(padded[None], extractor)}
    hf(**arguments).logits[0, -1, 11].backward()
    ours, theirs = (wave.grad for wave in waves)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_points_of_the_encoder_get_their_gradient(model: HookedALM) -> None:
    """Beside that of the waveform, and what is cut off there reaches no further down."""
    name = "audio.encoder.blocks.1.hook_resid_post"
    seen: list[Tensor] = []

    def gradient(**hooks: Any) -> Tensor:
        wave = torch.from_numpy(speech_like(20_000)).requires_grad_()
        with model.hooks(**hooks):
            model(model.prepare(wave, "What is it?"))[0, -1, 11].backward()
        return torch.zeros_like(wave) if wave.grad is None else wave.grad

    whole = gradient()
    watched = gradient(bwd_hooks=[(name, lambda value, hook: seen.append(value.clone()))])
    assert seen[0].abs().max() > 0
    assert torch.equal(watched, whole)
    assert not gradient(fwd_hooks=[(name, lambda value, hook: value.detach())]).any()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (torch.ones(2, RATE, requires_grad=True), r"got shape \[2, 16000\] at 16000 Hz"),
        ((torch.ones(8000, requires_grad=True), 8000), r"\[8000\] at 8000 Hz"),
    ],
)
def test_what_has_no_gradient(model: HookedALM, source: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        model.read_clip(source)


def test_another_extractor_is_refused(model: HookedALM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.prompts is not None
    wave = torch.from_numpy(speech_like(8000)).requires_grad_()
    monkeypatch.setattr(model.prompts.feature_extractor, "dither", 0.1)
    with pytest.raises(InputError, match="expected Whisper's log-mel spectrogram without dither"):
        model.read_clip(wave)
