"""semantic_vs_prosody on a user's own clips: what is refused before any work, and ``kill -9``."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import soundfile
import soxr

from hooked_alm import HookedALM
from hooked_alm.bundled import MODELS
from hooked_alm.errors import InputError
from hooked_alm.experiments.registry import load_experiment
from hooked_alm.experiments.semantic_vs_prosody.experiment import (
    BUNDLED_ITEMS,
    SemanticVsProsody,
)
from hooked_alm.experiments.semantic_vs_prosody.settings import Align, SemanticVsProsodyConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from stopped_runs import kill, needs_kill, results, run_experiment, start, units, wait_for
from tiny import TinyModels
from tolerances import BATCHED_ROWS

NAMES = ("s1_sad_words_happy_voice", "s1_sad_words_angry_voice", "s1_angry_words_happy_voice")
N_UNITS = 3 + 4 + 3 + 1
SMALL: dict[str, Any] = {"controls": ("self",), "n_resamples": 1000}
LOADED: dict[str, HookedALM] = {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the bundled model once for all tests; other models as ever."""
    load = HookedALM.from_pretrained

    def load_or_recall(folder: str, **options: Any) -> HookedALM:
        if Path(folder).parent != MODELS:
            return load(folder, **options)
        if folder not in LOADED:
            LOADED[folder] = load(folder, **options)
        return LOADED[folder]

    monkeypatch.setattr(HookedALM, "from_pretrained", load_or_recall)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """One semantic and one prosody pair."""
    return manifest(tmp_path / "clips", NAMES)


def manifest(folder: Path, names: tuple[str, ...], **changed: object) -> Path:
    folder.mkdir()
    table = pd.read_csv(BUNDLED_ITEMS / "manifest.csv")
    table = table[table.path.isin([f"{name}.ogg" for name in names])]
    table = table.assign(path=[str(BUNDLED_ITEMS / path) for path in table.path])
    table = table[["path", "semantic_label", "prosody_label", "speaker", "text"]]
    table.assign(**changed).to_csv(folder / "manifest.csv", index=False)
    return folder


def opened(**settings: Any) -> SemanticVsProsody:
    experiment = SemanticVsProsody(SemanticVsProsodyConfig(**{**SMALL, **settings}))
    experiment.identify()
    experiment.load()
    return experiment


def test_the_command_line_knows_it() -> None:
    assert load_experiment("semantic_vs_prosody") is SemanticVsProsody


def test_units_of_a_small_manifest(clips: Path) -> None:
    experiment = opened(audio=str(clips))
    ids = [unit.id for unit in experiment.units()]
    assert len(ids) == N_UNITS
    first, second, third = NAMES
    assert {f"semantic__{first}__{third}", f"prosody__{second}__{first}"} < {*ids}
    assert [i for i in ids if i.startswith("self__")] == [f"self__{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("names", "changed", "settings", "match"),
    [
        (NAMES, {"prosody_label": "cheerful"}, {}, r"line 2: prosody_label: got 'cheerful'"),
        (NAMES[::2], {}, {}, r"none of which makes a prosody pair.*set pair_types to \[semantic\]"),
        (NAMES[:2], {}, {}, r"none of which makes a semantic pair.*set pair_types to \[prosody\]"),
        (NAMES, {}, {"labels": {"sad": "sad", "happy": "happy"}}, r"got 'angry', expected one of"),
        (
            NAMES,
            {},
            {"labels": {"sad": "sad", "happy": "happy", "angry": "sad"}},
            "'sad' and 'angry' both begin with token",
        ),
        (NAMES, {}, {"labels": {"sad": "", "happy": "h", "angry": "a"}}, "'sad': .* has an empty"),
    ],
)
def test_what_no_run_could_use_is_refused(
    tmp_path: Path,
    names: tuple[str, ...],
    changed: dict[str, Any],
    settings: dict[str, Any],
    match: str,
) -> None:
    audio = str(manifest(tmp_path / "clips", names, **changed))
    with pytest.raises(InputError, match=match):
        opened(audio=audio, **settings)


def test_a_refusal_leaves_no_run_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = SemanticVsProsodyConfig(audio=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"reading .*nowhere"):
        runner.run(SemanticVsProsody(config), out)
    assert not (out / "run.json").exists()


def test_unequal_clips_under_error_are_refused_by_pair(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "clips", NAMES)
    samples, rate = soundfile.read(BUNDLED_ITEMS / f"{NAMES[2]}.ogg", dtype="float32")
    soundfile.write(folder / "short.wav", samples[:20_000], rate)
    table = pd.read_csv(folder / "manifest.csv")
    table.loc[table.path.str.contains(NAMES[2]), "path"] = "short.wav"
    table.to_csv(folder / "manifest.csv", index=False)
    with pytest.raises(InputError, match=r"aligning span 'audio'") as refused:
        opened(audio=str(folder), align="error")
    assert any(f"unit semantic__{NAMES[0]}__short" in note for note in refused.value.__notes__)
    assert len(opened(audio=str(folder)).pairs) == 4


def test_a_control_of_another_length_under_error_is_refused_too(tmp_path: Path) -> None:
    """Its donor is in no pair."""
    folder = manifest(tmp_path / "clips", (*NAMES, "s2_sad_words_happy_voice"))
    samples, rate = soundfile.read(BUNDLED_ITEMS / "s2_sad_words_happy_voice.ogg", dtype="float32")
    soundfile.write(folder / "s2_short.wav", samples[:27_000], rate)
    table = pd.read_csv(folder / "manifest.csv")
    table.loc[table.path.str.contains("s2_"), "path"] = "s2_short.wav"
    table.to_csv(folder / "manifest.csv", index=False)
    settings = {"audio": str(folder), "controls": ("same_labels",)}
    with pytest.raises(InputError, match=r"60 base and 42 donor positions") as refused:
        opened(**settings, align="error")
    assert any(f"unit same_labels__{NAMES[0]};" in note for note in refused.value.__notes__)
    for policy in get_args(Align)[1:]:
        experiment = opened(**settings, align=policy)
        [unit] = [unit for unit in experiment.units() if unit.id.startswith("same_labels")]
        cells = pd.DataFrame(experiment.measure(unit).tables["control_patches"])
        moved = (
            cells.filter(regex="^z_").to_numpy()
            - cells.filter(regex="^base_(?!prediction)").to_numpy()
        ).T
        assert abs(moved[:, 0]).max() > 0.1
        assert abs(moved[:, -1]).max() < 1e-4


def test_clips_that_the_model_cannot_hear_are_refused_by_line(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "clips", NAMES)
    rng = np.random.default_rng(0)
    table = pd.read_csv(folder / "manifest.csv")
    for row, (name, n) in enumerate({"short.wav": 100, "long.wav": 160_000}.items()):
        soundfile.write(folder / name, 0.1 * rng.standard_normal(n), 16_000)
        table.loc[row, "path"] = name
    table.to_csv(folder / "manifest.csv", index=False)
    match = (
        r"2 problems\n.*manifest\.csv line 2: .*short\.wav.* too short"
        r"[^\n]*\n.*line 3: .*long\.wav lasts 10\.000 s"
    )
    with pytest.raises(InputError, match=match):
        opened(audio=str(folder))


def test_stereo_telephone_and_studio_recordings_are_heard(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "clips", NAMES)
    table = pd.read_csv(folder / "manifest.csv")
    names = ("two channels.wav", "8 kHz.wav", "44100.flac")
    for path, name, rate in zip(table.path, names, (16_000, 8_000, 44_100), strict=True):
        samples, own = soundfile.read(path, dtype="float32")
        samples = soxr.resample(samples, own, rate)
        if "two" in name:
            samples = np.stack([samples, 0 * samples], axis=1)
        soundfile.write(folder / name, samples, rate)
    table.assign(path=names).to_csv(folder / "manifest.csv", index=False)
    experiment = opened(audio=str(folder), controls=("silence", "noise"))
    assert {clip.n_tokens for clip in experiment.clips.values()} == {60}
    described = experiment.identify()["clips"]
    experiment.load()
    assert [clip["item"] for clip in described] == ["two-channels", "8-kHz", "44100"]
    notes = ["2 channels downmixed", "resampled from 8000 Hz", "resampled from 44100 Hz"]
    assert all(n in " ".join(clip["notes"]) for n, clip in zip(notes, described, strict=True))
    sweeps = [sweep for _, sweep in experiment._controls()]
    assert {sweep.kind for sweep in sweeps} == {"silence", "noise"}
    for sweep in sweeps:
        assert experiment._control_clip(sweep).n_tokens == 60


def test_batches_are_the_single_ones_to_rounding(clips: Path) -> None:
    """Clips, pairs and controls; prompts of unequal length, in the order of the units."""
    table = pd.read_csv(clips / "manifest.csv")
    samples, rate = soundfile.read(table.path[0])
    soundfile.write(short := clips / "short.wav", samples[: len(samples) * 3 // 4], rate)
    table.assign(path=[short, *table.path[1:]]).to_csv(clips / "manifest.csv", index=False)
    settings: dict[str, Any] = {"audio": str(clips), "controls": ("self", "noise")}
    single = opened(**settings)
    batched = opened(**settings, batch_size=3, unit_batches=2, batch_positions=400)
    assert len({*single._lengths.values()}) > 1
    units, alone = batched.units(), single.units()
    works = [work for unit in units[:-1] for work in unit.payload]
    assert works == [unit.payload[0] for unit in alone[:-1]]
    assert [len(unit.payload) for unit in units[:-1]] == [3, 4, 6]
    found, expected = ([one.measure(u) for u in some] for one, some in (
        (batched, units), (single, alone)
    ))  # fmt: skip
    for name in batched.tables:
        ours, theirs = (
            pd.DataFrame([row for one in some for row in one.tables.get(name, ())])
            for some in (found, expected)
        )
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=BATCHED_ROWS)
    records, others = (
        [w for one in some[:-1] for w in one.record["works"]] for some in (found, expected)
    )
    assert [one.get("token_ids") for one in records] == [one.get("token_ids") for one in others]


def test_a_model_without_audio_is_refused(clips: Path, tiny_models: TinyModels) -> None:
    with pytest.raises(InputError, match="no audio front-end, or its folder no processor files"):
        opened(audio=str(clips), model=str(tiny_models.folder("mha")))


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("span=[audio]", r"span: got an unknown key.* Did you mean spans"),
        ("spans=[text]", "spans must be some of audio, text, struct, readout, all"),
        ("spans=[audio, audio]", "each once and audio among them"),
        ("controls=[hum]", r"controls\.0: got 'hum', expected 'self', 'same_labels'"),
        ("pair_types=[]", "pair_types: got .*at least 1 item"),
        ("n_pairs=0", "n_pairs: got 0, expected greater than or equal to 1"),
        ("align=min_len", "align: got 'min_len', expected 'error', 'resample_linear'"),
        ("delta=odds", "delta: got 'odds', expected 'logit_diff'"),
        ("labels={sad: sad}", "labels must name at least two emotions"),
        ("label_mode=sequence", "label_mode 'sequence' has no lens"),
        ("variant=Seed", "variant: got 'Seed', expected 'corrected' or 'seed'"),
    ],
)
def test_settings_that_no_run_could_have(word: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_settings(SemanticVsProsodyConfig, words=[word])


def test_the_seeds_defaults_can_be_set_one_by_one() -> None:
    def defects(**settings: Any) -> set[str]:
        return {*SemanticVsProsody(SemanticVsProsodyConfig(**settings)).known_defects()}

    every = {"C6", "C7", "C31", "C32", "M-001-2", "M-001-5", "M-001-8"}
    assert defects(variant="seed") == every
    assert defects() == set()
    assert defects(variant="seed", delta="logprob") == every - {"C31"}
    assert defects(lens_source="hf_tuple") == {"C6"}


# --- Kill and resume


@needs_kill
def test_three_kills_end_with_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    settings = {"audio": str(clips), **SMALL}
    config = SemanticVsProsodyConfig(**settings)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    runner.run(SemanticVsProsody(config), whole)
    for n_made in (0, 3, N_UNITS - 1):  # before a unit, amid them, as it concludes
        process = start(run_experiment, "semantic_vs_prosody", out, **settings)
        wait_for(lambda n=n_made: (out / "events.jsonl").exists() and len(units(out)) >= n)
        kill(process)
        assert not (out / "report.html").exists()
    before = len(units(out))
    assert before >= N_UNITS - 1
    again = runner.run(SemanticVsProsody(config), out)
    assert isinstance(again, RunFolder)
    expected, got = results(whole), results(out)
    assert len(units(out)) == N_UNITS
    assert {"tables/patches.parquet", "tables/flip_rates.csv", "report.json"} <= expected.keys()
    assert [name for name in expected if got.get(name) != expected[name]] == []
    assert got.keys() == expected.keys()
