"""Path patching against Hugging Face under PyTorch hooks, TransformerLens, and its own algebra."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import patching

import path_reference as reference
from hooked_alm import HookedALM
from hooked_alm.methods.patching.metrics import LogitDiff, Logits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_edges, path_patch
from path_cases import (
    BASE,
    DONOR,
    ENGINES,
    IDS,
    LONGER,
    READOUT,
    Case,
    assert_close,
    audio_case,
    name_of,
    qwen3_case,
)
from path_reference import EMBED, Node, receiver_name, sender_name
from tiny import TinyModels, hf_inputs
from tolerances import PATHS
from two_clips import metric, two_clips


@pytest.fixture(scope="session")
def text_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return qwen3_case(tmp_path_factory.mktemp("text"))


def of_kind(tiny_models: TinyModels, text_case: Case, kind: str) -> Case:
    return text_case if kind == "qwen3" else audio_case(tiny_models, kind)


KINDS = ["gqa", "mha", "qwen3"]
SENDERS: list[Node] = [EMBED, ("head", 0, 5), ("attn", 1, None), ("mlp", 0, None),
                       ("neuron", 1, 7)]  # fmt: skip
LAST: Node = ("resid_post", -1, None)


def some_receivers(n_layers: int, last_kv: int) -> list[Node]:
    """One of each kind, early and late."""
    last = n_layers - 1
    return [
        ("mlp", 0, None), ("q", 1, 4), ("resid_pre", 1, None), ("resid_mid", 1, None),
        ("k", 2, 0), ("v", 2, last_kv), ("mlp", last, None), ("q", last, 0), ("v", last, 0),
        ("resid_post", 1, None), ("resid_post", last, None),
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("mode", ["edge", "ioi"])
@pytest.mark.parametrize("kv", ["group", "query"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_hugging_face(
    tiny_models: TinyModels, text_case: Case, kind: str, kv: Any, mode: Any
) -> None:
    """Every kind of sender and receiver, padded rows, both engines, at every position."""
    case = of_kind(tiny_models, text_case, kind)
    if kv == "query" and kind == "mha":
        pytest.skip("every head has its own keys and values")
    n_kv = case.model.cfg.n_heads if kv == "query" else case.model.cfg.n_key_value_heads
    hf = reference.ungrouped(case.hf) if kv == "query" else case.hf
    receivers = some_receivers(case.model.cfg.n_layers, n_kv - 1)
    senders = [s for s in SENDERS if mode == "edge" or s[0] != "neuron"]
    if kv == "query":
        receivers, senders = [r for r in receivers if r[0] in ("k", "v")], senders[:2]
    places = ["readout", 6 if kind == "qwen3" else "audio", "all"]
    arguments = (
        [sender_name(s) for s in senders],
        [name_of(case, r) for r in receivers],
    )
    readout, everywhere = case.at_readout, case.every_logit
    found = [
        (of, at, path_patch(
            case.model, case.base, case.donor, of, *arguments,
            mode=mode, kv=kv, places=at, engine=engine,
        ).values)
        for engine, of, at in (
            ("fast", readout, places[:2]), ("fast", everywhere, places[1:]),
            ("hooks", everywhere, places[1:2]),
        )
    ]  # fmt: skip
    moved, pair, unpatched = 0, (case.hf_base, case.hf_donor), case.hf(**case.hf_base).logits
    for (i, s), (j, r) in product(*map(enumerate, (senders, receivers))):
        place = places[(i + j) % 3]
        cells = [(of, values[i, j, at.index(place)]) for of, at, values in found if place in at]
        if not reference.comes_before(s, r):
            assert all(np.isnan(cell).all() for _, cell in cells)
            continue
        # Two of three pairs on every kind of model, and each pair on two kinds.
        if kv == "group" and (i + 2 * j + KINDS.index(kind)) % 3 == 0:
            continue
        logits = (
            reference.edge_patched(hf, *pair, [(s, r)], case.where(place))
            if mode == "edge"
            else reference.ioi_patched(hf, *pair, [s], [r], case.where(place))
        )
        moved += int(not torch.equal(logits, unpatched))
        for of, cell in cells:
            assert_close(cell, case.measured(logits, of), (s, r, place))
    assert moved > len(senders) * 2


@torch.no_grad()
@pytest.mark.parametrize("mode", ["edge", "ioi"])
def test_places_that_lie_elsewhere_in_the_donor(tiny_models: TinyModels, mode: Any) -> None:
    """Messages are the donor's at the aligned positions."""
    case = audio_case(tiny_models, "gqa", LONGER)
    pairs: list[tuple[Node, Node]] = [
        (EMBED, ("k", 1, 1)), (("head", 0, 2), ("mlp", 2, None)), (("mlp", 1, None), ("v", 2, 0)),
    ]  # fmt: skip
    for s, r in pairs:
        for place in ("audio", "readout"):
            found = path_patch(
                case.model, case.base, case.donor, READOUT, sender_name(s), receiver_name(r),
                mode=mode, places=[place],
            )  # fmt: skip
            at, both = case.where(place), (case.hf_base, case.hf_donor)
            expected = (
                reference.edge_patched(case.hf, *both, [(s, r)], at)
                if mode == "edge"
                else reference.ioi_patched(case.hf, *both, [s], [r], at)
            )
            assert_close(found.values[0, 0, 0], expected[:, -1, IDS], (s, r, place))


SETS: list[tuple[list[Node], list[Node]]] = [
    # Two senders into one receiver; the norm sees both.
    ([EMBED, ("head", 1, 3)], [("q", 2, 1)]),
    # Receivers of several blocks, the later behind the earlier.
    ([EMBED], [("k", 0, 1), ("q", 1, 4), ("mlp", 1, None), ("v", 2, 0), LAST]),
    # Senders between the receivers, whose messages change with the earlier ones.
    (
        [EMBED, ("head", 1, 4), ("attn", 2, None), ("mlp", 1, None), ("mlp", 2, None)],
        [("mlp", 0, None), ("mlp", 1, None), ("q", 2, 4), ("mlp", 2, None), LAST],
    ),
    # Heads of a block at once, and a sender too late for some of the receivers.
    (
        [("head", 0, 0), ("head", 0, 5), ("mlp", 2, None)],
        [("q", 1, 0), ("q", 1, 2), ("k", 1, 0), ("v", 1, 1), LAST],
    ),
    # Senders that come before the first receiver and after the last.
    ([("attn", 0, None), ("neuron", 0, 3)], [("v", 1, 0), ("mlp", 1, None)]),
]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["edge", "ioi"])
@pytest.mark.parametrize("kind", KINDS)
def test_sets_equal_hugging_face(
    tiny_models: TinyModels, text_case: Case, kind: str, mode: Any
) -> None:
    """Tuples of names are patched in one run, later receivers behind the earlier ones."""
    case = of_kind(tiny_models, text_case, kind)
    places = ["all", 6 if kind == "qwen3" else "audio", "readout"]
    last: Node = ("resid_post", case.model.cfg.n_layers - 1, None)
    of_both = (case.at_readout, case.every_logit)
    for i, (senders, receivers) in enumerate(SETS):
        # Every set meets every place, on one kind of model each.
        at = places[(i + KINDS.index(kind)) % 3]
        if mode == "ioi":
            senders = [s for s in senders if s[0] != "neuron"]
        receivers = [last if r == LAST else r for r in receivers]
        where, both = case.where(at), (case.hf_base, case.hf_donor)
        edges = [(s, r) for s in senders for r in receivers if reference.comes_before(s, r)]
        logits = (
            reference.edge_patched(case.hf, *both, edges, where)
            if mode == "edge"
            else reference.ioi_patched(case.hf, *both, senders, receivers, where)
        )
        names = (
            [tuple(map(sender_name, senders))],
            [tuple(name_of(case, r) for r in receivers)],
        )
        ways = [("fast", of_both[0]), ("fast", of_both[1]), ("hooks", of_both[i % 2])]
        for engine, of in ways:
            found = path_patch(
                case.model, case.base, case.donor, of, *names,
                mode=mode, places=[at], engine=engine,
            )  # fmt: skip
            assert_close(found.values[0, 0, 0], case.measured(logits, of), (names, at))
            singles = (one[0][0] if len(one[0]) == 1 else one[0] for one in names)
            assert [found.axes["sender"][0], found.axes["receiver"][0]] == list(singles)


@torch.no_grad()
@pytest.mark.parametrize("place", ["all", "audio"])
def test_neurons_of_an_mlp_that_receives(tiny_models: TinyModels, place: str) -> None:
    """What they write is looked at after the MLP has read its message; together they are it."""
    case = audio_case(tiny_models, "gqa")
    into: tuple[Node, Node] = (EMBED, ("mlp", 1, None))
    last: Node = ("resid_post", case.model.cfg.n_layers - 1, None)
    neurons: list[Node] = [("neuron", 1, j) for j in range(case.model.cfg.d_mlp)]
    sets: dict[str, list[tuple[Node, Node]]] = {
        "neurons": [into, *((neuron, last) for neuron in neurons)],
        "whole": [into, (("mlp", 1, None), last)],
        "some": [into, *((neuron, last) for neuron in neurons[3:9])],
    }
    named = {
        key: [(sender_name(s), name_of(case, r)) for s, r in edges] for key, edges in sets.items()
    }
    of, both = case.every_logit, (case.hf_base, case.hf_donor)
    for engine in ENGINES:
        found = patch_edges(
            case.model, case.base, case.donor, of, named, places=[place], engine=engine
        )
        assert_close(found.values[0], torch.from_numpy(found.values[1]))
        for i, edges in enumerate(sets.values()):
            logits = reference.edge_patched(case.hf, *both, edges, case.where(place))
            assert_close(found.values[i, 0], of.function(logits), i)
    alone = patch_edges(case.model, case.base, case.donor, of, {"into": named["whole"][:1]})
    assert np.abs(alone.effect).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_random_halves_of_all_edges(tiny_models: TinyModels, text_case: Case, kind: str) -> None:
    """ACDC's edge ablation, written as hooks: every message is what the run has made so far."""
    case = of_kind(tiny_models, text_case, kind)
    edges = reference.all_edges(case.hf)
    names = {edge: (sender_name(edge[0]), name_of(case, edge[1])) for edge in edges}
    assert sorted(names.values()) == sorted(all_edges(case.model))
    generator = np.random.default_rng(0)
    sets = {str(share): [e for e in edges if generator.random() < share] for share in (0.02, 0.6)}
    named = {share: [names[e] for e in some] for share, some in sets.items()}
    of = case.every_logit
    for place in ("all",) if kind == "mha" else (6 if kind == "qwen3" else "audio",):
        found = {
            engine: patch_edges(
                case.model, case.base, case.donor, of, named, places=[place], engine=engine
            )
            for engine in ENGINES
        }
        for i, some in enumerate(sets.values()):
            logits = reference.edge_patched(
                case.hf, case.hf_base, case.hf_donor, some, case.where(place)
            )
            for result in found.values():
                assert_close(result.values[i, 0], of.function(logits), (place, i))
        assert found["fast"].axes["edges"] == ("0.02", "0.6")
    # The order in which the edges come does not matter.
    shuffled = {k: [v[i] for i in generator.permutation(len(v))] for k, v in named.items()}
    again = patch_edges(case.model, case.base, case.donor, of, shuffled, places=[place])
    assert_close(again.values, torch.from_numpy(found["fast"].values))


@torch.no_grad()
def test_an_edge_given_twice_is_one_edge(gqa: HookedALM) -> None:
    """Also under its other spelling."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    edge = ("blocks.0.attn.hook_z[1]", "blocks.1.attn.hook_q_input[0]")
    alias = ("blocks.0.attn.hook_result[1]", "blocks.1.hook_q_input[0]")
    sets = {"once": [edge], "twice": [edge, edge], "spelt": [edge, alias]}
    found = patch_edges(gqa, base, donor, READOUT, sets)
    both = [(edge[0], alias[0])]
    joint = path_patch(gqa, base, donor, READOUT, both, [(edge[1], alias[1])], places=["all"])
    once = torch.from_numpy(found.values[0])
    for other in (found.values[1], found.values[2], joint.values[0, 0]):
        assert_close(other, once)
    assert np.abs(found.effect).max() > 1e-3


@torch.no_grad()
def test_every_edge_is_the_donor_and_none_is_the_base(any_model: HookedALM) -> None:
    """A donor that differs in text and clip."""
    base, donor = any_model.encode(**BASE), any_model.encode(**DONOR)
    edges = all_edges(any_model)
    cfg = any_model.cfg
    readers = cfg.n_heads + 2 * cfg.n_key_value_heads
    writers = [1 + layer * (cfg.n_heads + 1) for layer in range(cfg.n_layers)]
    assert len(edges) == len(set(edges))
    assert len(edges) == sum(
        n * readers + n + cfg.n_heads for n in writers
    ) + 1 + cfg.n_layers * (cfg.n_heads + 1)  # fmt: skip
    for engine in ENGINES:
        found = patch_edges(
            any_model, base, donor, READOUT, {"all": edges, "none": []}, engine=engine
        )
        assert_close(found.values[0, 0], torch.from_numpy(found.donor))
        assert np.array_equal(found.values[1, 0], found.base)
        assert np.abs(found.total_effect).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("place", ["all", "audio", "readout"])
def test_all_outgoing_edges_are_the_node(any_model: HookedALM, place: str) -> None:
    """I20: for heads, an MLP, and the embedding, everything behind them recomputed."""
    base, donor = any_model.encode(**BASE), any_model.encode(**DONOR)
    edges = all_edges(any_model)
    nodes: dict[str, tuple[str, int, int | None]] = {
        "hook_embed": ("resid_pre", 0, None),
        "blocks.0.attn.hook_z[1]": ("z", 0, 1),
        "blocks.2.attn.hook_z[5]": ("z", 2, 5),
        "blocks.0.hook_mlp_out": ("mlp_out", 0, None),
        "blocks.3.hook_mlp_out": ("mlp_out", 3, None),
    }
    sets = {name: [e for e in edges if e[0] == name] for name in nodes}
    # The plain engine at one place only: it is slow.
    for engine in ENGINES if place == "audio" else ENGINES[:1]:
        found = patch_edges(any_model, base, donor, READOUT, sets, places=[place], engine=engine)
        for i, (site, layer, head) in enumerate(nodes.values()):
            node = patch(
                any_model, base, donor, READOUT, site=site, layers=[layer],
                heads=None if head is None else [head], places=[place], engine="hooks",
            )  # fmt: skip
            assert_close(found.values[i, 0], torch.from_numpy(node.values).flatten(0, -3), site)
            assert np.abs(node.effect).max() > 1e-3 or place != "readout"


@torch.no_grad()
def test_all_edges_into_a_reader_replace_its_input(any_model: HookedALM) -> None:
    """By a hook on the reader's own input; in ``patch_edges`` and as one set of senders."""
    base, donor = any_model.encode(**BASE), any_model.encode(**DONOR)
    real = base.attention_mask.bool()
    last_kv = any_model.cfg.n_key_value_heads - 1
    readers = {
        "blocks.2.attn.hook_q_input[4]": ("blocks.2.hook_q_input", 4),
        f"blocks.1.attn.hook_k_input[{last_kv}]": ("blocks.1.hook_k_input", last_kv),
        "blocks.3.attn.hook_v_input[0]": ("blocks.3.hook_v_input", 0),
        "blocks.2.hook_mlp_in": ("blocks.2.hook_mlp_in", None),
        "logits": ("blocks.3.hook_resid_post", None),
    }
    edges = all_edges(any_model)
    sets = {name: [e for e in edges if e[1] == name] for name in readers}
    found = patch_edges(any_model, base, donor, READOUT, sets)
    for i, (name, (point, head)) in enumerate(readers.items()):
        _, cache = any_model.run_with_cache(donor, names_filter=[point])

        def write(
            value: Tensor, hook: object, theirs: Tensor = cache[point], head: Any = head
        ) -> Tensor:
            value = value.clone()
            at = (real, slice(None) if head is None else head)
            value[at] = theirs[at]
            return value

        expected = any_model.run_with_hooks(base, fwd_hooks=[(point, write)])[:, -1, IDS]
        assert_close(found.values[i, 0], expected, name)
        senders = tuple(sender for sender, _ in sets[name])
        as_set = path_patch(
            any_model, base, donor, READOUT, [senders], name, places=["all"]
        )  # fmt: skip
        assert_close(as_set.values[0, 0, 0], expected, name)


@torch.no_grad()
@pytest.mark.parametrize("engine", ENGINES)
def test_ioi_from_everything_is_the_donor(any_model: HookedALM, engine: Any) -> None:
    """Embedding, heads and MLPs, or heads of a block as its attention, into the last stream."""
    base, donor = any_model.encode(**BASE), any_model.encode(**DONOR)
    layers = range(any_model.cfg.n_layers)
    heads = [f"blocks.{b}.attn.hook_z[{h}]" for b in layers for h in range(any_model.cfg.n_heads)]
    mlps = [f"blocks.{b}.hook_mlp_out" for b in layers]
    attention = [f"blocks.{b}.hook_attn_out" for b in layers]
    found = path_patch(
        any_model, base, donor, READOUT,
        [("hook_embed", *heads, *mlps), ("hook_embed", *heads), ("hook_embed", *attention)],
        "logits", mode="ioi", places=["all", "readout"], engine=engine,
    )  # fmt: skip
    # MLPs are functions of what is sent, so they need not be sent themselves.
    for cell in found.values.reshape(-1, *found.donor.shape):
        assert_close(cell, torch.from_numpy(found.donor))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["edge", "ioi"])
def test_a_group_is_its_query_heads_together(gqa: HookedALM, mode: Any) -> None:
    """For k and v; alone they are smaller."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    for part, senders in product("kv", ("hook_embed", "blocks.0.attn.hook_z[2]")):
        of = (gqa, base, donor, READOUT, senders)
        for group in (0, 1):
            at = [f"blocks.2.attn.hook_{part}_input[{head}]" for head in range(3)]
            together = [tuple(f"blocks.2.hook_{part}_input[{3 * group + i}]" for i in range(3))]
            one = path_patch(*of, at[group], mode=mode, places=["all"])
            joint = path_patch(*of, together, mode=mode, places=["all"], kv="query")
            assert_close(joint.values, torch.from_numpy(one.values))
            each = path_patch(*of, list(together[0]), mode=mode, places=["all"], kv="query")
            for i in range(3):
                apart = np.abs(each.values[:, i] - one.values[:, 0]).max()
                assert apart > 5 * PATHS[torch.float32]
    edges = {"group": [("hook_embed", "blocks.2.attn.hook_k_input[1]")]}
    heads = {"heads": [("hook_embed", f"blocks.2.attn.hook_k_input[{h}]") for h in (3, 4, 5)]}
    one = patch_edges(gqa, base, donor, READOUT, edges)
    joint = patch_edges(gqa, base, donor, READOUT, heads, kv="query")
    assert_close(joint.values, torch.from_numpy(one.values))
    assert not gqa.cfg.ungroup_grouped_query_attention


@torch.no_grad()
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("engine", ENGINES)
def test_edges_are_the_direct_paths_of_transformerlens(
    any_model: HookedALM, heads: str, part: Any, engine: Any
) -> None:
    """From every head of a block to every later head, at all positions."""
    if heads == "gqa" and part != "q":
        pytest.skip("TransformerLens refuses grouped keys and values")
    base, donor, *_ = two_clips(any_model)
    caches = any_model.run_with_cache(donor)[1], any_model.run_with_cache(base)[1]
    n_heads = any_model.cfg.n_heads
    sources = range(n_heads) if engine == "fast" else [1]
    found = path_patch(
        any_model, base, donor, Logits([5]),
        [f"blocks.1.attn.hook_z[{head}]" for head in sources],
        f"blocks.*.attn.hook_{part}_input[*]", places=["all"], engine=engine,
    )  # fmt: skip
    values = found.values.reshape(len(sources), any_model.cfg.n_layers, n_heads)
    assert np.isnan(values[:, :2]).all()
    for i, head in enumerate(sources):
        expected = patching.get_act_patch_direct_path(
            any_model, base, *caches, metric, 1, head, part, verbose=False
        )
        assert_close(values[i, 2:], expected[2:], head)
    assert np.abs(found.effect[~np.isnan(found.effect)]).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norm_is_the_linearised_edge(
    tiny_models: TinyModels, text_case: Case, kind: str
) -> None:
    """The delta over the base's norm, by hand; another number than the exact edge."""
    case = of_kind(tiny_models, text_case, kind)
    pairs: list[tuple[Node, Node]] = [
        (("head", 0, 2), ("q", 1, 4)), (EMBED, ("k", 2, 0)), (EMBED, ("v", 1, 1)),
        (("mlp", 0, None), ("mlp", 1, None)), (("neuron", 0, 4), ("q", 2, 0)),
    ]  # fmt: skip
    of = case.every_logit
    for (s, r), engine in product(pairs, ENGINES):
        arguments = (case.model, case.base, case.donor, of, sender_name(s), receiver_name(r))
        found = path_patch(*arguments, norm="frozen", places=["all"], engine=engine)
        at = case.where("all")
        logits = reference.edge_patched(
            case.hf, case.hf_base, case.hf_donor, [(s, r)], at, frozen_norm=True
        )
        assert_close(found.values[0, 0, 0], of.function(logits), (s, r))
        exact = path_patch(*arguments, places=["all"], engine=engine)
        # Qwen3 normalises q and k once more, which makes up for any scale.
        if s[0] != "neuron" and (kind != "qwen3" or r[0] not in ("q", "k")):
            assert np.abs(exact.values - found.values).max() > 5 * PATHS[torch.float32]


@torch.no_grad()
def test_modes_and_norms_are_different_quantities(gqa: HookedALM) -> None:
    """Head-to-head q edges at the readout: tens of percent between them, and signs flip."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    arguments = (
        gqa, base, donor, LogitDiff(5, 77),
        "blocks.0.attn.hook_z[*]", ["blocks.2.attn.hook_q_input[*]", "blocks.3.hook_q_input[*]"],
    )  # fmt: skip
    edge = path_patch(*arguments, places=["all"])
    ioi = path_patch(*arguments, places=["all"], mode="ioi")
    frozen = path_patch(*arguments, places=["all"], norm="frozen")
    assert (edge.mode, ioi.mode) == ("edge", "ioi")

    def apart(other: Any) -> float:
        return float(np.median(np.abs(other.effect - edge.effect) / np.abs(edge.effect)))

    assert apart(ioi) > 0.2
    assert apart(frozen) > 0.02
    assert (np.sign(ioi.effect) != np.sign(edge.effect)).any()


@torch.no_grad()
def test_receivers_before_their_senders(gqa: HookedALM) -> None:
    """No number, in the table and in a set without any edge; a block's MLP reads its heads."""
    base, donor, *_ = two_clips(gqa)
    senders = ["blocks.1.attn.hook_z[0]", "blocks.1.hook_mlp_out", "hook_embed"]
    readers = [
        "blocks.0.hook_mlp_in", "blocks.1.attn.hook_q_input[0]", "blocks.1.hook_resid_pre",
        "blocks.1.hook_mlp_in", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post",
        "blocks.2.attn.hook_v_input[1]", "logits",
    ]  # fmt: skip
    for mode, engine in product(("edge", "ioi"), ENGINES):
        found = path_patch(gqa, base, donor, READOUT, senders, readers, mode=mode, engine=engine)
        undefined = np.isnan(found.values).all(axis=(2, 3, 4))
        assert np.array_equal(undefined, np.isnan(found.values).any(axis=(2, 3, 4)))
        assert undefined.astype(int).tolist() == [
            [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [0] * 8
        ]  # fmt: skip
    assert len(found.to_dataframe()) == found.values.size
    # An empty set of edges is no patch, and no path at all is none either.
    none = path_patch(gqa, base, donor, READOUT, [tuple(senders[:2])], [tuple(readers[:2])])
    assert np.isnan(none.values).all()


@torch.no_grad()
def test_results_do_not_depend_on_memory(gqa: HookedALM) -> None:
    """One cell at a time, online messages among them."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    edges = all_edges(gqa)
    arguments = (gqa, base, donor, READOUT, {str(i): edges[i::23] for i in range(3)})
    whole = patch_edges(*arguments, places=["all", "readout"])
    found = patch_edges(*arguments, places=["all", "readout"], max_bytes=1)
    assert_close(found.values, torch.from_numpy(whole.values))


@pytest.fixture
def mlp_rows(gqa: HookedALM) -> Iterator[Callable[[], int]]:
    """Rows that MLPs have computed since the last call, over all blocks."""
    counted: list[int] = []
    handles = [
        block.mlp.gate_proj.register_forward_hook(
            lambda _, args, out: counted.append(out[..., 0].numel())
        )
        for block in gqa.blocks
    ]

    def taken() -> int:
        total = sum(counted)
        counted.clear()
        return total

    yield taken
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_edges_at_the_readout_cost_a_few_rows(gqa: HookedALM, mlp_rows: Callable[[], int]) -> None:
    """All head-to-head q edges: one row per block behind each, and two whole runs."""
    long = [gqa.encode(**hf_inputs([[90]], [6], seed=seed)) for seed in (1, 2)]
    arguments = (gqa, *long, READOUT, "blocks.*.attn.hook_z[*]")
    n_layers, n_heads, n_pos = gqa.cfg.n_layers, gqa.cfg.n_heads, long[0].shape[1]
    assert n_pos > 20
    every_q = "blocks.*.attn.hook_q_input[*]"
    found = path_patch(*arguments, every_q)
    n_cells = n_heads**2 * n_layers * (n_layers - 1) // 2
    assert (~np.isnan(found.values)).sum() == n_cells * len(IDS)
    runs = 2 * n_layers * n_pos
    # A cell into block b changes one row there and in every block behind it.
    behind = sum(b * (n_layers - b) for b in range(n_layers)) * n_heads**2
    assert mlp_rows() == runs + behind
    # The paths through MLPs take a row per sender and block besides, once for all receivers.
    path_patch(*arguments, every_q, mode="ioi")
    assert mlp_rows() == runs + behind + n_heads * sum(range(n_layers))
    # The plain loop runs everything for every cell.
    plain = path_patch(*arguments, "blocks.3.attn.hook_q_input[0]", engine="hooks")
    assert mlp_rows() >= runs + (n_layers - 1) * n_heads * n_layers * n_pos
    last = found.select(receiver="blocks.3.attn.hook_q_input[0]").values
    assert np.nanmax(np.abs(last - plain.values[:, 0])) <= PATHS[torch.float32]
