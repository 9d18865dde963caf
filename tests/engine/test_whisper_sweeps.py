"""Sweeps and paths in Whisper: in its decoder, its encoder, and from one into the other.

They are what the plain loop and a few lines by hand give.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_runs import both, moved, rounding
from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.donors import Mean, Noise
from hooked_alm.methods.patching.metrics import LogitDiff, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_chains, patch_edges, path_patch
from hooked_alm.methods.patching.pruning import prune_edges
from hooked_alm.points import SITES, Site, sites_of
from operations import operations
from whisper_toy import POSITIONS, Whispers, noise
from whisper_toy import prompts as prompts_of

E = "audio.encoder.blocks"
TAIL = OnLogits(lambda logits: logits[:, -5:].flatten(1))
DECODER: list[Site] = [s for s in SITES if s not in ("gate", "cross_attn.k", "cross_attn.v")]
MEMORY: list[Site] = ["cross_attn.k", "cross_attn.v"]


@pytest.fixture(scope="module")
def model(whispers: Whispers) -> HookedALM:
    return whispers.hooked()


@pytest.fixture(scope="module")
def x(model: HookedALM) -> ALMInput:
    """Nine and six tokens, the second left-padded."""
    return model.encode(**prompts_of())


@pytest.fixture(scope="module")
def y(model: HookedALM) -> ALMInput:
    inputs = prompts_of(seed=5)
    return model.encode(**{**inputs, "input_features": inputs["input_features"].flip(0)})


def test_sites(model: HookedALM) -> None:
    assert sites_of(model.cfg) == [site for site in SITES if site != "gate"]
    with pytest.raises(InputError, match="expected one of resid_pre, q"):
        patch(model, *[model.encode(**prompts_of())] * 2, TAIL, site="gate", places=["text"])


@pytest.mark.parametrize("site", DECODER)
def test_sites_of_the_decoder(model: HookedALM, x: ALMInput, y: ALMInput, site: Site) -> None:
    """Of runs that hear another clip; of a head and of all; rows, spans, joint layers."""
    if site in ("pattern", "cross_attn.pattern"):
        places: list[Any] = [5, (4, 7)]
    else:
        places = ["text", 5, ("sink", 8), "readout"]
    for heads in [None] if SITES[site].unit not in ("head", "kv_head") else [None, "each"]:
        fast, _ = both(
            model, x, y, TAIL, site=site, heads=heads, places=places, layers=[0, 1, (0, 1)],
            policy="truncate",
        )  # fmt: skip
        assert np.abs(fast.effect).max(axis=(-1, -2)).min() > 1e-4


@pytest.mark.parametrize("site", MEMORY)
def test_keys_and_values_of_the_memory(
    model: HookedALM, x: ALMInput, y: ALMInput, site: Site
) -> None:
    """Places are rows of the encoder: a clip, some rows, seconds."""
    places = ["audio", (3, 20, 49), 7, Window(0.1, 0.3)]
    for heads in (None, [0, (0, 1)]):
        fast, _ = both(
            model, x, y, TAIL, site=site, heads=heads, places=places, layers=[0, 1, (0, 1)]
        )
        assert np.abs(fast.effect).max(axis=(-1, -2)).min() > 1e-5
    each, _ = both(model, x[[0]], y[[0]], TAIL, site=site, places="each", layers=[1])
    assert each.axes["place"] == tuple(range(POSITIONS))


@pytest.mark.parametrize("donor", ["zero", "self", "mean", "noise", "between"])
def test_donors(model: HookedALM, x: ALMInput, y: ALMInput, donor: str) -> None:
    given: dict[str, Any] = {"mean": Mean(y), "noise": Noise(2.0), "between": y}
    mode = {"self": "scale", "between": "interpolate"}.get(donor, "replace")
    for site, places in (("cross_attn.z", [5, "readout"]), ("cross_attn.v", ["audio", 7])):
        fast, _ = both(
            model, x, given.get(donor, donor), TAIL, site=site, places=places, mode=mode,
            coefficient=0.6,
        )  # fmt: skip
        assert moved(fast) > 1e-3


def test_donors_of_another_model(
    model: HookedALM, x: ALMInput, y: ALMInput, whispers: Whispers
) -> None:
    """A run of it, and its means over rows of the memory."""
    other = HookedALM.from_pretrained(whispers.folder())
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    for donor, places in ((y, ["audio"]), (Mean(y), [0, 20, Window(0.1, 0.3)])):
        fast, _ = both(model, x, donor, TAIL, site="cross_attn.v", places=places, donor_model=other)
        assert moved(fast) > 1e-4
    name = "blocks.1.cross_attn.hook_v"
    mean = other.run_with_cache(y, names_filter=name)[1][name][:, 20].mean(0)

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 20] = mean
        return value

    expected = TAIL.function(model.run_with_hooks(x, fwd_hooks=[(name, write)])).detach()
    found = patch(model, x, Mean(y), TAIL, site="cross_attn.v", places=[20], layers=[1],
                  donor_model=other)  # fmt: skip
    limit = rounding(model, x)
    np.testing.assert_allclose(found.values[0, 0], expected.numpy(), rtol=0, atol=limit)
    padded, _ = both(model, x, Mean(y, by_position=True), TAIL, site="z", places=[0, 1, 8])
    assert moved(padded) > 1e-4


def test_other_kernels_and_precision(whispers: Whispers) -> None:
    for dtype, attention in ((torch.float32, "eager"), (torch.bfloat16, "sdpa")):
        model = whispers.hooked(dtype, attention)
        x = model.encode(**prompts_of())
        other = prompts_of(seed=5)
        y = model.encode(**{**other, "input_features": other["input_features"].flip(0)})
        for site in ("resid_pre", "cross_attn.q", "cross_attn.pattern", "mlp_out"):
            both(model, x, y, TAIL, site=site, places=[5], layers=[0, 1])
        both(model, x, y, TAIL, site="cross_attn.k", places=["audio"], layers=[0, 1])
        metric = LogitDiff(answer=5, other=11)  # read off the stream in fp32
        both(model, x, y, metric, site="cross_attn.z", places=["readout"])
        both(model, x, y, metric, site="z", places=["readout"], precision="float32")


def test_a_donor_with_another_clip_is_not_spliced(
    model: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    """Its first rows are the same embeddings, and not the same run; nor is its prefix shared."""
    inputs = prompts_of()
    other = model.encode(**{**inputs, "input_features": inputs["input_features"].flip(0)})
    for site in ("resid_pre", "resid_post"):
        fast, _ = both(
            model, x, other, TAIL, site=site, places=[("sink", "text")], layers=[1, (0, 1)]
        )
    assert moved(fast) > 1e-3
    assert not np.allclose(fast.base, fast.donor)
    # Two rows of one prompt that hear two clips share nothing, either.
    ids = {k: v[[0, 0]] for k, v in inputs.items() if k != "input_features"}
    twice = model.encode(**ids, input_features=inputs["input_features"])
    metric = LogitDiff(answer=5, other=11)  # of whole logits no prefix would be shared
    found, _ = both(model, twice, twice[[1, 0]], metric, site="resid_post", places=["text"])
    assert not np.allclose(found.base[0], found.base[1])
    same, _ = both(model, x[[0]], x[[0]], TAIL, site="resid_post", places=["sink"], layers=[0])
    assert moved(same) < rounding(model, x)


@pytest.mark.filterwarnings("ignore:patching resid")
@pytest.mark.parametrize("site", ["resid_pre", "v", "pattern", "z", "mlp_out"])
def test_sites_of_the_encoder(model: HookedALM, x: ALMInput, y: ALMInput, site: Site) -> None:
    encoder = model.towards("encoder")
    places = ["audio", (5, 20), Window(0.1, 0.3)]
    fast, _ = both(encoder, x, y, TAIL, site=site, places=places, layers=[0, 2, (0, 1)])
    assert np.abs(fast.effect).max(axis=(-1, -2)).min() > 1e-4
    with pytest.raises(InputError, match="expected one of resid_pre"):
        patch(encoder, x, y, TAIL, site="cross_attn.z")


def test_readouts(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Some logits of the last position, which is all that then runs of the last block."""
    metric = LogitDiff(answer=5, other=11)
    for one, site, places in (
        (model, "cross_attn.z", ["readout", "text"]),
        (model, "cross_attn.v", ["audio"]),
        (model.towards("encoder"), "mlp_out", ["audio", 3]),
    ):
        fast, _ = both(one, x, y, metric, site=site, places=places, policy="truncate")  # type: ignore[arg-type]
        assert moved(fast) > 1e-3


def agree(model: HookedALM, x: ALMInput, run: Any, least: float = 1e-4) -> Any:
    """The fast engine's result, if the plain loop's is the same."""
    fast, plain = (run(engine=engine) for engine in ("fast", "hooks"))
    limit = rounding(model, x)
    np.testing.assert_allclose(fast.values, plain.values, rtol=0, atol=limit, equal_nan=True)
    assert np.nanmax(np.abs(fast.effect)) > least
    return fast


@pytest.mark.parametrize("mode", ["edge", "ioi"])
def test_paths_in_the_decoder(model: HookedALM, x: ALMInput, y: ALMInput, mode: str) -> None:
    """Between heads of both attentions and MLPs; what a cross-attention head writes, by hand."""
    senders = ["blocks.0.attn.hook_z[1]", "blocks.0.cross_attn.hook_z[*]", "blocks.0.hook_mlp_out",
               "blocks.0.hook_cross_attn_out", "hook_embed"]  # fmt: skip
    receivers = ["blocks.0.cross_attn.hook_q[1]", "blocks.0.hook_mlp_in", "logits",
                 "blocks.1.cross_attn.hook_q[*]", "blocks.1.attn.hook_v_input[0]",
                 "blocks.0.hook_resid_mid_cross", "blocks.1.hook_resid_mid"]  # fmt: skip
    run = partial(
        path_patch, model, x, y, TAIL, senders, receivers, places=["readout", 5],
        mode=mode, policy="truncate",
    )  # fmt: skip
    agree(model, x, run)


@pytest.mark.parametrize("mode", ["edge", "ioi"])
@torch.no_grad()
def test_a_message_to_a_query_by_hand(
    model: HookedALM, x: ALMInput, y: ALMInput, mode: str
) -> None:
    """Added to the stream that is read; or with the MLP between recomputed, heads frozen."""
    sent, stream = "blocks.0.cross_attn.hook_z", "blocks.1.hook_resid_mid"
    names = [sent, stream, "blocks.0.hook_resid_mid_cross", "blocks.1.hook_attn_out"]
    base, donor = (model.run_with_cache(one, names_filter=names)[1] for one in (x, y))
    first, block = model.blocks
    change = (donor[sent] - base[sent])[:, :, 1] @ first.cross_attn.W_O[1]
    if mode == "edge":
        heard = base[stream] + change
    else:
        middle = base[names[2]] + change
        heard = middle + first.mlp(first.ln3(middle)) + base[names[3]]
    query = block.cross_attn.q_proj(block.ln2(heard)).unflatten(-1, (2, -1))

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, -1, 0] = query[:, -1, 0]
        return value

    point = "blocks.1.cross_attn.hook_q"
    expected = TAIL.function(model.run_with_hooks(x, fwd_hooks=[(point, write)]))
    options: Any = {"mode": mode}
    found = path_patch(model, x, y, TAIL, f"{sent}[1]", f"{point}[0]", **options)
    limit = rounding(model, x)
    np.testing.assert_allclose(found.values[0, 0, 0], expected.numpy(), rtol=0, atol=limit)
    assert moved(found) > 1e-4


@torch.no_grad()
def test_from_an_encoder_head_to_a_decoder_heads_values(
    model: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    """By hand: the message goes through the encoder's norm, and into one head's v at some rows."""
    sent, end = f"{E}.1.attn.hook_z", f"{E}.2.hook_resid_post"
    encoder = model.audio.encoder
    base, donor = (model.run_with_cache(one, names_filter=[sent, end])[1] for one in (x, y))
    change = (donor[sent] - base[sent])[:, :, 2] @ encoder.blocks[1].attn.W_O[2]
    memory = encoder.ln_final(base[end] + change)
    limit = rounding(model, x)
    for part in ("k", "v"):
        point = f"blocks.1.cross_attn.hook_{part}"
        heard = model.blocks[1].cross_attn.project(part, memory)

        def write(value: Tensor, hook: Any, heard: Tensor = heard) -> Tensor:
            value = value.clone()
            value[:, 5:15, 1] = heard[:, 5:15, 1]
            return value

        expected = TAIL.function(model.run_with_hooks(x, fwd_hooks=[(point, write)]))
        window = Window(0.1, 0.3)
        found = path_patch(model, x, y, TAIL, f"{sent}[2]", f"{point}[1]", places=[window])
        np.testing.assert_allclose(found.values[0, 0, 0], expected.numpy(), rtol=0, atol=limit)
        assert moved(found) > 1e-5


def test_paths_out_of_the_encoder(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    senders = [f"{E}.1.attn.hook_z[*]", f"{E}.2.hook_mlp_out", f"{E}.0.mlp.hook_post[3]",
               "audio.encoder.hook_embed",
               (f"{E}.0.attn.hook_z[1]", f"{E}.1.hook_attn_out")]  # fmt: skip
    receivers = ["blocks.0.cross_attn.hook_k[1]", "blocks.1.cross_attn.hook_v[*]",
                 ("blocks.0.cross_attn.hook_v[0]", "blocks.1.cross_attn.hook_v[1]")]  # fmt: skip
    run = partial(path_patch, model, x, y, TAIL, senders, receivers, places=["audio", 7])
    found = agree(model, x, run)
    assert np.abs(found.effect).max((-1, -2)).min() > 1e-7
    assert found.values.shape[:3] == (8, 4, 2)


@torch.no_grad()
def test_all_that_the_encoder_writes_is_the_donors_memory(
    model: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    """Every write into every key and value at once: the run that hears the donor's clip."""
    writers = ["audio.encoder.hook_embed"]
    writers += [f"{E}.{b}.{at}" for b in range(3) for at in ("hook_attn_out", "hook_mlp_out")]
    readers = [f"blocks.{b}.cross_attn.hook_{part}[{h}]"
               for b in (0, 1) for part in "kv" for h in (0, 1)]  # fmt: skip
    pairs = [(s, r) for s in writers for r in readers]
    found = patch_edges(model, x, y, TAIL, {"all": pairs}, places=["all"])
    memory = model.run_with_cache(y, names_filter="hook_audio_embed")[1]["hook_audio_embed"]
    expected = TAIL.function(model(x, memory=memory))
    limit = rounding(model, x)
    np.testing.assert_allclose(found.values[0, 0], expected.numpy(), rtol=0, atol=limit)
    assert moved(found) > 1e-2


@torch.no_grad()
def test_edges_of_the_decoder(model: HookedALM, x: ALMInput) -> None:
    """All of them at once are the donor's prompt with the base's memory; pruning walks them."""
    inputs = prompts_of(seed=5)
    y = model.encode(**{**inputs, "input_features": prompts_of()["input_features"]})
    edges = all_edges(model)
    assert ("blocks.0.cross_attn.hook_z[1]", "blocks.1.cross_attn.hook_q[0]") in edges
    assert not any("hook_k[" in r for _, r in edges)
    run = partial(
        patch_edges, model, x, y, TAIL, {"all": edges, "some": edges[::3]}, places=["all"]
    )
    found = agree(model, x, run)
    expected = TAIL.function(model(y))
    limit = rounding(model, x)
    np.testing.assert_allclose(found.values[0, 0], expected.numpy(), rtol=0, atol=limit)
    pruned = prune_edges(model, x[[0]], y[[0]], 0.05, place="all", candidates=edges[:12])
    assert len(pruned.kept) + len(pruned.removed) == 12


@torch.no_grad()
def test_chains(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Through queries, and from an encoder head through a decoder head's values to the logits."""
    chains = [
        ("blocks.0.attn.hook_z[0]", "blocks.0.cross_attn.hook_q[1]", "logits"),
        ("blocks.0.cross_attn.hook_z[0]", "blocks.0.hook_mlp_in", "blocks.1.cross_attn.hook_q[0]",
         "logits"),
    ]  # fmt: skip
    run = partial(patch_chains, model, x, y, TAIL, chains, place=5)
    agree(model, x, run, least=1e-5)
    out = [
        (f"{E}.0.attn.hook_z[1]", "blocks.0.cross_attn.hook_v[1]", "logits"),
        (f"{E}.2.hook_mlp_out", "blocks.0.cross_attn.hook_k[0]", "blocks.1.attn.hook_v_input[1]",
         "logits"),
    ]  # fmt: skip
    found = agree(
        model, x, partial(patch_chains, model, x, y, TAIL, out, place=Window(0.3, 0.6)), least=1e-6
    )
    # The first by hand: what the head then writes, added behind the last block.
    sent, end = f"{E}.0.attn.hook_z", f"{E}.2.hook_resid_post"
    z, last = "blocks.0.cross_attn.hook_z", "blocks.1.hook_resid_post"
    encoder = model.audio.encoder
    base, donor = (model.run_with_cache(one, names_filter=[sent, end, z])[1] for one in (x, y))
    change = (donor[sent] - base[sent])[:, :, 1] @ encoder.blocks[0].attn.W_O[1]
    heard = model.blocks[0].cross_attn.project("v", encoder.ln_final(base[end] + change))

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 15:30, 1] = heard[:, 15:30, 1]
        return value

    seen: list[Tensor] = []
    model.run_with_hooks(x, fwd_hooks=[
        ("blocks.0.cross_attn.hook_v", write), (z, lambda value, hook: seen.append(value)),
    ])  # fmt: skip
    told = (seen[0] - base[z])[:, :, 1] @ model.blocks[0].cross_attn.W_O[1]
    expected = TAIL.function(
        model.run_with_hooks(x, fwd_hooks=[(last, lambda value, hook: value + told)])
    )
    limit = rounding(model, x)
    np.testing.assert_allclose(found.values[0], expected.numpy(), rtol=0, atol=limit)


def test_operations_do_not_grow_with_cells(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Cells are data: more heads or places of a kind dispatch no more."""
    metric = LogitDiff(answer=5, other=11)

    def count(**options: Any) -> int:
        return operations(lambda: patch(model, x[[0]], y[[0]], metric, layers=[1], **options))

    for site, few, many in (
        ("cross_attn.z", {"heads": [0, 1]}, {"heads": [0, 1, 1, 0]}),
        ("cross_attn.q", {"heads": [0, 1]}, {"heads": [0, 1, 1, 0]}),
        ("cross_attn.v", {"places": [3, 4]}, {"places": list(range(20))}),
    ):
        place = {"places": [5]}
        assert count(site=site, **{**place, **few}) == count(site=site, **{**place, **many}), site

    def paths(senders: list[str]) -> int:
        return operations(lambda: path_patch(
            model, x[[0]], y[[0]], metric, senders, "blocks.1.cross_attn.hook_v[*]", places=["all"],
        ))  # fmt: skip

    assert paths([f"{E}.1.attn.hook_z[0]"]) == paths([f"{E}.1.attn.hook_z[*]"])


def test_what_is_refused(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    metric = LogitDiff(answer=5, other=11)
    head, key = f"{E}.0.attn.hook_z[1]", "blocks.1.cross_attn.hook_k[0]"
    for sender, receiver in (
        (head, "blocks.0.attn.hook_q_input[0]"), (head, "logits"), ("blocks.0.hook_attn_out", key),
    ):  # fmt: skip
        with pytest.raises(InputError, match="keys and values of cross-attention read the encoder"):
            path_patch(model, x, y, metric, sender, receiver, places=["audio"])
        with pytest.raises(InputError, match="reads something else"):
            patch_edges(model, x, y, metric, {"a": [(sender, receiver)]})
    pairs = [(head, "blocks.0.cross_attn.hook_k[0]"), ("blocks.0.attn.hook_z[0]", "logits")]
    with pytest.raises(InputError, match="Patch them in two calls"):
        patch_edges(model, x, y, metric, {"a": pairs})
    with pytest.raises(InputError, match="its blocks have cross-attention"):
        attribute_nodes(model, x, y, metric, site="z", places=["readout"])
    with pytest.raises(InputError, match="its blocks have cross-attention"):
        attribute_edges(model, x, y, metric, "blocks.0.attn.hook_z[0]", "logits")
    given = model.encode(
        decoder_input_ids=x.tokens, encoder_outputs=torch.zeros(2, POSITIONS, model.cfg.d_model)
    )
    with pytest.raises(InputError, match="a memory instead of"):
        patch(model, given, given, metric, site="cross_attn.k", places=["audio"])
    for site, read in (("cross_attn.v", "k"), ("z", "cross_attn.k"), ("z", "resid_pre")):
        with pytest.raises(InputError, match="expected values of the same axes"):
            patch(model, x, y, metric, site=site, donor_site=read, places=[3])  # type: ignore[arg-type]
    patch(model, x, y, metric, site="cross_attn.k", donor_site="cross_attn.v", places=[3])
    short = model.encode(
        decoder_input_ids=y.tokens, encoder_outputs=torch.zeros(2, 31, model.cfg.d_model)
    )
    for donor in (short, Mean(short)):
        with pytest.raises(InputError, match="expected one size"):
            patch(model, x, donor, metric, site="cross_attn.pattern", places=[3])
    with pytest.raises(InputError, match="this input has audio, padding"):
        patch(model, x, y, metric, site="cross_attn.k", places=["readout"])


def test_prompts_that_were_prepared(model: HookedALM) -> None:
    """A clip and another of equal length, under the same control tokens."""
    x, y = (
        model.prepare(noise(0.5, seed=s), language="en", answer_prefix=" happy") for s in (0, 1)
    )
    metric = LogitDiff(answer=5, other=11)
    rows = patch(model, x, y, metric, site="cross_attn.v", places=[Window(0.1, 0.2)], heads="each")
    heads = patch(model, x, y, metric, site="cross_attn.z", places=["readout"], heads="each")
    assert rows.values.shape[:3] == heads.values.shape[:3] == (2, 2, 1)
    assert moved(rows) > 1e-6
    assert moved(heads) > 1e-4
