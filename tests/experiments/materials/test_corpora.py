"""Names of published corpora, made here, and what they say; by command too."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from hooked_alm.errors import InputError
from hooked_alm.experiments.cli import app
from hooked_alm.experiments.materials.corpora import CORPORA, read_corpus
from hooked_alm.experiments.materials.recordings import load_recordings

NAMES: dict[str, dict[str, dict[str, str]]] = {
    "ravdess": {
        "Actor_12/03-01-06-01-02-01-12.wav": {
            "language": "en", "emotion": "fearful", "intensity": "normal", "speaker": "actor 12",
            "sex": "female", "sentence": "Dogs are sitting by the door", "take": "01",
            "channel": "speech",
        },
        "Actor_01/03-02-05-02-01-02-01.wav": {
            "emotion": "angry", "intensity": "strong", "sex": "male", "channel": "song",
        },
        "Actor_01/03-01-08-01-01-01-01.wav": {"emotion": "surprised"},
    },
    "crema-d": {
        "AudioWAV/1001_DFA_ANG_XX.wav": {
            "language": "en", "emotion": "anger", "speaker": "1001",
            "sentence": "Don't forget a jacket",
        },
        "AudioWAV/1091_IEO_HAP_HI.wav": {"emotion": "happy", "intensity": "high"},
    },
    "emodb": {
        "wav/03a01Fa.wav": {
            "language": "de", "emotion": "happiness", "speaker": "03", "take": "a",
            "sentence": "Der Lappen liegt auf dem Eisschrank.",
        },
        "wav/16b10Wb.wav": {"emotion": "anger", "speaker": "16"},
        "wav/10a05Ld.wav": {"emotion": "boredom"},
    },
    "esd": {
        "0001/Angry/0001_000351.wav": {
            "language": "zh", "emotion": "angry", "speaker": "0001", "sentence": "sentence 1",
            "text": "打远一看",
        },
        "0011/Surprise/test/0011_001750.wav": {
            "language": "en", "emotion": "surprise", "sentence": "sentence 350",
        },
        "0011/Neutral/0011_000001.wav": {"emotion": "neutral", "sentence": "sentence 1"},
    },
    "iemocap": {
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M003.wav": {
            "language": "en", "emotion": "frustration", "speaker": "session 1, male",
            "setting": "improvised", "text": "Excuse me.",
        },
        "Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F010.wav": {
            "emotion": "no agreement", "speaker": "session 5, female", "setting": "scripted",
        },
    },
}  # fmt: skip
TEXTS = {
    "esd": {"0001/0001.txt": "0001_000001\t开头\t中立\n0001_000351\t打远一看\t生气\n"},
    "iemocap": {
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt": "% [START_TIME - END_TIME] TURN_NAME "
        "EMOTION [V, A, D]\n\n[6.2901 - 8.2357]\tSes01F_impro01_M003\tfru\t[2.5, 3.5, 3.5]\n"
        "C-E2:\tNeutral;\t()\n",
        "Session1/dialog/transcriptions/Ses01F_impro01.txt": "Ses01F_impro01_M003 [006.2901-008."
        "2357]: Excuse me.\n",
        "Session5/dialog/EmoEvaluation/Ses05M_script01_1b.txt": "[1.0 - 2.0]\t"
        "Ses05M_script01_1b_F010\txxx\t[2.5, 2.5, 2.5]\n",
    },
}


def write(folder: Path, name: str, number: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(2000) * (0.1 + 0.01 * number)), 16_000)


@pytest.fixture(params=[*CORPORA])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    for number, name in enumerate(NAMES[request.param]):
        write(tmp_path, name, number)
    for name, text in TEXTS.get(request.param, {}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return request.param, tmp_path


@pytest.mark.filterwarnings("ignore:.*not read, since")  # the tables beside the clips
def test_what_names_say(corpus: tuple[str, Path]) -> None:
    name, folder = corpus
    found = {one.path.relative_to(folder).as_posix(): one for one in read_corpus(folder, name)}
    assert {*found} == {*NAMES[name]}
    for path, wanted in NAMES[name].items():
        assert wanted.items() <= found[path].cells.items()
        assert all(found[path].cells.values())  # what is not known is left out
        assert found[path].label == wanted["emotion"]


@pytest.mark.filterwarnings("ignore:.*not read, since")
def test_the_manifest_is_read_back(corpus: tuple[str, Path]) -> None:
    name, folder = corpus
    done = CliRunner().invoke(app, ["manifest", "--from", name, str(folder)])
    assert done.exit_code == 0, done.output
    listed = load_recordings(folder)
    assert [one.cells for one in listed] == [one.cells for one in read_corpus(folder, name)]
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        assert {row["channels"] for row in csv.DictReader(file)} == {"1"}


@pytest.mark.parametrize(
    ("corpus", "name", "message"),
    [
        ("ravdess", "03-01-09-01-02-01-12.wav", "got '09' for the emotion, expected one of 01"),
        ("ravdess", "happy.wav", "happy.wav: its name does not follow the corpus' scheme"),
        ("crema-d", "1001_DFA_JOY_XX.wav", "got 'JOY' for the emotion"),
        ("crema-d", "1001_ABC_ANG_XX.wav", "got 'ABC' for the sentence"),
        ("emodb", "03a03Fa.wav", "got 'a03' for the text"),
        ("esd", "0011/Happy/0011_000001.wav", "got it in Happy, where its number says Neutral"),
        ("esd", "0011_001751.wav", "got utterance 001751, expected"),
        ("iemocap", "Session1/sentences/wav/x/Ses01F_impro01_M003.wav", "EmoEvaluation has its"),
    ],
)
def test_names_of_no_meaning(tmp_path: Path, corpus: str, name: str, message: str) -> None:
    write(tmp_path, name, 0)
    write(tmp_path, str(Path(name).with_stem("another")), 1)
    with pytest.raises(InputError, match=message) as caught:
        read_corpus(tmp_path, corpus)
    assert f"reading {corpus} from {tmp_path}: 2 problems" in str(caught.value)


def test_no_such_corpus_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 'tess', expected one of ravdess, .* manifest.csv"):
        read_corpus(tmp_path, "tess")
    with pytest.raises(InputError, match="got no audio files"):
        read_corpus(tmp_path, "emodb")
