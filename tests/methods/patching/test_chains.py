"""Chains of more than two nodes, against Hugging Face under PyTorch hooks, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

import path_reference as reference
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.patching.paths import patch_chains, path_patch
from path_cases import (
    BASE,
    DONOR,
    ENGINES,
    LONGER,
    READOUT,
    Case,
    assert_close,
    audio_case,
    name_of,
    qwen3_case,
)
from path_reference import EMBED, Node, sender_name
from tiny import TinyModels
from tolerances import PATHS
from two_clips import two_clips

LAST: Node = ("resid_post", -1, None)
MLP_0: Node = ("mlp", 0, None)
HEAD_0: Node = ("head", 0, 3)
CHAINS: list[list[Node]] = [
    [HEAD_0, ("q", 1, 4), LAST],
    [HEAD_0, ("k", 1, 1), LAST],
    [HEAD_0, ("v", 1, 0), ("mlp", 1, None)],
    [EMBED, ("mlp", 0, None), ("q", 2, 0)],
    [("attn", 0, None), ("v", 1, 1), ("k", 2, 1)],
    [("neuron", 0, 7), ("mlp", 1, None), ("resid_pre", 2, None)],
    [EMBED, ("k", 0, 0), ("resid_mid", 1, None)],
    # Into the MLP of the block that the heads are in.
    [EMBED, ("q", 1, 2), ("mlp", 1, None), LAST],
    [MLP_0, ("v", 1, 1), ("v", 2, 0), LAST],
    [HEAD_0, ("mlp", 0, None), ("k", 1, 0), ("v", 2, 1)],
    [MLP_0, ("k", 1, 1), ("q", 2, 5), ("mlp", 2, None)],
    [EMBED, ("v", 0, 0), ("mlp", 1, None), ("q", 2, 3), ("resid_post", 2, None)],
]


@pytest.fixture(scope="session")
def text_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return qwen3_case(tmp_path_factory.mktemp("text"))


def names_of(case: Case, chain: list[Node]) -> tuple[str, ...]:
    return (sender_name(chain[0]), *(name_of(case, r) for r in chain[1:]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "place"),
    [("gqa", "all"), ("gqa", "audio"), ("gqa", "readout"), ("mha", "audio"), ("qwen3", 6),
     ("qwen3", "all"), ("longer", "audio")],
)  # fmt: skip
def test_equal_to_hugging_face(
    tiny_models: TinyModels, text_case: Case, kind: str, place: Any
) -> None:
    """Every kind of relay and of end, three to five nodes, padded rows, both engines."""
    if kind == "qwen3":
        case = text_case
    elif kind == "longer":
        case = audio_case(tiny_models, "gqa", LONGER)
    else:
        case = audio_case(tiny_models, kind)
    end: Node = ("resid_post", case.model.cfg.n_layers - 1, None)
    chains = [[end if node == LAST else node for node in chain] for chain in CHAINS]
    names = [names_of(case, chain) for chain in chains]
    of = case.every_logit
    found = [
        (metric, patch_chains(
            case.model, case.base, case.donor, metric, names, place=place, engine=engine
        ))
        for engine, metric in (("fast", of), ("hooks", of), ("fast", case.at_readout))
    ]  # fmt: skip
    first = found[0][1]
    assert first.axes["chain"] == tuple(names)
    assert (first.site, first.mode, first.engine) == ("chain", "edge", "fast")
    at = case.where(place)
    for i, chain in enumerate(chains):
        logits, messages = reference.chain_patched(case.hf, case.hf_base, case.hf_donor, chain, at)
        for metric, result in found:
            assert_close(result.values[i], case.measured(logits, metric), (chain, place))
        if place in ("all", "readout"):
            continue
        # Keys and values are heard at positions behind the place, queries and MLPs in it.
        heard = [(message.abs().amax(-1) > 0).sum(-1) for message in messages]
        for node, before, after in zip(chain[1:], heard[:-1], heard[1:], strict=False):
            if node[0] in "kv" and 0 < before.min() and before.max() <= len(at[0][0]):
                assert (after > before).all()
            assert (after <= before).all() or node[0] in "kv"
    moved = np.abs(first.effect).reshape(len(chains), -1).max(axis=1) > 10 * PATHS[torch.float32]
    assert moved.mean() > 0.6


@torch.no_grad()
@pytest.mark.parametrize("engine", ENGINES)
def test_a_relay_that_hears_nothing_says_nothing(gqa: HookedALM, engine: Any) -> None:
    """The text in front of the clip is the same in base and donor; the clip is not."""
    base, donor, *_ = two_clips(gqa)
    relays = ["blocks.1.attn.hook_q_input[1]", "blocks.1.attn.hook_k_input[0]",
              "blocks.1.attn.hook_v_input[1]", "blocks.1.hook_mlp_in"]  # fmt: skip
    chains = [("hook_embed", relay, "blocks.2.hook_mlp_in", "logits") for relay in relays]
    chains += [("blocks.0.attn.hook_z[2]", relay, "logits") for relay in relays]
    of = READOUT
    quiet = patch_chains(gqa, base, donor, of, chains, place=1, engine=engine)
    assert np.abs(quiet.effect).max() <= PATHS[torch.float32]
    loud = patch_chains(gqa, base, donor, of, chains, place="audio", engine=engine)
    reaches = np.abs(loud.effect).max(axis=(1, 2)) > 20 * PATHS[torch.float32]
    # The readout hears of the clip through keys and values only.
    assert reaches.tolist() == [False, True, True, False] * 2


@torch.no_grad()
def test_a_chain_is_not_the_edges_it_is_made_of(gqa: HookedALM) -> None:
    """The sender's direct message is left out, and the order of chains does not matter."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    sender, relay = "blocks.0.attn.hook_z[3]", "blocks.1.hook_mlp_in"
    chains = [(sender, relay, "logits"), (sender, relay, "blocks.2.hook_mlp_in")]
    found = patch_chains(gqa, base, donor, READOUT, chains, place="all")
    again = patch_chains(gqa, base, donor, READOUT, chains[::-1], place="all", max_bytes=1)
    assert_close(again.values[::-1], torch.from_numpy(found.values))
    edges = path_patch(gqa, base, donor, READOUT, sender, [relay, "logits"], places=["all"])
    for i in range(2):
        assert np.abs(found.effect[0] - edges.effect[0, i, 0]).max() > 1e-3
    assert patch_chains(gqa, base, donor, READOUT, []).values.shape[0] == 0


HEAD, QUERY = "blocks.0.attn.hook_z[1]", "blocks.2.attn.hook_q_input[3]"


@pytest.mark.parametrize(
    ("chain", "told"),
    [
        ((), "expected a sender and two or more receivers"),
        ((HEAD, "logits"), "expected a sender and two or more.*`path_patch`"),
        ((QUERY, QUERY, "logits"), "naming the sender"),
        ((HEAD, "blocks.1.attn.hook_z[1]", "logits"), "naming the receiver"),
        (("blocks.0.attn.hook_z[*]", QUERY, "logits"), "names 6 nodes"),
        ((HEAD, "blocks.*.hook_mlp_in", "logits"), "names 4 nodes"),
        ((HEAD, "blocks.2.attn.hook_v_input[2]", "logits"), "got index 2, expected 0 to 1"),
        (("blocks.2.attn.hook_z[1]", QUERY, "logits"), r"q_input\[3\] comes too early"),
        (("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_in", "logits"), "mlp_in comes too early"),
        ((HEAD, QUERY, "blocks.2.attn.hook_k_input[0]"), "k_input.* comes too early"),
        ((HEAD, QUERY, "blocks.1.hook_mlp_in"), "mlp_in comes too early"),
        ((HEAD, "blocks.2.hook_mlp_in", "blocks.2.hook_mlp_in"), "comes too early"),
        ((HEAD, "blocks.2.hook_mlp_in", "blocks.2.hook_resid_mid"), "comes too early"),
        ((HEAD, QUERY, "blocks.2.hook_resid_pre"), "comes too early"),
        ((HEAD, "blocks.1.hook_resid_mid", QUERY), "resid_mid is no node that passes on"),
        ((HEAD, "blocks.1.hook_resid_pre", QUERY, "logits"), "no node that passes on"),
        ((HEAD, "logits", "logits"), "logits is no node that passes on"),
    ],
)  # fmt: skip
def test_chains_that_are_refused(gqa: HookedALM, chain: tuple[str, ...], told: str) -> None:
    """Beside a chain that is fine."""
    base, donor, *_ = two_clips(gqa)
    good = (HEAD, QUERY, "blocks.2.hook_mlp_in", "blocks.2.hook_resid_post")
    with pytest.raises(InputError, match=told):
        patch_chains(gqa, base, donor, Logits([5]), [good, chain])
    assert patch_chains(gqa, base, donor, Logits([5]), [good]).values.shape == (1, 1, 1)


def test_batches_places_and_hooks_that_are_refused(gqa: HookedALM) -> None:
    base, donor, *_ = two_clips(gqa, [[10], [10]], [4, 4])
    chain = (HEAD, QUERY, "logits")
    with pytest.raises(InputError, match="2 base rows with 1 donor"):
        patch_chains(gqa, base, donor[0], Logits([5]), [chain])
    with pytest.raises(InputError, match="nowhere"):
        patch_chains(gqa, base, donor, Logits([5]), [chain], place="nowhere")
    with gqa.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]):
        with pytest.raises(InputError, match="hooks are attached"):
            patch_chains(gqa, base, donor, Logits([5]), [chain])
