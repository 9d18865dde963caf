"""Encoder lens as a whole: a user's table on a tiny Whisper, and on a language model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.experiments.encoder_lens.experiment import EncoderLens
from hooked_alm.experiments.encoder_lens.settings import EncoderLensConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.reading.lens import logit_lens
from noise_clips import noise_table
from stopped_runs import interrupted, results
from tiny import TinyModels
from tolerances import LENS_ROWS
from whisper_toy import LAYERS, Whispers

TEXTS = ("two cats", "", "Two cats, a cat!", "a dog")
SETTINGS: dict[str, Any] = {"n_resamples": 1000, "max_new_tokens": 8, "language": "en"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, in one of which nothing is said."""
    n = range(len(TEXTS))
    return noise_table(
        tmp_path_factory.mktemp("spoken"), [0.3 + 0.2 * i for i in n],
        text=TEXTS, speaker=[f"s{i % 2}" for i in n],
    )  # fmt: skip


def experiment(model: Path, table: Path, **changes: Any) -> EncoderLens:
    given = {**SETTINGS, **changes}
    return EncoderLens(EncoderLensConfig(model=str(model), audio=str(table), **given))


@pytest.fixture(scope="module")
def run(
    small_figures: None, whispers: Whispers, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(experiment(whispers.folder(), table), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(EncoderLens, "page", lambda self, page, run: None)


def test_every_clip_is_written_down_at_every_depth(
    run: RunFolder, whispers: Whispers, table: Path
) -> None:
    found = run.read_table("transcripts")
    assert found.groupby("clip").depth.apply(list).to_dict() == {
        f"c{n}": [*range(LAYERS["encoder"] + 1)] for n in range(4)
    }
    last = found[found.depth == LAYERS["encoder"]]
    assert (last.distance == 0).all()
    assert last.reference_n.tolist() == [2, 0, 4, 2]
    silent = last.iloc[1]
    assert (silent.reference_known, silent.reference_n) == (1, 0)
    assert np.isfinite(silent.log_p_reference)
    controls = run.read_table("controls")
    assert set(controls.verdict) == {"pass"}
    # Against a run of the model, which knows of no depths.
    model = whispers.hooked()
    with torch.no_grad():
        said = model.generate(
            model.prepare(table.parent / "c2.wav", language="en"), 8, do_sample=False,
            suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
    assert last.text.tolist()[2] == said[0].strip()


def test_error_rates_are_of_the_corpus(run: RunFolder) -> None:
    """Errors of all clips over all words, 8 here, not the mean of clips' rates."""
    rates = run.read_table("word_errors").set_index("depth")
    found = run.read_table("transcripts")
    for depth, some in found.groupby("depth"):
        wrong = some[["reference_substitutions", "reference_deletions", "reference_insertions"]]
        assert rates["mean"][depth] == wrong.to_numpy().sum() / 8
    assert set(rates.n) == {8}


def test_a_token_settles_where_the_logit_lens_says(
    run: RunFolder, whispers: Whispers, table: Path
) -> None:
    model, found = whispers.hooked(), run.read_table("tokens")
    x = model.prepare(table.parent / "c2.wav", language="en")
    said = run.read_unit("clip__c2")["record"]["tokens"][-1]
    rows = found[found["clip"] == "c2"].sort_values("place")
    y = x.extend(torch.tensor([said]))
    at = torch.arange(x.shape[1] - 1, y.shape[1])[None]
    with torch.no_grad():
        scores = logit_lens(model, y, [*range(model.cfg.d_vocab)], positions=at)[:, 0]
    for place, (depth, margin) in enumerate(zip(rows.depth, rows.margin, strict=True)):
        best = scores[:, place].argmax(-1).tolist()
        first = next(k for k in range(len(best)) if len({*best[k:]}) == 1)
        assert depth == first
        top = scores[depth, place].topk(2).values
        assert margin == pytest.approx(float(top[0] - top[1]), abs=LENS_ROWS)


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    def again() -> EncoderLens:
        return experiment(whispers.folder(), table)

    tables = {path.name: path.read_bytes() for path in run.path.glob("tables/*")}
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), {3}), tmp_path / "stopped")
    assert len([*(tmp_path / "stopped" / "units").glob("*.json")]) == 2
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert {p.name: p.read_bytes() for p in found.path.glob("tables/*")} == tables
    assert results(tmp_path / "two").keys() == results(tmp_path / "stopped").keys()


@pytest.mark.usefixtures("unpaged")
def test_without_a_column_of_words_nothing_is_said_of_errors(
    whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    (clips := tmp_path / "clips").mkdir()
    for clip in table.parent.glob("*.wav"):
        (clips / clip.name).symlink_to(clip)
    found = runner.run(experiment(whispers.folder(), clips), tmp_path / "run")
    assert found.read_table("word_errors").empty
    assert found.read_table("transcripts").log_p_reference.isna().all()
    claims = found.read_table("findings").set_index("claim")
    assert "no table says what is said" in claims.statement["last_block_helps"]


@pytest.mark.usefixtures("unpaged")
def test_a_model_that_hears_in_its_prompt_is_read_too(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    config = {"prompt": "What is said?", "language": None, "cluster": "speaker"}
    found = runner.run(experiment(tiny_models.folder(), table, **config), tmp_path / "run")
    rows = found.read_table("transcripts")
    assert {*rows.depth} == {0, 1, 2}
    assert set(found.read_table("controls").verdict) == {"pass"}
    model = HookedALM.from_pretrained(tiny_models.folder())
    x = model.prepare(table.parent / "c0.wav", "What is said?")
    said = model.generate(x, 8, do_sample=False)[0].strip()
    assert rows[(rows["clip"] == "c0") & (rows.depth == 2)].text.item() == said


def test_what_cannot_be_written_down_is_refused_before_anything_is_written(
    whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    plain = table.parent / "plain.csv"
    plain.write_text("path,text\nc0.wav,a\n", "utf-8")
    with pytest.raises(InputError, match=r"plain.csv.*line 2.*speaker: missing"):
        runner.run(experiment(whispers.folder(), plain, cluster="speaker"), out)
    with pytest.raises(InputError, match="no English spellings"):
        runner.run(experiment(whispers.folder(), table, normaliser="english"), out)
    with pytest.raises(InputError, match="expected one of the 2 that the checkpoint knows"):
        runner.run(experiment(whispers.folder(), table, language="fr"), out)
    assert not out.exists()
