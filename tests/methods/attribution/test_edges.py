"""Edge attribution: against autograd through hooked forks, TransformerLens, and exact edges."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.components.norm import LayerNorm, RMSNorm
from hooked_alm.methods.attribution.edges import _through_norm, attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.metrics import KL, LogitDiff, Logits, OnLogits
from hooked_alm.methods.patching.paths import path_patch
from tiny import TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import ATTRIBUTION, EDGE_SCORES, PADDED_SCORES, SAME_DONOR
from two_clips import metric as at_readout
from two_clips import two_clips

BASE = hf_inputs([[31], [23]], [6, 4])  # 16 positions; 0 and 4 pads, 8 and 6 of audio
OTHER = hf_inputs([[31], [23]], [6, 4], seed=2)
DIFF = LogitDiff(5, 9)
SENDERS = [
    "hook_embed", "blocks.*.attn.hook_z[*]", "blocks.1.hook_attn_out", "blocks.*.hook_mlp_out",
    "blocks.2.mlp.hook_post[7]",
]  # fmt: skip
READERS = [
    *(f"blocks.*.attn.hook_{part}_input[*]" for part in "qkv"), "blocks.*.hook_mlp_in", "logits",
]  # fmt: skip
RECEIVERS = [*READERS, "blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid"]
PLACES: list[Any] = ["audio", "readout", ("text", "audio"), "all"]


def pair(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    return model.encode(**BASE), model.encode(**OTHER)


def messages(model: HookedALM, x: ALMInput, senders: Sequence[str]) -> list[Tensor]:
    """What every sender adds to the stream, ``[batch, pos, d_model]``, by hooks that show it."""
    _, cache = model.run_with_cache(
        x, names_filter=lambda name: not name.startswith("audio.") and "hook_tokens" not in name
    )
    found = []
    for name in senders:
        point, _, unit = name.rstrip("]").partition("[")
        if point.endswith("hook_z"):
            found.append(cache[point.replace("hook_z", "hook_result")][:, :, int(unit)])
        elif unit:
            column = model.blocks[int(name.split(".")[1])].mlp.down_proj.weight[:, int(unit)]
            found.append(cache[point][:, :, int(unit), None] * column)
        else:
            found.append(cache[point])
    return [value.detach() for value in found]


def slopes(
    model: HookedALM, x: ALMInput, receivers: Sequence[str], way: float, other: ALMInput
) -> list[Tensor]:
    """Gradients at every receiver's fork of the stream, by backward hooks on the forks."""
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    points = [name.partition("[")[0].replace("logits", last) for name in receivers]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        ends = [model(one, stop_at_layer=0) for one in (x, other)]
    embeddings = (ends[0] + way * (ends[1] - ends[0])).requires_grad_()

    def keep(gradient: Tensor, hook: Any) -> None:
        found[str(hook.name)] = gradient.clone()

    with model.hooks(bwd_hooks=[(model.resolve(point), keep) for point in set(points)]):
        logits = model(embeddings, start_at_layer=0, inputs=x)
        (logits[:, -1, 5] - logits[:, -1, 9]).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    gradients = [found[model.resolve(point)] for point in points]
    units = [name.rstrip("]").partition("[")[2] for name in receivers]
    return [g[:, :, int(u)] if u else g for g, u in zip(gradients, units, strict=True)]


def by_hand(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    axes: Any,
    ways: Sequence[float] = (0.0,),
) -> np.ndarray:
    """``[sender, receiver, place, example]``, edge by edge."""
    changes = [
        theirs - ours
        for theirs, ours in zip(
            *(messages(model, x, axes["sender"]) for x in (donor, base)), strict=True
        )
    ]
    steps = [slopes(model, base, axes["receiver"], way, donor) for way in ways]
    mean = [torch.stack(one).mean(0) for one in zip(*steps, strict=True)]
    out = np.zeros((len(changes), len(mean), len(axes["place"]), len(base)))
    for (u, change), (v, slope), (p, place), row in product(
        enumerate(changes), enumerate(mean), enumerate(axes["place"]), range(len(base))
    ):
        parts = place if isinstance(place, tuple) else (place,)
        where = [pos for part in parts if part != "all" for pos in base.spans.positions(part, row)]
        where = where or base.attention_mask[row].nonzero().flatten().tolist()
        out[u, v, p, row] = float((change[row, where] * slope[row, where]).sum())
    return out


def compare(found: np.ndarray, expected: np.ndarray, limit: float = EDGE_SCORES) -> None:
    exists = ~np.isnan(found)
    size = np.abs(expected[exists]).max()
    assert size > 1e-2
    np.testing.assert_allclose(found[exists], expected[exists], atol=limit * size, rtol=0)


@pytest.mark.parametrize("kv", ["group", "query"])
@pytest.mark.parametrize("variant", ["gqa", "mha"])
def test_scores_are_change_times_the_forks_gradient(
    tiny_models: TinyModels, variant: str, kv: Any
) -> None:
    """Every edge of a left-padded batch; kv heads as they are, and per query head."""
    model = tiny_models.hooked(variant)
    base, donor = pair(model)
    found = attribute_edges(model, base, donor, DIFF, SENDERS, RECEIVERS, places=PLACES, kv=kv)
    axes = found.scores.axes
    model.set_ungroup_grouped_query_attention(kv == "query")
    compare(found.effect, by_hand(model, base, donor, axes))
    model.set_ungroup_grouped_query_attention(False)
    exact = path_patch(
        model, base, donor, DIFF, SENDERS, ["blocks.*.hook_mlp_in", "logits"], places=PLACES, kv=kv
    )
    assert list(axes) == list(exact.axes) == ["sender", "receiver", "place", "example"]
    assert axes["sender"] == exact.axes["sender"]
    assert axes["receiver"][-7:-2] == exact.axes["receiver"]
    there = np.isnan(found.effect[:, -7:-2])
    np.testing.assert_array_equal(there, np.isnan(exact.effect))
    assert there.any()
    assert (found.scores.site, found.scores.mode, found.scores.engine) == ("path", "edge", "eap")
    np.testing.assert_array_equal(found.scores.donor, exact.donor)


def test_models_with_q_k_norm_and_a_window(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = TextModels(tmp_path_factory.mktemp("text")).hooked("qwen3")
    batch = text_batch()
    inputs = [text.encode(**{**batch, "input_ids": ids}) for ids in
              (batch["input_ids"], batch["input_ids"].flip(0))]  # fmt: skip
    window = tiny_models.hooked("mqa, sliding")
    for model, (base, donor) in ((text, inputs), (window, pair(window))):
        found = attribute_edges(model, base, donor, DIFF, SENDERS[:2], READERS)
        compare(found.effect, by_hand(model, base, donor, found.scores.axes))


@pytest.mark.parametrize(
    ("endpoint", "ways"), [("base", (0, 1 / 3, 2 / 3)), ("donor", (1 / 3, 2 / 3, 1))]
)
def test_integrated_gradients(
    tiny_models: TinyModels, endpoint: Any, ways: tuple[float, ...]
) -> None:
    """Three steps by hand: the paper's end is the base (clean), its code's the donor."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    found = attribute_edges(
        model, base, donor, DIFF, SENDERS[:3], READERS, method="eap-ig", steps=3, endpoint=endpoint
    )
    compare(found.effect, by_hand(model, base, donor, found.scores.axes, ways))
    assert found.scores.engine == "eap-ig"


def test_one_step_is_eap_at_that_end(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    run = partial(attribute_edges, model, metric=DIFF, from_nodes=SENDERS, to_nodes=READERS)
    one = partial(run, base, donor, method="eap-ig", steps=1)
    np.testing.assert_array_equal(one().effect, run(base, donor).effect)
    # From the other end the change is the other way round.
    compare(one(endpoint="donor").effect, -run(donor, base).effect)


def test_integrated_gradients_add_up_to_the_total_effect(tiny_models: TinyModels) -> None:
    """The embedding's message to the first block, over the whole prompt: completeness."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    first = ["hook_embed"], ["blocks.0.hook_resid_pre"]
    run = partial(attribute_edges, model, base, donor, DIFF, *first)
    total = run().scores.total_effect
    gaps = []
    for steps in (4, 32):
        ends = [
            run(method="eap-ig", steps=steps, endpoint=endpoint).effect[0, 0, 0]
            for endpoint in ("base", "donor")
        ]
        gaps.append(np.abs((ends[0] + ends[1]) / 2 - total).max())
    assert np.abs(total).min() > 0.1
    assert gaps[1] < 2e-3 * np.abs(total).max()
    assert gaps[1] < gaps[0] / 8
    assert np.abs(run().effect[0, 0, 0] - total).max() > 0.05


def test_edges_of_a_sender_add_up_to_its_node(tiny_models: TinyModels) -> None:
    """Whoever reads the stream behind a node, together: the gradient at the node."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    found = np.nansum(
        attribute_edges(
            model, base, donor, DIFF,
            ["hook_embed", "blocks.1.attn.hook_z[*]", "blocks.2.hook_mlp_out"], READERS,
            places=["audio", "all"],
        ).effect,
        axis=1,
    )  # fmt: skip
    node = partial(attribute_nodes, model, base, donor, DIFF, places=["audio", "all"])
    nodes = [
        node(site="resid_pre", layers=[0]).effect,
        *node(site="z", layers=[1], heads="each").effect[0][:, None],
        node(site="mlp_out", layers=[2]).effect,
    ]
    compare(found, np.concatenate(nodes))


def test_groups_are_the_sum_of_their_query_heads(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    names = [f"blocks.*.attn.hook_{part}_input[*]" for part in "kv"]
    run = partial(attribute_edges, model, base, donor, DIFF, SENDERS, names)
    group, query = run().effect, run(kv="query").effect
    assert (group.shape[1], query.shape[1]) == (16, 48)
    compare(query.reshape(len(query), 16, 3, *query.shape[2:]).sum(2), group)
    assert not model.cfg.ungroup_grouped_query_attention


def test_transformer_lens_scores_the_same_edges(mha: HookedALM) -> None:
    """Its convention is denoising: grad at the corrupted run, clean minus corrupted."""
    corrupted, clean, *_ = two_clips(mha)
    theirs = attribution_patch(
        mha, clean, corrupted, at_readout, EdgeAttributionConfig(granularity="edge")
    ).edge_scores
    ours = attribute_edges(
        mha, corrupted, clean, OnLogits(at_readout),
        ["hook_embed", "blocks.*.attn.hook_z[*]", "blocks.*.hook_mlp_out"], READERS,
        places=list(range(8)),
    ).scores  # fmt: skip
    sender = {name: i for i, name in enumerate(ours.axes["sender"])}
    receiver = {name: i for i, name in enumerate(ours.axes["receiver"])}
    size = max(map(abs, theirs.values()))
    for (writer, reader), score in theirs.items():
        point = {
            "embed": "hook_embed",
            "attn_head_out": f"blocks.{writer.layer}.attn.hook_z[{writer.head}]",
            "mlp_out": f"blocks.{writer.layer}.hook_mlp_out",
        }[writer.kind]
        end = {"logits": "logits", "mlp_in": f"blocks.{reader.layer}.hook_mlp_in"}.get(
            reader.kind, f"blocks.{reader.layer}.attn.hook_{reader.kind}[{reader.head}]"
        )
        found = ours.effect[sender[point], receiver[end], reader.position, 0]
        assert found == pytest.approx(score, abs=3 * ATTRIBUTION * size)
    assert len(theirs) > 5000


def test_small_messages_do_what_the_scores_say(tiny_models: TinyModels) -> None:
    """Sign and size against exact edges, for donors that differ little."""
    model = tiny_models.hooked("gqa")
    base = model.encode(**BASE)
    near = BASE["input_features"] + 0.03 * (OTHER["input_features"] - BASE["input_features"])
    donor = model.encode(**{**BASE, "input_features": near})
    ends = ["hook_embed", "blocks.*.attn.hook_z[*]"], ["blocks.*.hook_mlp_in", "logits"]
    exact = path_patch(model, base, donor, DIFF, *ends, places=["audio", "all"]).effect
    run = partial(attribute_edges, model, base, donor, DIFF, *ends, places=["audio", "all"])
    found = run().effect
    exists = ~np.isnan(exact)
    size = np.abs(exact[exists]).max()
    assert size > 1e-3
    np.testing.assert_allclose(found[exists], exact[exists], atol=0.05 * size, rtol=0)
    assert np.corrcoef(found[exists], exact[exists])[0, 1] > 0.999


def test_sets_add_up(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    one = ["hook_embed", "blocks.1.hook_mlp_out"]
    other = ["blocks.1.attn.hook_q_input[3]", "blocks.2.hook_mlp_in"]
    run = partial(attribute_edges, model, base, donor, DIFF)
    single = run(one, other).effect
    joint = run([tuple(one), one[0]], [tuple(other), other[0]])
    assert joint.scores.axes["sender"] == (tuple(one), one[0])
    expected = [[np.nansum(single, (0, 1)), single[0, 0]], [single[0].sum(0), single[0, 0]]]
    compare(joint.effect, np.array(expected))


def test_rows_do_not_touch_each_other(tiny_models: TinyModels) -> None:
    """A left-padded row scores as its prompt does alone, however many rows run together."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    run = partial(
        attribute_edges, model, metric=DIFF, from_nodes=SENDERS[:2], to_nodes=READERS,
        method="eap-ig", steps=2, places=["audio", "all"],
    )  # fmt: skip
    whole = run(base, donor).effect
    compare(run(base, donor, rows_at_once=1).effect, whole, PADDED_SCORES)
    rows = []
    for row in (0, 1):
        alone = []
        for inputs in (BASE, OTHER):
            keep = inputs["attention_mask"][row].bool()
            alone.append(
                model.encode(
                    input_ids=inputs["input_ids"][row : row + 1, keep],
                    attention_mask=inputs["attention_mask"][row : row + 1, keep],
                    input_features=inputs["input_features"][row : row + 1],
                    feature_attention_mask=inputs["feature_attention_mask"][row : row + 1],
                )
            )
        rows.append(run(*alone).effect)
    compare(np.concatenate(rows, axis=-1), whole, PADDED_SCORES)


def test_positions_in_parts(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget changes rounding only."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    run = partial(attribute_edges, model, base, donor, DIFF, SENDERS, READERS)
    whole = run().effect
    monkeypatch.setattr("hooked_alm.methods.attribution.edges.CHUNK_BYTES", 2**16)
    compare(run().effect, whole)


def test_audio_is_heard(tiny_models: TinyModels) -> None:
    """Only the clip differs: the embedding's messages come from its positions, and reach logits."""
    model = tiny_models.hooked("gqa")
    base = model.encode(**BASE)
    donor = model.encode(**{**BASE, "input_features": OTHER["input_features"]})
    found = attribute_edges(
        model, base, donor, DIFF, "hook_embed", READERS, places=["audio", "text", "all"]
    ).effect[0]
    assert np.abs(found[:, 0]).max() > 1e-2
    assert not found[:, 1].any()
    compare(found[:, 0], found[:, 2])


def test_an_identical_donor_scores_nothing(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    for method in ("eap", "eap-ig"):
        run = partial(
            attribute_edges, model, metric=DIFF, from_nodes=SENDERS, to_nodes=READERS, method=method
        )
        size = np.nanmax(np.abs(run(base, donor).effect))
        assert np.nanmax(np.abs(run(base, model.encode(**BASE)).effect)) < SAME_DONOR * size


def test_checked_edges(tiny_models: TinyModels) -> None:
    """Their exact effects are ``path_patch``'s; what is no edge is never drawn."""
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    ends = ["blocks.*.attn.hook_z[*]"], ["blocks.*.attn.hook_k_input[*]", "blocks.*.hook_mlp_in"]
    for kv, metric in (("group", DIFF), ("query", Logits([5, 9, 3]))):
        options: dict[str, Any] = dict(places=["audio", "readout"], kv=kv)
        found = attribute_edges(model, base, donor, metric, *ends, check=12, seed=1, **options)
        exact = path_patch(model, base, donor, metric, *ends, **options)
        checked = found.checked
        assert checked is not None
        assert checked.scores.shape == (12, 2, *([3] if kv == "query" else []))
        assert {where["place"] for where in checked.coordinates} == {"audio", "readout"}
        for i, where in enumerate(checked.coordinates):
            at = tuple(found.scores.axes[axis].index(tick) for axis, tick in where.items())
            np.testing.assert_array_equal(checked.scores[i], found.effect[at])
            np.testing.assert_allclose(
                checked.exact[i], exact.effect[at], atol=2e-5 * np.abs(exact.base).max(), rtol=0
            )
        assert found.pearson == pytest.approx(
            np.corrcoef(checked.scores.ravel(), checked.exact.ravel())[0, 1]
        )
    few = ["blocks.1.attn.hook_z[0]", "hook_embed"], ["blocks.*.hook_mlp_in"]
    every = attribute_edges(model, base, donor, DIFF, *few, check=99).checked
    assert every is not None
    assert len(every.coordinates) == 3 + 4


def test_a_divergence_is_flat_at_the_base_only(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    run = partial(attribute_edges, model, base, donor, KL(), SENDERS[:2], READERS)
    assert np.nanmax(np.abs(run().effect)) < 1e-5
    assert np.nanmax(np.abs(run(method="eap-ig").effect)) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "method": "eap-ig"}, "at least one step"),
        ({"to_nodes": ["blocks.9.hook_mlp_in"]}, "blocks.9 is not on the way to the text head"),
        ({"from_nodes": ["blocks.0.hook_z[1]"]}, "naming the sender"),
        ({"metric": OnLogits(lambda logits: logits.detach()[:, -1, 5])}, "no gradient"),
    ],
)
def test_refusals(tiny_models: TinyModels, options: dict[str, Any], message: str) -> None:
    model = tiny_models.hooked("gqa")
    base, donor = pair(model)
    given = {"metric": DIFF, "from_nodes": SENDERS, "to_nodes": READERS, **options}
    with pytest.raises(InputError, match=message):
        attribute_edges(model, base, donor, **given)


def test_prompts_of_other_lengths_are_not_interpolated(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    base = model.encode(**BASE)
    donor = model.encode(**hf_inputs([[31], [23]], [9, 4], seed=2))
    run = partial(attribute_edges, model, base, donor, DIFF, SENDERS, READERS, places=["audio"])
    assert np.nanmax(np.abs(run().effect)) > 1e-2
    with pytest.raises(InputError, match="prompts of equal length"):
        run(method="eap-ig", steps=2)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_gradients_through_a_norm_are_autograds(kind: Any) -> None:
    torch.manual_seed(0)
    norm = kind(13, 1e-3)
    stream = (torch.randn(5, 13) + 2).requires_grad_()
    slopes = torch.randn(3, 5, 13)
    normalized = norm.normalize(stream)
    expected = torch.stack(
        [torch.autograd.grad(normalized, stream, one, retain_graph=True)[0] for one in slopes]
    )
    found = _through_norm(norm, stream.detach(), slopes.clone())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
