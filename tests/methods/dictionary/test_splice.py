"""Rows of a run, replaced: at which positions, by what, and what leaves the run as it was."""

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.splice import (
    RowEdit,
    feature_edit,
    reconstruction,
    splice_hooks,
)
from tiny import hf_inputs

DECODER, HEADS = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"
ENCODER = "audio.encoder.blocks.0.hook_resid_post"


@pytest.fixture
def x(gqa: HookedALM) -> ALMInput:
    """Two prompts of different lengths, with clips of different lengths."""
    return gqa.encode(**hf_inputs([[40], [77]], [9, 6]))


def run(model: HookedALM, x: ALMInput, edits: dict[str, RowEdit], spans: str = "audio") -> Tensor:
    hooks = splice_hooks(model, x, edits, spans)
    found: Tensor = model.run_with_hooks(x, fwd_hooks=hooks)
    return found


def dictionary(model: HookedALM, x: ALMInput, point: str) -> tuple[SparseAutoencoder, Tensor]:
    """A dictionary of a point that reconstructs badly, and the rows it is of."""
    rows = next(iter(rows_of(model, x, point).values())).values[point]
    cfg = DictionaryConfig(d_in=rows.shape[1], d_sae=23, architecture="topk", k=4)
    return SparseAutoencoder.initialised(cfg, rows, seed=0), rows


@pytest.mark.parametrize("point", [DECODER, HEADS, ENCODER])
def test_features_left_alone_change_nothing(gqa: HookedALM, x: ALMInput, point: str) -> None:
    sae, _ = dictionary(gqa, x, point)
    plain = gqa(x)
    assert torch.equal(run(gqa, x, {point: feature_edit(sae, lambda f: f)}), plain)
    assert not torch.equal(run(gqa, x, {point: feature_edit(sae, torch.zeros_like)}), plain)
    assert not torch.equal(run(gqa, x, {point: reconstruction(sae)}), plain)


@pytest.mark.parametrize("point", [DECODER, HEADS, ENCODER])
def test_exactly_the_rows_that_are_collected_are_edited(
    gqa: HookedALM, x: ALMInput, point: str
) -> None:
    sae, rows = dictionary(gqa, x, point)
    seen: list[Tensor] = []

    def edit(given: Tensor) -> Tensor:
        seen.append(given)
        return sae(given)

    hooks = splice_hooks(gqa, x, {point: edit})
    kept = [(point, lambda value, hook: after.append(value.clone()))]
    after: list[Tensor] = []
    gqa.run_with_hooks(x, fwd_hooks=[*hooks, *kept])
    assert torch.equal(torch.cat(seen), rows)
    _, cache = gqa.run_with_cache(x, names_filter=point)
    changed = (after[0] != cache[point]).flatten(2).any(-1)
    assert int(changed.sum()) == len(rows)


def test_spans_of_the_prompt(gqa: HookedALM, x: ALMInput) -> None:
    """Against a hook by hand, which writes at the positions of the text."""
    sae, _ = dictionary(gqa, x, DECODER)
    mask = x.spans.mask("text") & x.attention_mask.bool()

    def by_hand(value: Tensor, hook: object) -> Tensor:
        return torch.where(mask[..., None], sae(value), value)

    expected = gqa.run_with_hooks(x, fwd_hooks=[(DECODER, by_hand)])
    found = run(gqa, x, {DECODER: reconstruction(sae)}, "text")
    assert torch.equal(found, expected)


def test_several_points_at_once(gqa: HookedALM, x: ALMInput) -> None:
    saes = {point: reconstruction(dictionary(gqa, x, point)[0]) for point in (ENCODER, DECODER)}
    both = run(gqa, x, saes)
    for point, edit in saes.items():
        assert not torch.equal(run(gqa, x, {point: edit}), both)


@pytest.mark.parametrize("point", [DECODER, ENCODER])
def test_generation_hears_the_replaced_rows(gqa: HookedALM, x: ALMInput, point: str) -> None:
    """With a cache and without, and as a run over all that was written has it."""
    sae, _ = dictionary(gqa, x, point)
    hooks = splice_hooks(gqa, x, {point: reconstruction(sae)})
    settings = {"max_new_tokens": 5, "fwd_hooks": hooks, "return_type": "tokens"}
    written = gqa.generate(x, use_past_kv_cache=True, **settings)
    again = gqa.generate(x, use_past_kv_cache=False, **settings)
    assert torch.equal(written, again)
    logits = gqa.run_with_hooks(x, fwd_hooks=hooks)
    assert torch.equal(written[:, 0], logits[:, -1].argmax(-1))
    plain = gqa.generate(x, max_new_tokens=5, return_type="tokens")
    left_alone = feature_edit(sae, lambda f: f)
    hooks = splice_hooks(gqa, x, {point: left_alone})
    same = gqa.generate(x, max_new_tokens=5, return_type="tokens", fwd_hooks=hooks)
    assert torch.equal(plain, same)
