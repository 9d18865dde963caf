"""A stack that no model has, declared here: the engine, lens, paths and attribution walk it.

Three blocks whose rows read those of their own chunk of four; from the embeddings, or behind the
trunk's second block. Nothing of theirs knows of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_runs import PLAIN_SITES, TAIL, both, rounding
from hooked_alm import ALMInput, HookedALM, HookNameError, InputError
from hooked_alm.components.block import Block, Blocks
from hooked_alm.components.embed import Unembed
from hooked_alm.components.norm import RMSNorm
from hooked_alm.components.rotary import rotate
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_chains, path_patch
from hooked_alm.methods.reading.lens import logit_lens, residual_rows
from hooked_alm.points import SITES, Site, hook_name
from hooked_alm.stacks import Stack, ranges_of, rows_in
from tiny import randomise
from tiny_text import TextModels, text_batch
from tolerances import ATTRIBUTION, ENGINE

CHUNK = 4
N_LAYERS = 3
EARS = Stack(
    blocks="chunk_blocks", n_layers=N_LAYERS, norm="chunk_norm", unembed="chunk_unembed",
    reach="own chunk", chunk=CHUNK,
)  # fmt: skip
DECLARED = {
    "chunks": EARS,
    "chunks behind a trunk": replace(EARS, reads="blocks.1"),
}


class Listener(HookedALM):
    """A LLaMA with a stack beside its own."""

    def __init__(self, cfg: Any, stack: Stack) -> None:
        super().__init__(cfg)
        places = range(cfg.n_layers, cfg.n_layers + stack.n_layers)
        self.chunk_blocks = Blocks(Block(cfg, place, "full_attention") for place in places)
        self.chunk_norm, self.chunk_unembed = RMSNorm(cfg.d_model, cfg.eps), Unembed(cfg)
        self.stacks = {**self.stacks, "ears": stack}
        self.setup()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> HookedALM:
    return TextModels(tmp_path_factory.mktemp("text")).hooked("llama")


@pytest.fixture(scope="module", params=DECLARED)
def model(request: pytest.FixtureRequest, text: HookedALM) -> Iterator[HookedALM]:
    made = Listener(text.cfg, DECLARED[request.param])
    randomise(made)
    made.load_state_dict(text.state_dict(), strict=False)
    yield made.eval().towards("ears")
    assert not list(made.list_hooks())


@pytest.fixture
def pair(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    """Rows with 4, 0 and 1 pads: chunks do not begin at position 0 of the padded prompt."""
    base = text_batch()
    other = {**base, "input_ids": base["input_ids"].flip(0)}
    return model.encode(**base), model.encode(**other)


@torch.no_grad()
def by_hand(model: HookedALM, x: ALMInput, row: int) -> list[Tensor]:
    """The stream at every depth of one row's real positions, and logits, from the weights alone."""
    real = x.attention_mask[row].bool()
    n, stack, cfg = int(real.sum()), model.stacks["ears"], model.cfg
    stream = model.embed.weight[x.tokens[row, real]]
    tables = model.rotary(torch.arange(n)[None], stream.dtype)
    depths = [stream]
    for name in model.path:
        block = model.get_submodule(name)
        if not name.startswith("chunk"):
            parts = [range(n)]
        else:
            size = stack.chunk or n
            parts = [range(a, min(a + size, n)) for a in range(0, n, size)]
        normed = block.ln1(stream)
        q, k, v = (
            getattr(block.attn, f"{part}_proj")(normed).unflatten(-1, (-1, cfg.d_head))
            for part in "qkv"
        )
        q, k = (rotate(heads.transpose(0, 1)[None], tables)[0].transpose(0, 1) for heads in (q, k))
        k, v = (heads.repeat_interleave(cfg.n_groups, dim=1) for heads in (k, v))
        z = torch.zeros_like(q)
        for part in parts:
            at = list(part)
            scores = torch.einsum("qhe,khe->hqk", q[at], k[at]) * cfg.d_head**-0.5
            if not name.startswith("chunk"):
                scores = scores + torch.full((n, n), -torch.inf).triu(1)
            z[at] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[at])
        stream = stream + block.attn.o_proj(z.flatten(1))
        stream = stream + block.mlp(block.ln2(stream)[None])[0]
        depths.append(stream)
    return [*depths, model.chunk_unembed(model.chunk_norm(stream)[None])[0]]


@torch.no_grad()
def test_it_runs_as_declared(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    x, _ = pair
    logits, cache = model.run_with_cache(x, names_filter=model.depth_names())
    for row in range(len(x)):
        real = x.attention_mask[row].bool()
        *depths, last = by_hand(model, x, row)
        found = [cache[name][row, real] for name in model.depth_names()]
        for ours, theirs in zip((*found, logits[row, real]), (*depths, last), strict=True):
            limit = ENGINE[torch.float32] * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_sweeps(model: HookedALM, pair: tuple[ALMInput, ALMInput], site: Site) -> None:
    """First and last block, or two, in a chunk's middle, in two chunks, at the readout: a loop's.

    At the second of two blocks a cell is under way, its own keys behind those that all share.
    """
    x, other = pair
    heads = [1] if SITES[site].unit in ("head", "kv_head") else None
    layers = [0, len(model.path) - 1, (0, 1)]
    fast, _ = both(
        model, x, other, site=site, layers=layers, heads=heads, places=[6, (5, 9), "readout"]
    )
    assert np.abs(fast.effect).max() > 1e-3


def test_donors_of_whole_spans(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    """No splice: what stands before the span does not stay what it was."""
    x, _ = pair
    other = {**text_batch()}
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][:, 9:12] = 5
    for site in ("resid_pre", "resid_post"):
        fast, _ = both(model, x, model.encode(**other), site=site, places=[(9, 10, 11)])
        assert np.abs(fast.effect).max() > 1e-3


@torch.no_grad()
def test_an_edit_reaches_its_chunk(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    """Rows before it, too; those of other chunks only through a causal trunk."""
    x, _ = pair
    row, at = 1, 6  # a row without pads: chunks are 0-3, 4-7, 8-11, 12
    clean = model(x)[row]
    block = model.path[-3]

    def mute(value: Tensor, hook: Any) -> Tensor:
        return value.index_fill(1, torch.tensor(at), 0.0)

    edited = model.run_with_hooks(x, fwd_hooks=[(hook_name("resid_pre", block), mute)])[row]
    changed = (edited - clean).abs().amax(-1).nonzero().flatten().tolist()
    stack = model.stacks["ears"]
    assert changed == [4, 5, 6, 7]
    assert rows_in(stack.reached(ranges_of(torch.tensor([at])), 13)).tolist() == changed


def test_lens(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    """The last depth of the lens is the output; every depth is the stream's by hand."""
    x, _ = pair
    where = torch.tensor([[5, 12]] * len(x))
    tokens = [3, 50, 7]
    lens = logit_lens(model, x, tokens, positions=where)
    assert lens.shape == (len(model.path) + 1, len(x), 2, 3)
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(
        lens[-1], logits[:, where[0]][..., tokens], atol=rounding(model, x), rtol=0
    )
    rows = residual_rows(model, x, where)
    depths = by_hand(model, x, 1)[:-1]
    for ours, theirs in zip(rows[:, 1], depths, strict=True):
        limit = ENGINE[torch.float32] * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs[where[1]], atol=limit, rtol=0)


@pytest.mark.parametrize("mode", ["edge", "ioi"])
def test_paths(model: HookedALM, pair: tuple[ALMInput, ALMInput], mode: Any) -> None:
    """From the embedding and a head to q, k, v, MLPs and logits, at one position and at all."""
    x, other = pair
    first, last = model.path[-N_LAYERS], model.path[-1]
    into = [
        *(f"{hook_name(point, last)}[1]" for point in ("q", "k", "v")),
        hook_name("mlp_in", last), "logits",
    ]  # fmt: skip
    sent = ["hook_embed", f"{hook_name('z', first)}[3]", hook_name("mlp_out", first)]
    fast, plain = (
        path_patch(
            model, x, other, TAIL, sent, into, mode=mode, places=[6, "text"], engine=engine
        )
        for engine in ("fast", "hooks")
    )  # fmt: skip
    np.testing.assert_allclose(fast.values, plain.values, rtol=0, atol=rounding(model, x))
    assert np.abs(fast.effect).max((2, 3, 4)).min() > 1e-5


@torch.no_grad()
def test_a_chain_is_passed_on_to_all_that_read(
    model: HookedALM, pair: tuple[ALMInput, ALMInput]
) -> None:
    """A head's message to a value, whose head tells it to the whole chunk: written out by hooks."""
    x, other = pair
    at, row, kv = 6, 2, 1  # row 2 has one pad
    first, relay = model.path[-3], model.path[-2]
    chain = (f"{hook_name('z', first)}[3]", f"{hook_name('v', relay)}[{kv}]", "logits")
    found = patch_chains(model, x, other, TAIL, [chain], place=at)

    names = [hook_name("z", first), hook_name("resid_pre", relay), hook_name("z", relay)]
    names.append(hook_name("resid_post", model.path[-1]))
    base, donor = (model.run_with_cache(one, names_filter=names)[1] for one in (x, other))
    block = model.get_submodule(relay)
    moved = donor[names[0]][:, at, 3] - base[names[0]][:, at, 3]
    heard = base[names[1]].clone()
    heard[:, at] += moved @ model.get_submodule(first).attn.W_O[3]
    value = block.attn.project("v", block.ln1(heard))

    def speak(v: Tensor, hook: Any) -> Tensor:
        v = v.clone()
        v[:, at, kv] = value[:, at, kv]
        return v

    seen: dict[str, Tensor] = {}
    hooks = [(hook_name("v", relay), speak)]
    hooks += [(names[2], lambda z, hook: seen.update(z=z))]
    model.run_with_hooks(x, fwd_hooks=hooks)
    told = torch.einsum("bphe,hed->bpd", seen["z"] - base[names[2]], block.attn.W_O)
    logits = model.head_unembed(model.head_norm(base[names[3]] + told))
    expected = TAIL.function(logits)
    reached = (told[row].abs().amax(-1) > 0).nonzero().flatten().tolist()
    assert reached == [5, 6, 7, 8]
    torch.testing.assert_close(
        torch.from_numpy(found.values[0])[row].float(),
        expected[row],
        atol=rounding(model, x),
        rtol=0,
    )


def test_every_edge_of_a_stack(model: HookedALM) -> None:
    blocks = {
        name.split(".attn")[0].split(".hook")[0] for edge in all_edges(model) for name in edge
    }
    assert blocks == {"hook_embed", "logits", *model.path}


@pytest.mark.parametrize(("site", "qk_fix"), [("resid_post", False), ("z", False), ("k", True)])
def test_gradients_are_slopes(
    model: HookedALM, pair: tuple[ALMInput, ALMInput], site: Site, qk_fix: bool
) -> None:
    """A small step by the exact engine is the score of that step; keys change earlier rows' too."""
    x, other = pair
    readout = OnLogits(lambda logits: logits[:, -4:, 11].sum(1))
    options: dict[str, Any] = {"site": site, "places": [10], "mode": "interpolate"}
    small = 1e-3
    score = attribute_nodes(
        model, x, other, readout, qk_fix=qk_fix, coefficient=small, **options
    ).effect
    exact = patch(model, x, other, readout, coefficient=small, **options).effect
    assert np.abs(exact).max() > 1e-5
    np.testing.assert_allclose(score, exact, rtol=0, atol=0.03 * np.abs(exact).max())


def test_edge_scores(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    """What the last MLP writes is read by the logits alone: its edge scores as the MLP does."""
    x, other = pair
    readout = OnLogits(lambda logits: logits[:, -4:, 11].sum(1))
    last = len(model.path) - 1
    sent = [hook_name("mlp_out", model.path[last])]
    edge = attribute_edges(model, x, other, readout, sent, ["logits"], places=["readout"])
    node = attribute_nodes(
        model, x, other, readout, site="mlp_out", layers=[last], places=["readout"]
    )
    assert np.abs(node.effect).max() > 1e-3
    limit = ATTRIBUTION * np.abs(node.effect).max()
    np.testing.assert_allclose(edge.effect.ravel(), node.effect.ravel(), rtol=0, atol=limit)


def test_what_a_stack_refuses(model: HookedALM, pair: tuple[ALMInput, ALMInput]) -> None:
    from transformers import DynamicCache

    x, _ = pair
    with pytest.raises(InputError, match="chunk_blocks, whose rows read later ones, .*cached keys"):
        model(x, past_key_values=DynamicCache())
    assert len(model.towards("text").generate(x, 2, return_type="tokens")[0]) == 2
    with pytest.raises(InputError, match="'text' and 'ears'"):
        model.towards("eyes")
    for reach, chunk in (("own chunk", None), ("own chunk", 0), ("later rows", 4)):
        with pytest.raises(InputError, match="declaring chunk_blocks: got reach"):
            replace(EARS, reach=reach, chunk=chunk)
    with pytest.raises(HookNameError, match="does not reach it"):
        model.run_with_hooks(
            x, stop_at_layer=1, fwd_hooks=[(hook_name("z", model.path[-1]), lambda v, hook: v)]
        )


def test_both_heads_run_when_both_are_hooked(
    model: HookedALM, pair: tuple[ALMInput, ALMInput]
) -> None:
    x, _ = pair
    with torch.no_grad():
        ears, cache = model.run_with_cache(x, names_filter=["unembed.hook_out"])
        assert torch.equal(cache["unembed.hook_out"], model.towards("text")(x))
        assert torch.equal(ears, model(x))


@pytest.mark.parametrize(("reach", "chunk"), [("later rows", None), ("own chunk", 3)])
def test_reach_is_what_sees_says(reach: Any, chunk: int | None) -> None:
    """Rows that an edit reaches are those that see it, for every set of rows."""
    stack = Stack(blocks="b", n_layers=1, norm="n", unembed="u", reach=reach, chunk=chunk)
    n = 7
    places = torch.arange(n)
    sees = stack.sees(places[:, None], places)
    for chosen in product((False, True), repeat=n):
        rows = torch.tensor(chosen).nonzero().flatten()
        assert rows_in(ranges_of(rows)).tolist() == rows.tolist()
        reached = rows_in(stack.reached(ranges_of(rows), n))
        expected = sees[:, rows].any(1)
        if reach == "own chunk" or len(rows) == 0:
            assert reached.tolist() == expected.nonzero().flatten().tolist()
        else:
            assert reached.tolist() == list(range(int(rows.min()), n))
