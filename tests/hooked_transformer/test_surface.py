"""Code written for HookedTransformer runs with the audio. TransformerLens' tools: test_tl_*."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hooked_alm import ALMInput, HookedALM, InputError
from tiny import TinyModels, hf_inputs
from tolerances import OTHER_KERNEL

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
    names = [f"blocks.{layer}.attn.hook_k" for layer in range(ungrouped.cfg.n_layers)]
    logits, cache = ungrouped.run_with_cache(x, names_filter=names)
    ungrouped.set_ungroup_grouped_query_attention(False)
    grouped, kv = ungrouped.run_with_cache(x, names_filter=names)
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
