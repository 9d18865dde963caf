"""OB1's summaries, controls and claims, on tables whose answers are known by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emotion_toy import N_BLOCKS, Side, toy_recordings, toy_tables
from hooked_alm.experiments.emotion_conflict.claims import Claim, claims, finding_by_id
from hooked_alm.experiments.emotion_conflict.controls import controls
from hooked_alm.experiments.emotion_conflict.flips import flip_summary
from hooked_alm.experiments.emotion_conflict.report import conclude
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.tables import (
    MEAN_CURVE,
    accuracy,
    attention_ratios,
    attention_summary,
    conflict_items,
    critical_layers,
    delta_curves,
    flip_cells,
    handoffs,
    items_with_delta,
    patching_summary,
)
from hooked_alm.experiments.workbench.controls import FAIL, PASS, ROUNDING, SKIPPED
from hooked_alm.experiments.workbench.findings import finding_table
from hooked_alm.experiments.workbench.report import Report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.statistics.bootstrap import handoff_index

CONFIG = EmotionConflictConfig(n_resamples=1000)
SEED = EmotionConflictConfig(variant="seed", n_resamples=1000)
DRAWS = {"seed": 0, "n_resamples": 1000}
Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def made() -> Tables:
    return toy_tables(CONFIG)


@pytest.fixture
def tables(made: Tables) -> Tables:
    return {name: table.copy() for name, table in made.items()}


# --- Summaries


def test_delta_curves_are_means_over_clips(tables: Tables) -> None:
    table = delta_curves(items_with_delta(tables), **DRAWS)
    items = tables["delta"].merge(tables["runs"], on="unit")
    end = items[(items.depth == N_BLOCKS) & (items.condition == "conflict")]
    row = table[(table.condition == "conflict") & (table.depth == N_BLOCKS)].set_index("stratum")
    assert row.loc["all", "mean"] == pytest.approx(end.delta.mean())
    assert row.loc["all", "low"] < row.loc["all", "mean"] < row.loc["all", "high"]
    assert row.loc["language=en", "n"] == 3
    assert row.loc["language=en", "mean"] == pytest.approx(end[end.language == "en"].delta.mean())
    assert {"voice=sad", "intensity=strong"} <= set(row.index)
    assert (table[table.depth == 0]["mean"] == 0).all()


def test_every_method_has_every_clip_and_the_mean(tables: Tables) -> None:
    table = critical_layers(items_with_delta(tables), CONFIG, N_BLOCKS)
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


def test_half_rise_follows_the_winner_downwards(tables: Tables) -> None:
    table = critical_layers(items_with_delta(tables), CONFIG, N_BLOCKS)
    alone = table[(table.condition == "audio_only") & (table.method == "half_rise")]
    assert (alone.depth == 2).all()


def test_answers_are_counted_by_what_they_follow(tables: Tables) -> None:
    table = accuracy(items_with_delta(tables))
    assert (table.groupby("condition").rate.sum() == 1).all()
    k = table.set_index(["condition", "answer"]).k
    assert k["conflict", "the other emotion (T)"] == 12
    assert k["mention_only", "the voice (A)"] == 12
    assert k["mention_only", "the other emotion (T)"] == 0


def test_flip_cells_mark_what_was_not_asked(tables: Tables) -> None:
    cells = flip_cells(conflict_items(tables["runs"])).set_index(["voice", "named"])
    assert cells.rate["sad", "cheerful"] == 1
    assert np.isnan(cells.rate["sad", "angry"])
    assert cells.n["sad", "angry"] == 0
    assert len(cells) == 25


def test_patching_summary_counts_the_undefined(tables: Tables) -> None:
    patching = tables["patching"]
    of_clip = patching["clip"] == "zh_neutral_normal"
    patching.loc[of_clip & (patching.donor == "text_swap"), "recovery"] = np.nan
    table = patching_summary(patching, **DRAWS).set_index(["donor", "span", "block"])
    row = table.loc["text_swap", "text", 1]
    assert (row.n, row.n_undefined) == (12, 1)
    assert row.recovery_mean == pytest.approx(0.8)
    assert row.flip_rate == 1
    assert table.loc[("self", "text", 1), "n_undefined"] == 12
    assert np.isnan(table.loc[("self", "text", 1), "recovery_mean"])


def test_three_samples_have_a_wide_interval() -> None:
    patching = toy_tables(CONFIG, n_clips=3)["patching"]
    patching.loc[patching["clip"] == "zh_neutral_normal", "flip"] = 0.0
    table = patching_summary(patching, **DRAWS).set_index(["donor", "span", "block"])
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


def test_hand_offs_name_blocks(tables: Tables) -> None:
    patching = tables["patching"]
    table = handoffs(patching, **DRAWS).set_index(["donor", "event"])
    assert table.block["text_swap", "leaves"] == 2
    assert table.block["text_swap", "arrives"] == 2
    assert table.block["audio_swap", "leaves"] == 2
    assert (table.undefined == 0).all()
    some = patching[patching.block != 1]  # names are of blocks, not places in the list
    assert handoffs(some, **DRAWS).block.iloc[0] == 2
    patching.loc[patching.donor == "audio_swap", "recovery"] = np.nan
    nothing = handoffs(patching, **DRAWS).set_index(["donor", "event"]).loc["audio_swap", "leaves"]
    assert nothing.n == 0
    assert np.isnan(nothing.block)
    assert nothing.undefined == 1


def test_attention_is_summed_up(tables: Tables) -> None:
    mar = attention_ratios(tables["attention"], tables["runs"])
    assert (mar.n_audio == 2).all()
    assert (mar.n_text == 1).all()
    np.testing.assert_allclose(mar[["fraction", "ratio", "density"]].to_numpy()[0], [0.8, 4, 2])
    table = attention_summary(tables["attention"], tables["runs"], **DRAWS)
    row = table.set_index(["condition", "span", "layer", "measure"])["mean"]
    assert row["conflict", "audio", 0, "mass"] == pytest.approx(0.4)
    assert row["conflict", "audio", 0, "mass_without_sink"] == pytest.approx(0.5)
    assert np.isnan(row["conflict", "sink", 0, "mass_without_sink"])


# --- Controls


def verdicts(tables: Tables, config: EmotionConflictConfig = CONFIG) -> dict[str, str]:
    table = controls(tables, config, N_BLOCKS, audio_is_first=True)
    return dict(zip(table.control, table.verdict, strict=True))


def test_clean_tables_pass_every_control(tables: Tables) -> None:
    assert set(verdicts(tables).values()) == {PASS}


ENGINES = {"hooks": 1e-7, "fast": 1.5 * ROUNDING["float32"]}
"""The least shift that is no rounding of the engine's."""


def shift(cells: str, by: float | None = None) -> Any:
    def plant(tables: Tables, least: float = ENGINES["fast"]) -> None:
        patching = tables["patching"]
        patching.loc[patching.query(cells).index[:1], "shift"] += least if by is None else by

    return plant


def set_value(table: str, column: str, value: Any, rows: str = "index == index") -> Any:
    def plant(tables: Tables, least: float = 0.0) -> None:
        tables[table].loc[tables[table].query(rows).index, column] = value

    return plant


def say_the_voice(tables: Tables, least: float = 0.0) -> None:
    tables["patching"]["prediction"] = tables["patching"].voice


FAULTS = {
    "a run patched with itself": shift("donor == 'self'"),
    "last block, any span without the readout": shift(
        "donor == 'both' and block == 3 and span == 'struct'"
    ),
    "audio span, other instruction, audio first": shift(
        "donor == 'text_swap' and span == 'audio' and block == 1"
    ),
    "all positions patched = the donor's answer": shift(
        "donor == 'both' and span == 'all' and block == 1", 0.01
    ),
    "last block, readout patched = the donor's answer": shift(
        "donor == 'both' and span == 'readout' and block == 3"
    ),
    "lens at the last depth = logits": set_value("depths", "z_sad", 9.0, "depth == 4"),
    "a label is the top token": set_value("runs", "best_label_rank", 3),
    "probability of the labels together": set_value("runs", "label_mass", 0.1),
    "attention of the segments sums to 1": set_value(
        "attention", "mass", 0.41, "span == 'audio' and layer == 2"
    ),
    "an unrelated donor does not bring the voice's label": say_the_voice,
}


EXACT = {
    "a run patched with itself",
    "last block, any span without the readout",
    "audio span, other instruction, audio first",
    "last block, readout patched = the donor's answer",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("control", FAULTS)
def test_a_planted_fault_fails_its_control(tables: Tables, control: str, engine: str) -> None:
    FAULTS[control](tables, ENGINES[engine])
    found = verdicts(tables, CONFIG.model_copy(update={"engine": engine}))
    assert {name for name, verdict in found.items() if verdict == FAIL} == {control}


def test_rounding_fails_no_control_of_the_fast_engine(tables: Tables) -> None:
    """And all that are exact with hooks; each says which it is."""
    generator = np.random.default_rng(1)
    size = len(tables["patching"])
    tables["patching"]["shift"] += generator.uniform(-0.9, 0.9, size) * ROUNDING["float32"]
    assert set(verdicts(tables).values()) == {PASS}
    exact = CONFIG.model_copy(update={"engine": "hooks"})
    found = controls(tables, exact, N_BLOCKS, audio_is_first=True).set_index("control")
    assert {*found.index[found.verdict == FAIL]} == EXACT
    assert found.expected[list(EXACT)].str.startswith("exactly").all()
    fast = controls(tables, CONFIG, N_BLOCKS, audio_is_first=True).set_index("control")
    assert fast.expected[list(EXACT)].str.endswith("within 0.0001 by rounding").all()


def test_donors_of_other_lengths_are_not_held_to_recovery_1(tables: Tables) -> None:
    runs, patching = tables["runs"], tables["patching"]
    runs.loc[runs["clip"] == "zh_sad_normal", "n_audio_tokens"] = 9
    patching.loc[patching["clip"] == "zh_angry_normal", "donor_clip"] = "zh_sad_normal"
    wrong = (patching["clip"] == "zh_angry_normal") & (patching.span == "all")
    patching.loc[wrong & (patching.block == 0), "shift"] += 0.5
    assert verdicts(tables)["all positions patched = the donor's answer"] == PASS


def test_the_seed_lacks_most_controls() -> None:
    found = verdicts(toy_tables(SEED), SEED)
    assert found["lens at the last depth = logits"] == SKIPPED
    assert found["a run patched with itself"] == SKIPPED
    assert found["audio span, other instruction, audio first"] == SKIPPED


def test_an_unknown_order_is_not_judged(tables: Tables) -> None:
    table = controls(tables, CONFIG, N_BLOCKS, audio_is_first=None).set_index("control")
    assert table.verdict["audio span, other instruction, audio first"] == SKIPPED


# --- Claims


def found_claims(tables: Tables, config: EmotionConflictConfig = CONFIG) -> dict[str, Claim]:
    summaries = {
        "handoffs": handoffs(tables["patching"], **DRAWS),
        "ob1_flip_summary": flip_summary(conflict_items(tables["runs"])),
    }
    checks = controls(tables, config, N_BLOCKS, audio_is_first=True)
    return {c.id: c for c in claims(tables, summaries, checks, config, N_BLOCKS)}


@pytest.mark.parametrize(
    ("side", "answer", "dominance", "sign"),
    [
        ("text", "follows the instruction", "The text dominates", 1),
        ("voice", "follows the voice", "The voice dominates", -1),
    ],
)
def test_claims_reverse_with_the_rule(side: Side, answer: str, dominance: str, sign: int) -> None:
    found = found_claims(toy_tables(CONFIG, side))
    follows, h2 = found["answer_follows"].finding, found["H2_dominance"].finding
    assert follows.established
    assert answer in follows.statement
    assert h2.established
    assert h2.statement.startswith(dominance)
    assert np.sign(h2.estimate) == sign
    assert abs(h2.estimate) == pytest.approx(9)
    assert found["naming_is_not_enough"].finding.established == (side == "text")
    assert found["voice_is_heard"].finding.established
    assert found["handoff_text_swap"].finding.estimate == 2


def test_late_by_patching_needs_the_whole_interval(tables: Tables) -> None:
    late = found_claims(tables)["H1_patching"].finding
    assert late.established
    assert "The instruction, whose exchange" in late.statement
    patching = tables["patching"]
    early = (patching.span == "text") & (patching.donor == "text_swap") & (patching.block == 1)
    patching.loc[early, "recovery"] = 0.1
    early_finding = found_claims(tables)["H1_patching"].finding
    assert not early_finding.established
    assert "not past block 1.5" in early_finding.statement


def test_few_items_establish_nothing() -> None:
    found = found_claims(toy_tables(CONFIG, n_clips=9))
    assert not any(claim.finding.established for claim in found.values())


def test_many_items_of_few_clips_establish_nothing() -> None:
    pairs = EmotionConflictConfig(pairs="all_pairs", n_resamples=1000)
    found = found_claims(toy_tables(pairs, n_clips=3), pairs)
    assert found["answer_follows"].finding.n == 12
    assert found["voice_is_heard"].finding.n == 3
    assert not any(claim.finding.established for claim in found.values())
    assert "(only 3 clips)" in found["answer_follows"].finding.statement


def test_a_failed_control_takes_back_what_rests_on_it(tables: Tables) -> None:
    FAULTS["a run patched with itself"](tables)
    found = found_claims(tables)
    for name, claim in found.items():
        assert claim.finding.established == (name in {"answer_follows", "naming_is_not_enough",
                                                      "voice_is_heard"}), name  # fmt: skip
    line = found["H2_dominance"].finding.headline()
    assert line.text == "The text dominates the voice."
    assert line.detail.startswith(
        "Because: the control 'a run patched with itself' failed. TE(text)"
    )


def test_a_known_defect_takes_back_what_it_touches() -> None:
    found = found_claims(toy_tables(SEED), SEED)
    assert "known defects C1, C3, C4, C10" in found["H1_patching"].finding.statement
    assert "known defects C6" in found["H1_lens"].finding.statement
    assert "were not both swapped" in found["H2_dominance"].finding.statement
    assert found["answer_follows"].finding.established


def test_every_claim_makes_a_headline(tables: Tables) -> None:
    for side_tables in (tables, toy_tables(CONFIG, n_clips=2), toy_tables(CONFIG, "voice")):
        found = found_claims(side_tables)
        assert len(finding_table(finding_by_id([*found.values()]))) == len(found)
        for claim in found.values():
            line = claim.finding.headline()
            assert line.established == claim.finding.established
            assert "ot established" not in line.text
            assert line.text.endswith(".")
            assert line.detail


# --- The whole report


def concluded(
    path: Path, config: EmotionConflictConfig, clips: int = 2
) -> tuple[Report, RunFolder]:
    folder = RunFolder(path / "run")
    report = conclude(
        toy_tables(config, n_clips=clips),
        folder,
        config,
        recordings=toy_recordings(path / "audio", clips),
        n_blocks=N_BLOCKS,
        is_calibration=True,
    )
    return report, folder


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
