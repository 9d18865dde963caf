"""Trained weights, in the folders that ``scripts/real_models.py`` makes (``HOOKED_ALM_REAL``)."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from hooked_alm import HookedALM
from hooked_alm.converters.blocks.whisper_encoder import encoder_config, encoder_rules
from hooked_alm.converters.rules import target_of
from hooked_alm.encoder import AudioEncoder

pytestmark = pytest.mark.checkpoint
NORMS = [517.94, 510.16, 565.27, 2378.74, 2681.85, 3232.99]
"""Norms on record of whisper-base's stream behind its six blocks, on the tone below."""


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("HOOKED_ALM_REAL")
    if folder is None:
        pytest.skip("HOOKED_ALM_REAL names no folder that scripts/real_models.py has filled")
    return Path(folder)


def tone() -> np.ndarray:
    """Three seconds of 440 and 880 Hz, as those on record were made."""
    t = np.linspace(0, 3, 48000)
    found: np.ndarray = 0.5 * np.sin(2 * np.pi * 440 * t) + 0.3 * np.sin(2 * np.pi * 880 * t)
    return found.astype(np.float32)


def mel_of(folder: Path, samples: np.ndarray) -> Tensor:
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    found: Tensor = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    return found


def hooked_encoder(folder: Path, dtype: torch.dtype, attention: str) -> AudioEncoder:
    """The encoder alone, with the checkpoint's weights."""
    config = WhisperConfig.from_pretrained(folder)
    config._attn_implementation = attention
    encoder = AudioEncoder(encoder_config(config))
    stored = load_file(folder / "model.safetensors")
    rules = encoder_rules(r"model\.encoder\.")
    inside = {key: target_of(rules, key) for key in stored if ".encoder." in key}
    encoder.load_state_dict(
        {str(name).removeprefix("audio.encoder."): stored[key] for key, name in inside.items()}
    )
    return encoder.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_smollm2(real: Path, dtype: torch.dtype) -> None:
    """Logits and streams are Hugging Face's, and it knows the capital of France."""
    folder = real / "smollm2-135m-instruct"
    model = HookedALM.from_pretrained(folder, dtype=dtype)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    theirs = hf(ids, output_hidden_states=True)
    ours, cache = model.run_with_cache(ids, names_filter=model.depth_names())
    assert torch.equal(ours, theirs.logits)
    for name, state in zip(model.depth_names()[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.equal(cache[name], state)
    assert "Paris" in model.generate(ids, max_new_tokens=12)[0]


@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_whisper_encoders(real: Path, name: str, attention: str, dtype: torch.dtype) -> None:
    """Every state and the output, on two people on the telephone."""
    folder = real / name
    samples, _ = soundfile.read(real / "telephone" / "sample.wav", dtype="float32")
    mel = mel_of(folder, samples).to(dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    theirs = WhisperModel.from_pretrained(folder, **options).eval().encoder
    expected = theirs(mel, output_hidden_states=True)
    encoder = hooked_encoder(folder, dtype, attention)
    assert torch.equal(encoder(mel), expected.last_hidden_state)
    for ours, state in zip(encoder.states(mel), expected.hidden_states[:-1], strict=False):
        assert torch.equal(ours, state)


@torch.no_grad()
def test_the_norms_on_record(real: Path) -> None:
    """The jump behind the fourth block is some fifty rows', none of which hears the tone."""
    folder = real / "whisper-base"
    mel = mel_of(folder, tone())
    states = [*hooked_encoder(folder, torch.float32, "sdpa").states(mel)][1:]
    rows = torch.stack([state[0].double().norm(dim=-1) for state in states])
    found = rows.square().sum(-1).sqrt()
    torch.testing.assert_close(found, torch.tensor(NORMS).double(), rtol=1e-4, atol=0)
    massive = rows > 5 * rows.median(dim=-1, keepdim=True).values
    assert not massive[:3].any()
    assert massive[3].sum() == 54
    assert not massive[3, :150].any()
    share = rows[3, massive[3]].square().sum() / found[3] ** 2
    assert 0.93 < share < 0.937
    others = [rows[layer, ~massive[3]].square().sum().sqrt() for layer in (2, 3)]
    assert 1.17 < others[1] / others[0] < 1.2
