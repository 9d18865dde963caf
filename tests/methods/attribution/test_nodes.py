"""Attribution patching against Hugging Face's autograd, and the exact sweep that it predicts."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformer_lens.tools.analysis import attribution_patch

from engine_runs import PLAIN_SITES
from hf_reference import with_positions
from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.donors import Mean, Noise
from hooked_alm.methods.patching.metrics import KL, Accuracy, LogitDiff, Logits, LogProb, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.points import SITES, Site
from tiny import TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import ATTRIBUTION, FIRST_ORDER, PADDED_SCORES, SAME_DONOR, SOFTMAX_FIXED
from two_clips import metric as at_readout
from two_clips import two_clips

BASE = hf_inputs([[31], [23]], [6, 4])  # 16 positions; 0 and 4 pads, 8 and 6 of audio
OTHER = hf_inputs([[31], [23]], [6, 4], seed=2)
DIFF = LogitDiff(5, [9, 11])
PLACES: list[Any] = ["audio", "readout", "all", 12]
HF_POINTS: dict[str, tuple[str, bool]] = {
    "q": ("self_attn.q_proj", True), "k": ("self_attn.k_proj", True),
    "v": ("self_attn.v_proj", True), "z": ("self_attn.o_proj", False),
    "attn_out": ("self_attn.o_proj", True), "resid_mid": ("post_attention_layernorm", False),
    "pre": ("mlp.gate_proj", True), "gate": ("mlp.act_fn", True), "post": ("mlp.down_proj", False),
    "mlp_out": ("mlp.down_proj", True), "resid_pre": ("", False), "resid_post": ("", True),
}  # fmt: skip
"""Site -> module of the published block, and whether it is its output or its input."""


class Cases:
    """A model, a left-padded batch and its donor, by name; ``qwen3`` is a text model."""

    def __init__(self, audio: TinyModels, text: TextModels) -> None:
        self.audio, self.text = audio, text

    def __call__(self, name: str) -> tuple[HookedALM, ALMInput, ALMInput]:
        if name != "qwen3":
            model = self.audio.hooked(name)
            return model, model.encode(**BASE), model.encode(**OTHER)
        model, batch = self.text.hooked(name), text_batch()
        donor = {**batch, "input_ids": batch["input_ids"].flip(0)}
        return model, model.encode(**batch), model.encode(**donor)


@pytest.fixture(scope="module")
def cases(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    """Every model; hooks left on one fail."""
    cases = Cases(tiny_models, TextModels(tmp_path_factory.mktemp("text")))
    yield cases
    assert not any(list(cases(name)[0].list_hooks()) for name in ("gqa", "mha"))


def difference(logits: Tensor) -> Tensor:
    """DIFF, row by row."""
    return logits[:, -1, 5] - torch.stack([logits[0, -1, 9], logits[1, -1, 11]])


def hf_scores(hf: Any, site: str) -> list[Tensor]:
    """Change times gradient at a site of every block, ``[batch, pos, ...]``, by plain autograd."""
    module, is_output = HF_POINTS[site]
    runs = []
    for inputs in (BASE, OTHER):
        held: list[Tensor] = []

        def keep(_: Any, args: Any, out: Any = None, held: list[Tensor] = held) -> None:
            value = args[0] if out is None else out
            held.append(value[0] if isinstance(value, tuple) else value)

        handles = []
        for block in hf.model.language_model.layers:
            at = block.get_submodule(module)
            handles.append(
                at.register_forward_hook(keep)
                if is_output
                else at.register_forward_pre_hook(lambda m, a, keep=keep: keep(m, a))
            )
        logits = hf(**with_positions(inputs)).logits
        for handle in handles:
            handle.remove()
        runs.append((held, logits))
    (base, logits), (donor, _) = runs
    slopes = torch.autograd.grad(difference(logits).sum(), base)
    found = [((d - b) * g).detach() for b, d, g in zip(base, donor, slopes, strict=True)]
    return [x.unflatten(-1, (-1, 10)) if site in ("q", "k", "v", "z") else x for x in found]


@pytest.mark.parametrize("site", HF_POINTS)
@pytest.mark.parametrize("variant", ["gqa", "mha"])
def test_scores_are_change_times_gradient(cases: Cases, variant: str, site: Site) -> None:
    """Every block, unit and place of a left-padded batch, against the published model."""
    model, base, donor = cases(variant)
    unit = {"head": "heads", "kv_head": "heads", "neuron": "neurons"}.get(str(SITES[site].unit))
    options: dict[str, Any] = {} if unit is None else {unit: "each"}
    found = attribute_nodes(model, base, donor, DIFF, site=site, places=PLACES, **options)
    exact = patch(
        model, base, donor, DIFF, site=site, places=PLACES, layers=[0],
        **({unit: [0]} if unit else {}),
    )  # fmt: skip
    assert list(found.scores.axes) == list(exact.axes)
    assert (found.scores.engine, found.scores.mode, found.scores.site) == ("atp", "replace", site)
    np.testing.assert_array_equal(found.scores.base, exact.base)
    np.testing.assert_array_equal(found.scores.donor, exact.donor)
    size = np.abs(found.effect).max()
    assert size > 1e-2
    for layer, expected in enumerate(hf_scores(cases.audio.hf(variant), site)):
        for (p, place), row in product(enumerate(PLACES), (0, 1)):
            real = [i for i in range(16) if base.attention_mask[row, i]]
            where = (
                real if place == "all"
                else [place] if isinstance(place, int)
                else base.spans.positions(str(place), row)
            )  # fmt: skip
            by_unit = expected[row, where].sum(0)
            by_unit = by_unit if unit == "neurons" else by_unit.sum(-1)
            np.testing.assert_allclose(
                found.effect[layer, ..., p, row], by_unit, atol=ATTRIBUTION * size, rtol=0
            )


def test_pattern_scores(cases: Cases, tiny_models: TinyModels) -> None:
    """Whole rows of the pattern, under fused attention, against the published eager kernel."""
    model, base, donor = cases("gqa")
    hf = tiny_models.hf("gqa", attention="eager")
    runs = [hf(**with_positions(x), output_attentions=True) for x in (BASE, OTHER)]
    slopes = torch.autograd.grad(difference(runs[0].logits).sum(), runs[0].attentions)
    found = attribute_nodes(
        model, base, donor, DIFF, site="pattern", heads="each", places=["text", "readout"]
    ).effect
    size = np.abs(found).max()
    for layer, slope in enumerate(slopes):
        change = runs[1].attentions[layer] - runs[0].attentions[layer]
        by_query = (change * slope).sum(-1).detach()
        for p, place in enumerate(["text", "readout"]):
            for row in (0, 1):
                where = base.spans.positions(place, row)
                np.testing.assert_allclose(
                    found[layer, :, p, row],
                    by_query[row][:, where].sum(-1),
                    atol=10 * ATTRIBUTION * size,
                    rtol=0,
                )


STEP = 0.02


@pytest.mark.parametrize("site", PLAIN_SITES)
@pytest.mark.parametrize("donor_name", ["run", "zero", "noise", "mean", "scale", "add"])
def test_scores_are_the_slope_of_patching(cases: Cases, site: Site, donor_name: str) -> None:
    """Sign and size, for every mode and donor: a small patch does what the score says."""
    model, base, run = cases("gqa")
    if site == "pattern" and donor_name in ("noise", "mean"):
        pytest.skip("the pattern has no such donor")
    donor: Any = {"zero": "zero", "noise": Noise(0.5, seed=3), "mean": Mean(run), "scale": "self"}
    donor = donor.get(donor_name, run)
    mode: Any = {"scale": "scale", "add": "add"}.get(donor_name, "interpolate")
    unit = {"head": "heads", "kv_head": "heads", "neuron": "neurons"}.get(str(SITES[site].unit))
    options: dict[str, Any] = dict(
        site=site, places=["text", ("audio", "readout")], layers=[0, 3], mode=mode,
        **({unit: [1, (0, 1)]} if unit else {}),
    )  # fmt: skip
    middle = 1.0 if mode == "scale" else 0.0
    up, down = (
        patch(model, base, donor, DIFF, coefficient=middle + step, **options).values
        for step in (STEP, -STEP)
    )
    found = attribute_nodes(model, base, donor, DIFF, coefficient=middle + STEP, **options)
    size = np.abs(found.effect).max()
    assert size > 1e-4
    np.testing.assert_allclose(found.effect, (up - down) / 2, atol=FIRST_ORDER * size, rtol=0)


@pytest.mark.parametrize("kv", ["group", "query"])
@pytest.mark.parametrize("qk_fix", [False, True])
def test_kv_heads_and_query_heads(cases: Cases, kv: Any, qk_fix: bool) -> None:
    """A group's score is the sum of those of the heads that read it; both are slopes."""
    model, base, donor = cases("gqa")
    options: dict[str, Any] = dict(
        site="k", heads="each", places=["audio"], mode="interpolate", coefficient=STEP
    )
    found = attribute_nodes(model, base, donor, DIFF, kv=kv, qk_fix=qk_fix, **options).effect
    group = attribute_nodes(model, base, donor, DIFF, **options).effect
    up = patch(model, base, donor, DIFF, kv=kv, **options).effect
    down = patch(model, base, donor, DIFF, kv=kv, **{**options, "coefficient": -STEP}).effect
    size = np.abs(up).max()
    assert found.shape[1] == (2 if kv == "group" else 6)
    second_order = 0.05 if qk_fix else FIRST_ORDER
    np.testing.assert_allclose(found, (up - down) / 2, atol=second_order * size, rtol=0)
    assert not model.cfg.ungroup_grouped_query_attention
    if kv == "query" and not qk_fix:
        summed = found.reshape(4, 2, 3, *found.shape[2:]).sum(2)
        np.testing.assert_allclose(summed, group, atol=10 * ATTRIBUTION * size, rtol=0)


def linear_behind_the_softmax(model: HookedALM) -> HookedALM:
    """A copy whose last block and readout are linear but for the attention's softmax."""
    model = copy.deepcopy(model)
    nn.init.zeros_(model.blocks[-1].mlp.down_proj.weight)
    model.ln_final = nn.Identity()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa, sliding", "qwen3"])
@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("kv", ["group", "query"])
def test_qk_fix_is_exact_where_only_the_softmax_bends(
    cases: Cases, name: str, site: Site, kv: Any
) -> None:
    model, base, donor = cases(name)
    model = linear_behind_the_softmax(model)
    options: dict[str, Any] = dict(
        site=site, layers=[model.cfg.n_layers - 1], heads="each", kv=kv,
        places=["text", "readout", 11, "all"],
    )  # fmt: skip
    # Of several positions: at the last one alone, nothing would depend on the causal mask.
    metric = OnLogits(lambda logits: logits[:, -8:, 5].sum(1))
    run = partial(attribute_nodes, model, base, donor, metric, **options)
    exact = patch(model, base, donor, metric, **options).effect
    fixed, plain = run(qk_fix=True).effect, run().effect
    size = np.abs(exact).max()
    assert size > 1e-2
    np.testing.assert_allclose(fixed, exact, atol=SOFTMAX_FIXED * size, rtol=0)
    assert np.abs(plain - exact).max() > 20 * SOFTMAX_FIXED * size


def test_qk_fix_is_closer_on_average(cases: Cases) -> None:
    model, base, donor = cases("gqa")
    for site in ("q", "k"):
        options: dict[str, Any] = dict(site=site, heads="each", places=["audio", "text"])
        exact = patch(model, base, donor, DIFF, **options).effect
        error = {
            fix: np.abs(
                attribute_nodes(model, base, donor, DIFF, qk_fix=fix, **options).effect - exact
            ).mean()
            for fix in (False, True)
        }
        assert error[True] < 0.9 * error[False]


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_an_identical_donor_scores_nothing(cases: Cases, site: Site) -> None:
    """The base's own values exactly, its like to the rounding of a run that shares a prefix."""
    model, base, donor = cases("gqa")
    for qk_fix in {False, site in ("q", "k")}:
        run = partial(
            attribute_nodes, metric=DIFF, site=site, places=["audio", "all"], qk_fix=qk_fix
        )
        assert not run(model, base, "self").effect.any()
        twin = np.abs(run(model, base, model.encode(**BASE)).effect).max()
        assert twin < SAME_DONOR * np.abs(run(model, base, donor).effect).max()


@pytest.mark.parametrize(
    ("site", "qk_fix"), [("z", False), ("resid_mid", False), ("q", True), ("k", True)]
)
def test_rows_do_not_touch_each_other(cases: Cases, site: Site, qk_fix: bool) -> None:
    """A left-padded row scores as its prompt does alone, however many rows run together."""
    model, base, donor = cases("gqa")
    options: dict[str, Any] = dict(site=site, qk_fix=qk_fix, places=["audio", "all"])
    whole = attribute_nodes(model, base, donor, DIFF, **options).effect
    split = attribute_nodes(model, base, donor, DIFF, rows_at_once=1, **options).effect
    limit = PADDED_SCORES * np.abs(whole).max()
    np.testing.assert_allclose(split, whole, atol=limit, rtol=0)
    alone = []
    for row, other in ((0, 9), (1, 11)):
        pair = []
        for inputs in (BASE, OTHER):
            keep = inputs["attention_mask"][row].bool()
            pair.append(
                model.encode(
                    input_ids=inputs["input_ids"][row : row + 1, keep],
                    attention_mask=inputs["attention_mask"][row : row + 1, keep],
                    input_features=inputs["input_features"][row : row + 1],
                    feature_attention_mask=inputs["feature_attention_mask"][row : row + 1],
                )
            )
        alone.append(attribute_nodes(model, *pair, LogitDiff(5, other), **options).effect)
    np.testing.assert_allclose(np.concatenate(alone, axis=-1), whole, atol=limit, rtol=0)


def test_transformer_lens_scores_the_same_nodes(any_model: HookedALM) -> None:
    """Its convention is denoising: from the corrupted run to the clean. Ours names them so."""
    corrupted, clean, *_ = two_clips(any_model)
    theirs = attribution_patch(any_model, clean, corrupted, at_readout).node_scores
    metric = OnLogits(at_readout)
    positions = list(range(8))
    ours = {
        "attn_head_out": attribute_nodes(
            any_model, corrupted, clean, metric, site="z", heads="each", places=positions
        ).effect,
        "mlp_out": attribute_nodes(
            any_model, corrupted, clean, metric, site="mlp_out", places=positions
        ).effect[:, None],
        "embed": attribute_nodes(
            any_model, corrupted, clean, metric, site="resid_pre", layers=[0], places=positions
        ).effect[:, None],
    }
    size = max(map(abs, theirs.values()))
    for node, score in theirs.items():
        found = ours[node.kind][node.layer or 0, node.head or 0, node.position, 0]
        assert found == pytest.approx(score, abs=ATTRIBUTION * size)
    heard = [p for p in positions if ours["embed"][0, 0, p, 0]]
    assert heard == corrupted.spans.positions("audio", 0)


def test_metrics(cases: Cases) -> None:
    """Several values, whole logits, whole vocabulary; a divergence from the base is flat there."""
    model, base, donor = cases("gqa")

    def score(metric: Any, **options: Any) -> Any:
        return attribute_nodes(
            model, base, donor, metric, site="z", heads="each", places=["audio"], **options
        )

    diff = score(LogitDiff(5, 9)).effect
    both = score(Logits([5, 9]), check=6)
    limit = 10 * ATTRIBUTION * np.abs(diff).max()
    assert list(both.scores.axes) == ["layer", "head", "place", "example", "label"]
    assert both.checked.scores.shape == (6, 2, 2)
    np.testing.assert_allclose(both.effect[..., 0] - both.effect[..., 1], diff, atol=limit, rtol=0)
    whole = score(OnLogits(lambda logits: logits[:, -1, 5] - logits[:, -1, 9])).effect
    np.testing.assert_allclose(whole, diff, atol=limit, rtol=0)
    logits = score(Logits(range(model.cfg.d_vocab))).effect
    with torch.no_grad():
        p = model(base)[:, -1].softmax(-1).double().numpy()
    by_hand = logits[..., 5] - (p * logits).sum(-1)
    np.testing.assert_allclose(score(LogProb(5)).effect, by_hand, atol=limit, rtol=0)
    assert np.abs(score(KL()).effect).max() < limit
    assert np.abs(score(KL(to="donor")).effect).max() > 1e3 * limit


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_state_is_left_alone(
    tiny_models: TinyModels, caller: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stay trainable or frozen as they were, without gradients; audio is encoded once."""
    model = copy.deepcopy(tiny_models.hooked("gqa"))
    model.embed.weight.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(trainable.values())) == 2
    with caller():
        base, donor = model.encode(**BASE), model.encode(**OTHER)
        model(base)  # whatever is kept of the audio is the caller's kind of tensor
        found = attribute_nodes(model, base, donor, DIFF, site="k", qk_fix=True, check=4)
    expected = attribute_nodes(model, base, donor, DIFF, site="k", qk_fix=True)
    np.testing.assert_array_equal(found.effect, expected.effect)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not model.list_hooks()


def test_frozen_weights_are_restored_after_an_error(cases: Cases) -> None:
    model, base, donor = cases("gqa")

    def broken(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            raise RuntimeError("stop")
        return logits[:, -1, 5]

    with pytest.raises(RuntimeError, match="stop"):
        attribute_nodes(model, base, donor, OnLogits(broken))
    assert all(p.requires_grad for p in model.parameters())


def test_checked_cells(cases: Cases) -> None:
    """Their exact effects are the sweep's; half have the largest scores, half are drawn."""
    model, base, donor = cases("gqa")
    options: dict[str, Any] = dict(site="z", heads=[0, (1, 4), 5], places=["audio", "readout"])
    found = attribute_nodes(model, base, donor, DIFF, check=9, seed=4, **options)
    exact = patch(model, base, donor, DIFF, **options)
    checked = found.checked
    assert checked is not None
    assert checked.strata == ("top",) * 5 + ("random",) * 4
    ranked = np.sort(np.abs(found.effect).mean(-1).ravel())[::-1]
    for i, where in enumerate(checked.coordinates):
        at = [found.scores.axes[axis].index(tick) for axis, tick in where.items()]
        np.testing.assert_array_equal(checked.scores[i], found.effect[tuple(at)])
        np.testing.assert_allclose(
            checked.exact[i], exact.effect[tuple(at)], atol=1e-5 * np.abs(exact.base).max(), rtol=0
        )
        if i < 5:
            assert np.abs(checked.scores[i]).mean() == pytest.approx(ranked[i])
    assert len({tuple(where.items()) for where in checked.coordinates}) == 9
    pair = checked.scores.ravel(), checked.exact.ravel()
    assert found.pearson == pytest.approx(np.corrcoef(*pair)[0, 1])
    assert found.spearman == pytest.approx(stats.spearmanr(*pair).statistic)
    drawn = checked.scores[5:].mean(1), checked.exact[5:].mean(1)
    part = checked.correlation(stratum="random", of_means=True)
    assert part == pytest.approx(np.corrcoef(*drawn)[0, 1])
    assert checked.same_sign == np.mean(pair[0] * pair[1] > 0)
    table = pd.DataFrame(checked.columns())
    assert list(table) == ["layer", "head", "place", "stratum", "example", "score", "exact"]
    assert len(table) == 18
    gap = (table["score"] - table["exact"]).abs()
    assert table.iloc[gap.argmax()].to_dict() == checked.worst

    again = attribute_nodes(model, base, donor, DIFF, check=9, seed=4, **options).checked
    other = attribute_nodes(model, base, donor, DIFF, check=9, seed=5, **options).checked
    assert again is not None
    assert other is not None
    assert again.coordinates == checked.coordinates
    assert other.coordinates[:5] == checked.coordinates[:5]
    assert other.coordinates != checked.coordinates
    every = attribute_nodes(model, base, donor, DIFF, check=99, **options).checked
    assert every is not None
    assert len(every.coordinates) == 24
    unchecked = attribute_nodes(model, base, donor, DIFF, **options)
    assert unchecked.checked is None
    assert np.isnan(unchecked.pearson)
    assert np.isnan(unchecked.spearman)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "v", "qk_fix": True}, "'q' and 'k'"),
        ({"layers": [(0, 1)]}, "later hear the earlier"),
        ({"layers": [4]}, "layers 0 to 3"),
        ({"site": "resid_pre", "heads": "each"}, "only q, k"),
        ({"check": -1}, "-1 cells"),
        ({"places": [99]}, "16 positions"),
        ({"metric": OnLogits(lambda logits: logits.detach()[:, -1, 5])}, "no gradient"),
        ({"metric": OnLogits(lambda logits: logits.sum())}, "one value per row|One value per row"),
    ],
)
def test_refusals(cases: Cases, options: dict[str, Any], message: str) -> None:
    model, base, donor = cases("gqa")
    arguments = {"donor": donor, "metric": DIFF, **options}
    with pytest.raises(InputError, match=message):
        attribute_nodes(model, base, arguments.pop("donor"), arguments.pop("metric"), **arguments)


def test_accuracy_has_no_gradient(cases: Cases) -> None:
    model, base, donor = cases("gqa")
    labels = LabelSet(names=("a", "b"), spellings=(((5,),), ((9,),)))
    with pytest.raises(InputError, match="differentiating Accuracy"):
        attribute_nodes(model, base, donor, Accuracy(labels, "a"))


def test_hooks_are_refused(cases: Cases) -> None:
    model, base, donor = cases("gqa")
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value)]),
        pytest.raises(InputError, match="hooks are attached"),
    ):
        attribute_nodes(model, base, donor, DIFF)
