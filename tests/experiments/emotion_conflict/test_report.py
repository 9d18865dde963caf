"""OB1's summaries, controls and claims, on tables whose answers are known by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emotion_conflict_verdicts import BROKEN
from emotion_toy import INPUTS, N_BLOCKS, Side, toy_recordings, toy_results, toy_sounds, toy_tables
from hooked_alm.experiments.emotion_conflict.curves import (
    MEAN_CURVE,
    critical_layer_table,
    delta_curves,
    patching_summary,
)
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.pages import _asked
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.tables import (
    EmotionResults,
    accuracy,
    attention_ratios,
    conflict_items,
    flip_cells,
    items_with_delta,
    summarise,
)
from hooked_alm.experiments.materials.item_curves import handoffs
from hooked_alm.experiments.materials.ob1 import EMOTIONS
from hooked_alm.experiments.workbench import page
from hooked_alm.experiments.workbench.claims import Finding
from hooked_alm.experiments.workbench.conclude import conclude
from hooked_alm.experiments.workbench.controls import FAIL, PASS, ROUNDING, SKIPPED
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.experiments.workbench.report import Clips, Report, read_report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.statistics.bootstrap import handoff_index

CONFIG = EmotionConflictConfig(n_resamples=1000)
SEED = EmotionConflictConfig(variant="seed", n_resamples=1000)
DRAWS = Draws(0, 1000)


@pytest.fixture
def run() -> EmotionResults:
    return toy_results(CONFIG)


# --- Summaries


def test_delta_curves_are_means_over_clips(run: EmotionResults) -> None:
    table = delta_curves(items_with_delta(run), DRAWS)
    items = run["delta"].merge(run["runs"], on="unit")
    end = items[(items.depth == N_BLOCKS) & (items.condition == "conflict")]
    row = table[(table.condition == "conflict") & (table.depth == N_BLOCKS)].set_index("stratum")
    assert row.loc["all", "mean"] == pytest.approx(end.delta.mean())
    assert row.loc["all", "low"] < row.loc["all", "mean"] < row.loc["all", "high"]
    assert row.loc["language=en", "n"] == 3
    assert row.loc["language=en", "mean"] == pytest.approx(end[end.language == "en"].delta.mean())
    assert {"voice=sad", "intensity=strong"} <= set(row.index)
    assert (table[table.depth == 0]["mean"] == 0).all()


def test_every_method_has_every_clip_and_the_mean(run: EmotionResults) -> None:
    table = critical_layer_table(items_with_delta(run), run)
    counts = table.groupby(["condition", "method"]).size()
    assert set(counts) == {13}
    assert counts.index.get_level_values("method").nunique() == 5
    assert table.method.iloc[0] == "resolve"
    mean = table[(table.file == MEAN_CURVE) & (table.condition == "conflict")].set_index("method")
    # A straight line from 0: decided at depth 1, half way at 2, no kink.
    assert mean.depth["resolve"] == 1
    assert mean.depth["half_rise"] == 2
    assert np.isnan(mean.depth["second_diff_abs"])
    assert mean.relative_depth["half_rise"] == 0.5


def test_half_rise_follows_the_winner_downwards(run: EmotionResults) -> None:
    table = critical_layer_table(items_with_delta(run), run)
    alone = table[(table.condition == "audio_only") & (table.method == "half_rise")]
    assert (alone.depth == 2).all()


def test_answers_are_counted_by_what_they_follow(run: EmotionResults) -> None:
    table = accuracy(items_with_delta(run))
    assert (table.groupby("condition").rate.sum() == 1).all()
    k = table.set_index(["condition", "answer"]).k
    assert k["conflict", "the other label (T)"] == 12
    assert k["mention_only", "the voice (A)"] == 12
    assert k["mention_only", "the other label (T)"] == 0


def test_flip_cells_mark_what_was_not_asked(run: EmotionResults) -> None:
    cells = flip_cells(conflict_items(run["runs"]), EMOTIONS).set_index(["voice", "named"])
    assert cells.rate["sad", "cheerful"] == 1
    assert np.isnan(cells.rate["sad", "angry"])
    assert cells.n["sad", "angry"] == 0
    assert len(cells) == 25


def test_patching_summary_counts_the_undefined(run: EmotionResults) -> None:
    patching = run["patching"]
    of_clip = patching["clip"] == "zh_neutral_normal"
    patching.loc[of_clip & (patching.donor == "text_swap"), "recovery"] = np.nan
    table = patching_summary(patching, DRAWS).set_index(["donor", "span", "block"])
    row = table.loc["text_swap", "text", 1]
    assert (row.n, row.n_undefined) == (12, 1)
    assert row.recovery_mean == pytest.approx(0.8)
    assert row.flip_rate == 1
    assert table.loc[("self", "text", 1), "n_undefined"] == 12
    assert np.isnan(table.loc[("self", "text", 1), "recovery_mean"])


def test_three_samples_have_a_wide_interval() -> None:
    patching = toy_results(CONFIG, n_clips=3)["patching"]
    patching.loc[patching["clip"] == "zh_neutral_normal", "flip"] = 0.0
    table = patching_summary(patching, DRAWS).set_index(["donor", "span", "block"])
    row = table.loc["text_swap", "text", 0]
    found = [row.flip_rate, row.flip_low, row.flip_high]
    np.testing.assert_allclose(found, [2 / 3, 0.208, 0.939], atol=1e-3)


def test_a_hand_off_is_for_good() -> None:
    curves = np.array([[1, 1, 0.9, 0.6, 0.4, 0.1, 0], [1, 1, 0.4, 0.7, 0.3, 0, 0]])
    np.testing.assert_array_equal(handoff_index(curves), [4, 4])
    np.testing.assert_array_equal(handoff_index(np.array([[1, 0.4, 0.7, 0.3]])), [3])
    np.testing.assert_array_equal(handoff_index(np.array([[1.0, 0.2, 0.9]])), [3])
    half = np.array([[0.9, 0.5, 0.0]])
    assert handoff_index(half)[0] == 2
    assert handoff_index(half, includes_half=True)[0] == 1


def test_hand_offs_name_blocks(run: EmotionResults) -> None:
    patching = run["patching"]
    table = handoffs(patching, "block", DRAWS).set_index(["donor", "event"])
    assert table.block["text_swap", "leaves"] == 2
    assert table.block["text_swap", "arrives"] == 2
    assert table.block["audio_swap", "leaves"] == 2
    assert (table.undefined == 0).all()
    some = patching[patching.block != 1]  # names are of blocks, not places in the list
    assert handoffs(some, "block", DRAWS).block.iloc[0] == 2
    patching.loc[patching.donor == "audio_swap", "recovery"] = np.nan
    table = handoffs(patching, "block", DRAWS).set_index(["donor", "event"])
    nothing = table.loc["audio_swap", "leaves"]
    assert nothing.n == 0
    assert np.isnan(nothing.block)
    assert nothing.undefined == 1


def test_attention_is_summed_up(run: EmotionResults) -> None:
    empty = run["attention"].assign(mass=0.0)
    assert (
        attention_ratios(empty, run["runs"])[["fraction", "ratio", "density"]].isna().all(axis=None)
    )
    mar = attention_ratios(run["attention"], run["runs"])
    assert (mar.n_audio == 2).all()
    assert (mar.n_text == 1).all()
    np.testing.assert_allclose(mar[["fraction", "ratio", "density"]].to_numpy()[0], [0.8, 4, 2])
    table = dict(summarise(run))["attention_summary"]
    row = table.set_index(["condition", "span", "layer", "measure"])["mean"]
    assert row["conflict", "audio", 0, "mass"] == pytest.approx(0.4)
    assert row["conflict", "audio", 0, "mass_without_sink"] == pytest.approx(0.5)
    assert np.isnan(row["conflict", "sink", 0, "mass_without_sink"])


# --- Controls


def verdicts(run: EmotionResults) -> dict[str, str]:
    table = EmotionConflict.judge(run).controls
    return dict(zip(table.control, table.verdict, strict=True))


def test_a_planted_fault_fails_its_control_alone() -> None:
    for control, change in BROKEN.items():
        found = verdicts(change(toy_results(CONFIG)))
        assert {name for name, verdict in found.items() if verdict == FAIL} == {control}


EXACT = {
    "a run patched with itself",
    "last block, any span without the readout",
    "audio span, other instruction, audio first",
    "last block, readout patched = the donor's answer",
}


def test_rounding_fails_no_control_of_the_fast_engine(run: EmotionResults) -> None:
    """All exact ones fail with hooks, under which a patched run is the whole run to the bit."""
    generator = np.random.default_rng(1)
    size = len(run["patching"])
    shifts = generator.uniform(-0.9, 0.9, size) * ROUNDING["logit"]["float32"]
    run["patching"]["shift"] += shifts
    assert set(verdicts(run).values()) == {PASS}
    hooks = replace(run, config=CONFIG.model_copy(update={"engine": "hooks"}))
    found = EmotionConflict.judge(hooks).controls.set_index("control")
    assert {*found.index[found.verdict == FAIL]} == EXACT
    assert set(found.expected[list(EXACT)]) == {"exactly 0"}
    fast = EmotionConflict.judge(run).controls.set_index("control")
    assert set(fast.expected[list(EXACT)]) == {"at most 0.0001"}


def test_donors_of_other_lengths_are_not_held_to_recovery_1(run: EmotionResults) -> None:
    runs, patching = run["runs"], run["patching"]
    runs.loc[runs["clip"] == "zh_sad_normal", "n_audio_tokens"] = 9
    patching.loc[patching["clip"] == "zh_angry_normal", "donor_clip"] = "zh_sad_normal"
    wrong = (patching["clip"] == "zh_angry_normal") & (patching.span == "all")
    patching.loc[wrong & (patching.block == 0), "shift"] += 0.5
    assert verdicts(run)["all positions patched = the donor's answer"] == PASS


def test_the_seed_lacks_most_controls() -> None:
    found = verdicts(toy_results(SEED))
    assert found["lens at the last depth = logits"] == SKIPPED
    assert found["a run patched with itself"] == SKIPPED
    assert found["audio span, other instruction, audio first"] == SKIPPED


def test_text_before_the_audio_is_not_judged(run: EmotionResults) -> None:
    late = replace(run, inputs={**run.inputs, "audio_is_first": False})
    assert verdicts(late)["audio span, other instruction, audio first"] == SKIPPED


# --- Claims


def findings(run: EmotionResults) -> dict[str, Finding]:
    return EmotionConflict.judge(run).findings


@pytest.mark.parametrize(
    ("side", "answer", "dominance", "sign"),
    [
        ("text", "follows the instruction", "The text dominates", 1),
        ("voice", "follows the voice", "The voice dominates", -1),
    ],
)
def test_claims_reverse_with_the_rule(side: Side, answer: str, dominance: str, sign: int) -> None:
    found = findings(toy_results(CONFIG, side=side))
    follows, h2 = found["answer_follows"], found["H2_dominance"]
    assert follows.established
    assert answer in follows.statement
    assert h2.established
    assert h2.statement.startswith(dominance)
    assert np.sign(h2.estimate) == sign
    assert abs(h2.estimate) == pytest.approx(9)
    assert found["naming_is_not_enough"].established == (side == "text")
    assert found["voice_is_heard"].established
    assert found["handoff_text_swap"].estimate == 2


def test_late_by_patching_needs_the_whole_interval(run: EmotionResults) -> None:
    late = findings(run)["H1_patching"]
    assert late.established
    assert "The instruction, whose exchange" in late.statement
    patching = run["patching"]
    early = (patching.span == "text") & (patching.donor == "text_swap") & (patching.block == 1)
    patching.loc[early, "recovery"] = 0.1
    early_finding = findings(toy_results(CONFIG, run.tables))["H1_patching"]
    assert not early_finding.established
    assert "not past block 1.5" in early_finding.statement


def test_a_hand_off_of_an_effect_within_rounding() -> None:
    """Half of the effect of about 10 logits, against twice the noise of a mean over the items."""
    for share, is_doubted in ((0.99, False), (1.01, True)):
        run = toy_results(CONFIG)
        patching = run["patching"]
        items = patching[patching.donor == "text_swap"].drop_duplicates(["clip", "target"])
        limit = items.total_effect.mean() / 4 * math.sqrt(len(items))
        run.tables["patching"] = patching.assign(noise=share * limit)
        found = findings(run)
        for name in ("H1_patching", "handoff_text_swap"):
            why = any("half of the effect is within rounding" in one for one in found[name].doubts)
            assert why == is_doubted


def test_few_items_establish_nothing() -> None:
    found = findings(toy_results(CONFIG, n_clips=9))
    assert not any(one.established for one in found.values())


def test_many_items_of_few_clips_establish_nothing() -> None:
    pairs = EmotionConflictConfig(pairs="all_pairs", n_resamples=1000)
    found = findings(toy_results(pairs, n_clips=3))
    assert found["answer_follows"].n == 12
    assert found["voice_is_heard"].n == 3
    assert not any(one.established for one in found.values())
    assert "(only 3 clips)" in found["answer_follows"].statement


def test_a_failed_control_takes_back_what_rests_on_it(run: EmotionResults) -> None:
    found = findings(BROKEN["a run patched with itself"](run))
    kept = {"answer_follows", "naming_is_not_enough", "voice_is_heard"}
    assert {name for name, one in found.items() if one.established} == kept
    assert found["H2_dominance"].doubts == ("the control 'a run patched with itself' failed",)


def test_a_known_defect_takes_back_what_it_touches() -> None:
    found = findings(toy_results(SEED))
    assert "known defects C1, C3, C4, C10" in found["H1_patching"].statement
    assert "known defects C6" in found["H1_lens"].statement
    assert "were not both swapped" in found["H2_dominance"].statement
    assert found["answer_follows"].doubts == ("known defects C9",)
    assert found["voice_is_heard"].established


def test_noisy_hand_offs_have_95_percent_intervals() -> None:
    """Of curves that let go at another block in every clip, the interval holds 95 % of the means.

    By hand: a mean of 16 draws from blocks 2 to 13 is below one half from the first block at which
    more than half of the drawn clips have let go, whose distribution is counted here.
    """
    n_clips, n_blocks = 16, 16
    leaves = np.arange(n_clips) % 12 + 2
    rows = [
        {"donor": "text_swap", "span": "text", "clip": f"c{clip}", "target": "sad", "block": block,
         "recovery": float(block < leaves[clip])}
        for clip in range(n_clips) for block in range(n_blocks)
    ]  # fmt: skip
    row = handoffs(pd.DataFrame(rows), "block", Draws(0, 4000)).iloc[0]
    draws = np.random.default_rng(5).integers(0, n_clips, (20_000, n_clips))
    kept = (leaves[draws][:, :, None] > np.arange(n_blocks)).mean(axis=1)
    first = (kept < 0.5).argmax(axis=1)
    # Of 16 clips, t₁₅ = 2.131 and √(16/15) leave 1.4 % where a plain percentile leaves 2.5 %.
    assert (row.low, row.high) == tuple(np.quantile(first, [0.0139, 0.9861]))
    assert (row.low, row.high) != tuple(np.quantile(first, [0.1, 0.9]))


# --- The whole report


def concluded(
    path: Path, config: EmotionConflictConfig, clips: int = 2
) -> tuple[Report, RunFolder]:
    folder, experiment = RunFolder(path / "run"), EmotionConflict(config)
    experiment.folder = folder
    experiment.recordings = toy_recordings(path / "audio", clips)
    tables = toy_tables(config, n_clips=clips) | toy_sounds(experiment.recordings)
    conclude(experiment, INPUTS, tables, folder)
    return read_report(folder), folder


def files(folder: RunFolder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in sorted(folder.path.rglob("*"))
        if path.is_file()
    }


def test_the_report_is_whole_and_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    report, folder = concluded(tmp_path / "a", CONFIG)
    again, other = concluded(tmp_path / "b", CONFIG)
    assert repr(report) == repr(again)  # NaN is not equal to itself
    assert files(folder) == files(other)
    assert report.is_calibration
    assert "trained on a known rule" in report.lead
    assert [section.title for section in report.sections] == [
        *("What was asked", "Answers", "Lens", "Patching", "Attention", "Controls"),
        "Methods and caveats",
    ]
    for name in ("manifest", "ob1_flip_summary", "critical_layers", "patching_summary"):
        assert (folder.path / "tables" / f"{name}.csv").exists()
    shown = [item for section in report.sections for item in section.items]
    assert {item.name for item in shown if item.type == "figure"} == {
        *("answers_by_condition", "flip_matrix", "delta_logit__combined", "lens_fidelity"),
        *("delta_logit__controls", "handoff", "recovery__text_swap", "recovery__audio_swap"),
        *("patching_summary", "attention_by_segment", "mar"),
    }
    cards = next(item for item in shown if item.type == "clips").clips
    assert [card.figure for card in cards] == [
        *("clip__zh_neutral_normal", "clip__zh_cheerful_normal"),
    ]
    assert cards[0].numbers["answer, conflict"] == "angry"


def test_of_many_clips_the_page_and_its_files_are_of_a_sample(
    tmp_path: Path, run: EmotionResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_CLIP_BYTES", 25_000)  # three toy clips
    recordings = toy_recordings(tmp_path / "audio", 10)
    run.tables["manifest"] = pd.DataFrame({"clip": range(40), "sha256": 0, "voiced_fraction": 0.0})
    shown = page.Page(folder := RunFolder(tmp_path / "run"))
    _asked(shown, run, recordings)
    (clips,) = (one for one in shown.sections[0].items if isinstance(one, Clips))
    assert clips.caption.startswith("3 of the 10 clips (mono")
    assert clips.caption.endswith("an order drawn with seed 0.")
    names = {card.label for card in clips.clips}
    assert len({name.split("_")[1] for name in names}) == 3, "of three emotions"
    assert {path.stem for path in (folder.path / "clips").iterdir()} == names
    drawn = {path.stem for path in (folder.path / "figures").glob("clip__*")}
    assert drawn == {f"clip__{name}" for name in names}


def test_the_seed_variant_shows_the_seeds_figures(tmp_path: Path) -> None:
    """Its defects are told by the page itself, before any result."""
    report, folder = concluded(tmp_path, SEED)
    shown = {i.name for s in report.sections for i in s.items if i.type == "figure"}
    assert "patching_summary" in shown
    assert "delta_logit__controls" not in shown
    summary = folder.read_table("patching_summary")
    assert set(summary.span) == {"text", "audio"}
    assert set(summary.flip_rate) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("donors", [(), ("self",)])
def test_one_clip_without_donors_makes_a_report(tmp_path: Path, donors: tuple[Any, ...]) -> None:
    config = EmotionConflictConfig(donors=donors, n_resamples=1000)
    report, folder = concluded(tmp_path, config, clips=1)
    assert not any(line.established for line in report.headlines)
    assert len(folder.read_table("patching_summary")) == 32 * len(donors)
