"""The fast engine against the plain loop: every site, mode, donor, place and model; its savings."""

import inspect
import random
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import patching as transformer_lens_patching

import hooked_alm.engine.groups as groups_module
import hooked_alm.engine.planning as planning_module
import hooked_alm.engine.sweep as sweep_module
from engine_runs import (
    BASE,
    MODELS,
    OTHER,
    PLAIN_SITES,
    TAIL,
    Case,
    Cases,
    Cell,
    Edit,
    both,
    close,
    marks_of,
    moved,
    rounding,
)
from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.bundled import CLIPS
from hooked_alm.engine.cells import hooks_of
from hooked_alm.engine.record import Record, Spliced
from hooked_alm.engine.runs import record_runs
from hooked_alm.engine.sweep import sweep
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.donors import DonorValues, Mean, Noise, run_of
from hooked_alm.methods.patching.measurement import Measurement
from hooked_alm.methods.patching.metrics import LogitDiff, Logits, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.points import SITES, Site
from tiny import PAD, PLACEHOLDER, TinyModels, hf_inputs
from tiny_text import TextModels

UNIT_SITES = {"q": 6, "k": 2, "v": 2, "z": 6, "pattern": 6, "pre": 34, "gate": 34, "post": 34}
"""Sites with heads or neurons, and how many the grouped model has."""
DONORS = ("run", "self", "zero", "noise", "mean", "mean by position")
EDITS = [*product(("replace", "interpolate", "add"), DONORS), ("scale", "self")]


@pytest.fixture(scope="module")
def cases(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    """Every model; hooks left on one fail."""
    cases = Cases(tiny_models, TextModels(tmp_path_factory.mktemp("text")))
    yield cases
    assert not [point for case in cases.made.values() for point in case.model.list_hooks()]


def donor_of(case: Case, name: str) -> Any:
    return {
        "run": case.donor, "self": "self", "zero": "zero", "noise": Noise(scale=0.7, seed=3),
        "mean": Mean(case.alike), "mean by position": Mean(case.alike, by_position=True),
    }[name]  # fmt: skip


def units_of(case: Case, site: Site) -> dict[str, Any]:
    """One unit and two at once, the last among them."""
    cfg, unit = case.model.cfg, SITES[site].unit
    if unit is None:
        return {}
    n = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "neuron": cfg.d_mlp}[unit]
    return {"neurons" if unit == "neuron" else "heads": [n - 1, (0, n - 1)] if n > 1 else [0]}


# --- equal to the plain loop ---------------------------------------------------------------------


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_every_mode_and_donor(cases: Cases, site: Site) -> None:
    """All 19 pairs at every site; models, blocks, places and units take turns."""
    places = {
        True: ["audio", 12, ("text", "readout"), "all", Window(0.05, 0.2), (8, "text")],
        False: ["text", 9, ("readout", "sink"), "all", 6],
    }
    layers: list[Any] = [0, -1, (1, 2), (0, -1), 1]
    first = PLAIN_SITES.index(site)
    for turn, (mode, name) in enumerate(EDITS, start=first):
        if site == "pattern" and name in ("noise", "mean"):
            continue  # refused, see below
        case = cases(MODELS[turn % len(MODELS)], "eager" if turn % 4 == 3 else "sdpa")
        there = places[bool(case.base.clips)]
        n, layer = case.model.cfg.n_layers, layers[turn % 5]
        # Values of some positions are means over rows that have the same ones.
        base = case.alone if name.startswith("mean") else case.base
        fast, plain = both(
            case.model, base, donor_of(case, name),
            site=site, mode=mode, coefficient=0.6, places=[there[turn % len(there)]],
            layers=[layer % n if isinstance(layer, int) else tuple(b % n for b in layer)],
            **(units_of(case, site) if turn % 3 == 0 else {}),
        )  # fmt: skip
        if name == "self" and mode in ("replace", "interpolate"):
            assert moved(plain) < 1e-5, "one's own values change nothing"
        elif (name, mode) not in (("zero", "add"),):
            assert moved(plain) > 1e-4, (site, mode, name)
        assert np.isnan(fast.donor).all() == (name != "run")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(cases: Cases, name: str, attention: str) -> None:
    """All sites at two blocks, over a batch with unequal padding; the readout and what precedes."""
    model, base, donor, *_ = cases(name, attention)
    for site in PLAIN_SITES:
        layers, places = [1, model.cfg.n_layers - 1], ["readout", "text"]
        fast, plain = both(model, base, donor, site=site, places=places, layers=layers)
        assert fast.values.shape[:3] == (2, 2, len(base))
        assert moved(plain) > 1e-3


@pytest.mark.parametrize("site", UNIT_SITES)
@pytest.mark.parametrize("name", ["gqa", "qwen3"])
def test_each_unit(cases: Cases, name: str, site: Site) -> None:
    """Heads and neurons one by one and several at once, at two blocks."""
    model, base, donor, *_ = cases(name)
    kind = "neurons" if SITES[site].unit == "neuron" else "heads"
    fast, plain = both(
        model, base, donor, Logits([7, 9]), site=site, places=["text"], layers=[1],
        **{kind: "each"},
    )  # fmt: skip
    axis = SITES[site].unit
    assert fast.axes[str(axis)] == tuple(range(UNIT_SITES[site]))
    assert (np.abs(plain.effect).max(axis=(0, 2, 3, 4)) > 1e-6).all(), "every unit does something"
    both(model, base, donor, site=site, places=["text"], layers=[0, 2], **{kind: [(1, 0), 1]})


@pytest.mark.parametrize("site", ["k", "v"])
@pytest.mark.parametrize("name", ["gqa", "qwen3", "mqa, sliding"])
def test_keys_and_values_per_query_head(cases: Cases, name: str, site: Site) -> None:
    """More cells than per group, other numbers, and the model's setting is as before."""
    model, base, donor, *_ = cases(name)
    options: dict[str, Any] = {"site": site, "places": ["text"], "heads": "each", "layers": [1]}
    fast, _ = both(model, base, donor, kv="query", **options)
    group, _ = both(model, base, donor, **options)
    n_kv = model.cfg.n_key_value_heads
    assert fast.axes["kv_head"] == tuple(range(model.cfg.n_heads))
    assert group.axes["kv_head"] == tuple(range(n_kv))
    assert not model.cfg.ungroup_grouped_query_attention
    # A group is its query heads, all patched.
    heads = [tuple(range(model.cfg.n_heads // n_kv))]
    whole, _ = both(model, base, donor, kv="query", **{**options, "heads": heads})
    limit = rounding(model, base)
    np.testing.assert_allclose(whole.values[:, 0], group.values[:, 0], rtol=0, atol=limit)
    assert np.abs(fast.values[:, 0] - group.values[:, 0]).max() > 1e-4


@pytest.mark.parametrize("site", ["resid_pre", "k", "z"])
def test_each_position(cases: Cases, site: Site) -> None:
    """Every position one by one; a pad of a row is a cell where nothing is patched."""
    model, base, donor, *_ = cases("gqa")
    fast, _ = both(model, base, donor, site=site, places="each", layers=[1, 3])
    assert fast.axes["place"] == tuple(range(base.shape[1]))
    pads = np.abs(fast.effect[:, :4, 1])
    assert pads.max() == 0
    assert (np.abs(fast.effect[0, :, 0]).max(axis=-1) > 1e-5).all()


POLICIES = [
    ("resample_linear", "audio"), ("nearest", "audio"), ("truncate", "audio"),
    ("pad_last", "audio"), ("dtw", "audio"), ("min_len", "audio"),
    ("truncate", ("text", "audio")), ("pad_last", Window(0.0, 5.0)),
]  # fmt: skip


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "v"])
@pytest.mark.parametrize(("policy", "place"), POLICIES)
def test_every_aligner(gqa: HookedALM, policy: Any, place: Any, site: Site) -> None:
    """Clips exchanged, so that one row stretches and the other shrinks; pads differ as well."""
    base = gqa.encode(**BASE)
    donor = gqa.encode(**hf_inputs([[23], [31]], [6, 7], seed=3))
    fast, plain = both(gqa, base, donor, site=site, places=[place], policy=policy, layers=[1, 3])
    assert moved(plain) > 1e-2
    assert fast.length_ratios == plain.length_ratios


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_two_clips_in_one_row(cases: Cases, site: Site) -> None:
    """Two, one and no clips in rows of one batch; windows of either clip."""
    model = cases("mqa, sliding").model
    base = model.encode(**hf_inputs([[15, 11], [27], []], [6, 4, 12]))
    donor = model.encode(**hf_inputs([[15, 11], [27], []], [6, 4, 12], seed=5))
    both(model, base, donor, site=site, places=["audio", "text"], layers=[0, 3])
    both(
        model, base[[0]], donor[[0]], site=site,
        places=[Window(0.0, 0.1), Window(0.05, 0.1, clip=1)],
    )  # fmt: skip


BF16_SITES: tuple[Site, ...] = ("resid_pre", "k", "z", "pattern", "mlp_out", "resid_post")


@pytest.mark.parametrize("name", ["gqa", "mqa, sliding"])
def test_bfloat16(cases: Cases, name: str) -> None:
    model, base, donor, *_ = cases(name, "sdpa", torch.bfloat16)
    for site in BF16_SITES:
        _, plain = both(model, base, donor, site=site, places=["text", "readout"])
        assert moved(plain) > 0.1


def test_bundled_model() -> None:
    """One clip under two instructions: heads at the readout, and spans."""
    model = HookedALM.from_pretrained("bundled:follows_text")
    clips = [CLIPS / f"en_{name}_strong.wav" for name in ("sad", "angry")]
    text = "Judge the emotion of this audio. Output the label only."
    base, donor = (model.prepare(clip, text) for clip in clips)
    metric = Logits([5, 17])
    for site, places in (("z", ["readout"]), ("resid_pre", ["text", "readout"])):
        heads = {"heads": [0, (1, 4)]} if site == "z" else {}
        _, plain = both(model, base, donor, metric, site=site, places=places, **heads)
        assert moved(plain) > 1e-3
    audio = min(len(base.spans.positions("audio", 0)), len(donor.spans.positions("audio", 0)))
    assert audio > 20
    both(model, base, donor, metric, site="resid_post", policy="truncate", layers=[0, 2])


@st.composite
def drawn(draw: Any) -> dict[str, Any]:
    """A model, a batch and one sweep of it."""
    rows = draw(st.integers(1, 3))
    clips = [draw(st.lists(st.integers(7, 31), max_size=2)) for _ in range(rows)]
    texts = [draw(st.integers(10, 15)) for _ in range(rows)]
    site = draw(st.sampled_from(PLAIN_SITES))
    mode, donor = draw(st.sampled_from([edit for edit in EDITS if edit[1] != DONORS[-1]]))
    # A pattern of prompts that are padded otherwise would attend to pads.
    donor = "zero" if site == "pattern" and donor in ("noise", "mean") else donor
    position = st.integers(0, 9).map(lambda p: p - 10)  # from the end: real in every row
    return {
        "variant": draw(st.sampled_from(["gqa", "mha", "mqa, sliding", "no head_dim"])),
        "attention": draw(st.sampled_from(["sdpa", "eager"])),
        "clips": clips, "texts": texts, "site": site, "mode": mode,
        "donor": donor,
        "coefficient": draw(st.sampled_from([-1.0, 0.0, 0.3, 2.0])),
        "layers": draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)),
        "joint": draw(st.booleans()), "units": draw(st.booleans()),
        "places": draw(st.lists(position, min_size=1, max_size=3, unique=True)),
        "with_text": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(case=drawn())
def test_any_sweep(cases: Cases, case: dict[str, Any]) -> None:
    """Shapes, sites, blocks, positions, donors and modes, drawn by Hypothesis."""
    model = cases(case["variant"], case["attention"]).model
    base, donor = (
        model.encode(**hf_inputs(case["clips"], case["texts"], seed=seed)) for seed in (1, 2)
    )
    n = base.shape[1]
    places = tuple(n + p for p in case["places"])
    layers = case["layers"]
    it = Case(model, base, donor, base, donor)
    both(
        model, base, donor_of(it, case["donor"]), site=case["site"], mode=case["mode"],
        coefficient=case["coefficient"], layers=[tuple(layers)] if case["joint"] else layers,
        places=[places, "text"] if case["with_text"] else [places],
        **(units_of(it, case["site"]) if case["units"] else {}),
    )  # fmt: skip


# --- equal to TransformerLens' loops -------------------------------------------------------------

BY_POSITION = {site: f"get_act_patch_{site}" for site in ("resid_pre", "resid_mid", "attn_out",
                                                          "mlp_out")}  # fmt: skip
BY_HEAD = {site: f"get_act_patch_attn_head_{'out' if site == 'z' else site}_all_pos"
           for site in ("z", "q", "k", "v", "pattern")}  # fmt: skip


@pytest.mark.parametrize("site", [*BY_POSITION, *BY_HEAD])
def test_equal_to_transformer_lens(cases: Cases, site: Site) -> None:
    """Its sweeps run on the model itself, with audio, one forward per cell."""
    model = cases("gqa").model
    one = hf_inputs([[11]], [5])
    base = model.encode(**one)
    donor = model.encode(**{**one, "input_features": one["input_features"].flip(-1)})
    _, cache = model.run_with_cache(donor)
    function = getattr(transformer_lens_patching, {**BY_POSITION, **BY_HEAD}[site])
    with torch.no_grad():
        found = function(model, base, cache, lambda logits: logits[0, -1, 7] - logits[0, -1, 9])
    where: dict[str, Any] = {"places": "each"}
    if site in BY_HEAD:
        # Every real position, audio's among them.
        where = {"places": ["all"], "heads": "each"}
    ours = patch(model, base, donor, LogitDiff(7, 9), site=site, **where)
    axes = ours.values.squeeze(-1) if site in BY_POSITION else ours.values[:, :, 0, 0]
    limit = rounding(model, base)
    np.testing.assert_allclose(axes, found.numpy(), rtol=0, atol=limit)
    assert np.abs(axes - ours.base).max() > 1e-3


# --- cells of several edits ----------------------------------------------------------------------


def recorded(model: HookedALM, x: ALMInput) -> list[Record]:
    return record_runs(model, x).records


def streams(model: HookedALM, x: ALMInput, cell: Cell) -> Tensor:
    """The stream after the last block of the cell's row, by hooks."""
    kept: list[Tensor] = []
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    keep = last, lambda value, hook: kept.append(value.clone())
    with torch.no_grad():
        hooks = hooks_of(marks_of([cell], len(x)), range(len(x)), model.path)
        model.run_with_hooks(x, fwd_hooks=[*hooks, keep])
    return kept[0][cell.row]


def edit(site: Site, layer: int, positions: list[int], c: float = 0.6, shift: float = 0.3) -> Edit:
    """Another one at each position; its order and repetition show. Patterns stay causal."""
    ramp = 1 + torch.arange(len(positions)) / 4

    def write(value: Tensor) -> Tensor:
        factor = ramp.reshape(-1, *[1] * (value.ndim - 1))
        return factor * (c * value + (0.0 if site == "pattern" else shift))

    return Edit(site, layer, positions, write)


def check_cells(
    model: HookedALM,
    x: ALMInput,
    cells: list[Cell],
    read: list[np.ndarray] | None = None,
    **options: Any,
) -> int:
    """Every cell is found once, as hooks find it; returns how many parts it took."""
    records = recorded(model, x)
    rows = [np.arange(len(record)) for record in records] if read is None else read
    parts = list(sweep(model, records, marks_of(cells, len(x)), rows, **options))
    asked = [i for i, cell in enumerate(cells) if any(one.positions for one in cell.edits)]
    assert sorted(i // len(x) for part in parts for i in part.cells) == asked
    for part in parts:
        for number, found in zip(part.cells, part.resid, strict=True):
            index = int(number) // len(x)
            assert cells[index].row == part.row
            where = records[part.row].where[rows[part.row]]
            close(found, streams(model, x, cells[index])[where])
    return len(parts)


def drawn_cells(x: ALMInput, n_layers: int, n_cells: int, seed: int) -> list[Cell]:
    """Early and late sites mixed, several blocks, positions in any order, of any row."""
    rng = random.Random(seed)
    cells = []
    for _ in range(n_cells):
        row = rng.randrange(len(x))
        real = x.attention_mask[row].nonzero().flatten().tolist()
        edits = tuple(
            edit(
                rng.choice(PLAIN_SITES), rng.randrange(n_layers),
                rng.sample(real, rng.randint(0, 4)), rng.choice([0.0, 0.5, 1.3]),
            )
            for _ in range(rng.randint(0, 4))
        )  # fmt: skip
        cells.append(Cell(row, edits))
    return cells


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa, sliding", "qwen3"])
@pytest.mark.parametrize("read", ["all", "last", "some"])
def test_cells_of_several_edits(cases: Cases, name: str, read: str) -> None:
    model, base, *_ = cases(name)
    seed = ["all", "last", "some"].index(read)
    rows = {
        "all": None,
        "last": [np.array([len(record) - 1]) for record in recorded(model, base)],
        "some": [np.array([1, 5, len(record) - 3]) for record in recorded(model, base)],
    }[read]
    check_cells(model, base, drawn_cells(base, model.cfg.n_layers, 30, seed), rows)


@pytest.mark.parametrize("early", PLAIN_SITES)
def test_two_sites_in_one_cell(cases: Cases, early: Site) -> None:
    """In one block, in two, in the last, where only what is read runs; each with every other."""
    model, base, *_ = cases("gqa")
    cells = [
        Cell(0, (edit(early, first, [11, 4]), edit(late, second, [9, 4, 15])))
        for late in PLAIN_SITES
        for first, second in ((1, 1), (3, 3), (2, 3))
    ]
    check_cells(model, base, cells, [np.array([15]), np.array([11])])


def test_edits_of_one_hook_apply_in_their_order(cases: Cases) -> None:
    """And of two hooks on the same stream, in the order in which they fire."""
    model, base, *_ = cases("gqa")
    cells = [
        Cell(0, (edit(site, 1, [9], 2.0), edit(site, 1, [9, 12], 0.5, 1.0))) for site in PLAIN_SITES
    ]
    post, pre = edit("resid_post", 1, [9], 2.0), edit("resid_pre", 2, [9], 0.5, 1.0)
    check_cells(model, base, [*cells, Cell(0, (pre, post)), Cell(0, (post, pre))])


def test_cell_without_edits_is_the_base_run(cases: Cases) -> None:
    """It is not run; beside a cell that is, too."""
    model, base, *_ = cases("gqa")
    measured = Measurement(model, base, None, Logits([7, 9]))
    cells = [Cell(0, [edit("z", 1, [15])]), Cell(1, ()), Cell(1, [edit("z", 1, [])])]
    for some in (cells, cells[1:]):
        found = measured.values(len(some), marks_of(some, len(base)))
        assert torch.equal(found[-2:], measured.base_values.expand(2, -1, -1))
    assert not torch.equal(measured.values(1, marks_of(cells[:1], 2))[0], measured.base_values)


@pytest.mark.parametrize("name", ["gqa", "mqa, sliding", "qwen3"])
def test_by_the_fused_kernel(cases: Cases, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As cells of many rows run: several lengths together, with and without keys of their own."""
    monkeypatch.setattr("hooked_alm.engine.mixing.KERNEL_ROWS", 3)
    model, base, donor, *_ = cases(name)
    check_cells(model, base, drawn_cells(base, model.cfg.n_layers, 30, 5))
    for site in ("resid_pre", "q", "k", "v", "z"):
        both(model, base, donor, site=site, places=["text", (6, 9)], layers=[0, 2])


def test_batch_of_pairs_is_each_pair(cases: Cases) -> None:
    """Of unequal length, base and donor too: one call, the numbers of a call each."""
    model = cases("gqa").model
    clips, words = [[31], [14], [23, 9]], [6, 11, 4]
    base = model.encode(**hf_inputs(clips, words))
    donor = model.encode(**hf_inputs([[25], [14], [30, 9]], [9, 11, 4], seed=2))
    options: dict[str, Any] = {
        "site": "z", "heads": "each", "places": ["audio", "readout"], "policy": "nearest"
    }  # fmt: skip
    metric = LogitDiff([3, 5, 7], [8, 4, 2])
    whole = patch(model, base, donor, metric, **options)
    limit = rounding(model, base)
    for row in range(3):
        one = LogitDiff(metric.answer[row], metric.other[row])  # type: ignore[index]
        alone = patch(model, base[[row]], donor[[row]], one, **options)
        np.testing.assert_allclose(whole.values[..., row], alone.values[..., 0], rtol=0, atol=limit)
        assert moved(alone) > 1e-3


# --- the donor splice ----------------------------------------------------------------------------


@pytest.fixture
def splices(monkeypatch: pytest.MonkeyPatch) -> list[Spliced]:
    """Every splice that the engine makes."""
    made: list[Spliced] = []

    class Seen(Spliced):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(planning_module, "Spliced", Seen)
    return made


# Two clips of 4 and 3 positions: 4 text, (marker, 4, marker), (marker, 3, marker), 4 text.
PROMPT = hf_inputs([[15, 11]], [8])
SECOND = Window(0.0, 0.12, clip=1)
SPAN = [11, 12, 13]


def changed(**changes: Tensor) -> dict[str, Tensor]:
    """The prompt with another second clip, and what else differs."""
    features = PROMPT["input_features"].clone()
    features[1] = features[1].flip(-1) * 1.5
    return {**PROMPT, "input_features": features, **changes}


def first_clip_changed() -> dict[str, Tensor]:
    features = changed()["input_features"].clone()
    features[0] = features[0].flip(-1) * 1.5
    return changed(input_features=features)


def tokens_changed(*positions: int) -> dict[str, Tensor]:
    ids = PROMPT["input_ids"].clone()
    ids[0, list(positions)] = (ids[0, list(positions)] + 50) % 300
    return changed(input_ids=ids)


def jumped(position: int) -> dict[str, Tensor]:
    """Position ids leave a gap of 6 before a position."""
    n = PROMPT["input_ids"].shape[1]
    ids = torch.arange(n)
    return changed(position_ids=(ids + 6 * (ids >= position))[None])


def differs_before() -> dict[str, dict[str, Tensor]]:
    return {
        "the first token": tokens_changed(0),
        "the last word before": tokens_changed(3),
        "an earlier clip": first_clip_changed(),
        "positions from the start": jumped(1),
        "positions from the span": jumped(11),
        "positions in the span": jumped(13),
    }


def differs_elsewhere() -> dict[str, dict[str, Tensor]]:
    last = PROMPT["input_ids"].shape[1] - 1
    return {
        "nothing else": changed(),
        "a token behind": tokens_changed(16, last),
        "positions behind": jumped(14),
    }


@pytest.mark.parametrize("name", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("difference", differs_elsewhere())
def test_span_is_spliced(cases: Cases, splices: list[Spliced], name: str, difference: str) -> None:
    model = cases(name).model
    base, donor = model.encode(**PROMPT), model.encode(**differs_elsewhere()[difference])
    for site in ("resid_pre", "resid_post"):
        splices.clear()
        _, plain = both(model, base, donor, site=site, places=[SECOND])
        assert [(one.start, one.stop) for one in splices] == [(11, 14)], "one for all blocks"
        assert moved(plain) > 1e-2


@pytest.mark.parametrize("name", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("difference", differs_before())
def test_difference_before_the_span_is_not_spliced(
    cases: Cases, splices: list[Spliced], name: str, difference: str
) -> None:
    """And the numbers are right: they would be the donor's continuation of another prefix."""
    model = cases(name).model
    base, donor = model.encode(**PROMPT), model.encode(**differs_before()[difference])
    for site in ("resid_pre", "resid_post"):
        _, plain = both(model, base, donor, site=site, places=[SECOND])
        assert moved(plain) > 1e-2
    assert not splices


@pytest.mark.parametrize(("first", "is_spliced"), [(15, False), (16, True)])
def test_token_next_to_the_span(
    cases: Cases, splices: list[Spliced], first: int, is_spliced: bool
) -> None:
    """The very row before the span counts; rows of the span are the donor's anyway."""
    model = cases("gqa").model
    words = {**PROMPT, "input_ids": tokens_changed(*range(first, 18))["input_ids"]}
    base, donor = model.encode(**PROMPT), model.encode(**words)
    _, plain = both(model, base, donor, site="resid_pre", places=[(16, 17)])
    assert moved(plain) > 1e-2
    assert bool(splices) == is_spliced


def test_span_out_of_order_is_spliced(cases: Cases, splices: list[Spliced]) -> None:
    model = cases("gqa").model
    base, donor = model.encode(**PROMPT), model.encode(**changed())
    _, plain = both(model, base, donor, site="resid_pre", places=[(13, 11, 12)])
    assert {(one.start, one.stop) for one in splices} == {(11, 14)}
    assert moved(plain) > 1e-2


def test_base_positions_that_jump(cases: Cases, splices: list[Spliced]) -> None:
    """Equal in both: spliced; in the base alone: not."""
    model = cases("gqa").model
    jump = {"position_ids": jumped(5)["position_ids"]}
    base = model.encode(**PROMPT, **jump)
    both(model, base, model.encode(**changed()), site="resid_pre", places=[SECOND])
    assert not splices
    both(model, base, model.encode(**changed(**jump)), site="resid_pre", places=[SECOND])
    assert splices


@pytest.mark.parametrize("name", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("padded", ["donor", "base"])
def test_left_padding_alone_is_spliced(
    cases: Cases, splices: list[Spliced], name: str, padded: str
) -> None:
    """The other has a longer neighbour, whose clip is encoded elsewhere: none here."""
    model = cases(name).model

    def with_pads(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return {
            **inputs,
            "input_ids": torch.cat([torch.full((1, 5), PAD), ids], 1),
            "attention_mask": torch.cat([torch.zeros(1, 5).long(), mask], 1),
        }

    base = model.encode(**(with_pads(PROMPT) if padded == "base" else PROMPT))
    donor = model.encode(**(with_pads(changed()) if padded == "donor" else changed()))
    assert base.shape[1] != donor.shape[1]
    _, plain = both(model, base, donor, site="resid_pre", places=[SECOND])
    assert len(splices) == 1
    assert moved(plain) > 1e-2


NOT_WHOLE: dict[str, dict[str, Any]] = {
    "interpolate": {"mode": "interpolate", "coefficient": 0.5},
    "add": {"mode": "add"},
    "in two pieces": {"places": [(SECOND, "readout")]},
    "both clips": {"places": ["audio"]},
    "with a hole": {"places": [(11, 13)]},
    "joint layers": {"layers": [(0, 2)]},
    "another site": {"site": "resid_mid"},
    "read elsewhere": {"donor_site": "resid_post"},
    "a mean": {"donor": "mean"},
    "noise": {"donor": "noise"},
}


@pytest.mark.parametrize("reason", NOT_WHOLE)
def test_not_a_whole_span_of_one_run(cases: Cases, splices: list[Spliced], reason: str) -> None:
    model = cases("gqa").model
    donor = model.encode(**changed())
    it = Case(model, model.encode(**PROMPT), donor, donor, donor)
    options = {"site": "resid_pre", "places": [SECOND], **NOT_WHOLE[reason]}
    _, plain = both(model, it.base, donor_of(it, options.pop("donor", "run")), **options)
    assert moved(plain) > 1e-2
    assert not splices


@pytest.mark.parametrize("frames", [7, 31])
@pytest.mark.parametrize("policy", ["pad_last", "truncate", "nearest", "resample_linear"])
def test_unequal_spans(cases: Cases, splices: list[Spliced], policy: Any, frames: int) -> None:
    """Cut ones are spliced as far as they go; stretched ones are not."""
    model = cases("gqa").model
    other = hf_inputs([[15, frames]], [8])
    other["input_features"][0] = PROMPT["input_features"][0]
    base, donor = model.encode(**PROMPT), model.encode(**other)
    window = Window(0.0, 9.0, clip=1)
    _, plain = both(model, base, donor, site="resid_pre", places=[window], policy=policy)
    assert moved(plain) > 1e-2
    n_donor = len(donor.spans.positions("audio", 0)) - 4
    stops = {one.stop for one in splices}
    # A longer donor, cut to the base's length, is its first rows: so is the padded one.
    is_cut = policy == "truncate" or (policy == "pad_last" and n_donor > 3)
    assert stops == ({11 + min(3, n_donor)} if is_cut else set())


def test_donor_rows_elsewhere(cases: Cases, splices: list[Spliced]) -> None:
    """The same span, taken from other rows of an agreeing run."""
    model = cases("gqa").model
    x, other = model.encode(**PROMPT), model.encode(**changed())
    run = recorded(model, other)[0]
    cells = [
        Cell(0, (Edit("resid_pre", layer, SPAN, lambda _, d=run.resid[layer][at]: d,
                      (run, at)),))
        for layer in range(3)
        for at in ([12, 13, 14], [10, 11, 12], [11, 13, 12])
    ]  # fmt: skip
    check_cells(model, x, cells)
    assert not splices


def test_cells_with_the_same_start_and_other_prefixes(cases: Cases, splices: list[Spliced]) -> None:
    """Two donors' spans, and edits of the row behind them, in one sweep."""
    model = cases("gqa").model
    louder = changed()["input_features"] * torch.tensor([1.0, 2.0])[:, None, None]
    donors = [
        recorded(model, model.encode(**one))[0]
        for one in (changed(), {**PROMPT, "input_features": louder})
    ]
    cells = [
        Cell(0, (Edit("resid_pre", layer, SPAN, lambda _, d=donor.resid[layer][SPAN]: d,
                      (donor, SPAN)),))
        for layer in (1, 3)
        for donor in donors
    ]  # fmt: skip
    cells = [Cell(0, (edit("v", 1, [14]),)), *cells, Cell(0, (edit("z", 2, [14]),))]
    check_cells(model, model.encode(**PROMPT), cells)
    assert len(splices) == 2


# --- memory --------------------------------------------------------------------------------------


def sweep_of_heads(case: Case, **options: Any) -> PatchResult:
    model, base, donor, *_ = case
    places = ["readout", "text", 11]
    metric = Logits([7, 9])
    return patch(model, base, donor, metric, site="z", heads="each", places=places, **options)


def within_rounding(case: Case, found: PatchResult, expected: PatchResult) -> None:
    limit = rounding(case.model, case.base)
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=limit)


def test_budget_changes_nothing_but_rounding(cases: Cases) -> None:
    case = cases("gqa")
    whole = sweep_of_heads(case, max_bytes=2**34)
    for max_bytes in (1, 200_000, None):
        within_rounding(case, sweep_of_heads(case, max_bytes=max_bytes), whole)


def test_budget_cuts_the_cells(cases: Cases) -> None:
    """One at a time, some at a time, or a part per row and first position."""
    model, base, *_ = cases("gqa")
    cells = drawn_cells(base, 4, 20, 7)
    n_edited = sum(any(one.positions for one in cell.edits) for cell in cells)
    assert check_cells(model, base, cells, max_bytes=1) == n_edited
    some = check_cells(model, base, cells, max_bytes=200_000)
    all_at_once = check_cells(model, base, cells, max_bytes=2**34)
    assert n_edited > some > all_at_once


def short_of_memory(monkeypatch: pytest.MonkeyPatch, name: str, fails: Any) -> list[int]:
    """Make a function of the sweep raise where ``fails(call number)``."""
    owner: Any = sweep_module if name == "run_block" else groups_module
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []

    def wrapped(*arguments: Any) -> Any:
        calls.append(len(calls))
        if fails(calls[-1]):
            raise torch.OutOfMemoryError("planted")
        return original(*arguments)

    monkeypatch.setattr(owner, last, wrapped)
    return calls


# Six groups (two rows, three places) and four blocks.
@pytest.mark.parametrize(
    ("where", "call"),
    [("run_block", 0), ("run_block", 2), ("run_block", 3), ("own_key_values", 0),
     ("Group.absorb", 5), ("Group.absorb", 21), ("Group.enter", 24)],
)  # fmt: skip
def test_out_of_memory_halves_and_goes_on(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """Once, at any point of the climb: a retry starts from the beginning."""
    case = cases("gqa")
    expected = sweep_of_heads(case)
    calls = short_of_memory(monkeypatch, where, lambda n: n == call)
    with pytest.warns(RuntimeWarning, match="144 cells at once did not fit into memory"):
        found = sweep_of_heads(case)
    assert len(calls) > call + 1
    within_rounding(case, found, expected)


def test_out_of_memory_until_it_fits(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("gqa")
    expected = sweep_of_heads(case)
    short_of_memory(monkeypatch, "run_block", lambda n: n < 4)
    with pytest.warns(RuntimeWarning, match="did not fit") as seen:
        found = sweep_of_heads(case)
    budgets = [float(str(one.message).split("going on with ")[1].split()[0]) for one in seen]
    assert len(budgets) == 4
    assert budgets == sorted(budgets, reverse=True)
    within_rounding(case, found, expected)


def test_cell_that_never_fits(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("gqa")
    short_of_memory(monkeypatch, "run_block", lambda n: True)
    with pytest.warns(RuntimeWarning) as seen, pytest.raises(torch.OutOfMemoryError):
        sweep_of_heads(case)
    assert re.search("sweep: [23] cells at once did not fit", str(seen[-1].message))
    with pytest.raises(torch.OutOfMemoryError, match="planted"):  # and no warning
        patch(case.model, case.base[[0]], case.donor[[0]], TAIL, places=[11], layers=[1])


# --- work saved ----------------------------------------------------------------------------------


def rows_run(model: HookedALM, work: Any) -> list[list[int]]:
    """Per block, the rows of each pass through its MLP."""
    seen: list[list[int]] = [[] for _ in model.blocks]

    def counter(layer: int) -> Any:
        return lambda mlp, inputs: seen[layer].append(inputs[0].shape[:-1].numel())

    handles = [
        block.mlp.register_forward_pre_hook(counter(layer))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        list(work)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.fixture
def one_row(cases: Cases) -> tuple[HookedALM, ALMInput, list[Record], list[np.ndarray]]:
    """18 positions, read at the last."""
    model = cases("gqa").model
    x = model.encode(**PROMPT)
    return model, x, recorded(model, x), [np.array([x.shape[1] - 1])]


OneRow = tuple[HookedALM, ALMInput, list[Record], list[np.ndarray]]
N = PROMPT["input_ids"].shape[1]


def test_heads_at_the_readout_cost_one_row_each(one_row: OneRow) -> None:
    """Rules 1, 3 and 4: 6 heads x 4 blocks, in one pass; a cell costs a row per block above."""
    model, _, records, read = one_row
    cells = [Cell(0, (edit("z", layer, [N - 1]),)) for layer in range(4) for _ in range(6)]
    assert rows_run(model, sweep(model, records, marks_of(cells, 1), read)) == [
        [6],
        [12],
        [18],
        [24],
    ]


SINGLE: dict[Site, list[list[int]]] = {
    # Its block: rows that change there. Above: rows from the position on. Last: the row that is
    # read, if the position is it.
    **{site: [[], [N - 6], [N - 6], [1]] for site in ("resid_pre", "k", "v")},
    **{
        site: [[], [1], [N - 6], [1]]
        for site in ("q", "pattern", "z", "attn_out", "resid_mid", "pre", "gate", "post", "mlp_out")
    },
    "resid_post": [[], [], [N - 6], [1]],
}


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_position_in_the_middle(one_row: OneRow, site: Site) -> None:
    """Rule 1: nothing before the position, nothing below the block."""
    model, _, records, read = one_row
    work = sweep(model, records, marks_of([Cell(0, (edit(site, 1, [6]),))], 1), read)
    assert rows_run(model, work) == SINGLE[site]


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_last_block_runs_what_is_read(one_row: OneRow, site: Site) -> None:
    """Rule 4: a position there matters to the readout by keys and values only."""
    model, _, records, read = one_row
    work = sweep(model, records, marks_of([Cell(0, (edit(site, 3, [6]),))], 1), read)
    reads_it = site in ("resid_pre", "k", "v")
    seen = rows_run(model, work)
    assert seen[:3] == [[], [], []]
    assert sum(seen[3]) == int(reads_it)


def test_splice_runs_what_follows(one_row: OneRow) -> None:
    """Rule 2: rows behind the span only; without it, the span's too."""
    model, _, records, read = one_row
    donor = recorded(model, model.encode(**changed()))[0]

    def cells(is_spliced: bool) -> list[Cell]:
        return [
            Cell(0, (Edit("resid_pre", layer, SPAN, lambda v, d=donor.resid[layer][SPAN]: d,
                          (donor, SPAN) if is_spliced else None),))
            for layer in range(4)
        ]  # fmt: skip

    behind, all_of_it = N - 14, N - 11
    seen = rows_run(model, sweep(model, records, marks_of(cells(True), 1), read))
    assert seen == [[behind], [2 * behind], [3 * behind], [4]]
    seen = rows_run(model, sweep(model, records, marks_of(cells(False), 1), read))
    assert seen == [[all_of_it], [2 * all_of_it], [3 * all_of_it], [4]]


def test_nothing_runs_that_nobody_reads(one_row: OneRow) -> None:
    """What is edited behind the last row that is read; and the stream after the last block."""
    model, _, records, read = one_row
    late = [Cell(0, (edit("resid_pre", 1, [9]),))]
    assert rows_run(model, sweep(model, records, marks_of(late, 1), [np.array([8])])) == [[]] * 4
    last = [Cell(0, (edit("resid_post", 3, [N - 1]),))]
    assert rows_run(model, sweep(model, records, marks_of(last, 1), read)) == [[]] * 4


def test_whole_spans_of_a_run_by_itself(cases: Cases) -> None:
    """Through ``patch``: two runs, and no row more than they and the rules need."""
    model = cases("gqa").model
    base, donor = model.encode(**PROMPT), model.encode(**changed())

    def work() -> Iterator[PatchResult]:
        yield patch(model, base, donor, LogitDiff(7, 9), site="resid_pre", places=[SECOND])

    runs, behind = [N, N - 11], N - 14  # the donor's run begins where its clip does (rule 5)
    assert rows_run(model, work()) == [[*runs, n] for n in (behind, 2 * behind, 3 * behind, 4)]


def test_unembedding_only_where_asked(cases: Cases) -> None:
    """Rule 4: a metric that names its tokens never sees the others."""
    model, base, donor, *_ = cases("gqa")
    calls: list[int] = []
    handle = model.unembed.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        patch(model, base, donor, LogitDiff(7, 9), site="z", heads="each")
        assert calls == []
        patch(model, base, donor, TAIL, site="z", layers=[0])
        assert calls
    finally:
        handle.remove()


# --- refusals ------------------------------------------------------------------------------------


def test_refusals(gqa: HookedALM) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**OTHER)

    def refuse(match: str, *, donor: Any = donor, metric: Any = TAIL, **options: Any) -> None:
        for engine in ("fast", "hooks"):
            with pytest.raises(InputError, match=match):
                patch(gqa, base, donor, metric, **{"engine": engine, **options})

    refuse(r"choosing layer \[4, 9\]: the model has layers 0 to 3", layers=[0, (9, 1), 4])
    refuse(r"choosing layer \[-1\]", layers=[-1])
    refuse(r"choosing head \[6\]: the model has heads 0 to 5", site="z", heads=[1, 6])
    refuse(r"choosing kv head \[2\]: the model has kv heads 0 to 1", site="k", heads=[2])
    refuse(r"choosing head \[6\]|kv head \[6\]", site="k", kv="query", heads=[6])
    refuse(r"choosing neuron \[34\]", site="post", neurons=[(0, 34)])
    refuse(r"patching heads \[1\] of resid_post: only q, k, v, pattern, z have any", heads=[1])
    refuse(r"patching neurons \[1\] of z: only pre, gate, post", site="z", neurons=[1])
    refuse("2 base rows with 1 donor rows", donor=donor[0])
    refuse("patching the pattern with Noise", site="pattern", donor=Noise())
    deaf = gqa.encode(**hf_inputs([[], []], [9, 14]))
    with pytest.raises(InputError, match="patching at 'audio': no row of the base has such"):
        patch(gqa, deaf, "zero", TAIL, places=["readout", "audio"])
    refuse("patching the pattern with Mean", site="pattern", donor=Mean(donor))
    refuse("padded differently", site="pattern", donor=Mean(donor, by_position=True))
    longer = gqa.encode(**hf_inputs([[31], [23]], [6, 20]))
    refuse(
        r"the base has 16 positions, the donor 28, or they are padded", site="pattern", donor=longer
    )
    refuse("aligning position 12 of row 0", donor=longer, places=[12])
    refuse("measuring 2 rows: the metric has answers for 1", metric=LogitDiff([3], 4))
    for shape in ("the metric returned shape \\(3,\\)",):
        refuse(shape, metric=OnLogits(lambda logits: torch.zeros(3)))
    refuse("returned shape \\(2, 2, 2\\)|shape \\(1, 2, 2\\)",
           metric=OnLogits(lambda logits: torch.zeros(len(logits), 2, 2)))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "match"),
    [({"engine": "slow"}, "choosing an engine: got 'slow'"),
     ({"mode": "swap"}, "patching with mode 'swap': expected one of"),
     ({"donor": "mean"}, "patching with donor 'mean': expected .* 'self' or 'zero'")],
)  # fmt: skip
def test_unknown_words(
    gqa: HookedALM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], match: str
) -> None:
    """Past the type checks of the tests, which refuse them first."""
    monkeypatch.setattr(Measurement, "__init__", unchecked(Measurement.__init__))
    monkeypatch.setattr(DonorValues, "__init__", unchecked(DonorValues.__init__))
    monkeypatch.setattr("hooked_alm.methods.patching.patch.run_of", unchecked(run_of))
    options = dict(options)
    base, donor = gqa.encode(**BASE), options.pop("donor", gqa.encode(**OTHER))
    named = inspect.signature(patch).parameters.values()
    defaults = {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY}
    with pytest.raises(InputError, match=match):
        unchecked(patch)(gqa, base, donor, TAIL, **{**defaults, **options})


def unchecked(function: Any) -> Any:
    """A function without the run-time type checks that the tests switch on."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_hooks_on_the_model(gqa: HookedALM) -> None:
    """The fast engine refuses; the loop runs under them and leaves them in place."""
    base = gqa.encode(**BASE)
    silence = "blocks.1.hook_mlp_out", lambda value, hook: torch.zeros_like(value)
    with gqa.hooks(fwd_hooks=[silence]):
        with pytest.raises(InputError, match=r"hooks are attached \(blocks.1.hook_mlp_out\)"):
            patch(gqa, base, "zero", TAIL)
        hooked = patch(gqa, base, "zero", TAIL, engine="hooks", layers=[0, 1])
        assert np.allclose(hooked.base, TAIL.function(gqa(base)).detach())
    plain = patch(gqa, base, "zero", TAIL, engine="hooks", layers=[0, 1])
    assert (np.abs(hooked.values - plain.values).max(axis=(1, 2, 3)) > 1e-3).all()


def test_edits_that_cannot_be(gqa: HookedALM) -> None:
    base = gqa.encode(**BASE)
    records = recorded(gqa, base)
    read = [np.array([0]), np.array([0])]

    def refuse(match: str, *edits: Edit, row: int = 1) -> None:
        with pytest.raises(InputError, match=match):
            list(sweep(gqa, records, marks_of([Cell(row, edits)], 2), read))

    refuse(r"editing positions \[3\]: they are pads, or beyond the 16", edit("z", 1, [3, 5]))
    refuse(r"editing positions \[16, -1\]", edit("z", 1, [16, -1]), row=0)
    refuse(r"editing blocks \[4\]: the model has blocks 0 to 3", edit("z", 4, [9]))
    refuse(r"editing blocks \[-1\]", edit("resid_post", -1, [9]))
    assert int((base.tokens == PLACEHOLDER).sum()) == 14
