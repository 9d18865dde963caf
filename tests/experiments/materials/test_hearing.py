"""Clips of which only the last few are held: the same features, however often they are read."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch

from hooked_alm import HookedALM
from hooked_alm.audio import read_audio
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials import hearing
from hooked_alm.experiments.materials.hearing import FiledClip, Hearing
from hooked_alm.inputs import AudioClip

NAMES = ("en_sad_strong", "zh_sad_strong", "en_angry_normal")


class Reader:
    """Counts what is read."""

    def __init__(self, model: HookedALM) -> None:
        self.model, self.paths = model, list[Path]()

    def __call__(self, path: Path) -> AudioClip:
        self.paths.append(path)
        return self.model.read_clip(path)


@pytest.fixture(scope="module")
def model() -> HookedALM:
    return HookedALM.from_pretrained("bundled:follows_text")


@pytest.fixture
def clips(
    model: HookedALM, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[FiledClip[Path]], Reader]:
    monkeypatch.setattr(hearing, "N_KEPT", 2)
    reader = Reader(model)
    heard = Hearing(reader)
    return [heard.clip(CLIPS / f"{name}.wav") for name in NAMES], reader


def test_what_is_known_is_held_and_features_of_the_last_few(
    model: HookedALM, clips: tuple[list[FiledClip[Path]], Reader]
) -> None:
    (first, second, third), reader = clips
    for clip, name in zip((first, second, third), NAMES, strict=True):
        plain = model.read_clip(CLIPS / f"{name}.wav")
        assert (clip.n_frames, clip.n_tokens, clip.name) == (
            plain.n_frames,
            plain.n_tokens,
            plain.name,
        )
        assert (clip.seconds, clip.notes) == (plain.seconds, plain.notes)
    assert len(reader.paths) == 3
    assert third.features is third.features
    assert third.features.shape == second.features.shape
    assert len(reader.paths) == 3
    plain = model.read_clip(CLIPS / f"{NAMES[0]}.wav")
    assert torch.equal(first.features, plain.features)
    assert reader.paths[3:] == [CLIPS / f"{NAMES[0]}.wav"]
    # Asked for last before it, the third was the one to go.
    assert torch.equal(second.features, model.read_clip(CLIPS / f"{NAMES[1]}.wav").features)
    assert len(reader.paths) == 4


def test_what_the_encoder_made_of_the_oldest_goes_too(
    model: HookedALM, clips: tuple[list[FiledClip[Path]], Reader]
) -> None:
    (first, second, third), _ = clips
    expected = [model(model.prepare(CLIPS / f"{name}.wav", "What?")) for name in NAMES]
    for clip, logits in zip((first, second, third), expected, strict=True):
        assert torch.equal(model(model.prepare(clip, "What?")), logits)
    assert [len(clip._encoded) for clip in (first, second, third)] == [0, 1, 1]


def test_another_process_reads_for_itself(model: HookedALM) -> None:
    clip = Hearing(partial(model.read_clip, truncate=False)).clip(CLIPS / "en_sad_strong.wav")
    one, other = pickle.loads(pickle.dumps((clip, clip)))
    assert one is other
    assert not one.hearing._kept
    assert torch.equal(one.features, clip.features)


def test_a_recording_that_changes_is_refused(tmp_path: Path, model: HookedALM) -> None:
    wave = read_audio(
        CLIPS / "en_sad_strong.wav", sampling_rate=16_000, max_seconds=30, truncate=False
    ).samples
    soundfile.write(path := tmp_path / "a.wav", wave, 16_000)
    heard = Hearing(model.read_clip)
    clip = heard.clip(path)
    heard._kept.clear()
    soundfile.write(path, wave[::-1], 16_000)  # as long
    with pytest.raises(InputError, match=r"another recording \(3.0 s\) than .* \(3.0 s\)"):
        clip.features.sum()
    soundfile.write(path, wave[:-8000], 16_000)
    with pytest.raises(InputError, match=r"another recording \(2.5 s\) than .* \(3.0 s\)"):
        clip.features.sum()
