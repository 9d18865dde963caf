"""``emotion_conflict`` on a user's own folder and settings: what is refused, and what is recorded.

A refusal comes before the first unit and leaves a folder with results as it was. That clips,
manifests and settings are each checked is tested where they are read; here, that the experiment
asks for these checks in time.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS, MODELS
from hooked_alm.errors import HookedALMError, InputError
from hooked_alm.experiments import cli
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.ob1 import LABELS
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from tiny import TinyModels
from tolerances import BATCHED_ROWS

RATE = 16_000
NAMES = ("zh_sad_strong", "zh_cheerful_strong", "zh_cheerful_normal")
SMALL = {
    "modes": ("audio_only", "conflict"),
    "donors": ("self", "text_swap", "audio_swap"),
    "patch_layers": (4,),
    "truncate": True,
}


def samples(name: str) -> np.ndarray:
    return soundfile.read(CLIPS / f"{name}.wav", dtype="float32")[0]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two good clips, to be spoilt."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in NAMES[:2]:
        shutil.copy(CLIPS / f"{name}.wav", folder)
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the bundled model once for all tests; other models as ever."""
    load = HookedALM.from_pretrained

    def load_or_recall(folder: str, **options: Any) -> HookedALM:
        if folder != str(MODELS / "follows_text"):
            return load(folder, **options)
        if folder not in BUNDLED:
            BUNDLED[folder] = load(folder, **options)
        return BUNDLED[folder]

    monkeypatch.setattr(HookedALM, "from_pretrained", load_or_recall)


BUNDLED: dict[str, HookedALM] = {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run on a folder of clips that differ in duration, rate and channels."""
    root = tmp_path_factory.mktemp("user")
    audio = root / "my clips"
    audio.mkdir()
    sad, cheerful, long = map(samples, NAMES)
    soundfile.write(audio / f"{NAMES[0]}.wav", sad[:40_000], RATE)
    # The same sound at another rate, twice: what the model hears is 16 kHz mono again.
    stereo = np.stack([cheerful, 0.5 * cheerful], axis=1)
    soundfile.write(audio / f"{NAMES[1]}.flac", stereo, 22_050)
    soundfile.write(audio / f"{NAMES[2]}.wav", np.concatenate([long, long]), RATE)
    config = EmotionConflictConfig(audio=str(audio), **SMALL)
    return runner.run(EmotionConflict(config), root / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(finished: RunFolder, match: str, **settings: Any) -> None:
    """The settings are refused before anything is run or written, even over finished work."""
    before = contents(finished.path)
    with pytest.raises(HookedALMError, match=match):
        runner.run(EmotionConflict(EmotionConflictConfig(**settings)), finished.path)
    assert contents(finished.path) == before


# --- A user's folder


def test_a_folder_of_ones_own_runs_from_end_to_end(finished: RunFolder) -> None:
    inputs = finished.provenance["inputs"]
    notes = {clip["name"]: clip["notes"] for clip in inputs["clips"]}
    tokens = {clip["name"]: clip["audio_tokens"] for clip in inputs["clips"]}
    assert notes[NAMES[0]] == []
    assert notes[NAMES[1]] == [
        "2 channels downmixed by their mean",
        "resampled from 22050 Hz to 16000 Hz (soxr HQ)",
    ]
    assert notes[NAMES[2]] == ["truncated from 7.000 s to 6 s"]
    assert tokens == {NAMES[0]: 62, NAMES[1]: 63, NAMES[2]: 150}

    runs = finished.read_table("runs")
    assert len(runs) == 6
    assert dict(zip(runs["clip"], runs["n_audio_tokens"], strict=True)) == tokens
    patching = finished.read_table("patching")
    assert set(patching["donor"]) == set(SMALL["donors"])
    assert patching["shift"].notna().all()
    record = finished.read_unit(f"patch__{NAMES[2]}__sad__audio_swap")["record"]
    (record,) = record["works"]
    assert record["donor"]["clip"] == NAMES[0]
    assert record["span_length_ratio"]["audio"] == 62 / 150
    assert (finished.path / "report.html").stat().st_size > 10_000


def test_the_same_command_finds_it_done(finished: RunFolder) -> None:
    config = EmotionConflictConfig(**finished.provenance["config"])
    tables = {p.name: p.read_bytes() for p in (finished.path / "tables").iterdir()}
    runner.run(EmotionConflict(config), finished.path)
    assert {p.name: p.read_bytes() for p in (finished.path / "tables").iterdir()} == tables


def test_silence_is_a_warning_and_recorded(clips: Path) -> None:
    soundfile.write(clips / "zh_sad_strong.wav", np.zeros(RATE, np.float32), RATE)
    experiment = EmotionConflict(EmotionConflictConfig(audio=str(clips), **SMALL))
    with pytest.warns(UserWarning, match=r"zh_sad_strong\.wav: silent"):
        inputs = experiment.identify()
    [notes] = [clip["notes"] for clip in inputs["clips"] if clip["name"] == "zh_sad_strong"]
    assert notes == ["silent: its peak is 0 of full scale"]


# --- Recordings that are refused


def _remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def _list_a_missing_clip(folder: Path) -> None:
    lines = ["path,language,emotion,intensity", "a.wav,zh,sad,strong", "b.wav,zh,sad,normal"]
    (folder / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")


def _empty(folder: Path) -> None:
    (folder / "zh_sad_strong.wav").write_bytes(b"")


def _no_samples(folder: Path) -> None:
    soundfile.write(folder / "zh_sad_strong.wav", np.zeros(0, np.float32), RATE)


def _corrupt(folder: Path) -> None:
    (folder / "zh_sad_strong.wav").write_bytes(b"RIFF no sound" * 99)


def _cut_off(folder: Path) -> None:
    path = folder / "zh_sad_strong.wav"
    path.write_bytes(path.read_bytes()[:5000])


def _nan(folder: Path) -> None:
    sound = samples("zh_sad_strong")
    sound[1600] = np.nan
    soundfile.write(folder / "zh_sad_strong.wav", sound, RATE, subtype="FLOAT")


def _over_long(folder: Path) -> None:
    sound = np.tile(samples("zh_sad_strong"), 2)
    soundfile.write(folder / "zh_sad_strong.wav", sound, RATE)


def _too_short(folder: Path) -> None:
    soundfile.write(folder / "zh_sad_strong.wav", samples("zh_sad_strong")[:200], RATE)


def _wrong_name(folder: Path) -> None:
    shutil.copy(CLIPS / "zh_angry_normal.wav", folder / "zh_furious_normal.wav")


def _strong_neutral(folder: Path) -> None:
    for path in CLIPS.glob("*.wav"):
        shutil.copy(path, folder)
    for language in ("zh", "en"):
        sound = 0.5 * samples(f"{language}_neutral_normal")
        soundfile.write(folder / f"{language}_neutral_strong.wav", sound, RATE)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_remove_all, "loading recordings: got .*clips, expected a folder"),
        (_list_a_missing_clip, r"(?s)manifest\.csv: 2 problems.*line 2: path: .*no such file"),
        (_empty, r"zh_sad_strong\.wav.* got 0 bytes"),
        (_no_samples, r"zh_sad_strong\.wav has no samples"),
        (_corrupt, r"zh_sad_strong\.wav is corrupt"),
        (_cut_off, r"zh_sad_strong\.wav is corrupt: it ends after"),
        (_nan, r"NaN, infinite .* values in 1 of 56000 samples .* at sample 1600 \(0\.100 s\)"),
        (_over_long, r"zh_sad_strong\.wav lasts 7\.000 s, expected at most 6 s\. .*truncate=True"),
        (_too_short, "too short for one audio position"),
        (_wrong_name, "zh_furious_normal.* expected language_emotion_intensity"),
        (_strong_neutral, r"got 20 recordings with a strong neutral \(en_neutral_strong\.wav, zh_"),
    ],
)
def test_unusable_recordings(
    finished: RunFolder, clips: Path, spoil: Callable[[Path], None], match: str
) -> None:
    spoil(clips)
    refused(finished, match, audio=str(clips))


def test_a_strong_neutral_can_be_declared(clips: Path) -> None:
    _strong_neutral(clips)
    experiment = EmotionConflict(EmotionConflictConfig(audio=str(clips), n_clips=20, donors=()))
    assert len(experiment.identify()["clips"]) == 20


def test_a_number_of_clips_that_is_not_there(finished: RunFolder, clips: Path) -> None:
    refused(finished, "got 2 recordings, expected the 18 declared", audio=str(clips), n_clips=18)


# --- Settings that are refused


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "bundled:follows_nobody"}, "carries .*bundled:follows_text, bundled:follows_v"),
        ({"patch_layers": (0, 10, -1)}, r"patching blocks \[10, -1\]: .* blocks 0 to 9"),
        (
            {"labels": {"zh": {**LABELS["zh"], "angry": "高兴"}}},
            "'cheerful' and 'angry' both begin with token",
        ),
        (
            {"labels": {"zh": {**LABELS["zh"], "sad": ("悲伤", "高兴")}}, "label_mode": "variants"},
            "'cheerful' and 'sad' both begin with token",
        ),
        (
            {"labels": {"zh": {**LABELS["zh"], "sad": ("悲伤", "中性")}}},
            "mode 'first_token' scores",
        ),
        ({"labels": {"zh": {**LABELS["zh"], "sad": ""}}}, "'sad': .* has an empty spelling"),
        (
            {"labels": {"zh": {"sad": "悲伤"}}},
            r"cheerful_strong\.wav: emotion: got 'cheerful', expected one of sad",
        ),
        (
            {"labels": {"zh": {"sad": "悲", "glad": "喜"}}},
            r"cheerful_strong\.wav: emotion: got 'cheerful', expected one of sad, glad",
        ),
        ({"label_column": "mood"}, "mood"),
        (
            {"conflict_map": {"sad": "happy"}},
            r"conflict_map\.sad: got 'happy', expected another of",
        ),
        (
            {"prompt_language": "de"},
            r"got clips in 'de' and no instructions in it: set prompts\.de",
        ),
    ],
)
def test_settings_that_do_not_fit_model_or_clips(
    finished: RunFolder, clips: Path, settings: dict[str, Any], match: str
) -> None:
    refused(finished, match, **{"audio": str(clips), **settings})


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("patch_layer=[1]", r"patch_layer: got an unknown key.* Did you mean patch_layers"),
        ("spans=[audio]", "spans: got an unknown key"),
        ("patch_layers=3", "patch_layers: got 3, expected a valid tuple"),
        ("patch_layers=[]", "patch_layers: got .*, expected Tuple should have at least 1 item"),
        ("patch_layers=[a]", r"patch_layers\.0: got 'a', expected a valid integer"),
        ("min_effect=none", "min_effect: got 'none', expected a valid number"),
        ("min_effect=0", "min_effect: got 0, expected greater than 0"),
        ("n_resamples=10", "n_resamples: got 10, expected greater than or equal to 1000"),
        ("truncate=perhaps", "truncate: got 'perhaps', expected a valid boolean"),
        ("donors=[voice_swap]", r"donors\.0: got 'voice_swap', expected 'self', 'text_swap'"),
        ("modes=[audio_only]", "modes must include conflict"),
        ("modes=[conflict, audio_only, shout]", r"modes\.2: got 'shout', expected 'audio_only'"),
        ("prompts={de: {ask: A}}", r"prompts\.de\.label_only: got nothing, expected Field req"),
        (
            "prompts.de={ask: A, label_only: B, obey: C, mention: '{label}', choose: '{labels}', "
            "unrelated: D}",
            r"prompts\.de\.obey: got 'C', expected text that has \{label\} once",
        ),
        ("label_mode=sequence", "label_mode 'sequence' has no lens"),
        ("align=stretch", "align: got 'stretch', expected 'error'"),
        ("variant=Seed", "variant: got 'Seed', expected 'corrected' or 'seed'"),
    ],
)
def test_settings_that_no_run_could_have(word: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_settings(EmotionConflictConfig, words=[word])


def test_the_command_line_says_it_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["run", "emotion_conflict", "--out", str(out), "-s", "patch_layer=[1]"]
    monkeypatch.setattr("sys.argv", ["hooked-alm", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: reading the settings: patch_layer: got an unknown key")
    assert "Traceback" not in message
    assert not out.exists()


# --- Models that are refused


def test_a_checkpoint_without_processor_files(
    finished: RunFolder, clips: Path, tiny_models: TinyModels
) -> None:
    folder = tiny_models.folder("mha")
    refused(finished, "no processor files", model=str(folder), audio=str(clips))


def test_a_text_only_checkpoint(finished: RunFolder, clips: Path, tmp_path: Path) -> None:
    sizes = dict(
        hidden_size=12, intermediate_size=10, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, vocab_size=19,
    )  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(tmp_path / "text")
    refused(
        finished,
        "the model has no audio front-end, or its folder no processor files",
        model=str(tmp_path / "text"),
        audio=str(clips),
    )


@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_batched_sweeps_are_the_single_ones_to_rounding(finished: RunFolder, engine: str) -> None:
    """Of clips of unequal length, by every donor; a run patched with itself stays as it was."""
    given = {**finished.provenance["config"], "engine": engine}
    single, batched = (
        EmotionConflict(EmotionConflictConfig(**{**given, "batch_size": n, "unit_batches": n}))
        for n in (1, 3)
    )
    for experiment in (single, batched):
        experiment.identify()
        experiment.load()
    (unit,) = (unit for unit in batched.units() if unit.id.startswith("patch"))
    assert len(unit.payload) == 9
    assert len({single.n_positions(sweep) for sweep in unit.payload}) > 1
    found, alone = batched.measure(unit), single.measure(unit)
    ours, theirs = (pd.DataFrame(one.tables["patching"]) for one in (found, alone))
    assert {*ours.donor} == {*SMALL["donors"]}
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=BATCHED_ROWS)
    if engine == "hooks":
        assert not ours.loc[ours.donor == "self", "shift"].any()
    for mine, other in zip(found.record["works"], alone.record["works"], strict=True):
        for key in ("unit", "span_length_ratio", "token_ids", "spans", "donor"):
            assert mine[key] == other[key]


def test_labels_of_unequal_length_align_or_are_refused_before_the_first_unit(
    finished: RunFolder, tmp_path: Path, tiny_models: TinyModels
) -> None:
    """The tiny tokenizer splits every label differently, as real ones do."""
    audio = tmp_path / "clips"
    audio.mkdir()
    for name in ("en_sad_strong", "en_cheerful_strong"):
        soundfile.write(audio / f"{name}.wav", samples(name)[:12_000], RATE)
    settings = {"model": str(tiny_models.folder("gqa")), "audio": str(audio), "patch_layers": (1,)}
    refused(
        finished, "aligning span 'label'.* labels of equal token count", **settings, align="error"
    )
    experiment = EmotionConflict(EmotionConflictConfig(**settings, donors=("text_swap",)))
    experiment.identify()
    experiment.load()
    sweeps = [experiment.measure(u) for u in experiment.units() if u.id.startswith("patch")]
    assert len(sweeps) == 2
    for sweep in sweeps:
        ratios = sweep.record["works"][0]["span_length_ratio"]
        assert ratios["label"] != 1.0  # recorded
        assert ratios["audio"] == 1.0
        scores = pd.DataFrame(sweep.tables["patching"]).filter(like="z_")
        assert torch.tensor(scores.to_numpy().tolist()).isfinite().all()
