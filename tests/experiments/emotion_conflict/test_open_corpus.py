"""Any corpus: labels, languages, prompts and conflicts from a table and YAML; and what is said."""

import re
from pathlib import Path
from typing import Any

import pytest
import soundfile

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.conflict_corpus import Corpus
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS
from hooked_alm.experiments.materials.recordings import load_recordings
from hooked_alm.experiments.workbench import runner, work
from hooked_alm.experiments.workbench.provenance import command_line
from hooked_alm.experiments.workbench.report import read_report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings

PAGE = (Path(__file__).parents[3] / "docs/own_recordings.md").read_text("utf-8")
SHEET = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)[0]
[YAML] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SOURCES = ("en_cheerful_strong", "en_sad_strong", "zh_cheerful_strong")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of the page, with clips under its names."""
    folder = tmp_path_factory.mktemp("german")
    (folder / "table.csv").write_text(SHEET, "utf-8")
    (folder / "german.yaml").write_text(YAML, "utf-8")
    for line, source in zip(SHEET.splitlines()[1:], SOURCES, strict=True):
        path = folder / line.split(",")[0]
        path.parent.mkdir(exist_ok=True)
        samples, rate = soundfile.read(CLIPS / f"{source}.wav", dtype="float32")
        soundfile.write(path, samples, rate)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path) -> RunFolder:
    words = ["patch_layers=[4]", "donors=[text_swap, audio_swap]", "n_resamples=1000"]
    config = load_settings(
        EmotionConflictConfig,
        file=corpus / "german.yaml",
        options={"audio": str(corpus / "table.csv")},
        words=words,
    )
    return runner.run(EmotionConflict(config), corpus / "run")


def test_the_page_runs_and_says_what_is_so(run: RunFolder) -> None:
    inputs = run.provenance["inputs"]
    assert inputs["labels"] == ["froh", "traurig"]
    assert inputs["prompts"]["de"]["conflict"] == (
        "Beurteile die Emotion dieser Aufnahme. Bedingung: Urteile im Ton von „traurig“ und gib "
        "das Wort aus."
    )
    runs = run.read_table("runs")
    assert set(runs[runs.condition == "conflict"].named) == {"froh", "traurig"}
    assert {"z_froh", "z_traurig"} <= {*runs.columns}
    report = read_report(run)
    assert not report.is_calibration
    assert report.lead.startswith("3 clips, of 2 speakers, 1 sentence, 1 language.")
    text = re.sub(r'data:[^"]*', "", (run.path / "report.html").read_text("utf-8"))
    for false in ("one sentence", "one voice", "five labels", "The two bundled models", "OB1"):
        assert false not in text


def test_the_recorded_command_gives_the_same_settings(run: RunFolder) -> None:
    config = EmotionConflictConfig(**run.provenance["config"])
    words = command_line("emotion_conflict", config)
    assert "Beurteile" in words


def corpus_of(folder: Path, **settings: Any) -> Corpus:
    config = EmotionConflictConfig(audio=str(folder), **settings)
    column = config.label_column
    return Corpus(config, load_recordings(folder / "table.csv", label_column=column))


def test_labels_targets_and_words_come_from_the_table_and_the_settings(corpus: Path) -> None:
    found = corpus_of(corpus, prompt_language="en")
    first, second, _ = found.recordings
    assert found.labels == ("froh", "traurig")
    assert found.words("en") == {"froh": "froh", "traurig": "traurig"}
    assert (found.targets(first), found.targets(second)) == (("traurig",), ("froh",))
    by_speaker = corpus_of(corpus, prompt_language="en", label_column="speaker")
    assert by_speaker.labels == ("anna", "bert")
    three = {"en": {"froh": "happy", "traurig": "sad", "wütend": "angry"}}
    found = corpus_of(corpus, prompt_language="en", labels=three)
    assert found.labels == ("froh", "traurig", "wütend")
    assert found.words("en") == three["en"]
    assert found.targets(second) == ("wütend",)  # the next one, where no map says another
    found = corpus_of(corpus, prompt_language="en", labels=three, conflict_map={"traurig": "froh"})
    assert found.targets(second) == ("froh",)
    every = corpus_of(corpus, prompt_language="en", labels=three, pairs="all_pairs")
    assert every.targets(second) == ("froh", "wütend")


def test_ob1_is_what_is_taken_for_its_own_labels() -> None:
    config = EmotionConflictConfig()
    found = Corpus(config, load_recordings(CLIPS))
    assert found.labels == EMOTIONS
    assert {one.label: found.targets(one) for one in found.recordings} == {
        voice: (target,) for voice, target in CONFLICT_MAP.items()
    }
    assert found.words("zh")["sad"] == "悲伤"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"got clips in 'de' and no instructions in it: set prompts\.de"),
        ({"prompt_language": "en", "conflict_map": {"froh": "froh"}}, r"conflict_map\.froh: got"),
        (
            {"prompt_language": "en", "labels": {"en": {"froh": "happy"}, "zh": {"traurig": "悲"}}},
            r"(?s)labels\.en: got froh, expected a word for each of froh, traurig.*labels\.zh",
        ),
        ({"prompt_language": "en", "label_column": "sentence"}, "got the label 'Das .*' alone"),
    ],
)
def test_what_no_prompt_can_be_made_of(
    corpus: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        corpus_of(corpus, **settings)


def test_donors_share_speaker_and_sentence_but_not_the_label(corpus: Path) -> None:
    found = corpus_of(corpus, prompt_language="en")
    first = found.recordings[0]
    assert [one.name for one in found.clips_like(first, ["traurig"])] == ["02"]
    by_language = corpus_of(corpus, prompt_language="en", label_column="speaker")
    anna, _, bert = by_language.recordings
    assert by_language.clips_like(anna, ["bert"]) == [bert]  # of another speaker, the label


def test_units_are_named_as_files_can_be(corpus: Path) -> None:
    labels = {"en": {"froh": "a", "traurig": "b", "so / so": "c"}}
    found = corpus_of(corpus, prompt_language="en", labels=labels, pairs="all_pairs")
    experiment = EmotionConflict(found.config)
    experiment.corpus = found
    ids = [unit.id for unit in experiment.units()]
    assert all(work.FILE_NAME_SAFE.fullmatch(one) for one in ids)
    named = {run.named for run in experiment.plan.runs}
    assert "so / so" in named
