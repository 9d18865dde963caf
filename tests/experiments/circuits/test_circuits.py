"""``circuits`` on a model whose circuit was planted, on one without any, and on the twins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from circuits_toy import PLANTED, planted_model, toy, write_pairs
from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.experiments.circuits.claims import CLAIMS
from hooked_alm.experiments.circuits.confounds import answering_clips, clip_confounds, clip_table
from hooked_alm.experiments.circuits.experiment import Circuits
from hooked_alm.experiments.circuits.measure import PairSweeps, metric_of
from hooked_alm.experiments.circuits.plan import (
    CircuitNode,
    all_nodes,
    bundled_pairs,
    edges_among,
    places_of,
    random_nodes,
)
from hooked_alm.experiments.circuits.settings import CircuitsConfig
from hooked_alm.experiments.circuits.tables import total_effects
from hooked_alm.experiments.materials.clips import sound_units
from hooked_alm.experiments.materials.pairs import prepare_pairs, read_pairs
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.experiment import Unit
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.patching.measurement import Measurement
from hooked_alm.methods.patching.paths import all_edges
from stopped_runs import interrupted, results
from tiny import TinyModels
from tolerances import BATCHED_ROWS, FAST_ENGINE

ENGINES = FAST_ENGINE[torch.float32]


pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def planted(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("planted")
    model = planted_model(tiny_models, root / "model")
    return model, write_pairs(root, model)


@pytest.fixture(scope="module")
def finished(planted: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runner.run(toy(*planted), tmp_path_factory.mktemp("run") / "run")


def verdicts(folder: RunFolder) -> dict[str, bool]:
    table = folder.read_table("findings")
    return dict(zip(table.claim, table.established, strict=True))


# --- The planted circuit


def test_the_planted_head_is_found_and_confirmed(finished: RunFolder) -> None:
    assert finished.read_table("clips").path.nunique() == 13  # equally long and loud
    assert finished.read_table("confounds").empty
    winners = finished.read_table("winners")
    assert list(zip(winners["layer"], winners["head"], strict=True)) == [(2, 3)]
    assert winners.place.tolist() == ["readout"]
    assert winners.confirmed.tolist() == [True]
    cells = finished.read_table("node_cells")
    # Nothing else can reach the answer: two hypotheses, noising and denoising of that head.
    assert cells.q.notna().sum() == 2
    # Seven of twelve groups choose, all of one sign: p = 2 / 2^7, and 1 / 2^5 on the others.
    assert (cells.n_groups == 7).all()
    assert cells[cells.found].p.tolist() == [2 / 128] * 2
    assert winners.held_out_p.tolist() == [1 / 32]
    assert verdicts(finished)["tone: nodes"]


def test_the_planted_head_is_all_of_the_effect(finished: RunFolder) -> None:
    nodes, pairs = finished.read_table("nodes"), finished.read_table("pairs").set_index("pair")
    own = nodes[(nodes.layer == 2) & (nodes["head"] == 3) & (nodes.place == "readout")]
    np.testing.assert_allclose(own.recovery, 1, atol=1e-3)
    np.testing.assert_allclose(own.toward, pairs.loc[own.pair].total_effect, atol=ENGINES)
    others = nodes.drop(own.index)
    assert (others.toward == 0).all()
    direct = finished.read_table("direct")
    heads = direct[direct.sender == PLANTED.sender]
    np.testing.assert_allclose(heads.toward, pairs.loc[heads.pair].total_effect, atol=ENGINES)
    assert (direct[direct.sender != PLANTED.sender].toward == 0).all()


def test_the_planted_circuit_is_faithful_and_complete(finished: RunFolder) -> None:
    shares = finished.read_table("faithfulness").set_index(["circuit", "what"])["mean"]
    assert shares["circuit", "alone"] == pytest.approx(1, abs=1e-3)
    assert shares["circuit", "removed"] == pytest.approx(0, abs=1e-3)
    assert shares["random", "alone"] == pytest.approx(0, abs=1e-3)
    assert shares["random", "removed"] == pytest.approx(1, abs=1e-3)
    established = verdicts(finished)
    assert established["tone: alone"]
    assert established["tone: removed"]
    controls = finished.read_table("controls")
    assert controls.verdict.tolist() == ["pass"] * 3


def test_the_planted_head_hears_the_audio(finished: RunFolder) -> None:
    paths = finished.read_table("top_paths")
    # The only sender is the embedding, whose tokens differ in the audio alone.
    assert set(paths.sender) == {"hook_embed"}
    assert set(paths.place) == {"audio"}
    reads = finished.read_table("reads")
    assert (reads[reads.place != "audio"].toward == 0).all()
    statement = finished.read_table("findings").set_index("claim").statement["tone: reads"]
    assert "read it at the audio" in statement


def test_what_the_run_says_of_itself(finished: RunFolder) -> None:
    run = finished.provenance
    assert sorted(run["inputs"]["split"].values()).count("discovery") == 7
    assert run["config"]["max_bytes"] == 2**30
    pairs = finished.read_table("pairs").set_index("group")
    assert pairs.part.to_dict() == run["inputs"]["split"]
    # Circuits are judged on pairs that did not choose them.
    assert set(finished.read_table("circuit").part) == {"held-out"}
    page = (finished.path / "report.html").read_text("utf-8")
    assert "The circuit of tone" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for png in (finished.path / "figures").glob("*.png"):
        assert png.with_suffix(".csv").stat().st_size > 0


def test_the_split_is_the_seeds(planted: tuple[Path, Path]) -> None:
    splits = [toy(*planted, seed=seed).identify()["split"] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


# --- Nothing to find


def test_a_model_that_hears_nothing_establishes_nothing(
    tiny_models: TinyModels, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    deaf = planted_model(tiny_models, tmp_path / "deaf", is_deaf=True)
    some = planted[1].with_name("some.jsonl")
    some.write_text("\n".join(planted[1].read_text("utf-8").splitlines()[:4]), "utf-8")
    folder = runner.run(toy(deaf, some, places=["readout"]), tmp_path / "run")
    assert verdicts(folder) == {"tone: effect": False, "tone: nodes": False}
    assert len(list(folder.path.glob("units/paths__*"))) == 0
    assert "not established" in (folder.path / "report.html").read_text("utf-8")


def test_effects_of_no_sign_are_not_established(planted: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, planted[0], flipped=True)
    folder = runner.run(toy(planted[0], pairs, places=["readout"]), tmp_path / "run")
    nodes = folder.read_table("nodes")
    assert (nodes.toward > 0.01).any()
    assert (nodes.toward < -0.01).any()
    assert verdicts(folder) == {"tone: effect": False, "tone: nodes": False}


# --- Stopped and resumed


def test_stopped_amid_either_stage_it_ends_with_the_same_bytes(
    planted: tuple[Path, Path], finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for before in (5, 12):  # of 12 units that look at nodes; the 12th call then follows a path
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(toy(*planted), {before}), out)
    assert 0 < len(list(out.glob("units/paths__*"))) < 12
    runner.run(toy(*planted), out)
    assert results(out) == results(finished.path)


# --- The sweeps


def rows_of(sweeps: PairSweeps, nodes: list[CircuitNode]) -> list[pd.DataFrame]:
    heads = [node for node in nodes if node.is_head]
    return [
        *(sweeps.nodes(), sweeps.direct(), sweeps.paths(nodes, heads)),
        *(sweeps.reads(heads), sweeps.circuits({"circuit": nodes})),
    ]


def test_the_plain_loop_gives_the_same(planted: tuple[Path, Path], gqa: HookedALM) -> None:
    one = prepare_pairs(gqa, read_pairs(planted[1])[:1])[0]
    nodes = [CircuitNode(1, 4), CircuitNode(2, 0), CircuitNode(1, -1)]
    settings: dict[str, Any] = {"path_modes": ("ioi",)}
    fast, hooks = (
        rows_of(
            PairSweeps(gqa, [one], ["readout"], CircuitsConfig(engine=engine, **settings)), nodes
        )
        for engine in ("fast", "hooks")
    )
    for ours, plain in zip(fast, hooks, strict=True):
        assert len(ours) > 0
        numbers = [name for name in ("toward", "value") if name in ours]
        np.testing.assert_allclose(ours[numbers], plain[numbers], atol=ENGINES, rtol=0)
        words = ours.select_dtypes(exclude="number").columns
        assert ours[words].equals(plain[words])


def test_batches_are_the_single_pairs_to_rounding(planted: tuple[Path, Path]) -> None:
    """Both stages; of one batch are pairs of one part, whose circuits alone are judged."""
    few: dict[str, Any] = {"places": ["readout", "audio"], "n_random": 1}
    single, batched = toy(*planted, **few), toy(*planted, **few, batch_size=2, unit_batches=2)
    for one in (single, batched):
        one.identify()
        one.load()
    works = [work for unit in batched.units()[:-1] for work in unit.payload]
    assert [len(unit.payload) for unit in batched.units()[:-1]] == [4, 4, 4]
    some = [work for work in works if single.batch_kind(work)[1] == "held-out"][:2]
    assert {single.batch_kind(work)[1] for work in works} == {"discovery", "held-out"}
    for nodes in ((), (CircuitNode(1, 4), CircuitNode(1, -1))):
        unit = Unit("some", tuple(replace(work, nodes=nodes) for work in some))
        ours, theirs = (one.measure(unit).tables for one in (batched, single))
        assert ours.keys() == theirs.keys()
        for name, rows in theirs.items():
            table, expected = (
                pd.DataFrame(found).drop(columns="recovery", errors="ignore")  # of effects near 0
                for found in (ours[name], rows)
            )
            pd.testing.assert_frame_equal(table, expected, rtol=1e-4, atol=BATCHED_ROWS)


def test_both_directions_point_to_the_donor(planted: tuple[Path, Path]) -> None:
    model = HookedALM.from_pretrained(planted[0])
    one = prepare_pairs(model, read_pairs(planted[1])[:1])[0]
    rows = PairSweeps(model, [one], ["readout"], CircuitsConfig()).nodes()
    own = rows[(rows.layer == 2) & (rows["head"] == 3)].to_dict("records")
    assert [row["direction"] for row in own] == ["noising", "denoising"]
    # The metric is the base's answer against the donor's; either patch undoes what the other does.
    assert own[0]["value"] == pytest.approx(rows.donor[0], abs=ENGINES)
    assert own[1]["value"] == pytest.approx(rows.base[0], abs=ENGINES)
    assert own[0]["toward"] == pytest.approx(own[1]["toward"], abs=ENGINES)
    assert rows.base[0] > rows.donor[0]


@pytest.mark.parametrize("metric", ["log_prob", "prob"])
@torch.no_grad()
def test_other_metrics(planted: tuple[Path, Path], metric: str) -> None:
    model = HookedALM.from_pretrained(planted[0])
    one = prepare_pairs(model, read_pairs(planted[1])[:1])[0]
    config = CircuitsConfig(metric=metric)  # type: ignore[arg-type]
    ends = PairSweeps(model, [one], ["readout"], config).nodes().iloc[0]
    logits = [model(x)[0, -1].log_softmax(-1) for x in (one.base, one.donor)]
    expected = [found[one.answers[0]].item() for found in logits]
    if metric == "prob":
        expected = np.exp(expected).tolist()
    assert [ends.base, ends.donor] == pytest.approx(expected, abs=ENGINES)


# --- The plan


def test_bundled_pairs_differ_in_one_thing() -> None:
    pairs = bundled_pairs(2)
    assert len(pairs) == 18 * 2 * 2
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        same_clip = pair.base.audio == pair.donor.audio
        same_words = pair.base.parts == pair.donor.parts
        assert (same_clip, same_words) == {
            "voice": (False, True), "instruction": (True, False)
        }[pair.contrast]  # fmt: skip
        assert pair.group == pair.base.audio[0].stem
        named = dict(pair.base.parts)["label"]
        if pair.contrast == "instruction":
            assert pair.answers == (named, dict(pair.donor.parts)["label"])
        else:
            assert named not in pair.answers


def test_places_before_the_difference_are_left_out() -> None:
    model = HookedALM.from_pretrained("bundled:follows_text")
    pairs = prepare_pairs(model, [p for p in bundled_pairs(1) if p.group == "en_sad_normal"])
    for one in pairs:
        kept, left_out = places_of([one], CircuitsConfig())
        if one.pair.contrast == "voice":
            assert set(kept) == {"readout", "text", "struct", "audio"}
        else:
            assert set(kept) == {"readout", "text", "struct"}
            assert left_out == {"audio": "it ends before base and donor differ"}


def test_edges_of_every_node_are_all_edges(gqa: HookedALM) -> None:
    gqa.set_ungroup_grouped_query_attention(True)
    try:
        expected = all_edges(gqa)
    finally:
        gqa.set_ungroup_grouped_query_attention(False)
    found = edges_among(all_nodes(gqa))
    assert len(found) == len(expected)
    assert set(found) == set(expected)


def test_random_circuits_are_of_equal_size_and_others(gqa: HookedALM) -> None:
    winners = [CircuitNode(0, 1), CircuitNode(3, 5), *(CircuitNode(i, -1) for i in range(3))]
    drawn = random_nodes(gqa, winners, np.random.default_rng(0))
    assert drawn == random_nodes(gqa, winners, np.random.default_rng(0))
    assert sum(node.is_head for node in drawn) == 2
    assert sum(not node.is_head for node in drawn) == 3
    assert len(set(drawn)) == 5
    assert not {node for node in winners if node.is_head} & set(drawn)
    assert CircuitNode(3, -1) in drawn


# --- The twins


@torch.no_grad()
def test_what_moves_the_answer_reverses_between_the_twins() -> None:
    found = {}
    config = CircuitsConfig(n_resamples=1000)
    groups = [*sorted({pair.group for pair in bundled_pairs(1)})[::2], "zh_sad_strong"]
    few = [pair for pair in bundled_pairs(1) if pair.group in groups]
    clips = answering_clips(few)
    sounds = [row for one in sound_units(clips) for row in one.payload.measured().tables["sounds"]]
    sounding = clip_table(few, clips, pd.DataFrame(sounds))
    for name in ("follows_text", "follows_voice"):
        model = HookedALM.from_pretrained(f"bundled:{name}")
        rows = []
        for one in prepare_pairs(model, few):
            both = Measurement(model, one.base, one.donor, metric_of([one], config))
            effect = float(both.base_values[0] - both.donor_values[0])
            who = {"contrast": one.pair.contrast, "group": one.pair.group, "total_effect": effect}
            rows.append({**who, "base_as_given": True, "donor_as_given": True})
        pairs = pd.DataFrame(rows)
        run = Circuits.results(config, {}, {"pairs": pairs})
        run.tables["effects"] = total_effects(pairs, run.draws)
        run.tables["confounds"] = clip_confounds(sounding, seed=0)
        dominance, effect = CLAIMS[:2]
        found[name] = {"dominance": dominance.judge(run)}
        found[name] |= {
            f"{one}: effect": effect.judge(run, one) for one in ("voice", "instruction")
        }
    text, voice = found["follows_text"], found["follows_voice"]
    assert text["dominance"].established
    assert voice["dominance"].established
    assert text["dominance"].statement.startswith("The answer depends more on the instruction")
    assert voice["dominance"].statement.startswith("The answer depends more on the voice")
    assert voice["voice: effect"].established
    assert not voice["instruction: effect"].established


# --- Settings and inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"places": ["text"]}, "must include readout"),
        ({"path_modes": []}, "path_modes"),
        ({"align": "dtw"}, "align dtw"),
        ({"variant": "seed"}, "variant must be corrected"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CircuitsConfig(**settings)


def test_bad_pairs_stop_before_any_work(planted: tuple[Path, Path], tmp_path: Path) -> None:
    lines = planted[1].read_text("utf-8").splitlines()
    one = json.loads(lines[0])
    for side in ("base", "donor"):
        one[side]["audio"] = str(planted[1].parent / one[side]["audio"])
    longer = {**one, "donor": {**one["donor"], "text": "Another question?"}, "group": "other"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, [one, longer])), "utf-8")
    with pytest.raises(InputError, match=r"pairs.jsonl line 2: aligning span 'text'"):
        runner.run(toy(planted[0], file), tmp_path / "run")
    assert not (tmp_path / "run" / "units").exists()
    file.write_text(json.dumps(one), "utf-8")
    with pytest.raises(InputError, match="all their groups .* fall into one part"):
        toy(planted[0], file).identify()
