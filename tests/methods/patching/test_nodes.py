"""Names of nodes, what they stand for, and what path patching refuses."""

from typing import Any

import numpy as np
import pytest
import torch

from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.patching.nodes import Receiver, Sender, receivers, senders
from hooked_alm.methods.patching.paths import _check_modes, all_edges, patch_edges, path_patch
from tiny import N_LAYERS
from tolerances import PATHS
from two_clips import two_clips

LAST = N_LAYERS - 1


@pytest.mark.parametrize(
    ("name", "node", "writes"),
    [
        ("hook_embed", Sender(0, "embed"), -1),
        ("blocks.0.attn.hook_z[5]", Sender(0, "head", 5), 0),
        ("blocks.2.attn.hook_result[0]", Sender(2, "head", 0), 6),
        ("blocks.2.attn.hook_z", Sender(2, "attn"), 6),
        ("blocks.3.hook_attn_out", Sender(3, "attn"), 9),
        ("blocks.0.hook_mlp_out", Sender(0, "mlp"), 2),
        ("blocks.1.mlp.hook_post", Sender(1, "mlp"), 5),
        ("blocks.3.mlp.hook_post[33]", Sender(3, "neuron", 33), 11),
    ],
)
def test_senders(gqa: HookedALM, name: str, node: Sender, writes: int) -> None:
    (found,) = senders(gqa, name)
    assert (found, found.name, found.writes) == (node, name, writes)


@pytest.mark.parametrize(
    ("names", "node", "reads"),
    [
        (("blocks.2.{}[5]", "hook_q_input"), Receiver(2, "q", 5), 6),
        (("blocks.0.{}[1]", "hook_k_input"), Receiver(0, "k", 1), 0),
        (("blocks.3.{}[0]", "hook_v_input"), Receiver(3, "v", 0), 9),
        (("blocks.1.{}", "hook_mlp_in"), Receiver(1, "mlp"), 5),
        (("blocks.1.{}", "hook_resid_pre"), Receiver(1, "resid_pre"), 3),
        (("blocks.1.{}", "hook_resid_mid"), Receiver(1, "resid_mid"), 4),
        (("blocks.1.{}", "hook_resid_post"), Receiver(1, "resid_post"), 6),
    ],
)
def test_receivers(gqa: HookedALM, names: tuple[str, str], node: Receiver, reads: int) -> None:
    """Split inputs by HookedTransformer's name, by TransformerLens 4's, and as q, k, v."""
    pattern, point = names
    points = [point]
    if point.endswith("_input"):
        points += [f"attn.{point}", f"attn.{point.removesuffix('_input')}"]
    for one in points:
        name = pattern.format(one)
        (found,) = receivers(gqa, name)
        assert (found, found.name, found.reads) == (node, name, reads)


def test_the_logits_are_the_last_stream(gqa: HookedALM) -> None:
    (found,) = receivers(gqa, "logits")
    assert found == receivers(gqa, f"blocks.{LAST}.hook_resid_post")[0]
    assert (found.name, found.reads) == ("logits", 3 * N_LAYERS)


def test_wildcards(any_model: HookedALM) -> None:
    """Layers, heads and neurons in order; k and v have the heads the model shows."""
    cfg = any_model.cfg
    heads = senders(any_model, "blocks.*.attn.hook_z[*]")
    assert [n.name for n in heads] == [
        f"blocks.{b}.attn.hook_z[{h}]" for b in range(N_LAYERS) for h in range(cfg.n_heads)
    ]
    assert [n.unit for n in senders(any_model, "blocks.1.mlp.hook_post[*]")] == list(range(34))
    assert [n.layer for n in senders(any_model, "blocks.*.hook_mlp_out")] == list(range(N_LAYERS))
    keys = receivers(any_model, ["blocks.1.attn.hook_k_input[*]", "logits"])
    assert [n.unit for n in keys] == [*range(cfg.n_key_value_heads), None]
    queries = receivers(any_model, "blocks.*.hook_q_input[2]")
    assert [(n.layer, n.unit) for n in queries] == [(b, 2) for b in range(N_LAYERS)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.0.hook_z[1]", "expected a hook point.*attn.hook_z"),
        ("blocks.0.attn.hook_zz[1]", "expected a hook point.*attn.hook_z"),
        ("attn.hook_z[1]", "expected a hook point"),
        ("blocks.0.hook_embed", "expected a hook point"),
        ("blocks.0.hook_resid_pre", "A sender is one of hook_embed"),
        ("logits", "A sender is one of"),
        ("blocks.0.attn.hook_z[-1]", "in brackets, a head"),
        ("blocks.0.attn.hook_z[1", "in brackets, a head"),
        ("", "naming the sender ''"),
        ("hook_embed[0]", "no parts to index"),
        ("blocks.0.hook_mlp_out[0]", "no parts to index"),
        ("blocks.0.hook_attn_out[0]", "no parts to index"),
        ("blocks.4.attn.hook_z[0]", "blocks.4 is not on the way"),
        ("blocks.0.attn.hook_z[6]", "got index 6, expected 0 to 5"),
        ("blocks.0.mlp.hook_post[34]", "got index 34, expected 0 to 33"),
    ],
)
def test_senders_that_are_none(gqa: HookedALM, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        senders(gqa, name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.1.attn.hook_z[0]", "A receiver is one of .*logits"),
        ("hook_embed", "A receiver is one of"),
        ("blocks.1.hook_q[0]", "expected a hook point"),
        ("logits[0]", "expected a hook point"),
        ("blocks.1.logits", "expected a hook point"),
        ("hook_mlp_in", "expected a hook point"),
        ("blocks.1.attn.hook_q_input", r"needs a head, as in '\[3\]'"),
        ("blocks.1.hook_mlp_in[0]", "has no heads"),
        ("blocks.1.hook_resid_pre[*]", "has no heads"),
        ("blocks.9.hook_mlp_in", "blocks.9 is not on the way"),
        ("blocks.1.attn.hook_q_input[6]", "got index 6, expected 0 to 5"),
        ("blocks.1.attn.hook_k_input[2]", "got index 2, expected 0 to 1"),
        ("blocks.1.hook_v_input[2]", "got index 2, expected 0 to 1"),
    ],
)
def test_receivers_that_are_none(gqa: HookedALM, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        receivers(gqa, name)


HEAD, QUERY = "blocks.0.attn.hook_z[1]", "blocks.2.attn.hook_q_input[3]"
MLP, NEURON = "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post[3]"
BESIDE_OTHERS = "and others at once: everything behind the residual stream reads it already"
COUNTED_TWICE = r"edges from blocks.{} and from parts of it at once: .* would count twice"


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (("blocks.0.mlp.hook_post[1]", QUERY), {"mode": "ioi"}, "neurons with mode='ioi'"),
        (([(HEAD, "blocks.1.mlp.hook_post[*]")], QUERY), {"mode": "ioi"}, "neurons"),
        ((HEAD, QUERY), {"mode": "ioi", "norm": "frozen"}, "norm='frozen': only single"),
        ((HEAD, "blocks.2.hook_resid_pre"), {"norm": "frozen"}, "only single q, k, v and MLP"),
        ((HEAD, "logits"), {"norm": "frozen"}, "only single q, k, v and MLP"),
        ((HEAD, [(QUERY, "blocks.2.hook_mlp_in")]), {"norm": "frozen"}, "only single"),
        ((HEAD, [(QUERY, "blocks.2.hook_resid_pre")]), {}, BESIDE_OTHERS),
        ((HEAD, [("blocks.*.hook_resid_mid",)]), {}, BESIDE_OTHERS),
        ((HEAD, [("blocks.1.hook_resid_post", "logits")]), {}, BESIDE_OTHERS),
        (([(HEAD, "blocks.0.hook_attn_out")], QUERY), {}, COUNTED_TWICE.format("0.hook_attn_out")),
        (([(HEAD, "blocks.0.attn.hook_z")], QUERY), {"mode": "ioi"}, "would count twice"),
        (([(MLP, NEURON)], QUERY), {}, COUNTED_TWICE.format("1.hook_mlp_out")),
        ((HEAD, "blocks.2.attn.hook_k_input[2]"), {}, "got index 2, expected 0 to 1"),
        ((HEAD, QUERY), {"places": ["nowhere"]}, "nowhere"),
    ],
)
def test_paths_that_are_refused(
    gqa: HookedALM, arguments: tuple[Any, Any], options: dict[str, Any], told: str
) -> None:
    base, donor, *_ = two_clips(gqa)
    with pytest.raises(InputError, match=told):
        path_patch(gqa, base, donor, Logits([5]), *arguments, **options)
    assert not gqa.cfg.ungroup_grouped_query_attention


@pytest.mark.parametrize(("mode", "norm"), [("direct", "exact"), ("edge", "linear")])
def test_modes_that_do_not_exist(mode: str, norm: str) -> None:
    """Below the entry point, whose annotations refuse them first while tests check types."""
    with pytest.raises(InputError, match="expected mode 'edge' or 'ioi' and norm 'exact' or"):
        _check_modes(mode, norm, [], [])


@pytest.mark.parametrize(
    ("edge", "told"),
    [
        ((QUERY, HEAD), "naming the sender"),
        (("blocks.2.attn.hook_z[1]", QUERY), r"hook_z\[1\] -> .*: the receiver comes first"),
        (("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_in"), "the receiver comes first"),
        (("blocks.*.attn.hook_z[1]", QUERY), "names 4 nodes. Name each edge"),
        ((HEAD, "blocks.2.attn.hook_q_input[*]"), "names 6 nodes"),
        ((HEAD, "blocks.2.attn.hook_v_input[2]"), "got index 2, expected 0 to 1"),
    ],
)
def test_edges_that_are_refused(gqa: HookedALM, edge: tuple[str, str], told: str) -> None:
    base, donor, *_ = two_clips(gqa)
    good = ("hook_embed", "logits")
    with pytest.raises(InputError, match=told):
        patch_edges(gqa, base, donor, Logits([5]), {"good": [good], "bad": [good, edge]})


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ([(HEAD, "blocks.2.hook_resid_mid"), (HEAD, "logits")], BESIDE_OTHERS),
        ([(HEAD, "blocks.2.hook_resid_pre"), (MLP, QUERY)], BESIDE_OTHERS),
        ([("blocks.0.hook_attn_out", "logits"), (HEAD, QUERY)], "would count twice"),
        ([(MLP, "logits"), (NEURON, QUERY)], "would count twice"),
        ([(NEURON, "logits"), ("blocks.1.mlp.hook_post", QUERY)], "would count twice"),
    ],
)
def test_edges_that_hold_one_another(
    gqa: HookedALM, edges: list[tuple[str, str]], told: str
) -> None:
    """In one set; each in a set of its own is fine, and so are parts of another block."""
    base, donor, *_ = two_clips(gqa)
    for engine in ("fast", "hooks"):
        with pytest.raises(InputError, match=told):
            patch_edges(gqa, base, donor, Logits([5]), {"fine": [], "bad": edges}, engine=engine)
    found = patch_edges(gqa, base, donor, Logits([5]), {str(i): [e] for i, e in enumerate(edges)})
    assert (np.abs(found.effect) > 1e-5).all()
    others = [("blocks.1.hook_attn_out", "logits"), (HEAD, QUERY), (MLP, "logits"),
              ("blocks.2.mlp.hook_post[3]", "logits")]  # fmt: skip
    assert (patch_edges(gqa, base, donor, Logits([5]), {"parts": others}).effect != 0).all()


def test_donors_of_another_number_and_hooks_on_the_model(gqa: HookedALM) -> None:
    base, donor, *_ = two_clips(gqa, [[10], [10]], [4, 4])
    with pytest.raises(InputError, match="2 base rows with 1 donor"):
        path_patch(gqa, base, donor[0], Logits([5]), HEAD, QUERY)
    with gqa.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]):
        with pytest.raises(InputError, match="hooks are attached"):
            patch_edges(gqa, base, donor, Logits([5]), {"one": [(HEAD, QUERY)]})


@torch.no_grad()
def test_spellings_and_axes(gqa: HookedALM) -> None:
    """Two names of a receiver are one receiver; ticks are as they were written."""
    base, donor, *_ = two_clips(gqa)
    names = [f"blocks.2.{at}[1]" for at in ("attn.hook_k_input", "hook_k_input", "attn.hook_k")]
    result = "blocks.0.attn.hook_result[1]"
    found = path_patch(gqa, base, donor, Logits([5, 6]), [HEAD, result], names, places=["all"])
    assert dict(found.axes) == {
        "sender": (HEAD, result), "receiver": tuple(names), "place": ("all",), "example": (0,),
        "label": (0, 1),
    }  # fmt: skip
    assert np.abs(found.values - found.values[:1, :1]).max() <= PATHS[torch.float32]
    assert (found.values[0, 0] != found.base).all()
    assert (found.site, found.mode, found.engine) == ("path", "edge", "fast")
    assert found.select(sender=HEAD, receiver=names[0], place="all").values.shape == (1, 2)
    per_head = path_patch(
        gqa, base, donor, Logits([5]), HEAD, "blocks.2.hook_k_input[*]", kv="query"
    )
    assert len(per_head.axes["receiver"]) == gqa.cfg.n_heads
    assert patch_edges(gqa, base, donor, Logits([5]), {"a": all_edges(gqa)[:1]}).site == "edges"
