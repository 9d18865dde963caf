"""Code written for HookedTransformer, and TransformerLens' own tools, run with the audio."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformer_lens import patching
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    attribution_patch,
    direct_logit_attribution,
    faithfulness,
)
from transformer_lens.tools.analysis import logit_lens as tl_logit_lens

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.lens import logit_lens
from tiny import TinyModels, hf_inputs
from tolerances import OTHER_KERNEL, RECOVERED

TOKEN = 5
CLOSE = {"atol": OTHER_KERNEL[torch.float32], "rtol": OTHER_KERNEL[torch.float32]}
CLIPS, WORDS = [[40]], [9]


@pytest.fixture(params=["mha", "gqa"])
def model(request: pytest.FixtureRequest, tiny_models: TinyModels) -> HookedALM:
    """Grouped and not."""
    return tiny_models.hooked(request.param)


@pytest.fixture
def ungrouped(tiny_models: TinyModels) -> Iterator[HookedALM]:
    """A grouped model while it shows keys and values per query head."""
    model = tiny_models.hooked("gqa")
    model.set_ungroup_grouped_query_attention(True)
    yield model
    model.set_ungroup_grouped_query_attention(False)


def clean_and_corrupt(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    """The same words around two clips of equal length."""
    inputs = hf_inputs(CLIPS, WORDS)
    other = {**inputs, "input_features": inputs["input_features"].flip(-1)}
    return model.encode(**inputs), model.encode(**other)


def metric(logits: Tensor) -> Tensor:
    """The logit of one token at the readout."""
    return logits[0, -1, TOKEN]


@torch.no_grad()
def test_weights_are_what_the_hooks_compute_with(model: HookedALM) -> None:
    """Per-head algebra on TransformerLens' shapes reproduces q, k, v and the head results."""
    x, _ = clean_and_corrupt(model)
    _, cache = model.run_with_cache(x, names_filter=lambda name: ".1." in name)
    normed = cache["blocks.1.ln1.hook_normalized"] * model.blocks[1].ln1.w
    for kind in "QKV":
        heads = torch.einsum("bpd,hde->bphe", normed, getattr(model, f"W_{kind}")[1])
        heads = heads + getattr(model, f"b_{kind}")[1]
        seen = cache[f"blocks.1.attn.hook_{kind.lower()}"]
        expanded = seen.repeat_interleave(model.cfg.n_heads // seen.shape[2], 2)
        torch.testing.assert_close(heads, expanded, **CLOSE)
    written = torch.einsum("bphe,hed->bpd", cache["blocks.1.attn.hook_z"], model.W_O[1])
    torch.testing.assert_close(written + model.b_O[1], cache["blocks.1.hook_attn_out"], **CLOSE)
    n_layers, n_heads, d_model = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    for factored, parts in ((model.QK, "QK"), (model.OV, "OV")):
        assert tuple(factored.shape) == (n_layers, n_heads, d_model, d_model), parts
    direct = model.W_V[2, 3] @ model.W_O[2, 3]
    torch.testing.assert_close(model.OV[2, 3].AB, direct, **CLOSE)
    assert len(model.all_head_labels()) == n_layers * n_heads


@torch.no_grad()
def test_ungrouping_shows_every_query_head(tiny_models: TinyModels, ungrouped: HookedALM) -> None:
    """Same results, more heads to hook, and nothing left behind when it is switched off."""
    x, _ = clean_and_corrupt(ungrouped)
    assert ungrouped.cfg.n_key_value_heads == ungrouped.cfg.n_heads
    logits, cache = ungrouped.run_with_cache(x, names_filter=lambda name: name.endswith("hook_k"))
    ungrouped.set_ungroup_grouped_query_attention(False)
    grouped, kv = ungrouped.run_with_cache(x, names_filter=lambda name: name.endswith("hook_k"))
    torch.testing.assert_close(logits, grouped, **CLOSE)
    n_groups = ungrouped.cfg.n_groups
    assert n_groups > 1
    for name, keys in kv.items():
        assert torch.equal(cache[name], keys.repeat_interleave(n_groups, 2))
    assert torch.equal(grouped, tiny_models.hooked("gqa")(x))


@torch.no_grad()
def test_one_query_heads_key_can_be_patched_alone(ungrouped: HookedALM) -> None:
    """Zeroing the key of one head changes its pattern only, also through the split input."""
    x, _ = clean_and_corrupt(ungrouped)
    name = "blocks.1.attn.hook_pattern"
    _, before = ungrouped.run_with_cache(x, names_filter=name)

    def zero_head_4(value: Tensor, hook: object) -> Tensor:
        return value.index_fill(2, torch.tensor([4]), 0.0)

    for point in ("blocks.1.attn.hook_k", "blocks.1.attn.hook_k_input"):
        with ungrouped.hooks(fwd_hooks=[(point, zero_head_4)]):
            _, after = ungrouped.run_with_cache(x, names_filter=name)
        moved = (before[name] - after[name]).abs().amax((0, 2, 3)) > 1e-6
        assert moved.tolist() == [head == 4 for head in range(6)], point


@torch.no_grad()
@pytest.mark.parametrize(
    ("sweep", "site", "axis"),
    [
        (patching.get_act_patch_resid_pre, "hook_resid_pre", 1),
        (patching.get_act_patch_attn_out, "hook_attn_out", 1),
        (patching.get_act_patch_mlp_out, "hook_mlp_out", 1),
        (patching.get_act_patch_attn_head_out_all_pos, "attn.hook_z", 2),
        (patching.get_act_patch_attn_head_k_all_pos, "attn.hook_k", 2),
        (patching.get_act_patch_attn_head_v_all_pos, "attn.hook_v", 2),
    ],
)
def test_patching_sweeps_hear_the_audio(
    model: HookedALM, sweep: Callable[..., Tensor], site: str, axis: int
) -> None:
    """Cells equal runs written out by hand, and the two runs do differ."""
    base, donor = clean_and_corrupt(model)
    clean, cache = model.run_with_cache(donor)
    found = sweep(model, base, cache, metric)
    for layer, cell in ((0, 0), (1, found.shape[1] - 1), (3, 1)):
        name = f"blocks.{layer}.{site}"
        index = torch.tensor([cell])
        values = cache[name].index_select(axis, index)

        def write(
            value: Tensor, hook: object, index: Tensor = index, values: Tensor = values
        ) -> Tensor:
            return value.index_copy(axis, index, values)

        by_hand = metric(model.run_with_hooks(base, fwd_hooks=[(name, write)]))
        assert torch.equal(found[layer, cell], by_hand)
    assert not torch.equal(metric(clean), metric(model(base)))


@torch.no_grad()
def test_transformer_lens_own_lens_agrees(model: HookedALM) -> None:
    """Its logit lens, run on an ``ALMInput``, gives our lens logits at every depth."""
    x, _ = clean_and_corrupt(model)
    ours = logit_lens(model, x, range(model.cfg.d_vocab))[:, :, 0]
    theirs = tl_logit_lens(model, x).readout.values
    torch.testing.assert_close(theirs, ours, **CLOSE)


@torch.no_grad()
def test_direct_logit_attribution_adds_up_to_the_logit(model: HookedALM) -> None:
    """Right on weights that nobody folded: the components' shares sum to the model's own logit."""
    x, _ = clean_and_corrupt(model)
    assert (model.ln_final.w - 1).abs().max() > 0.1
    logits, cache = model.run_with_cache(x)
    for unit in ("component", "head"):
        found = direct_logit_attribution(model, x, TOKEN, unit=unit)
        torch.testing.assert_close(
            found.attribution.sum(0).squeeze(), logits[0, -1, TOKEN], **CLOSE
        )
    parts = cache.decompose_resid(apply_ln=True, pos_slice=-1)
    shares = parts @ model.tokens_to_residual_directions(TOKEN)
    torch.testing.assert_close(shares.sum(0)[0], logits[0, -1, TOKEN], **CLOSE)


@torch.no_grad()
def test_cache_methods_decompose_the_stream(model: HookedALM) -> None:
    """Embedding, attention and MLP outputs add up to the stream, audio positions included."""
    x, _ = clean_and_corrupt(model)
    _, cache = model.run_with_cache(x)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "embed"
    last = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    torch.testing.assert_close(parts.sum(0), last, **CLOSE)
    heads = cache.stack_head_results(layer=2)
    attn = sum(cache[f"blocks.{layer}.hook_attn_out"] for layer in range(2))
    torch.testing.assert_close(heads.sum(0), attn, **CLOSE)


@torch.no_grad()
def test_flags_decide_what_a_cache_without_names_keeps(model: HookedALM) -> None:
    """Off, costly points stay out; on, they are in; hooked by name they fire either way."""
    x, _ = clean_and_corrupt(model)
    assert "blocks.0.attn.hook_result" not in model.run_with_cache(x)[1]
    model.set_use_attn_result(True)
    try:
        assert "blocks.0.attn.hook_result" in model.run_with_cache(x)[1]
    finally:
        model.set_use_attn_result(False)
    if model.cfg.n_groups > 1:
        with pytest.raises(InputError, match="cannot feed fewer kv heads"):
            model.set_use_attn_in(True)


@torch.no_grad()
def test_the_loss_never_scores_placeholders(model: HookedALM) -> None:
    """Next-token cross-entropy by hand, over the words alone."""
    inputs = hf_inputs([[40], [23]], [9, 14])
    x = model.encode(**inputs)
    logits, loss = model(x, return_type="both")
    total, n = 0.0, 0
    for row in range(2):
        for pos in range(1, x.shape[1]):
            is_word = x.tokens[row, pos] != model.audio.tokens.placeholder
            if is_word and x.attention_mask[row, pos - 1]:
                total += F.cross_entropy(logits[row, pos - 1], x.tokens[row, pos])
                n += 1
    torch.testing.assert_close(loss, total / n, **CLOSE)
    assert torch.equal(model(x, return_type="loss"), loss)


def test_gradients_of_a_loss_are_cached(model: HookedALM) -> None:
    """`run_with_cache(incl_bwd=True)` reaches the audio positions of ``hook_embed``."""
    x, _ = clean_and_corrupt(model)
    _, cache = model.run_with_cache(x, names_filter="hook_embed", incl_bwd=True, return_type="loss")
    gradient = cache["hook_embed_grad"]
    assert gradient[0, x.spans.positions("audio", 0)].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_direct_paths_into_q_k_and_v(ungrouped: HookedALM, part: str) -> None:
    """TransformerLens' path patching, on a grouped model, against the algebra of one edge."""
    model, (source, head) = ungrouped, (0, 1)
    base, donor = clean_and_corrupt(model)
    _, clean = model.run_with_cache(donor)
    _, corrupt = model.run_with_cache(base)
    found = patching.get_act_patch_direct_path(
        model, base, clean, corrupt, metric, source, head, component=part, verbose=False
    )
    name = f"blocks.{source}.attn.hook_z"
    delta = (clean[name] - corrupt[name])[:, :, head] @ model.W_O[source, head]
    for layer, reader in ((1, 0), (2, 5), (3, 3)):
        resid = corrupt[f"blocks.{layer}.hook_resid_pre"] + delta
        rms = (resid.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        normed = resid / rms * model.blocks[layer].ln1.w
        weight, bias = getattr(model, f"W_{part.upper()}"), getattr(model, f"b_{part.upper()}")
        new = normed @ weight[layer, reader] + bias[layer, reader]

        def write(value: Tensor, hook: object, new: Tensor = new, reader: int = reader) -> Tensor:
            return value.index_copy(2, torch.tensor([reader]), new.unsqueeze(2))

        edited = model.run_with_hooks(base, fwd_hooks=[(f"blocks.{layer}.attn.hook_{part}", write)])
        torch.testing.assert_close(found[layer, reader], metric(edited), **CLOSE)
    assert (found[1:] - metric(model(base))).abs().max() > 1e-3


def test_edge_attribution_and_faithfulness(ungrouped: HookedALM) -> None:
    """On a grouped model, with audio: all edges restore the clean run, none leave the other.

    Scores of the embedding are zero before the clip and not inside it: the audio is heard, and
    gradients reach it.
    """
    inputs = hf_inputs([[24]], [5])
    clean = ungrouped.encode(**inputs)
    corrupt = ungrouped.encode(**{**inputs, "input_features": inputs["input_features"].flip(-1)})
    config = EdgeAttributionConfig(granularity="edge")
    scores = attribution_patch(ungrouped, clean, corrupt, metric, config)
    embed = {n.position: s for n, s in scores.node_scores.items() if n.kind == "embed"}
    audio = clean.spans.positions("audio", 0)
    assert all(embed[pos] == 0 for pos in range(audio[0]))
    assert all(embed[pos] != 0 for pos in audio)
    everything = faithfulness(ungrouped, clean, corrupt, metric, list(scores.edge_scores))
    assert everything.recovered == pytest.approx(1.0, abs=RECOVERED)
    full = float(metric(ungrouped(clean)).detach())
    assert everything.full_metric == pytest.approx(full, abs=CLOSE["atol"])
    nothing = faithfulness(ungrouped, clean, corrupt, metric, [])
    assert nothing.recovered == pytest.approx(0.0, abs=RECOVERED)
