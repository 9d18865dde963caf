"""What hooks do to a run: edits reach the logits as they should, and nothing else."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2

from hf_reference import with_positions
from hooked_alm import HookedALM, HookNameError, InputError
from tiny import TinyModels, hf_inputs
from tolerances import AGAINST_FP64, OTHER_KERNEL

Hook = Callable[[Tensor, Any], Tensor | None]
INPUTS = hf_inputs([[30, 17], [97]], [8, 5])
REAL = INPUTS["attention_mask"].bool()
"""Kernels agree about these rows only: a pad may attend to anything."""
ON_DEMAND = (
    "hook_tokens", "blocks.1.hook_attn_in", "blocks.1.hook_q_input", "blocks.1.hook_k_input",
    "blocks.1.hook_v_input", "blocks.1.ln1.hook_scale", "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result", "blocks.1.hook_mlp_in",
    "blocks.1.ln2.hook_scale", "ln_final.hook_scale",
)  # fmt: skip
"""Points that are computed on the side, of one block."""


def returned(edit: Callable[[Tensor], Tensor]) -> Hook:
    return lambda value, hook: edit(value.clone())


def in_place(edit: Callable[[Tensor], Tensor]) -> Hook:
    def hook_function(value: Tensor, hook: Any) -> None:
        value.copy_(edit(value.clone()))

    return hook_function


def through_data(edit: Callable[[Tensor], Tensor]) -> Hook:
    def hook_function(value: Tensor, hook: Any) -> None:
        value.data.copy_(edit(value.clone()))

    return hook_function


def edit_of(name: str) -> Callable[[Tensor], Tensor]:
    """A change that no softmax or norm cancels."""

    def edit(value: Tensor) -> Tensor:
        if name == "hook_tokens":
            value[:, -1] = 7
        else:
            value[..., ::2] *= 0.5
            if value.shape[-1] == 1:  # norm scales
                value *= 1.25
        return value

    return edit


@pytest.mark.parametrize("variant", ["gqa", "mha"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_point_takes_edits_made_in_any_way(
    tiny_models: TinyModels, variant: str, attention: str
) -> None:
    model = tiny_models.hooked(variant, attention=attention)
    x = model.encode(**INPUTS)
    before = model(x)
    tokens, features = x.tokens.clone(), [clip.features.clone() for clip in x.clips]
    names = [
        name
        for name in model.matching(lambda name: True)
        if not name.startswith(("blocks.0", "blocks.2", "blocks.3"))
    ]
    for name in names:
        edit = edit_of(name)
        after = [
            model.run_with_hooks(x, fwd_hooks=[(name, way(edit))])
            for way in (returned, in_place, through_data)
        ]
        assert not torch.equal(after[0], before), name
        assert torch.equal(after[1], after[0]), name
        assert torch.equal(after[2], after[0]), name
        assert torch.equal(model(x), before), f"{name} leaks into the next run"
    assert torch.equal(x.tokens, tokens)
    assert all(torch.equal(c.features, f) for c, f in zip(x.clips, features, strict=True))
    unfireable = {"blocks.1.hook_attn_in"} if variant == "gqa" else set()
    assert set(ON_DEMAND) - unfireable <= set(names)


def test_edits_work_with_gradients(mha: HookedALM) -> None:
    x = mha.encode(**INPUTS)
    for name in ON_DEMAND:
        edit = edit_of(name)
        with torch.no_grad():
            expected = mha.run_with_hooks(x, fwd_hooks=[(name, returned(edit))])
        for way in (returned, in_place, through_data):
            assert torch.equal(mha.run_with_hooks(x, fwd_hooks=[(name, way(edit))]), expected), name
    with torch.inference_mode():
        for way in (returned, in_place, through_data):
            assert torch.equal(mha.run_with_hooks(x, fwd_hooks=[(name, way(edit))]), expected)


def hf_point(hf: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The Hugging Face module whose input ("pre") or output ("post") a hook point is."""
    if name.startswith("blocks."):
        _, layer, point = name.split(".", 2)
        block = hf.model.language_model.layers[int(layer)]
        attn, mlp = block.self_attn, block.mlp
        return {
            "hook_resid_pre": (block, "pre"),
            "attn.hook_q": (attn.q_proj, "post"),
            "attn.hook_k": (attn.k_proj, "post"),
            "attn.hook_v": (attn.v_proj, "post"),
            "attn.hook_z": (attn.o_proj, "pre"),
            "hook_attn_out": (attn.o_proj, "post"),
            "hook_mlp_in": (block.post_attention_layernorm, "pre"),
            "mlp.hook_pre": (mlp.gate_proj, "post"),
            "mlp.hook_gate": (mlp.act_fn, "post"),
            "mlp.hook_pre_linear": (mlp.up_proj, "post"),
            "mlp.hook_post": (mlp.down_proj, "pre"),
            "hook_mlp_out": (mlp.down_proj, "post"),
            "hook_resid_post": (block, "post"),
        }.get(point)
    return {
        "hook_text_embed": (hf.model.language_model.embed_tokens, "post"),
        "audio.hook_encoder_in": (hf.model.audio_tower, "pre"),
        "audio.hook_encoder_out": (hf.model.audio_tower.layer_norm, "post"),
        "audio.hook_projector_in": (hf.model.multi_modal_projector, "pre"),
        "audio.hook_projector_out": (hf.model.multi_modal_projector, "post"),
        "hook_embed": (hf.model.language_model.layers[0], "pre"),
        "unembed.hook_in": (hf.lm_head, "pre"),
        "unembed.hook_out": (hf.lm_head, "post"),
    }.get(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_interventions_equal_hugging_face_under_pytorch_hooks(
    tiny_models: TinyModels, dtype: torch.dtype
) -> None:
    hf, model = tiny_models.hf(dtype=dtype), tiny_models.hooked(dtype=dtype)
    x = model.encode(**INPUTS)
    compared = 0
    for name in model.matching(lambda name: not name.startswith(("blocks.1", "blocks.2"))):
        point = hf_point(hf, name)
        if point is None:
            continue
        module, side = point

        # The same edit for [.., head, d_head] and [.., head * d_head].
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            value[-1:] *= 0.5
            return value

        if side == "pre":
            handle = module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
        else:
            handle = module.register_forward_hook(lambda _, args, out: edit(out))
        expected = hf(**with_positions(INPUTS)).logits
        handle.remove()
        got = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: edit(value))])
        assert torch.equal(got, expected), name
        compared += 1
    assert compared == 2 * 13 + 8


def with_hf_attention(change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Eager attention of Hugging Face with scores, then pattern, changed per layer."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        k = modeling_qwen2.repeat_kv(k, module.num_key_value_groups)
        v = modeling_qwen2.repeat_kv(v, module.num_key_value_groups)
        scores = torch.matmul(q, k.transpose(2, 3)) * scaling + mask
        pattern = change(module.layer_idx, scores)
        return torch.matmul(pattern, v).transpose(1, 2).contiguous(), pattern

    return mock.patch.object(modeling_qwen2, "eager_attention_forward", attention)


@torch.no_grad()
def test_edits_of_scores_and_pattern(tiny_models: TinyModels) -> None:
    def raise_score(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 4, -1, 2] += 3.0
        return scores

    def cut_column(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 1, :, 3] = 0
        return pattern

    def change(layer: int, scores: Tensor) -> Tensor:
        if layer == 2:
            scores = raise_score(scores)
        pattern = scores.softmax(-1, dtype=torch.float32)
        return cut_column(pattern) if layer == 1 else pattern

    edits = [
        ("blocks.2.attn.hook_attn_scores", lambda value, hook: raise_score(value)),
        ("blocks.1.attn.hook_pattern", lambda value, hook: cut_column(value)),
    ]
    with with_hf_attention(change):
        expected = tiny_models.hf(attention="eager")(**with_positions(INPUTS)).logits
    eager, sdpa = tiny_models.hooked(attention="eager"), tiny_models.hooked()
    got = eager.run_with_hooks(eager.encode(**INPUTS), fwd_hooks=edits)
    assert torch.equal(got, expected)
    # Under sdpa the other layers keep their kernel, and so does the audio encoder.
    got = sdpa.run_with_hooks(sdpa.encode(**INPUTS), fwd_hooks=edits)
    assert (got - expected)[REAL].abs().max() < OTHER_KERNEL[torch.float32]
    # Only the edited layers leave the kernel: the layer below is HF's sdpa, bit by bit.
    _, clean = sdpa.run_with_cache(sdpa.encode(**INPUTS))
    with sdpa.hooks(fwd_hooks=edits):
        _, edited = sdpa.run_with_cache(sdpa.encode(**INPUTS))
    assert torch.equal(edited["resid_post", 0], clean["resid_post", 0])
    assert not torch.equal(edited["resid_post", 1], clean["resid_post", 1])
    assert not edited["pattern", 1][:, 1, :, 3].any()


@torch.no_grad()
def test_result_of_a_head(tiny_models: TinyModels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.hooked(dtype=dtype)
        x = model.encode(**INPUTS)
        _, cache = model.run_with_cache(x, names_filter=lambda name: name.startswith("blocks.1"))
        error = (cache["result", 1].sum(2) - cache["attn_out", 1]).abs().max()
        assert error < OTHER_KERNEL[dtype]

        def without_head(value: Tensor, hook: Any) -> None:
            value[:, :, 3] = 0

        by_result, by_z = (
            model.run_with_hooks(x, fwd_hooks=[(f"blocks.1.attn.hook_{point}", without_head)])
            for point in ("result", "z")
        )
        assert (by_result - by_z).abs().max() < OTHER_KERNEL[dtype]
        assert (by_z - model(x)).abs().max() > 20 * (by_result - by_z).abs().max()


def replaced_heads(
    linear: nn.Linear, norm: nn.Module, d_head: int, heads: list[int], resid: Tensor
) -> Callable[..., Tensor]:
    """A PyTorch hook on a projection: the heads named read ``resid`` instead."""

    def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.unflatten(-1, (-1, d_head)).clone()
        other = nn.functional.linear(norm(resid), linear.weight, linear.bias)
        out[:, :, heads] = other.unflatten(-1, (-1, d_head))[:, :, heads]
        return out.flatten(2)

    return hook


@pytest.mark.parametrize("variant", ["gqa", "mha"])
@torch.no_grad()
def test_split_inputs_reach_their_own_heads_only(tiny_models: TinyModels, variant: str) -> None:
    hf, model = tiny_models.hf(variant), tiny_models.hooked(variant)
    x = model.encode(**INPUTS)
    _, cache = model.run_with_cache(x, names_filter="blocks.2.hook_resid_pre")
    other = cache["resid_pre", 2].flip(1)
    layer = hf.model.language_model.layers[2]
    for letter, heads in (("q", [0, 4]), ("k", [1]), ("v", [1]), ("q", [5]), ("v", [0])):
        linear = getattr(layer.self_attn, f"{letter}_proj")
        hook = replaced_heads(linear, layer.input_layernorm, model.cfg.d_head, heads, other)
        handle = linear.register_forward_hook(hook)
        expected = hf(**with_positions(INPUTS)).logits
        handle.remove()

        def swap(value: Tensor, hook: Any, heads: list[int] = heads) -> None:
            for head in heads:
                value[:, :, head] = other

        for name in (f"blocks.2.hook_{letter}_input", f"blocks.2.attn.hook_{letter}_input"):
            got = model.run_with_hooks(x, fwd_hooks=[(name, swap)])
            assert (got - expected).abs().max() < OTHER_KERNEL[torch.float32], (letter, heads)
        assert (got - model(x)).abs().max() > 0.1


@torch.no_grad()
def test_all_split_inputs_together_are_the_input_of_the_attention(mha: HookedALM) -> None:
    x = mha.encode(**INPUTS)

    def everyone(value: Tensor, hook: Any) -> Tensor:
        return value.flip(1)

    normed = mha.blocks[1].ln1
    _, cache = mha.run_with_cache(x, names_filter="blocks.1.hook_resid_pre")
    flipped = normed.normalize(cache["resid_pre", 1].flip(1))
    expected = mha.run_with_hooks(
        x, fwd_hooks=[("blocks.1.ln1.hook_normalized", lambda value, hook: flipped)]
    )
    by_parts = mha.run_with_hooks(
        x, fwd_hooks=[(f"blocks.1.hook_{letter}_input", everyone) for letter in "qkv"]
    )
    at_once = mha.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_attn_in", everyone)])
    assert (at_once - expected).abs().max() < OTHER_KERNEL[torch.float32]
    assert torch.equal(by_parts, at_once)
    # q, k and v read the edited fork, so flipping again gives back the unedited run.
    undone = mha.run_with_hooks(
        x,
        fwd_hooks=[("blocks.1.hook_attn_in", everyone)]
        + [(f"blocks.1.hook_{letter}_input", everyone) for letter in "qkv"],
    )
    assert (undone - mha(x)).abs().max() < OTHER_KERNEL[torch.float32]


@torch.no_grad()
def test_norm_scale(tiny_models: TinyModels) -> None:
    hf, model = tiny_models.hf(), tiny_models.hooked()
    x = model.encode(**INPUTS)
    _, cache = model.run_with_cache(x)
    norms = {
        "blocks.1.ln1": (hf.model.language_model.layers[1].input_layernorm, "resid_pre"),
        "blocks.1.ln2": (hf.model.language_model.layers[1].post_attention_layernorm, "resid_mid"),
        "ln_final": (hf.model.language_model.norm, "resid_post"),
    }
    for name, (norm, before) in norms.items():
        resid = cache[before, 1 if name.startswith("blocks") else 3]
        scale = cache[f"{name}.hook_scale"]
        exact = (resid.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        assert ((scale - exact) / exact).abs().max() < AGAINST_FP64
        assert scale.dtype == torch.float32

        def frozen(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return module.weight * (args[0] / 2.5)

        handle = norm.register_forward_hook(frozen)
        expected = hf(**with_positions(INPUTS)).logits
        handle.remove()
        constant = [(f"{name}.hook_scale", lambda value, hook: torch.full_like(value, 2.5))]
        assert torch.equal(model.run_with_hooks(x, fwd_hooks=constant), expected), name


@torch.no_grad()
def test_edited_tokens_are_the_tokens_of_the_run(gqa: HookedALM) -> None:
    other = {**INPUTS, "input_ids": INPUTS["input_ids"].clone()}
    other["input_ids"][:, -2:] = torch.tensor([5, 9])
    edit = [("hook_tokens", lambda value, hook: other["input_ids"])]
    got = gqa.run_with_hooks(gqa.encode(**INPUTS), fwd_hooks=edit)
    assert torch.equal(got, gqa(gqa.encode(**other)))


def test_gradient_of_the_pattern_under_sdpa(gqa: HookedALM, tiny_models: TinyModels) -> None:
    """A hook that waits for a gradient makes the pattern part of the computation."""
    inputs = hf_inputs([[97]], [6])
    output = tiny_models.hf(attention="eager")(**inputs, output_attentions=True)
    (expected,) = torch.autograd.grad(output.logits[:, -1, 5].sum(), [output.attentions[2]])
    found: list[Tensor] = []
    hooks = [("blocks.2.attn.hook_pattern", lambda gradient, hook: found.append(gradient.clone()))]
    with gqa.hooks(bwd_hooks=hooks):
        gqa(gqa.encode(**inputs))[:, -1, 5].sum().backward()
    gqa.zero_grad()
    assert len(found) == 1
    assert (found[0] - expected).abs().max() < OTHER_KERNEL[torch.float32]
    assert expected.abs().max() > 0.1


def zero(value: Tensor, hook: Any) -> None:
    value.zero_()


@torch.no_grad()
def test_in_place_hooks_do_not_reach_what_was_cached_before_them(gqa: HookedALM) -> None:
    """Neighbouring points may pass the very same tensor on."""
    x = gqa.encode(**INPUTS)
    _, clean = gqa.run_with_cache(x)
    earlier = {
        "blocks.1.hook_resid_pre": ("blocks.0.hook_resid_post", "hook_embed"),
        "hook_embed": ("hook_text_embed", "hook_audio_embed"),
        "blocks.2.hook_mlp_out": ("blocks.2.mlp.hook_post", "blocks.2.hook_resid_mid"),
        "blocks.1.attn.hook_rot_q": ("blocks.1.attn.hook_q", "blocks.1.attn.hook_k"),
        "unembed.hook_in": ("ln_final.hook_normalized", "blocks.3.hook_resid_post"),
    }

    def check(cache: Any, names: tuple[str, ...]) -> None:
        for name in names:
            assert torch.equal(cache[name], clean[name]), (edited, name)

    for edited, names in earlier.items():
        with gqa.hooks(fwd_hooks=[(edited, zero)]):
            _, cache = gqa.run_with_cache(x)
        check(cache, names)
        # What passed the point itself is stored as the rest of the model saw it.
        assert not cache[edited].any()
        gqa.add_hook(edited, zero)
        _, cache = gqa.run_with_cache(x)
        gqa.reset_hooks()
        check(cache, names)
        # Recorders that are attached first, by hand, and hooks that come later.
        store, recorders, _ = gqa.get_caching_hooks()
        gqa.run_with_hooks(x, fwd_hooks=[*recorders, (edited, zero)])
        check(store, (*names, edited))
        store = gqa.add_caching_hooks()
        gqa.run_with_hooks(x, fwd_hooks=[(edited, zero)])
        gqa.reset_hooks()
        check(store, (*names, edited))
        store = gqa.add_caching_hooks()
        gqa.add_hook(edited, zero)
        gqa(x)
        gqa.reset_hooks()
        check(store, (*names, edited))


@torch.no_grad()
def test_in_place_hooks_do_not_reach_tensors_of_the_caller(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    expected, cache = gqa.run_with_cache(x)
    resid = cache["resid_pre", 2]
    before = resid.clone()
    for name in ("blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.2.hook_q_input"):
        gqa.run_with_hooks(resid, start_at_layer=2, inputs=x, fwd_hooks=[(name, zero)])
        assert torch.equal(resid, before)
    assert torch.equal(gqa(resid, start_at_layer=2, inputs=x), expected)
    # The embeddings of a clip are kept for later runs; alone, it needs no padding.
    alone = x[1]
    expected_alone = gqa(alone)
    for name in ("hook_audio_embed", "hook_embed"):
        assert not torch.equal(gqa.run_with_hooks(alone, fwd_hooks=[(name, zero)]), expected_alone)
        assert torch.equal(gqa(alone), expected_alone)
    gqa.generate(x, 2, return_type="tokens", fwd_hooks=[("hook_embed", zero)])
    assert torch.equal(gqa(x), expected)


@torch.no_grad()
def test_caching_copies_nothing_while_nobody_writes(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    _, cache = gqa.run_with_cache(x)
    assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()
    # A slice owns its memory: it must not keep the whole activation alive.
    _, cache = gqa.run_with_cache(x, pos_slice=(3, 5))
    for name, value in cache.items():
        if name != "hook_audio_embed":
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_hooks_leave_with_their_context(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    before = gqa(x)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gqa.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_attn_out", fail)])
    with pytest.raises(RuntimeError, match="on purpose"), gqa.hooks([("hook_embed", fail)]):
        gqa.run_with_cache(x)
    with pytest.raises(KeyError, match="nothing_here"):
        gqa.run_with_hooks(x, fwd_hooks=[("hook_embed", fail), ("nothing_here", fail)])
    assert not gqa.list_hooks()
    with gqa.hooks([("blocks.0.hook_attn_out", zero)]):
        inner = gqa.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_attn_out", zero)])
        outer = gqa(x)
    assert not torch.equal(inner, outer)
    assert not torch.equal(outer, before)
    gqa.add_perma_hook("blocks.0.hook_attn_out", zero)
    gqa.reset_hooks()
    assert torch.equal(gqa(x), outer)
    gqa.reset_hooks(including_permanent=True)
    assert torch.equal(gqa(x), before)


@torch.no_grad()
def test_resuming_at_any_layer_equals_the_whole_run(tiny_models: TinyModels) -> None:
    for variant in ("gqa", "mqa, sliding"):
        model = tiny_models.hooked(variant)
        x = model.encode(**INPUTS)
        logits, cache = model.run_with_cache(x)
        n_layers = model.cfg.n_layers
        for layer in range(n_layers + 1):
            resid = model(x, stop_at_layer=layer)
            name = f"blocks.{layer}.hook_resid_pre"
            kept = cache[name if layer < n_layers else f"blocks.{layer - 1}.hook_resid_post"]
            assert torch.equal(resid, kept)
            assert torch.equal(model(resid, start_at_layer=layer, inputs=x), logits)
            for stop in range(layer, n_layers):
                part = model(resid, start_at_layer=layer, stop_at_layer=stop, inputs=x)
                assert torch.equal(part, cache["resid_pre", stop])
        assert torch.equal(model(x, stop_at_layer=-1), cache["resid_pre", n_layers - 1])
        assert torch.equal(model(cache["resid_pre", 2], start_at_layer=-2, inputs=x), logits)


@torch.no_grad()
def test_skipped_blocks_do_not_run(gqa: HookedALM) -> None:
    ran: list[str] = []
    modules = {f"blocks.{layer}": block for layer, block in enumerate(gqa.blocks)}
    modules |= {"ln_final": gqa.ln_final, "unembed": gqa.unembed}
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in modules.items()
    ]
    x = gqa.encode(**INPUTS)
    try:
        resid = gqa(x, stop_at_layer=2)
        assert ran == ["blocks.0", "blocks.1"]
        ran.clear()
        with mock.patch.object(gqa.audio, "encode") as encode:
            gqa(resid, start_at_layer=2, inputs=gqa.encode(**INPUTS))
        assert not encode.called
        assert ran == ["blocks.2", "blocks.3", "ln_final", "unembed"]
        ran.clear()
        assert gqa(x, return_type=None) is None
        assert ran == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "ln_final"]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_residual_without_its_prompt_is_unpadded(gqa: HookedALM) -> None:
    ids = hf_inputs([[]], [11])["input_ids"]
    resid = gqa(ids, stop_at_layer=1)
    assert torch.equal(gqa(resid, start_at_layer=1), gqa(ids))


@pytest.mark.parametrize(
    ("name", "returned", "found"),
    [
        ("blocks.1.attn.hook_z", lambda z: z[:, :, :2], r"\[2, 27, 2, 10\]"),
        ("blocks.1.hook_resid_pre", lambda resid: resid[:1], r"\[1, 27, 54\]"),
        ("blocks.2.attn.hook_pattern", lambda pattern: pattern.mean(1, keepdim=True), r"\[2, 1, "),
        ("ln_final.hook_scale", lambda scale: scale.squeeze(-1), r"\[2, 27\]"),
        ("blocks.0.mlp.hook_post", lambda post: float(post.detach().mean()), "float"),
    ],
)
def test_what_hooks_return_has_the_shape_they_were_given(
    gqa: HookedALM, name: str, returned: Any, found: str
) -> None:
    """One row or head would be spread over all."""
    x = gqa.encode(**hf_inputs([[63], [23]], [9, 14]))
    with pytest.raises(InputError, match=rf"hooking '{name}': a hook returned {found}.*expected"):
        gqa.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: returned(value))])


def test_hooks_that_a_part_of_the_run_does_not_reach(gqa: HookedALM) -> None:
    """They would be silent; what the part does reach still fires, and predicates take what runs."""
    x = gqa.encode(**INPUTS)
    resid = gqa(x, stop_at_layer=2)
    later = {"start_at_layer": 2, "inputs": x}
    for given, options, names in (
        (resid, later, ("blocks.1.hook_resid_post", "hook_embed", "audio.hook_encoder_out")),
        (resid, {**later, "start_at_layer": -2}, ("blocks.1.attn.hook_q_input", "hook_tokens")),
        (x, {"stop_at_layer": 2}, ("blocks.2.hook_resid_pre", "ln_final.hook_scale")),
    ):
        for name in names:
            with pytest.raises(HookNameError, match="a run that does not reach it"):
                gqa.run_with_hooks(given, fwd_hooks=[(name, zero)], **options)
    fired = []
    hooks = [
        (lambda name: name.endswith("hook_resid_post"), lambda v, hook: fired.append(hook.name))
    ]
    gqa.run_with_hooks(resid, fwd_hooks=hooks, stop_at_layer=3, **later)
    assert fired == ["blocks.2.hook_resid_post"]
    edited = gqa.run_with_hooks(resid, fwd_hooks=[("unembed.hook_in", zero)], **later)
    assert not edited.any()


def test_layers_and_inputs_that_cannot_run(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    resid = gqa(x, stop_at_layer=0)
    for options in ({"stop_at_layer": 5}, {"stop_at_layer": -5}):
        with pytest.raises(InputError, match=r"got stop_at_layer=-?5, expected a number from -4"):
            gqa(x, **options)
    with pytest.raises(InputError, match="got start_at_layer=5"):
        gqa(resid, start_at_layer=5, inputs=x)
    with pytest.raises(InputError, match="say at which block"):
        gqa(resid)
    with pytest.raises(InputError, match="give the residual stream"):
        gqa(x, start_at_layer=1)

    def drop_some_placeholders(value: Tensor, hook: Any) -> None:
        value[:, :12] = 9

    with pytest.raises(InputError, match="a hook on hook_tokens changed audio placeholders"):
        gqa.run_with_hooks(x, fwd_hooks=[("hook_tokens", drop_some_placeholders)])
