"""Names of what the package carries: found wherever a model or a clip is named, or refused."""

import re
from pathlib import Path

import pytest
import torch

from hooked_alm import HookedALM
from hooked_alm.bundled import ASSETS, CLIPS, MODELS, clip_file, model_folder
from hooked_alm.converters.parity import verify
from hooked_alm.errors import InputError


@pytest.mark.parametrize("text", ["models/mine", "bundle", "./bundled:x"])
def test_other_names_are_paths(text: str) -> None:
    assert model_folder(text) == clip_file(text) == Path(text)
    assert clip_file(Path("bundled:x")) == Path("bundled:x")


def test_models_and_clips_by_name() -> None:
    assert model_folder("bundled:follows_text") == MODELS / "follows_text"
    assert clip_file("bundled:zh_sad_strong") == CLIPS / "zh_sad_strong.wav"
    assert clip_file("bundled:s1_sad_words_happy_voice").suffix == ".ogg"


def test_unknown_names_say_the_known_ones() -> None:
    listed = "the package carries bundled:follows_prosody, .*bundled:follows_voice."
    for lost in ("bundled:en_sad_strong", "bundled:", "bundled:../models/follows_text"):
        with pytest.raises(InputError, match=re.escape(f"loading {lost!r}: ") + listed):
            model_folder(lost)
    carried = len(
        {path.stem for path in ASSETS.rglob("*") if path.suffix in {".wav", ".ogg", ".flac"}}
    )
    near = f"carries .*bundled:en_sad_strong, .*, the nearest of {carried}\\."
    for lost in ("bundled:en_sad_stong", "bundled:en_sad_strong.wav"):
        with pytest.raises(InputError, match=near):
            clip_file(lost)


def test_a_model_hears_a_clip_by_name() -> None:
    model = HookedALM.from_pretrained("bundled:follows_text")
    assert model.cfg.model_name == "bundled:follows_text"
    assert model.sources["model"] == MODELS / "follows_text"
    by_name, by_path = (
        model.prepare(clip, "Judge the emotion of this audio. Output the label only.")
        for clip in ("bundled:en_sad_strong", CLIPS / "en_sad_strong.wav")
    )
    assert torch.equal(by_name.clips[0].features, by_path.clips[0].features)
    assert by_name.clips[0].name == "en_sad_strong.wav"
    with pytest.raises(InputError, match="loading 'bundled:nobody': the package carries"):
        HookedALM.from_pretrained("bundled:follows_text", lora="bundled:nobody")


def test_verify_takes_a_name() -> None:
    found = verify("bundled:follows_text")
    assert found.passed
    assert found.model == "bundled:follows_text"
