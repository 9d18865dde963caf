"""Encoder lens on published weights: transcripts on record, depth by depth, by the command."""

import os
from pathlib import Path
from typing import Any

import pytest
import soundfile

from hooked_alm.experiments.encoder_lens.experiment import EncoderLens
from hooked_alm.experiments.encoder_lens.settings import EncoderLensConfig
from hooked_alm.experiments.workbench import runner

pytestmark = pytest.mark.checkpoint
ON_RECORD = {
    "whisper-tiny.en": [
        ", you" * 30, "...", "...", "Yes",
        "Hello. Hello. Hello. Hello. Hello. I didn't know you were there. I needed to design. I "
        "thought, you know, I heard a beat. This is Diane in New Jersey. And I'm Sheila and Texas, "
        "originally from Chicago.",
    ],
    "whisper-base": [
        "B", "to" + " a" * 39, " ".join("A" * 40), "I am",
        "I'm going to" + " go ahead and" * 12,
        "Hello" + " hello" * 39,
        "Hello. Hello. Oh, hello. I didn't know you were there. I needed to die. Okay, I thought, "
        "you know, I heard a beep. This is Diane in New Jersey",
    ],
}  # fmt: skip
"""Of seconds 6.5 to 18 of ``telephone``, as on record: there, what the checkpoint forbids was
never said, and no times."""
OF_TIMES = {("whisper-base", 1): ""}
"""Where the decoder predicts times, which the checkpoint's lists allow and text leaves out."""
UNLIKE = {"whisper-tiny.en": [1, 2, 3], "whisper-base": [0, 1, 4]}
"""Depths that say something else where nothing is forbidden."""
SETTINGS: dict[str, Any] = {
    "whisper-tiny.en": {"max_new_tokens": 60},
    "whisper-base": {"max_new_tokens": 40, "language": "en"},
}


@pytest.mark.parametrize("name", ON_RECORD)
def test_transcripts_by_depth(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (root := os.environ.get("HOOKED_ALM_REAL")) is None:
        pytest.skip("HOOKED_ALM_REAL names no folder that scripts/real_models.py has filled")
    monkeypatch.setattr(EncoderLens, "page", lambda self, page, run: None)
    samples, rate = soundfile.read(Path(root) / "telephone" / "sample.wav")
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "cut.wav", samples[104000:288000], rate)
    said = {}
    for suppress in (True, False):
        config = EncoderLensConfig(
            model=str(Path(root) / name), audio=str(tmp_path / "clips"), suppress=suppress,
            n_resamples=1000, **SETTINGS[name],
        )  # fmt: skip
        run = runner.run(EncoderLens(config), tmp_path / f"run {suppress}")
        said[suppress] = run.read_table("transcripts").text.tolist()
    expected = [OF_TIMES.get((name, k), text) for k, text in enumerate(ON_RECORD[name])]
    assert said[True] == expected
    pairs = enumerate(zip(said[False], ON_RECORD[name], strict=True))
    assert [k for k, (free, recorded) in pairs if free != recorded] == UNLIKE[name]
