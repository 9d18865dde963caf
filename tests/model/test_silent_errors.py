"""What goes wrong without a word elsewhere, and the test that fails if it does so here.

Silent errors of TransformerLens' bridge on audio models:

1. tools take ids and run without the audio: here, and inputs::test_placeholders_without_audio,
   tl_patching::test_sweeps_equal_hugging_face_under_pytorch_hooks, tl_cache::test_logit_lens
2. ``hook_embed`` is the text before the merge: tl_cache::test_decompose_resid,
   parity_qwen2_audio::test_equal_to_hugging_face, parity_qwen2_audio::test_gradients_equal,
   tl_attribution::test_node_scores_are_change_times_gradient
3. generation without a KV cache forgets the audio: generation::test_tokens_equal,
   generation::test_audio_is_heard_without_a_cache_and_encoded_once
4. the loss scores placeholders: surface::test_the_loss_never_scores_placeholders
5. ``attn_in`` with grouped heads feeds the wrong ones: here,
   surface::test_flags_decide_what_a_cache_without_names_keeps
6. in-place hooks write into tensors of the caller: here,
   hooks::test_in_place_hooks_do_not_reach_tensors_of_the_caller

Traps of its base class:

* ``run_with_hooks`` and ``hooks`` check no names: hook_names::test_points_that_cannot_fire_raise_and_say_why
* a hook behind a flag that is off never fires: hooks::test_every_point_takes_edits_made_in_any_way
* names that match nothing cache nothing, tuples and sets fail:
  hook_names::test_unknown_names_raise_with_a_suggestion,
  hook_names::test_predicates_that_match_nothing_raise,
  hook_names::test_filters_select_the_same_points_in_every_form
* ``pos_slice`` cuts heads instead of positions: hook_names::test_positions_are_sliced_on_their_own_axis,
  hook_names::test_gradients_are_sliced_like_activations
* a second name of a point is missing from the cache: here, generation::test_what_is_cached
* cached entries change under later in-place hooks:
  hooks::test_in_place_hooks_do_not_reach_what_was_cached_before_them,
  generation::test_in_place_edits_do_not_reach_what_was_cached_before_them
* the next run reuses what a hook wrote to: here
"""  # noqa: E501

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools.analysis import (
    attribution_patch,
    collect_activations,
    direct_logit_attribution,
)
from transformer_lens.tools.analysis import logit_lens as tl_logit_lens

from hooked_alm import ALMInput, HookedALM, InputError
from two_clips import TOKEN, Pair, metric, two_clips

TESTS = Path(__file__).parents[1]


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(\w+)::(test_\w+)", __doc__ or "")
    assert len(named) > 15
    for module, test in named:
        (file,) = TESTS.rglob(f"test_{module}.py")
        tree = ast.parse(file.read_text("utf-8"))
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (module, test)


# --- 1. Tools and the audio

Tool = Callable[[HookedALM, Any, Any], Any]


def cache_of(model: HookedALM, x: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(x)[1]


TOOLS: dict[str, tuple[Tool, bool]] = {
    "resid_pre sweep": (
        lambda model, x, y: patching.get_act_patch_resid_pre(model, x, cache_of(model, y), metric),
        True,
    ),
    "head sweep": (
        lambda model, x, y: patching.get_act_patch_attn_head_out_all_pos(
            model, x, cache_of(model, y), metric
        ),
        True,
    ),
    "pattern sweep": (
        lambda model, x, y: patching.get_act_patch_attn_head_pattern_all_pos(
            model, x, cache_of(model, y), metric
        ),
        True,
    ),
    "direct path": (
        lambda model, x, y: patching.get_act_patch_direct_path(
            model, x, cache_of(model, y), cache_of(model, x), metric, 0, 1, verbose=False
        ),
        True,
    ),
    "attribution": (lambda model, x, y: attribution_patch(model, x, y, metric), True),
    "logit lens": (lambda model, x, y: tl_logit_lens(model, x), False),
    "logit attribution": (lambda model, x, y: direct_logit_attribution(model, x, TOKEN), False),
    "collected activations": (
        lambda model, x, y: collect_activations(
            model, "blocks.1.hook_resid_post", x, model, positions=torch.tensor([-1])
        ),
        False,
    ),
}
"""Tool -> how to call it on two inputs, and whether it reads the second."""


@pytest.mark.parametrize("name", TOOLS)
def test_every_run_that_a_tool_makes_hears_the_audio(gqa: HookedALM, name: str) -> None:
    """At audio positions, what enters the first block is what the projector made of the clips."""
    pair = two_clips(gqa)
    tool, is_pair = TOOLS[name]
    with torch.no_grad():
        embeddings = [gqa.run_with_cache(x, names_filter="hook_audio_embed")[1] for x in pair[:2]]
    expected = [cache["hook_audio_embed"][0] for cache in embeddings]
    positions = pair.base.spans.positions("audio", 0)
    assert len(positions) == len(expected[0]) > 0
    assert not torch.equal(expected[0], expected[1])
    heard: set[int] = set()

    def listen(value: Tensor, hook: Any) -> None:
        same = [i for i, clip in enumerate(expected) if torch.equal(value[0, positions], clip)]
        assert same, "a run without its audio"
        heard.update(same)

    with gqa.hooks(fwd_hooks=[("hook_embed", listen)]):
        tool(gqa, pair.base, pair.donor)
    gqa.zero_grad()
    assert heard == ({0, 1} if is_pair else {0})


@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_runs_on_placeholders_without_audio(gqa: HookedALM, name: str) -> None:
    """Where Hugging Face's model, and so the bridge, would take the placeholders for words."""
    tool, _ = TOOLS[name]
    ids = two_clips(gqa).base.tokens
    with pytest.raises(InputError, match="audio placeholders"):
        tool(gqa, ids, ids)
    assert not gqa.list_hooks()


# --- 5. Grouped heads


@pytest.fixture
def ungrouped(gqa: HookedALM) -> Iterator[HookedALM]:
    gqa.set_ungroup_grouped_query_attention(True)
    yield gqa
    gqa.set_use_attn_in(False)
    gqa.set_ungroup_grouped_query_attention(False)


@torch.no_grad()
def test_attn_in_of_a_head_feeds_that_head_alone(ungrouped: HookedALM) -> None:
    """Query, key and value of one head, and of no other in its group."""
    x = two_clips(ungrouped).base
    z = "blocks.1.attn.hook_z"
    ungrouped.set_use_attn_in(True)
    _, before = ungrouped.run_with_cache(x, names_filter=z)
    for head in range(ungrouped.cfg.n_heads):

        def edit(value: Tensor, hook: Any, head: int = head) -> None:
            value[:, :, head] = value[:, :, head].flip(-1)

        with ungrouped.hooks(fwd_hooks=[("blocks.1.hook_attn_in", edit)]):
            _, after = ungrouped.run_with_cache(x, names_filter=z)
        moved = (after[z] - before[z]).abs().amax((0, 1, 3)) > 1e-3
        assert moved.tolist() == [h == head for h in range(ungrouped.cfg.n_heads)]


def test_a_flag_set_past_its_setter_opens_nothing(gqa: HookedALM) -> None:
    """``cfg`` is mutable, as TransformerLens' tools expect."""
    x = two_clips(gqa).base
    gqa.cfg.use_attn_in = True
    try:
        assert not [name for name in gqa.run_with_cache(x)[1] if name.endswith("hook_attn_in")]
        with pytest.raises(KeyError, match="cannot fire"):
            gqa.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_attn_in", lambda value, hook: None)])
    finally:
        gqa.cfg.use_attn_in = False


# --- 6. In-place writes into what is kept

SWEEPS = [
    *(patching.get_act_patch_resid_pre, patching.get_act_patch_resid_mid),
    *(patching.get_act_patch_attn_out, patching.get_act_patch_mlp_out),
    *(patching.get_act_patch_attn_head_out_all_pos, patching.get_act_patch_attn_head_q_all_pos),
    *(patching.get_act_patch_attn_head_k_all_pos, patching.get_act_patch_attn_head_v_all_pos),
    patching.get_act_patch_attn_head_pattern_all_pos,
]


def kept(x: ALMInput) -> list[Tensor]:
    """Everything an input holds for later runs: ids, spectrograms, memoised embeddings."""
    encoded = [
        value
        for clip in x.clips
        for _, encodings in clip._encoded.values()
        for value in encodings.values()
    ]
    assert encoded
    return [x.tokens, x.attention_mask, x.position_ids, *(c.features for c in x.clips), *encoded]


def assert_untouched(pair: Pair, model: HookedALM, use: Callable[[], Any]) -> None:
    """Inputs keep their bits, and run as before."""
    runs = [model(x) for x in pair[:2]]
    before = [[value.clone() for value in kept(x)] for x in pair[:2]]
    use()
    for x, values, logits in zip(pair[:2], before, runs, strict=True):
        found = kept(x)
        assert len(found) == len(values)
        assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))
        assert torch.equal(model(x), logits)


@torch.no_grad()
def test_transformer_lens_in_place_setters_leave_no_trace(gqa: HookedALM) -> None:
    """Its sweeps write into live activations: neither donor cache nor inputs may notice."""
    pair = two_clips(gqa)
    cache = cache_of(gqa, pair.donor)
    entries = {name: value.clone() for name, value in cache.items()}

    def sweep_all() -> None:
        for sweep in SWEEPS:
            found = sweep(gqa, pair.base, cache, metric)
            assert found.unique().numel() > 1, sweep.__name__

    assert_untouched(pair, gqa, sweep_all)
    assert all(torch.equal(cache[name], value) for name, value in entries.items())


@torch.no_grad()
def test_writing_into_a_cache_changes_no_later_run(gqa: HookedALM) -> None:
    """The entries of a plain cache are the run's own tensors; none of them is kept for the next."""
    pair = two_clips(gqa)

    def write() -> None:
        for x in pair[:2]:
            _, cache = gqa.run_with_cache(x, names_filter=lambda name: True)
            _, steps = gqa.generate(
                x, 3, return_type="tokens", names_filter=lambda name: not name.startswith("audio.")
            )
            for value in (*cache.values(), *steps.values()):
                value.zero_()

    assert_untouched(pair, gqa, write)


@torch.no_grad()
def test_hooks_that_write_everywhere_change_no_later_run(gqa: HookedALM) -> None:
    """Every point at once, in ordinary runs, resumed ones and generation."""
    pair = two_clips(gqa)
    resid = gqa(pair.base, stop_at_layer=2)
    before = resid.clone()

    def clear(value: Tensor, hook: Any) -> None:
        value.zero_()

    hooks = [
        (name, clear)
        for name in gqa.matching(lambda name: not name.endswith(("hook_tokens", "hook_scale")))
    ]

    def run() -> None:
        gqa.run_with_hooks(pair.base, fwd_hooks=hooks)
        later = [hook for hook in hooks if hook[0].startswith(("blocks.2", "blocks.3", "ln_final"))]
        gqa.run_with_hooks(resid, start_at_layer=2, inputs=pair.base, fwd_hooks=later)
        gqa.generate(pair.donor, 2, return_type="tokens", fwd_hooks=hooks)

    assert_untouched(pair, gqa, run)
    assert torch.equal(resid, before)


# --- Names


def test_both_names_of_a_point_are_in_every_kind_of_cache(ungrouped: HookedALM) -> None:
    """Activations and gradients, whichever name was asked for."""
    x = two_clips(ungrouped).base
    for letter in "qkv":
        pair = [f"blocks.1.hook_{letter}_input", f"blocks.1.attn.hook_{letter}_input"]
        both = {*pair, *(f"{name}_grad" for name in pair)}
        for name in pair:
            _, cache = ungrouped.run_with_cache(
                x, names_filter=name, incl_bwd=True, return_type="loss"
            )
            assert set(cache) == both
            for suffix in ("", "_grad"):
                assert torch.equal(*(cache[own + suffix] for own in pair))
                assert cache[name + suffix].any()
            store = ungrouped.add_caching_hooks(name)
            ungrouped(x)
            ungrouped.reset_hooks()
            assert set(store) == set(pair)
    ungrouped.zero_grad()
