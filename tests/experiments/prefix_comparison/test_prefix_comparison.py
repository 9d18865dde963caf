"""``prefix_comparison`` against plain Hugging Face, by hand, killed, resumed, and on the twins."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hooked_alm import HookedALM
from hooked_alm.bundled import ASSETS, CLIPS, model_folder
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.trained_lens import LensCard, save_lens
from hooked_alm.experiments.prefix_comparison import figures as own_figures
from hooked_alm.experiments.prefix_comparison.claims import CLAIMS, longest
from hooked_alm.experiments.prefix_comparison.experiment import PrefixComparison
from hooked_alm.experiments.prefix_comparison.plan import teacher_forced
from hooked_alm.experiments.prefix_comparison.settings import PrefixComparisonConfig
from hooked_alm.experiments.prefix_comparison.shards import Maps, NanMean, pack, shards, unpack
from hooked_alm.experiments.prefix_comparison.tables import PrefixResults, means, quadrant_table
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.identity import to_json
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.experiments.workbench.page import Page
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.reading.lens import residual_rows, translated, unembed_rows
from hooked_alm.methods.reading.segment_mass import LATEST, WINDOW, MassMeter
from hooked_alm.methods.reading.tuned_lens import TunedLens
from hooked_alm.methods.statistics.rank_correlation import (
    MOST_CORRELATED,
    fisher_z,
    partial_spearman,
    spearman,
)
from prefix_comparison_toy import (
    N_LAYERS,
    Plain,
    experiment,
    ids_and_positions,
    item,
    js_of,
    load_hf,
    plain_hf,
    text_checkpoint,
    write_items,
)
from stopped_runs import (
    interrupted,
    kill,
    needs_kill,
    results,
    run_experiment,
    start,
    units,
    wait_for,
)
from tiny import hf_inputs
from tolerances import DIVERGENCE, MASS_OF_PATTERN

MASS = MASS_OF_PATTERN[torch.float32]


pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text model, and eight items of a code agent: two of every outcome."""
    root = tmp_path_factory.mktemp("code")
    model = text_checkpoint(root / "model")
    return model, write_items(root / "items.jsonl", [item(number) for number in range(8)])


@pytest.fixture(scope="module")
def finished(code: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runner.run(experiment(*code), tmp_path_factory.mktemp("run") / "run")


def record(folder: RunFolder, unit: str) -> dict[str, Any]:
    found: dict[str, Any] = folder.read_unit(unit)["record"]
    return found


# --- Against plain Hugging Face, cell by cell, in both variants


def references(hf: Any, one: Any, source: str) -> list[Plain]:
    return [
        plain_hf(
            hf,
            ids_and_positions([*prefix.ids, *one.continuation]),
            len(prefix.ids),
            source=source,
        )
        for prefix in one.prefixes.values()
    ]


@pytest.mark.parametrize("variant", ["corrected", "seed"])
def test_every_cell_is_hugging_faces(code: tuple[Path, Path], tmp_path: Path, variant: str) -> None:
    ours = experiment(*code, variant=variant, interventions=[], n_shown=0, pos_modes=["as_run"])
    folder = runner.run(ours, tmp_path / "run")
    assert ours.config.lens_source == {"corrected": "hooks", "seed": "hf_tuple"}[variant]
    page = (folder.path / "report.html").read_text("utf-8")
    # At its head, before any claim.
    head = page.partition('<ul class="headlines">')[0]
    told = re.search("Known defects of these settings</b>.{,30}<dt>C6</dt>", head, re.DOTALL)
    assert bool(told) == (variant == "seed")
    hf = load_hf(code[0])
    mass_table = folder.read_table("mass").set_index(["item", "run", "segment", "layer"])
    mass_table = mass_table["mass"].sort_index()
    for one in ours.items:
        expected = references(hf, one, ours.config.lens_source)
        found = record(folder, f"{one.item.id}__as_run")
        y = torch.tensor(one.continuation).expand(N_LAYERS + 1, -1)[..., None]
        nll = [-plain.log_p.gather(-1, y)[..., 0] for plain in expected]
        close(unpack(found["nll"]), torch.stack(nll).numpy(), DIVERGENCE)
        js = js_of(expected[0].log_p, expected[1].log_p)
        close(unpack(found["js"])[0], js.numpy(), DIVERGENCE)
        semantic = found["tokens"]["semantic"]
        for name, plain in zip(("agentic", "assisted"), expected, strict=True):
            own = plain.attention[:, :, semantic].double()
            for segment, ranges in found["spans"][name].items():
                if not ranges[0]:
                    continue
                keys = [i for start, stop in ranges[0] for i in range(start, stop)]
                by_layer = own[..., keys].sum(-1).mean((1, 2))
                close(mass_table[one.item.id, name, segment].to_numpy(), by_layer.numpy(), MASS)
        tool = [
            i
            for start, stop in found["spans"]["agentic"]["tool_response"][0]
            for i in range(start, stop)
        ]
        heads = expected[0].attention[:, :, semantic][..., tool].sum(-1).mean(2)
        close(unpack(found["heads"]), heads.numpy(), MASS)


def close(ours: np.ndarray, theirs: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def test_the_variants_differ_at_the_last_depth_only(code: tuple[Path, Path]) -> None:
    """Defect C6: a norm applied twice."""
    nll = []
    for source in ("hooks", "hf_tuple"):
        ours = experiment(*code, lens_source=source)
        ours.identify()
        ours.load()
        one = ours.items[0]
        runs = [teacher_forced(n, p.x, one.continuation) for n, p in one.prefixes.items()]
        nll.append(ours.comparison.compare(runs, [(0, 1)]).nll)
    assert torch.equal(nll[0][:-1], nll[1][:-1])
    assert (nll[0][-1] - nll[1][-1]).abs().max() > 0.01


def test_a_tuned_lens_in_the_logit_lens_place(code: tuple[Path, Path], tmp_path: Path) -> None:
    """Untrained it changes no bit; moved, it changes every depth but the output as it should."""
    settings: dict[str, Any] = {"interventions": [], "n_shown": 0, "pos_modes": ["as_run"]}
    plain = experiment(*code, **settings)
    plain.identify()
    plain.load()
    expected = plain.measure(plain.units()[0])
    lens = TunedLens.untrained(plain.model)
    card = LensCard(
        model="toy", dtype="float32", n_layers=N_LAYERS, d_model=lens.d_model,
        unembed_sha256=lens.unembed_sha256, scored="all",
    )  # fmt: skip
    save_lens(lens, card, tmp_path / "untrained")
    for translator in lens.translators:
        translator.bias.normal_()
    save_lens(lens, card, tmp_path / "moved")
    untrained, moved = (
        experiment(*code, tuned_lens=str(tmp_path / name), **settings)
        for name in ("untrained", "moved")
    )
    hashes = [one.identify()["tuned_lens"]["params_sha256"] for one in (untrained, moved)]
    assert hashes[0] != hashes[1]
    untrained.load()
    moved.load()
    same = untrained.measure(untrained.units()[0])
    assert to_json(asdict(same)) == to_json(asdict(expected))  # as text, NaN equals NaN
    found = moved.measure(moved.units()[0])
    assert to_json(found.tables["mass"]) == to_json(expected.tables["mass"])
    ours, theirs = unpack(found.record["nll"]), unpack(expected.record["nll"])
    one = plain.items[0]
    for run, prefix in enumerate(one.prefixes.values()):
        x = teacher_forced("", prefix.x, one.continuation)
        rows = residual_rows(moved.model, x.x, x.queries[None])
        log_p = unembed_rows(moved.model, translated(lens, rows)).double().log_softmax(-1)[:, 0]
        y = x.targets.expand(N_LAYERS + 1, -1)[..., None]
        close(ours[run], -log_p.gather(-1, y)[..., 0].numpy(), DIVERGENCE)
    assert (abs(ours - theirs)[:, :-1].max(-1) > 0.01).all()
    assert (ours[:, -1] == theirs[:, -1]).all()
    with pytest.raises(InputError, match="got no config.json"):
        experiment(*code, tuned_lens=str(tmp_path)).identify()


@torch.no_grad()
def test_audio_cells_are_hugging_faces(tmp_path: Path) -> None:
    """The bundled model and items: the clip reaches Hugging Face as features."""
    from transformers import Qwen2AudioForConditionalGeneration

    name = "bundled:follows_voice"
    lines = (ASSETS / "prefix_comparison.jsonl").read_text("utf-8").split("\n")[1:10:6]
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(lines).replace('"ob1/', f'"{CLIPS.as_posix()}/'), "utf-8")
    ours = experiment(name, file, n_shown=0)
    folder = runner.run(ours, tmp_path / "run")
    clips = [clip for one in ours.items for p in one.prefixes.values() for clip in p.x.clips]
    assert clips
    assert not any(clip._encoded for clip in clips)
    hf: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
        model_folder(name), dtype=torch.float32, attn_implementation="eager"
    )
    for one in ours.items:
        found = record(folder, f"{one.item.id}__as_run")
        y = torch.tensor(one.continuation)
        log_p = []
        for prefix in one.prefixes.values():
            x = prefix.x
            arguments: dict[str, Any] = ids_and_positions([*prefix.ids, *one.continuation])
            if x.clips:
                clip = x.clips[0]
                frames = torch.arange(clip.features.shape[-1]) < clip.n_frames[0]
                arguments["input_features"] = clip.features
                arguments["feature_attention_mask"] = frames.long()[None]
            log_p.append(plain_hf(hf.eval(), arguments, x.shape[1]).log_p)
        nll = torch.stack(
            [-one.gather(-1, y.expand(len(one), -1)[..., None])[..., 0] for one in log_p]
        )
        close(unpack(found["nll"])[:3], nll.numpy(), DIVERGENCE)
        close(unpack(found["js"])[0], js_of(log_p[0], log_p[1]).numpy(), DIVERGENCE)
        close(unpack(found["js"])[1], js_of(log_p[2], log_p[1]).numpy(), DIVERGENCE)


# --- Attention


@torch.no_grad()
def test_mass_is_the_sum_of_the_pattern_however_it_is_cut(gqa: HookedALM) -> None:
    prefix = gqa.encode(**hf_inputs([[40]], [8]))
    run = teacher_forced("a", prefix, list(range(30, 30 + WINDOW + 6)))
    queries = run.queries[1:]
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(gqa.cfg.n_layers)]
    _, cache = gqa.run_with_cache(run.x, names_filter=names)
    pattern = torch.stack([cache[name][0] for name in names])[:, :, queries]
    found = []
    for at_once in (64, 3, 1):
        meter = MassMeter(gqa, run.x, queries)
        meter.at_once = at_once
        with gqa.hooks(fwd_hooks=meter.hooks()):
            gqa(run.x)
        mass = meter.result()
        found.append(mass)
        for index, segment in enumerate(mass.segments[:-1]):
            own = pattern[..., run.x.spans.positions(segment, 0)].sum(-1)
            close(mass.mass[..., index], own.mean(1).numpy(), MASS)
            close(mass.heads[..., index], own.mean(2).numpy(), MASS)
            n_seen = np.array(
                [sum(p <= q for p in run.x.spans.positions(segment, 0)) for q in queries]
            )
            even = n_seen / (queries.numpy() + 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                density = own.mean(1).numpy() / even
            close(mass.density[..., index], np.where(n_seen, density, np.nan), 1e-4)
        latest = [
            pattern[:, :, i, max(run.start, int(q) - WINDOW + 1) : int(q) + 1].sum(-1).mean(1)
            for i, q in enumerate(queries)
        ]
        close(mass.mass[..., mass.segments.index(LATEST)], torch.stack(latest, 1).numpy(), MASS)
        # Card M-002-11 and invariant I9: at every query the segments sum to 1.
        close(mass.mass[..., :-1].sum(-1), np.ones(mass.mass.shape[:2]), 1e-5)
    close(found[0].mass, found[1].mass, MASS)


def test_the_first_token_has_no_prior_output(finished: RunFolder, code: tuple[Path, Path]) -> None:
    ours = experiment(*code)
    ours.identify()
    ours.load()
    one = ours.items[0]
    run = teacher_forced("agentic", one.prefixes["agentic"].x, one.continuation)
    meter = MassMeter(ours.model, run.x, run.queries[:2])
    with ours.model.hooks(fwd_hooks=meter.hooks()):
        ours.model(run.x)
    mass = meter.result()
    prior = mass.mass[..., mass.segments.index("prior_output")]
    assert not prior[:, 0].any()
    assert (prior[:, 1] > 0).all()


# --- Coupling, averages, quadrants: the cards' numbers


def test_card_m_002_12() -> None:
    mass, delta = np.array([0.1, 0.2, 0.3]), np.array([-1.0, -2, -3])
    assert spearman(mass, delta) == pytest.approx(-1)
    assert np.isnan(spearman(np.array([0.1, 0.1, 0.1]), delta))
    assert np.isnan(fisher_z(np.array([np.nan]))[0])
    assert fisher_z(np.array([-1.0]))[0] == -np.arctanh(MOST_CORRELATED)


DRAWS = Draws(0, 1000)


def one_depth(values: list[float], groups: Sequence[str]) -> pd.DataFrame:
    """A row per item and group, as `wide` makes it."""
    index = pd.MultiIndex.from_arrays(
        [[str(i) for i in range(len(values))], list(groups)], names=["item", "group"]
    )
    return pd.DataFrame({0: values}, index=index).rename_axis(columns="depth")


def test_items_without_a_correlation_are_left_out_and_counted() -> None:
    row = means(one_depth([0.5, np.nan, 0.7], "abc"), DRAWS).iloc[0]
    assert (row["mean"], row["n"], row["n_undefined"]) == (pytest.approx(0.6), 2, 1)


def test_partial_correlation_takes_out_the_drift() -> None:
    rng = np.random.default_rng(0)
    t, noise = np.arange(60.0), rng.normal(size=(2, 60))
    x, y = t + noise[0], t + noise[1]
    classes = ["a", "b"] * 30
    assert spearman(x, y) > 0.9
    assert abs(partial_spearman(x, y, classes)) < 0.4
    assert partial_spearman(t + 9 * noise[0], t - 9 * noise[0], classes) < -0.8
    # The class alone explains both.
    step = np.array([0.0, 1.0] * 30)
    assert np.isnan(partial_spearman(step, x, classes))
    assert np.isnan(partial_spearman(x[:5], y[:5], ["a", "b", "c", "d", "e"]))


def test_card_m_002_9_means_of_means(finished: RunFolder) -> None:
    """Items weigh the same, whatever their length."""
    assert means(one_depth([4.0, 0.0], "ab"), DRAWS)["mean"][0] == 2.0
    found = list(shards(finished, finished.read_table("items")))
    assert len({one.maps.shape[2] for one in found}) > 1
    expected = np.mean([one.maps[0, -1].mean() for one in found])
    summary = finished.read_table("curves_summary")
    own = summary[(summary.run == "agentic") & (summary.metric == "delta")]
    assert own["mean"].to_numpy()[-1] == pytest.approx(expected, abs=1e-6)


def hand_made(**tables: pd.DataFrame) -> PrefixResults:
    inputs = {"compared": {"a": "a", "b": "b", "segment": "tool"}}
    return PrefixResults(PrefixComparisonConfig(), inputs, tables)


def test_cards_s7_and_s8() -> None:
    row = means(one_depth([2.5] * 6, "abcdef"), DRAWS).iloc[0]
    assert (row["low"], row["high"]) == (2.5, 2.5)
    few = means(one_depth([2.5] * 5, "abcde"), DRAWS).iloc[0]
    assert few["mean"] == 2.5
    assert np.isnan([few["low"], few["high"]]).all()
    items = pd.DataFrame({"item": [*"abcdefghijkl"], "quadrant": ["G10"] * 6 + ["G01"] * 6})
    curves = items.assign(group=items.item, run="a", depth=0, delta=[1.0] * 6 + [3.0] * 6)
    found = quadrant_table(hand_made(items=items, curves=curves)).set_index("quadrant")
    assert found.loc["G10 − G01", ["mean", "low", "high"]].tolist() == [-2, -2, -2]
    assert found.n.to_dict() == {"G10": 6, "G01": 6, "G10 − G01": 12}


def test_items_of_a_group_are_resampled_together() -> None:
    values = [0.0, 1.0] * 6
    alone = means(one_depth(values, "abcdefghijkl"), DRAWS).iloc[0]
    together = means(one_depth(values, "aabbccddeeff"), DRAWS).iloc[0]
    assert (together["low"], together["high"]) == (0.5, 0.5)
    assert alone["low"] < 0.5 < alone["high"]


def test_items_that_share_a_source_establish_nothing_by_their_number() -> None:
    """Twelve items of two groups are two observations."""
    judge = {claim.name: claim.judge for claim in CLAIMS}["output"]
    names = [str(i) for i in range(12)]
    items = pd.DataFrame({"item": names, "js": 0.1})
    curves = items.assign(run="a", depth=1, delta=[-1.0 - 0.1 * i for i in range(12)], group=names)
    assert judge(hand_made(items=items, curves=curves)).established
    found = judge(hand_made(items=items, curves=curves.assign(group=["x", "y"] * 6)))
    assert not found.established
    assert "only 2 groups of items" in found.statement


def test_card_m_002_10(finished: RunFolder) -> None:
    items = finished.read_table("items")
    pairs = list(zip(items.right_a, items.right_b, strict=True))
    assert pairs[:4] == [(True, True), (False, True), (True, False), (False, False)]
    assert items.quadrant.tolist()[:4] == ["G11", "G01", "G10", "G00"]


def test_the_window_is_the_longest_of_one_sign() -> None:
    assert longest(np.array([0.0, 0, 0])) is None
    assert longest(np.array([1.0, 1, 0, -1, -1, -1])) == (3, 5)
    assert longest(np.array([-1.0, -1, 1, 0])) == (0, 1)
    assert longest(np.array([1.0, 0, 1])) == (2, 2)


def test_maps_weigh_items_the_same_and_leave_cells_open() -> None:
    mean = NanMean()
    mean.add(np.array([[1.0, np.nan, np.nan]]))
    mean.add(np.array([[3.0, 5.0, np.nan]]))
    np.testing.assert_array_equal(mean.mean(), [[2, 5, np.nan]])
    assert mean.count.tolist() == [[2, 1, 0]]


def test_arrays_survive_their_packing() -> None:
    for values in (np.arange(6, dtype=np.float32).reshape(2, 3), np.array([np.nan, -0.0])):
        again = unpack(pack(values))
        assert again.dtype == values.dtype
        assert again.tobytes() == values.tobytes()


def test_a_prefix_compared_with_itself_is_no_different(
    code: tuple[Path, Path], tmp_path: Path
) -> None:
    same = []
    for number in range(2):
        one = item(number)
        one["conditions"]["assisted"] = one["conditions"]["agentic"]
        same.append(one)
    file = write_items(tmp_path / "same.jsonl", same)
    folder = runner.run(experiment(code[0], file, n_shown=0), tmp_path / "run")
    curves = folder.read_table("curves")
    own = curves[curves.run == "agentic"]
    assert not own[["delta", "js", "kl", "kl_back"]].to_numpy().any()
    assert (folder.read_table("curves")[curves.run == "neutral tool_response"].js[1:] > 0).any()
    assert "one length in every item" in (folder.path / "report.html").read_text("utf-8")


# --- The whole run


def test_interventions_and_controls(finished: RunFolder) -> None:
    runs = finished.read_table("runs_summary").set_index("run")
    original = runs.loc["original tool_response"]
    # Card M-002-13: the original content put in again gives 0 on all three measures.
    assert original.delta_change == original.mass_change == 0
    table = finished.read_table("runs")
    by_run = {name: some.exact.tolist() for name, some in table.groupby("run")}
    assert by_run["original tool_response"] == by_run["agentic"]
    for name in ("neutral", "repeat_spec", "wrong_task"):
        assert runs.loc[f"{name} tool_response"].delta_change != 0
    controls = finished.read_table("controls")
    assert controls.verdict.tolist() == ["pass"] * 4


def test_position_modes_of_a_run(finished: RunFolder) -> None:
    table = finished.read_table("positions")
    assert table.is_matched.all()
    assert (table.moved == "assisted").all()
    items = finished.read_table("items").set_index("item")
    shift = (items.n_prefix_a - items.n_prefix_b).reindex(table.item)
    assert table.n.tolist() == shift.tolist()
    largest = table.groupby("mode").largest_nll_change.max()
    assert largest["left_pad"] < 1e-3
    assert largest["gap"] > 0.01
    assert largest["filler"] > 0.01
    curve = finished.read_table("matched")
    last = curve[(curve["mode"] == "left_pad") & (curve.depth == N_LAYERS)].set_index("item")
    np.testing.assert_allclose(last.delta, items.delta.reindex(last.index), atol=1e-4)


def test_what_the_run_leaves(finished: RunFolder) -> None:
    run = finished.provenance
    assert run["inputs"]["compared"] == {
        "a": "agentic",
        "b": "assisted",
        "segment": "tool_response",
    }
    assert (run["inputs"]["classes"], run["inputs"]["outcomes"]) == ("code", "file")
    assert run["known_defects"] == {}
    check = finished.read_json("prefix_check.json", "")
    assert len(check["prefixes"]) == 16
    found = record(finished, "he-1__as_run")
    assert found["position_ids"]["agentic"] == [
        [0, found["spans"]["agentic"]["prior_output"][0][0][1]]
    ]
    anchors = finished.read_table("anchors").set_index("anchor")
    assert anchors.loc["first_return"].tolist() == [8, 0]
    assert anchors.loc["first_loop"].tolist() == [2, 6]
    page = (finished.path / "report.html").read_text("utf-8")
    assert "Around the first return: 8 items have one" in page
    assert "as rotary embeddings imply, this model does not see it" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for png in (finished.path / "figures").glob("*.png"):
        assert png.with_suffix(".csv").stat().st_size > 0
    verdicts = finished.read_table("findings").set_index("claim").established
    # Eight items establish nothing (M-002-15).
    assert not verdicts.any()


def test_maps_of_all_items(finished: RunFolder) -> None:
    maps = Maps()
    config = PrefixComparisonConfig(n_bins=4)
    for shard in shards(finished, finished.read_table("items")):
        maps.add(shard, config)
    progress = pd.read_csv(finished.path / "figures" / "progress.csv")
    cells = maps.found["progress", "all"].mean()[0]
    np.testing.assert_allclose(progress.delta, cells.reshape(-1), atol=1e-6)
    by_group = [maps.found["progress", q] for q in ("G11", "G10", "G01", "G00")]
    together = sum(one.total[0] for one in by_group) / sum(one.count[0] for one in by_group)
    np.testing.assert_allclose(together, cells, atol=1e-9)


def test_a_segment_has_one_colour_in_both_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one prefix lacks the segment that the other reads most."""
    values = {
        "agentic": {"tool": 0.6, "spec": 0.3, "sink": 0.1},
        "assisted": {"spec": 0.2, "sink": 0.8},
    }
    mass = pd.DataFrame(
        [
            {
                "run": run,
                "segment": name,
                "layer": layer,
                "mean": value,
                "low": value,
                "high": value,
            }
            for run, segments in values.items()
            for name, value in segments.items()
            for layer in range(2)
        ]
    )
    drawn: list[Any] = []
    monkeypatch.setattr(Page, "figure", lambda *given: drawn.append(given[2]))
    inputs = {"compared": {"a": "agentic", "b": "assisted", "segment": "tool"}}
    run = PrefixResults(PrefixComparisonConfig(), inputs, {"mass_summary": mass})
    own_figures.add_mass(Page(RunFolder(tmp_path)), run)
    colours = [
        {line.get_label(): line.get_color() for line in axes.get_lines()} for axes in drawn[0].axes
    ]
    assert colours[0] == colours[1]
    assert len({*colours[0].values()}) == 3


# --- Memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that PyTorch's tensors held at once, of those made meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def test_a_unit_holds_what_it_says(code: tuple[Path, Path], tmp_path: Path) -> None:
    """At the smallest budgets, beside one block of one run; a generous one is made use of."""
    long = item(0, continuation="x = 1\n" * 55)
    file = write_items(tmp_path / "items.jsonl", [long, item(1)])
    whole = experiment(code[0], file)
    whole.identify()
    whole.load()
    longest = teacher_forced("a", whole.items[0].prefixes["agentic"].x, whole.items[0].continuation)
    block = peak_bytes(lambda: whole.model(longest.x, stop_at_layer=1))
    with pytest.raises(InputError, match="items.jsonl line 1: comparing 6 runs") as refused:
        experiment(code[0], file, max_bytes=1).identify()
    least = int(str(refused.value).split("expected ")[1].split()[0])
    peaks = {}
    for budget in (least, 2 * least, 2**29):
        ours = experiment(code[0], file, max_bytes=budget)
        assert ours.identify()["holds_most"]["item"] == "he-0"
        ours.load()
        peaks[budget] = peak_bytes(lambda one=ours: one.measure(one.units()[0]))
        assert peaks[budget] <= budget + block
    assert peaks[least] < 0.5 * peaks[2**29]
    with pytest.raises(InputError, match=f"expected {least} or more"):
        experiment(code[0], file, max_bytes=least - 1).identify()


# --- Settings and bad input


def test_known_defects_follow_from_the_switches() -> None:
    def defects(**settings: Any) -> set[str]:
        return {*PrefixComparison(PrefixComparisonConfig(**settings)).known_defects()}

    assert defects(variant="seed") == {"C5", "C6", "C39"}
    assert not defects()
    assert defects(variant="seed", lens_source="hooks") == {"C5", "C39"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": "agent"}, "got a='agent' and b='assisted', expected two different ones of agentic"),
        (
            {"segment": "tool"},
            "items.jsonl line 1: conditions.agentic: got no token in segment 'too",
        ),
        (
            {"max_bytes": 9},
            r"items.jsonl line 1: comparing 6 runs .*max_bytes=9, expected \d+ or more",
        ),
        (
            {"a": "assisted", "b": "agentic"},
            "conditions.assisted: got no token in segment 'tool_res",
        ),
    ],
)
def test_bad_settings_are_refused_before_work(
    code: tuple[Path, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        experiment(*code, **settings).identify()


def test_bad_items_are_refused_before_work(code: tuple[Path, Path], tmp_path: Path) -> None:
    mixed = item(1)
    del mixed["conditions"]["assisted"]["outcome"]
    file = write_items(tmp_path / "items.jsonl", [item(0), mixed])
    with pytest.raises(InputError, match=r"items.jsonl line 2 lacks conditions.agentic.outcome or"):
        experiment(code[0], file).identify()
    assert experiment(code[0], file, outcomes="greedy").identify()["outcomes"] == "greedy"
    blank = write_items(tmp_path / "blank.jsonl", [item(0), item(1, continuation="  \n")])
    with pytest.raises(InputError, match="blank.jsonl line 2: continuation: .*not blank"):
        experiment(code[0], blank).identify()


# --- Stopped and resumed


def test_stopped_twice_it_ends_with_the_same_bytes(
    code: tuple[Path, Path], finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for before in (5, 9):  # amid the runs as they were, then amid the position modes
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(experiment(*code), {before}), out)
    assert len(list(out.glob("units/*"))) == 12
    runner.run(experiment(*code), out)
    assert results(out) == results(finished.path)


@needs_kill
def test_killed_twice_it_ends_with_the_same_bytes(
    code: tuple[Path, Path], finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = experiment(*code).config.model_dump()
    n_units = len(units(finished.path))
    for n_made in (2, n_units - 1):
        process = start(run_experiment, "prefix_comparison", out, **settings)
        wait_for(lambda n=n_made: len(units(out)) >= n)
        kill(process)
        assert not (out / "report.html").exists()
    runner.run(experiment(*code), out)
    assert results(out) == results(finished.path)


# --- The twins


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    root = tmp_path_factory.mktemp("twins")
    return {
        name: runner.run(experiment(f"bundled:follows_{name}", "bundled"), root / name)
        for name in ("voice", "text")
    }


def test_what_silence_does_reverses_between_the_twins(twins: dict[str, RunFolder]) -> None:
    """The model that follows the voice needs it for the answer; its twin answers without."""
    items = {name: folder.read_table("items") for name, folder in twins.items()}
    assert items["voice"].right_a.all()
    assert items["voice"].right_b.mean() < 0.3
    assert not items["text"].right_a.any()
    assert not items["text"].right_b.any()
    # With silence both say one fixed answer; where it is the right one, nothing changes.
    moved = items["voice"][items["voice"].quadrant == "G10"]
    assert (moved.js > 0.68).all()
    assert (moved.delta < -7).all()
    assert (items["text"].js < 0.01).all()
    for folder in twins.values():
        assert set(folder.read_table("controls").verdict) <= {"pass", "not applicable"}
        runs = folder.read_table("runs").set_index(["run", "item"])
        # The intervention 'neutral' makes the very clip that the condition 'silent' has.
        pd.testing.assert_frame_equal(
            runs.loc["neutral audio"][["nll", "mass"]], runs.loc["silent"][["nll", "mass"]]
        )
    wrong = {
        name: folder.read_table("runs_summary").set_index("run").delta
        for name, folder in twins.items()
    }
    assert wrong["voice"]["wrong_task audio"] > wrong["voice"]["real"] + 5


def test_the_page_says_that_it_is_a_calibration(twins: dict[str, RunFolder]) -> None:
    page = (twins["voice"].path / "report.html").read_text("utf-8")
    assert "Calibration" in page
    assert "maps would be one column" in page
    assert "No continuation has tokens enough for a correlation" in page
    assert not (twins["voice"].path / "figures" / "coupling.png").exists()
