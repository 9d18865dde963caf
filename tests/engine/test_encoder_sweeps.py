"""Sweeps and paths along an audio encoder, and out of it.

They are what the plain loop, Hugging Face and a few lines by hand give. Other families' encoders
are swept in ``tests/converters``.
"""

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine_runs import PLAIN_SITES, both, moved, rounding
from hf_reference import with_positions
from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.frontend import FrontEnd
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.donors import Mean, Noise
from hooked_alm.methods.patching.metrics import LogitDiff, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_chains, patch_edges, path_patch
from hooked_alm.methods.reading.attention_mass import attention_mass
from hooked_alm.methods.reading.head_norms import HeadMeter
from hooked_alm.methods.reading.lens import logit_lens
from hooked_alm.methods.reading.tuned_lens import TunedLens
from hooked_alm.points import SITES, Site
from operations import operations
from tiny import TinyModels, hf_inputs

B = "audio.encoder.blocks"
TAIL = OnLogits(lambda logits: logits[:, -5:].flatten(1))
"""A metric that loses nothing: all logits of the last positions, which are text of either row."""
INPUTS = with_positions(hf_inputs([[63, 40], [23]], [9, 14]))
OTHER = with_positions(hf_inputs([[63, 40], [23]], [9, 14], seed=2))
WITHOUT_GATE = [site for site in PLAIN_SITES if site != "gate"]


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> HookedALM:
    return tiny_models.hooked()


@pytest.fixture(scope="module")
def encoder(model: HookedALM) -> HookedALM:
    return model.towards("encoder")


@pytest.fixture(scope="module")
def x(model: HookedALM) -> ALMInput:
    """Two clips in one row, one in the other: windows of 50 rows, of which 32, 20 and 12 run."""
    return model.encode(**INPUTS)


@pytest.fixture(scope="module")
def y(model: HookedALM) -> ALMInput:
    return model.encode(**OTHER)


def test_rows_of_prompts(model: HookedALM, x: ALMInput) -> None:
    """Windows of a prompt stand one behind the other; seconds count within a clip."""
    rows = model.encoder_rows(x)
    spans = rows.prompts.spans
    assert rows.prompts.shape == (2, 100)
    assert spans["audio"] == [[(0, 32), (50, 70)], [(0, 12)]]
    assert spans["padding"] == [[], []]
    assert spans.seconds(0, 0.1, 0.2, clip=1) == [(55, 60)]
    assert spans.seconds(0, 0.62, 9.0, clip=0) == [(31, 32)]
    with pytest.raises(InputError, match="the clip lasts 0.24 s"):
        spans.seconds(1, 0.24, 0.3)
    name = f"{B}.1.attn.hook_z"
    value = model.run_with_cache(x, names_filter=name)[1][name]
    by_prompt = rows.by_prompt(name, value)
    assert torch.equal(by_prompt[0, 50:100], value[1])
    assert torch.equal(by_prompt[1, :50], value[2])
    assert not by_prompt[1, 50:].any()
    assert torch.equal(rows.by_window(name, by_prompt, torch.full_like(value, torch.nan)), value)
    assert rows.is_seen.sum() == 32 + 20 + 12


@pytest.mark.filterwarnings("ignore:patching resid")  # of a whole clip, among other places
@pytest.mark.parametrize("site", WITHOUT_GATE)
def test_sites(encoder: HookedALM, x: ALMInput, y: ALMInput, site: Site) -> None:
    """Whole clips, rows of one, a window of seconds; of a run; a head and all."""
    places = ["audio", (5, 20, 51), Window(0.02, 0.1, clip=0)]
    for heads in [None] if SITES[site].unit not in ("head", "kv_head") else [None, [1]]:
        fast, _ = both(
            encoder, x, y, TAIL, site=site, heads=heads, places=places, layers=[0, 1, (0, 1)]
        )
        every = np.abs(fast.effect).max(axis=(-1, -2))
        assert every.min() > 1e-3


def test_cells_of_different_windows(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Each beside the keys of its own, whose rows are another's places."""
    sites: list[Site] = ["resid_pre", "v", "z"]
    for site in sites:
        fast, _ = both(encoder, x[[0]], y[[0]], TAIL, site=site, places=[3, 53, 60])
        assert np.abs(fast.effect).max(axis=(-1, -2)).min() > 1e-4


@pytest.mark.parametrize("donor", ["zero", "self", "mean", "mean by position", "noise", "between"])
def test_donors(encoder: HookedALM, x: ALMInput, y: ALMInput, donor: str) -> None:
    given: dict[str, Any] = {
        "mean": Mean(y), "mean by position": Mean(y[[0, 0]], by_position=True), "noise": Noise(2.0),
        "between": y,
    }  # fmt: skip
    mode = {"self": "scale", "between": "interpolate"}.get(donor, "replace")
    ours = x[[0]] if donor == "mean by position" else x
    fast, _ = both(
        encoder, ours, given.get(donor, donor), TAIL, site="attn_out", places=["audio", 7],
        mode=mode, coefficient=0.6,
    )  # fmt: skip
    assert moved(fast) > 1e-2


@torch.no_grad()
def test_patterns_have_the_keys_of_their_window(
    encoder: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    """Written by hooks at a window's own rows and keys."""
    name, rows = f"{B}.0.attn.hook_pattern", [52, 60]
    theirs = encoder.run_with_cache(y, names_filter=name)[1][name]

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[1, 2, [2, 10]] = theirs[1, 2, [2, 10]]  # window 1 is the row's second
        return value

    expected = encoder.run_with_hooks(x, fwd_hooks=[(name, write)])[0, -5:].flatten()
    found = patch(
        encoder, x, y, TAIL, site="pattern", heads=[2], layers=[0], places=[tuple(rows)]
    ).values[0, 0, 0, 0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=rounding(encoder, x))


@torch.no_grad()
def test_a_sweep_is_what_hugging_face_does(
    tiny_models: TinyModels, encoder: HookedALM, x: ALMInput
) -> None:
    """Every head muted at rows 3 to 20 of a clip, by PyTorch hooks on the published class."""
    hf = tiny_models.hf()
    found = patch(encoder, x, "zero", TAIL, site="z", heads="each", places=[Window(0.06, 0.4)])
    for layer, module in enumerate(hf.model.audio_tower.layers):
        attn = module.self_attn
        for head in range(attn.num_heads):

            def mute(
                module: nn.Module, args: tuple[Tensor], head: int = head, d: int = attn.head_dim
            ) -> tuple[Tensor]:
                z = args[0].unflatten(-1, (-1, d)).clone()
                z[0, 3:20, head] = z[2, 3:12, head] = 0  # the third window is the second row's
                return (z.flatten(2),)

            handle = attn.out_proj.register_forward_pre_hook(mute)
            expected = hf(**INPUTS).logits[:, -5:].flatten(1)
            handle.remove()
            np.testing.assert_allclose(
                found.values[layer, head, 0], expected.numpy(), rtol=0, atol=rounding(encoder, x)
            )
    assert moved(found) > 1e-2


@torch.no_grad()
def test_a_whole_clip_is_the_donors(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """At any depth, which is said: what is heard is the donor's embeddings."""
    with pytest.warns(UserWarning, match="at any depth"):
        found = patch(encoder, x, y, TAIL, site="resid_post", places=[("audio", 3)])
    heard = encoder.run_with_cache(y, names_filter="hook_audio_embed")[1]["hook_audio_embed"]
    expected = encoder.run_with_hooks(x, fwd_hooks=[("hook_audio_embed", lambda v, hook: heard)])
    for values in found.values:
        np.testing.assert_allclose(
            values[0], expected[:, -5:].flatten(1).numpy(), rtol=0, atol=rounding(encoder, x)
        )


def test_edges(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Both engines and both kinds of path; every edge at once is the whole clip's donor."""
    senders = ["audio.encoder.hook_embed", f"{B}.0.attn.hook_z[1]", f"{B}.0.hook_mlp_out"]
    inputs = [f"{B}.1.attn.hook_{part}_input[0]" for part in "qkv"]
    receivers = [*inputs, f"{B}.1.hook_mlp_in", "audio.encoder.ln_final"]
    for mode in ("edge", "ioi"):
        fast, plain = (
            path_patch(
                encoder, x, y, TAIL, senders, receivers, places=["audio", 6], mode=mode,
                engine=engine,
            )
            for engine in ("fast", "hooks")
        )  # fmt: skip
        np.testing.assert_allclose(fast.values, plain.values, rtol=0, atol=rounding(encoder, x))
        assert np.abs(fast.effect).max(axis=(-1, -2)).min() > 1e-5
    edges = all_edges(encoder)
    assert {name for edge in edges for name in edge} >= {senders[0], receivers[-1]}
    every = patch_edges(encoder, x, y, TAIL, {"every": edges, "half": edges[1::2]})
    with pytest.warns(UserWarning, match="at any depth"):
        whole = patch(encoder, x, y, TAIL, site="resid_pre", layers=[0])
    limit = rounding(encoder, x)
    np.testing.assert_allclose(every.values[0], whole.values[0], rtol=0, atol=limit)
    assert np.abs(every.values[1] - every.values[0]).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "norm"), [("edge", "exact"), ("edge", "frozen"), ("ioi", "exact")]
)
def test_an_edge_by_hand(
    encoder: HookedALM, x: ALMInput, y: ALMInput, mode: Any, norm: Any
) -> None:
    """From a head to a value's input: shifts, means and the biases of the MLP between are in it."""
    sent, mid, heard = f"{B}.0.attn.hook_z", f"{B}.0.hook_resid_mid", f"{B}.1.hook_resid_pre"
    base, donor = (
        encoder.run_with_cache(one, names_filter=[sent, mid, heard])[1].cache_dict for one in (x, y)
    )
    first, second = (encoder.block(layer) for layer in (0, 1))
    message = (donor[sent] - base[sent])[:, :, 1] @ first.attn.W_O[1]
    stream = base[heard] + message
    if mode == "ioi":
        stream = base[mid] + message
        stream = stream + first.mlp(first.ln2(stream))
    of = base[heard] if norm == "frozen" else stream
    scale = (of.var(-1, unbiased=False, keepdim=True) + second.ln1.eps).sqrt()
    normed = (stream - stream.mean(-1, keepdim=True)) / scale * second.ln1.weight + second.ln1.bias
    value = (normed @ second.attn.W_V[2]) + second.attn.b_V[2]

    def speak(v: Tensor, hook: Any) -> Tensor:
        v = v.clone()
        v[0, 4:9, 2] = value[0, 4:9]
        return v

    expected = encoder.run_with_hooks(x, fwd_hooks=[(f"{B}.1.attn.hook_v", speak)])[0, -5:]
    found = path_patch(
        encoder, x, y, TAIL, f"{B}.0.attn.hook_z[1]", f"{B}.1.attn.hook_v_input[2]",
        places=[Window(0.08, 0.18)], norm=norm, mode=mode,
    )  # fmt: skip
    np.testing.assert_allclose(
        found.values[0, 0, 0, 0], expected.flatten().numpy(), rtol=0, atol=rounding(encoder, x)
    )
    assert np.abs(found.effect[0, 0, 0, 0]).max() > 1e-3


@torch.no_grad()
def test_a_path_into_the_decoder_by_hand(model: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Of two heads together: through the final norm, the pooling, the projector and the merge."""
    end, stream = f"{B}.1.hook_resid_post", "blocks.2.hook_resid_pre"
    sent = [f"{B}.{layer}.attn.hook_z" for layer in (0, 1)]
    runs = [
        model.run_with_cache(one, names_filter=[*sent, "hook_embed", stream])[1] for one in (x, y)
    ]
    encoder = model.towards("encoder")

    def add(value: Tensor, hook: Any) -> Tensor:
        message = sum(
            (runs[1][name] - runs[0][name])[:, :, head] @ encoder.block(layer).attn.W_O[head]
            for layer, (name, head) in enumerate(zip(sent, (2, 0), strict=True))
        )
        return value + message

    kept: dict[str, Tensor] = {}
    hooks = [(end, add), ("hook_embed", lambda value, hook: kept.update(embed=value.clone()))]
    model.run_with_hooks(x, fwd_hooks=hooks)
    change = kept["embed"] - runs[0]["hook_embed"]
    assert not change[~x.spans.heard].any()
    block = model.block(2)
    key = block.attn.project("k", block.ln1(runs[0][stream] + change))

    def hear(k: Tensor, hook: Any) -> Tensor:
        k = k.clone()
        k[x.spans.heard] = torch.where(
            torch.arange(k.shape[2])[:, None] == 1, key[x.spans.heard], k[x.spans.heard]
        )
        return k

    expected = model.run_with_hooks(x, fwd_hooks=[("blocks.2.attn.hook_k", hear)])[:, -5:]
    pair = (f"{sent[0]}[2]", f"{sent[1]}[0]")
    for engine in ("fast", "hooks"):
        found = path_patch(
            model, x, y, TAIL, [pair, f"{sent[0]}[1]"], "blocks.2.attn.hook_k_input[1]",
            places=["audio"], engine=engine,
        )  # fmt: skip
        np.testing.assert_allclose(
            found.values[0, 0, 0], expected.flatten(1).numpy(), rtol=0, atol=rounding(model, x)
        )
        assert np.abs(found.effect).max(axis=(1, 2, 3, 4)).min() > 1e-4


def test_chains(model: HookedALM, encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """Within the encoder, on to all rows of the window; and from there into the decoder."""
    first = f"{B}.0.attn.hook_z[1]"
    within = [
        (first, f"{B}.1.attn.hook_{part}_input[2]", "audio.encoder.ln_final") for part in "qkv"
    ] + [(first, f"{B}.1.hook_mlp_in", "audio.encoder.ln_final")]
    out = [(first, "blocks.1.attn.hook_v_input[0]", "logits")]
    for at, chains in ((encoder, within), (model, out)):
        fast, plain = (
            patch_chains(at, x, y, TAIL, chains, place="audio", engine=engine)
            for engine in ("fast", "hooks")
        )
        np.testing.assert_allclose(fast.values, plain.values, rtol=0, atol=rounding(model, x))
        assert np.abs(fast.effect).max(axis=(1, 2)).min() > 1e-4


def test_a_chain_from_a_row_that_does_not_run(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    chain = (f"{B}.0.attn.hook_z[1]", f"{B}.1.attn.hook_v_input[2]", "audio.encoder.ln_final")
    found = patch_chains(encoder, x, y, TAIL, [chain], place=45)
    assert moved(found) == 0


@torch.no_grad()
def test_a_chain_by_hand(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """A head's message to an MLP, and what that says otherwise to the end: biases cancel."""
    sent, mid = f"{B}.0.attn.hook_z", f"{B}.1.hook_resid_mid"
    post, end = f"{B}.1.mlp.hook_post", f"{B}.1.hook_resid_post"
    base, donor = (
        encoder.run_with_cache(one, names_filter=[sent, mid, post])[1].cache_dict for one in (x, y)
    )
    first, second = (encoder.block(layer) for layer in (0, 1))
    heard = base[mid] + (donor[sent] - base[sent])[:, :, 1] @ first.attn.W_O[1]
    told = second.mlp(second.ln2(heard)) - second.mlp(second.ln2(base[mid]))
    assert second.mlp.b_out.abs().min() > 0
    expected = encoder.run_with_hooks(x, fwd_hooks=[(end, lambda value, hook: value + told)])
    chain = (f"{sent}[1]", f"{B}.1.hook_mlp_in", "audio.encoder.ln_final")
    found = patch_chains(encoder, x, y, TAIL, [chain], place="audio")
    np.testing.assert_allclose(
        found.values[0], expected[:, -5:].flatten(1).numpy(), rtol=0, atol=rounding(encoder, x)
    )
    assert moved(found) > 1e-3


@pytest.fixture
def mixed(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    """Three prompts, of which the second has no clip, with windows as wide as the encoder's."""
    x, y = (
        model.encode(**with_positions(hf_inputs([[63], [], [40]], [9, 14, 11], seed=seed)))
        for seed in (1, 2)
    )
    return x, y


def test_prompts_without_a_clip(
    model: HookedALM, encoder: HookedALM, mixed: tuple[ALMInput, ALMInput]
) -> None:
    """They are what they were; windows behind them are other prompts'."""
    x, y = mixed
    rows, name = model.encoder_rows(x), f"{B}.1.attn.hook_z"
    value = model.run_with_cache(x, names_filter=name)[1][name]
    by_prompt = rows.by_prompt(name, value)
    assert by_prompt.shape[0] == 3
    assert torch.equal(by_prompt[[0, 2]], value)
    assert not by_prompt[1].any()
    donors: list[Any] = [y, Noise(2.0)]
    for donor in donors:
        fast, _ = both(encoder, x, donor, TAIL, site="z", places=["audio"])
        reached = np.abs(fast.effect).max(axis=(0, 1, 3))
        assert reached[1] == 0
        assert reached[[0, 2]].min() > 1e-3
    into = "blocks.1.attn.hook_k_input[0]"
    for engine in ("fast", "hooks"):
        told = path_patch(
            model, x, y, TAIL, f"{B}.0.attn.hook_z[1]", into, places=["readout", "all"],
            engine=engine,
        )  # fmt: skip
        reached = np.abs(told.effect).max(axis=(0, 1, 2, 4))
        assert reached[1] < rounding(model, x)
        assert reached[[0, 2]].min() > 1e-5


def test_another_thread_never_hears_a_cell(
    model: HookedALM, x: ALMInput, y: ALMInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second thread waits while the encoder starts behind its blocks, chains included."""
    fresh = model.encode(**with_positions(hf_inputs([[50]], [8], seed=5)))
    with torch.no_grad():
        expected = model(model.encode(**with_positions(hf_inputs([[50]], [8], seed=5))))
    heard: list[Tensor] = []
    embed = FrontEnd.embed_states

    def listen() -> None:
        with torch.no_grad():
            heard.append(model(fresh))

    def slow(self: FrontEnd, *args: Any) -> Tensor:
        thread = threading.Thread(target=listen)
        thread.start()
        assert self.hooked_encoder is not None
        with self.hooked_encoder.resumed(args[1]):
            thread.join(timeout=0.5)
        threads.append(thread)
        return embed(self, *args)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(FrontEnd, "embed_states", slow)
    chain = (f"{B}.0.attn.hook_z[1]", "blocks.1.attn.hook_v_input[0]", "logits")
    patch_chains(model, x[[1]], y[[1]], TAIL, [chain], place="audio")
    for thread in threads:
        thread.join()
    assert heard
    assert all(torch.equal(one, expected) for one in heard)


def test_messages_of_clips_of_another_length(model: HookedALM, x: ALMInput) -> None:
    """Rows without a donor's say nothing; the others what they say."""
    other = model.encode(**with_positions(hf_inputs([[47, 40], [23]], [9, 14], seed=2)))
    sent, into = f"{B}.1.hook_mlp_out", "blocks.0.hook_resid_pre"
    with pytest.raises(InputError, match="32 base and 24 donor positions"):
        path_patch(model, x, other, TAIL, sent, into, places=["text"])
    base, donor = (
        model.run_with_cache(one, names_filter=sent)[1][sent].detach() for one in (x, other)
    )
    change = torch.zeros_like(base)
    for window, n in enumerate((24, 20, 12)):
        change[window, :n] = (donor - base)[window, :n]
    kept: dict[str, Tensor] = {}
    hooks = [(f"{B}.1.hook_resid_post", lambda value, hook: value + change)]
    hooks += [("hook_embed", lambda value, hook: kept.update(embed=value.clone()))]
    with torch.no_grad():
        model.run_with_hooks(x, fwd_hooks=hooks)
        told = kept["embed"] - model(x, stop_at_layer=0)
        # The places are aligned alike: 12 of 16 positions of the first clip, and all of the others.
        (start, _), second = x.spans["audio"][0]
        is_heard = torch.zeros(x.shape)
        is_heard[0, start : start + 12] = is_heard[0, slice(*second)] = 1
        is_heard[1, slice(*x.spans["audio"][1][0])] = 1
        add = (into, lambda value, hook: value + told * is_heard[..., None])
        expected = TAIL.function(model.run_with_hooks(x, fwd_hooks=[add]))
    found = path_patch(model, x, other, TAIL, sent, into, places=["audio"], policy="truncate")
    np.testing.assert_allclose(
        found.values[0, 0, 0], expected.numpy(), rtol=0, atol=rounding(model, x)
    )
    assert moved(found) > 1e-3


def test_operations_do_not_grow_with_cells(
    model: HookedALM, encoder: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    sweeps: list[Any] = [
        [partial(patch, encoder, x, y, LogitDiff(7, 9), site=site, heads=heads, places=["audio"])
         for heads in ([0, 2], [0, 1, 2])]
        for site in ("z", "v", "q")
    ]  # fmt: skip
    sweeps.append(
        [
            partial(patch, encoder, x, y, LogitDiff(7, 9), site="mlp_out", places=places)
            for places in ([3, 8], [3, 8, 9, 10])
        ]
    )
    for into, at in (("blocks.1.attn.hook_k_input[0]", model), ("audio.encoder.ln_final", encoder)):
        sweeps.append(
            [
                partial(
                    path_patch, at, x, y, LogitDiff(7, 9),
                    [f"{B}.0.attn.hook_z[{head}]" for head in heads], into, places=["audio"],
                )
                for heads in ([0, 2], [0, 1, 2])
            ]
        )  # fmt: skip
    for few, many in sweeps:
        found = operations(few), operations(many)
        assert found[0] == found[1]
        assert found[0].total() > 100


def test_memory_is_a_matter_of_rounding(encoder: HookedALM, x: ALMInput, y: ALMInput) -> None:
    """A cell at a time, and all together."""
    run = partial(patch, encoder, x, y, TAIL, site="z", heads="each", places=["audio"])
    np.testing.assert_allclose(
        run(max_bytes=1).values, run().values, rtol=0, atol=rounding(encoder, x)
    )


def test_noise_in_low_precision(tiny_models: TinyModels) -> None:
    low = tiny_models.hooked(dtype=torch.bfloat16)
    base, donor = (low.encode(**some) for some in (INPUTS, OTHER))
    fast, _ = both(low.towards("encoder"), base, donor, TAIL, site="z", places=["audio"])
    assert fast.noise is not None
    assert 0 < fast.noise.max() < moved(fast)
    with pytest.raises(InputError, match="dtype='float32'"):
        patch(low.towards("encoder"), base, donor, TAIL, precision="float32", places=["audio"])


def test_what_does_not_run_along_an_encoder(
    model: HookedALM, encoder: HookedALM, x: ALMInput, y: ALMInput
) -> None:
    metric = LogitDiff(7, 9)
    head, into = f"{B}.0.attn.hook_z[1]", "blocks.1.hook_mlp_in"
    for call in (
        partial(logit_lens, encoder, x, [3]), partial(TunedLens.untrained, encoder),
        partial(attention_mass, encoder, x, ["audio"]), partial(HeadMeter, encoder),
        partial(attribute_nodes, encoder, x, y, metric),
        partial(attribute_edges, encoder, x, y, metric, head, "audio.encoder.ln_final"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"along audio.encoder.blocks: .*towards\('text'\)"):
            call()
    with pytest.raises(InputError, match="attributing edges from .* heard already"):
        attribute_edges(model, x, y, metric, head, into)
    with pytest.raises(InputError, match="of the encoder would be frozen"):
        path_patch(model, x, y, metric, head, into, mode="ioi")
    with pytest.raises(InputError, match=r"take model.towards\('encoder'\)"):
        path_patch(model, x, y, metric, head, f"{B}.1.hook_mlp_in")
    with pytest.raises(InputError, match="not on the way through the encoder"):
        path_patch(encoder, x, y, metric, head, into, places=["audio"])
    with pytest.raises(InputError, match="this input has audio, padding"):
        path_patch(encoder, x, y, metric, head, "audio.encoder.ln_final")
    with pytest.raises(InputError, match="which run whole"):
        encoder(x, stop_at_layer=1)
    with pytest.raises(InputError, match=r"hook_resid_post, audio.encoder.ln_final"):
        path_patch(encoder, x, y, metric, head, "logits", places=["audio"])
    with pytest.raises(InputError, match="naming the sender 'blocks.0.audio.encoder"):
        path_patch(model, x, y, metric, "blocks.0.audio.encoder.hook_mlp_out", into)
    with pytest.raises(InputError, match="the prompts have no audio"):
        path_patch(
            model, x[[1]], model.encode(input_ids=torch.tensor([[4, 5]])), metric, head, into
        )
    with pytest.raises(InputError, match="the prompts have no audio"):
        model.encoder_rows(torch.tensor([[4, 5]]))
    text = model.encode(input_ids=torch.tensor([[4, 5, 6]]))
    with pytest.raises(InputError, match="the prompts have no audio"):
        patch(encoder, text, "zero", metric)


@torch.no_grad()
def test_the_model_stays_what_it_is(model: HookedALM, encoder: HookedALM, x: ALMInput) -> None:
    assert torch.equal(encoder(x), model(x))
    assert encoder.towards("text").path == model.path
    assert encoder.path == (f"{B}.0", f"{B}.1")
    assert "audio.encoder.blocks" in repr(encoder)
    ours, theirs = (one.run_with_cache(x)[1].cache_dict for one in (encoder, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not [*model.list_hooks()]
