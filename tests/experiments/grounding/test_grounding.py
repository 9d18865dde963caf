"""``grounding`` on the twins, on a model of which one head carries everything, and on nothing."""

import functools
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from circuits_toy import PLANTED, planted_model
from grounding_toy import N_TONES, run_small, settings_of, write_labelled_tones
from grounding_verdicts import cases, edit
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments.grounding.experiment import Grounding
from hooked_alm.experiments.grounding.measure import READINGS, GroundingMeasures
from hooked_alm.experiments.grounding.settings import GroundingConfig
from hooked_alm.experiments.grounding.tables import MEASURES, best_heads, coefficient
from hooked_alm.experiments.materials.clips import Sounds
from hooked_alm.experiments.materials.item_curves import cell_means
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.controls import label_controls
from hooked_alm.experiments.workbench.executors import Executor, Processes
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from stopped_runs import kill, needs_kill, results, start, units, wait_for
from tiny import TinyModels
from tolerances import BATCHED_ROWS, FAST_ENGINE

# --- Truth: the rule that the twins were trained on


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips whose donors are among them."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("zh_sad_strong", "zh_cheerful_strong", "zh_angry_normal", "zh_neutral_normal"):
        shutil.copy(CLIPS / f"{name}.wav", folder)
    return folder


def opened(**settings: Any) -> Grounding:
    experiment = Grounding(GroundingConfig(**settings))
    experiment.identify()
    experiment.load()
    return experiment


@contextmanager
def only(site: int) -> Iterator[None]:
    """Sweeps one of the sites alone: all of them take seconds an item."""
    every = GroundingMeasures.sites
    with pytest.MonkeyPatch.context() as patched:
        one = itertools.islice
        patched.setattr(GroundingMeasures, "sites", lambda x: one(every(x), site, site + 1))
        yield


@functools.cache
def at_depth_0(model: str, audio: Path, condition: str) -> dict[str, pd.DataFrame]:
    experiment = opened(
        model=f"bundled:{model}", audio=str(audio), condition=condition, batch_size=4,
        unit_batches=4,
    )  # fmt: skip
    with only(0):
        units = (one for one in experiment.units() if not isinstance(one.payload, Sounds))
        found = [experiment.measure(one) for one in units]
    return {
        name: pd.DataFrame([row for one in found for row in one.tables[name]])
        for name in ("runs", "grounding")
    }


@pytest.mark.parametrize(
    ("model", "low", "high"), [("follows_voice", 0.99, 1), ("follows_text", 0, 0.2)]
)
def test_gc_0_is_the_rule_that_was_trained(few: Path, model: str, low: float, high: float) -> None:
    """A voice that agrees with an answer raises its logit further: not 0 where the text decides."""
    cells = at_depth_0(model, few, "conflict")["grounding"]
    whole = cells[cells.span == "all"]
    assert len(whole) == 4 * 2
    assert low <= whole.gc.mean() <= high
    assert ((whole.gc > 0.5) == (model == "follows_voice")).all()
    # At its own span, before the first block, an input is all of its exchange.
    for name in ("audio", "text"):
        own = cells[cells.span == name]
        close = {"rtol": 0, "atol": 4 * FAST_ENGINE[torch.float32]}
        np.testing.assert_allclose(own[f"effect_{name}"], own[f"te_{name}"], **close)


@pytest.mark.parametrize("model", ["follows_voice", "follows_text"])
def test_without_an_instruction_the_coefficient_is_nan_and_not_1(few: Path, model: str) -> None:
    tables = at_depth_0(model, few, "audio_only")
    assert {*tables["runs"].role} == {"base", "audio"}
    cells = tables["grounding"]
    assert cells[["gc", "te_text", "effect_text", "rec_text"]].isna().all(axis=None)
    whole = cells[cells.span == "all"]
    assert (whole.te_audio > 1).all()  # both twins hear the voice
    np.testing.assert_allclose(whole.rec_audio, 1, rtol=0, atol=4 * FAST_ENGINE[torch.float32])


# --- One head that carries everything


@pytest.fixture(scope="module")
def tones(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones, labelled by which of two tokens the planted model rather says."""
    folder = tmp_path_factory.mktemp("tones")
    write_labelled_tones(folder, planted_model(tiny_models, folder / "model"))
    return folder


def planted(folder: Path, **settings: Any) -> Grounding:
    return Grounding(GroundingConfig(**settings_of(folder, **settings)))


def ran(out: Path, executor: Executor | None = None, **settings: Any) -> RunFolder:
    """A whole run, in a process that does not check the shapes of some 100,000 calls."""
    process = start(run_small, out, executor, **settings)
    process.join()
    assert process.exitcode == 0
    return RunFolder(out)


@pytest.fixture(scope="module")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return ran(tmp_path_factory.mktemp("run") / "run", **settings_of(tones))


def test_the_planted_head_is_named(finished: RunFolder) -> None:
    best = finished.read_table("best_heads")
    best = best[best.input == "audio"]
    assert best.direction.tolist() == [*READINGS]
    assert best[["block", "head"]].drop_duplicates().to_numpy().tolist() == [[*PLANTED]]
    np.testing.assert_allclose(best.recovery, 1, atol=1e-3)
    findings = finished.read_table("findings").set_index("claim")
    # Random tokens are not what this model says: its labels' controls take the claim back.
    assert "head L2H3 carries the voice's part" in findings.statement["head_audio"]
    failed = finished.read_table("controls").query("verdict == 'FAIL'").control
    assert {*failed} <= {one.name for one in label_controls("runs")}
    assert findings.statement["head_audio"].count("the control") == len(failed)
    # Nothing else writes to the stream, and what the head writes is at the readout from there on.
    handoffs = finished.read_table("handoffs").set_index(["direction", "donor", "event"])
    for reading in READINGS:
        assert handoffs.depth[reading, "audio_swap", "leaves"] == PLANTED.layer + 1
        assert handoffs.depth[reading, "audio_swap", "arrives"] == PLANTED.layer + 1
    nodes = finished.read_table("nodes")
    others = nodes[(nodes.block != PLANTED.layer) | (nodes["head"] != PLANTED.head)]
    assert (others[["effect_audio", "effect_text"]].abs() < 1e-5).all(axis=None)


def test_audio_only_prints_nan(tones: Path, tmp_path: Path) -> None:
    folder = ran(tmp_path / "run", **settings_of(tones, condition="audio_only"))
    findings = folder.read_table("findings").set_index("claim")
    assert "under audio_only no instruction can be exchanged" in findings.statement["grounded"]
    assert f"gc = NaN in {N_TONES} items" in findings.statement["grounded"]
    assert "head L2H3 carries the voice's part" in findings.statement["head_audio"]
    assert "the instruction was not exchanged" in findings.statement["head_text"]
    assert "The grounding coefficient is NaN everywhere" in (folder.path / "report.html").read_text(
        "utf-8"
    )


def test_nothing_is_named_where_nothing_is_carried(
    tiny_models: TinyModels, tones: Path, tmp_path: Path
) -> None:
    planted_model(tiny_models, tones / "deaf", is_deaf=True)
    folder = ran(tmp_path / "run", **settings_of(tones, "deaf"))
    statements = folder.read_table("findings").statement
    assert not statements.str.contains("ead L").any(), statements
    assert not folder.read_table("findings").established.any()


@needs_kill
def test_killed_and_resumed_by_two_processes_it_ends_with_the_same_bytes(
    tones: Path, finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for n in (1, 2):
        process = start(run_small, out, **settings_of(tones))
        wait_for(lambda n=n: len(units(out)) == n)
        kill(process)
    assert len(units(out)) < len(units(finished.path)) == 4
    assert results(ran(out, Processes(2), **settings_of(tones)).path) == results(finished.path)


def test_batches_are_the_single_items_to_rounding(tones: Path) -> None:
    single, batched = (planted(tones, batch_size=n, unit_batches=2 // n) for n in (1, 2))
    for one in (single, batched):
        one.identify()
        one.load()
    unit = batched.units()[0]
    assert len(unit.payload) == 2
    with only(2):  # heads
        ours, theirs = (one.measure(unit) for one in (batched, single))
    assert ours.tables.keys() == theirs.tables.keys()
    for name, rows in theirs.tables.items():
        # Coefficients and recoveries are of effects near 0 too.
        found, expected = (
            pd.DataFrame(table).drop(columns=["gc", "rec_audio", "rec_text"], errors="ignore")
            for table in (ours.tables[name], rows)
        )
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=BATCHED_ROWS)
    for mine, other in zip(ours.record["works"], theirs.record["works"], strict=True):
        assert mine == other


# --- Summaries


def test_means_are_of_the_items_that_have_a_value() -> None:
    run, draws = cases(), Draws(0, 1000)
    cells = run["grounding"].copy()
    first = cells[(cells.depth == 1) & (cells["clip"] == "c0")].index
    cells.loc[first, "gc"] = np.nan
    means = cell_means(cells, MEASURES, ["direction", "span", "depth"], draws)
    gc = means[(means.measure == "gc") & (means.span == "all") & (means.direction == "noise")]
    assert gc.n.tolist() == [12, 11, 12, 12, 12]
    assert gc.n_undefined.tolist() == [0, 1, 0, 0, 0]
    for depth, row in zip(range(5), gc.to_dict("records"), strict=True):
        own = cells[(cells.direction == "noise") & (cells.span == "all") & (cells.depth == depth)]
        assert row["mean"] == pytest.approx(own.gc.mean(), abs=1e-12)
        own = own.sort_values(["clip", "target"])
        alone = draws.row(own.gc, own["clip"].tolist())
        assert [row[end] for end in ("low", "high")] == pytest.approx([alone["low"], alone["high"]])


def test_a_lead_is_over_the_nearest_and_holds_for_all() -> None:
    run = cases()
    best = best_heads(run["nodes"], Draws(0, 1000)).set_index(["input", "direction"])
    row = best.loc["audio", "denoise"]
    nodes = run["nodes"]
    nodes = nodes[(nodes.direction == "denoise") & (nodes["head"] >= 0)]
    means = nodes.groupby(["block", "head"]).effect_audio.mean().sort_values(ascending=False)
    assert (row.block, row["head"]) == means.index[0] == (2, 1)
    assert (row.next_block, row.next_head) == means.index[1] == (1, 0)
    assert row.effect == pytest.approx(means.iloc[0])
    assert row.lead == pytest.approx(means.iloc[0] - means.iloc[1])
    assert 0 < row.lead_low < row.lead


def test_what_is_undefined_is_said_in_words() -> None:
    """No item's instruction moves its answer enough to be divided by."""
    run = edit("nodes", "direction == 'noise'", "rec_text", lambda x: np.nan)(cases())
    said = Grounding.judge(run).findings["head_text"].statement
    assert "recovery undefined, as the exchange moves no item's answer by 0.5 logits" in said
    assert "denoise: L1H0 moves" in said
    assert "nan" not in said.lower()


def test_the_answer_is_judged_by_whole_runs_also_where_spans_are_resampled() -> None:
    run = edit("grounding", "span == 'all' and depth == 0", "effect_audio", lambda x: 0 * x)(
        cases()
    )
    own = run["items"].gc.mean()
    assert own > 0.85
    assert coefficient(run["grounding_means"])["mean"] == pytest.approx(own)


def test_where_no_runs_are_equally_long_their_control_is_not_checked() -> None:
    run = edit("runs", "role != 'base'", "n_tokens", lambda x: x + 1)(cases())
    controls = Grounding.judge(run).controls.set_index("control")
    whole = controls.loc["all positions exchanged, at any depth = the other run"]
    assert (whole.verdict, whole.found) == ("not applicable", "no such values")


# --- Settings and inputs


def test_the_seeds_ratio_is_a_known_defect() -> None:
    seed = Grounding(GroundingConfig(variant="seed"))
    assert seed.config.gc_form == "ratio"
    assert {*seed.known_defects()} == {"C13"}
    assert not Grounding(GroundingConfig()).known_defects()


@pytest.mark.parametrize(
    ("word", "match"),
    [
        (
            "condition=consistent",
            "condition: got 'consistent', expected 'conflict' or 'audio_only'",
        ),
        ("node_spans=[text]", r"node_spans\.0: got 'text', expected 'readout' or 'audio'"),
        ("node_spans=[audio]", "node_spans must include readout, and each only once"),
        ("gc_form=odds", "gc_form: got 'odds', expected 'share' or 'ratio'"),
        ("label_mode=sequence", "label_mode 'sequence' has no lens and no patched cell"),
        ("min_effect=0", "min_effect: got 0, expected greater than 0"),
    ],
)
def test_settings_that_no_run_could_have(word: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_settings(GroundingConfig, words=[word])


def test_what_cannot_run_is_refused_before_anything_is_written(tones: Path, tmp_path: Path) -> None:
    sound = 0.1 * np.sin(np.arange(4000) / 10)
    soundfile.write(tmp_path / "x.wav", sound, 16_000)
    soundfile.write(tmp_path / "y.wav", 0.5 * sound, 16_000)
    table = tmp_path / "table.csv"
    table.write_text("path,emotion,language,speaker\nx.wav,q,en,p\ny.wav,z,en,r\n", "utf-8")
    with pytest.raises(InputError, match="got no clip for which there is one of another label"):
        runner.run(planted(tones, audio=str(table), condition="audio_only"), tmp_path / "run")
    table.write_text("path,emotion,language\nx.wav,q,en\ny.wav,c,en\n", "utf-8")
    with pytest.raises(
        InputError, match=r"table\.csv.*line 3: emotion: got 'c', expected one of q"
    ):
        runner.run(planted(tones, audio=str(table)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
