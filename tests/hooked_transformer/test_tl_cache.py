"""``ActivationCache``, logit lens and direct logit attribution, against Hugging Face."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens, logit_readout

from hf_reference import hf_activations, with_positions
from hooked_alm import ALMInput, HookedALM
from tiny import N_LAYERS, TinyModels
from two_clips import CLOSE, TOKEN, two_clips

OTHER = 6
FRAMES, WORDS = [[10], [14]], [5, 4]


class Run(NamedTuple):
    """The same prompts through both models: a padded batch of two."""

    x: ALMInput
    logits: Tensor
    cache: ActivationCache
    hf: Any
    """Hugging Face's model."""
    seen: dict[str, Tensor]
    """Its activations, by our names."""
    real: Tensor
    """``[batch, pos]``: not a pad."""

    def check(self, found: Tensor, expected: Tensor) -> None:
        """Equal at real positions up to a sum taken in another order; positions on axes 1, 2."""
        torch.testing.assert_close(found[:, self.real], expected[:, self.real], **CLOSE)


@pytest.fixture
def run(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> Run:
    """Each layout of heads, against the published model."""
    with torch.no_grad():
        x, _, inputs, _ = two_clips(any_model, FRAMES, WORDS)
        hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
        logits, cache = any_model.run_with_cache(x)
        seen = hf_activations(hf, with_positions(inputs))
    return Run(x, logits, cache, hf, seen, x.attention_mask.bool())


def streams(seen: dict[str, Tensor]) -> Tensor:
    """The residual stream before every block and after the last."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(N_LAYERS)]
    return torch.stack([seen[name] for name in [*names, f"blocks.{N_LAYERS - 1}.hook_resid_post"]])


def components(seen: dict[str, Tensor], n_layers: int = N_LAYERS) -> Tensor:
    """What was written to the stream: embedding, then attention and MLP of every block."""
    parts = [seen["hook_embed"]]
    for layer in range(n_layers):
        parts += [seen[f"blocks.{layer}.hook_{part}_out"] for part in ("attn", "mlp")]
    return torch.stack(parts)


def head_results(run: Run, n_layers: int = N_LAYERS) -> Tensor:
    """What every head wrote: its z through its columns of the output projection."""
    found = []
    for layer in range(n_layers):
        z = run.seen[f"blocks.{layer}.attn.hook_z"]
        weight = run.hf.model.language_model.layers[layer].self_attn.o_proj.weight
        for head, columns in enumerate(weight.split(z.shape[-1], dim=1)):
            found.append(z[:, :, head] @ columns.T)
    return torch.stack(found)


def neuron_results(run: Run, n_layers: int = N_LAYERS) -> Tensor:
    """What every neuron wrote."""
    found = []
    for layer in range(n_layers):
        weight = run.hf.model.language_model.layers[layer].mlp.down_proj.weight
        post = run.seen[f"blocks.{layer}.mlp.hook_post"]
        found += [post[..., neuron, None] * weight[:, neuron] for neuron in range(len(weight.T))]
    return torch.stack(found)


def rms(run: Run, resid: Tensor) -> Tensor:
    """What an RMSNorm divides by."""
    eps = run.hf.config.text_config.rms_norm_eps
    return (resid.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def token_direction(run: Run, token: int) -> Tensor:
    """The token's row of the head, times the final norm's scale."""
    return run.hf.lm_head.weight[token] * run.hf.model.language_model.norm.weight


@torch.no_grad()
def test_accumulated_resid(run: Run) -> None:
    """The stream at every depth; through the final norm and head, the last one is the logits."""
    stack, labels = run.cache.accumulated_resid(return_labels=True)
    run.check(stack, streams(run.seen))
    assert labels == ["0_pre", "1_pre", "2_pre", "3_pre", "final_post"]
    normed = run.cache.accumulated_resid(apply_ln=True)
    norm = run.hf.model.language_model.norm
    run.check(normed, torch.stack([norm(stream) for stream in streams(run.seen)]))
    run.check((normed[-1:] @ run.cache.model.W_U), run.seen["unembed.hook_out"][None])
    to_mlp = run.cache.accumulated_resid(2, incl_mid=True, mlp_input=True)
    names = ["0.hook_resid_pre", "0.hook_resid_mid", "1.hook_resid_pre", "1.hook_resid_mid",
             "2.hook_resid_pre", "2.hook_resid_mid"]  # fmt: skip
    run.check(to_mlp, torch.stack([run.seen[f"blocks.{name}"] for name in names]))


@torch.no_grad()
def test_decompose_resid(run: Run) -> None:
    """What was written, at audio positions too; scaled, what the norm of a block reads of it."""
    parts, labels = run.cache.decompose_resid(return_labels=True)
    run.check(parts, components(run.seen))
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    run.check(parts.sum(0)[None], streams(run.seen)[-1:])
    scaled = run.cache.decompose_resid(2, apply_ln=True)
    stream = streams(run.seen)[2]
    run.check(scaled, components(run.seen, 2) / rms(run, stream))
    weight = run.hf.model.language_model.layers[2].input_layernorm.weight
    run.check((scaled.sum(0) * weight)[None], run.seen["blocks.2.ln1.out"][None])


@torch.no_grad()
def test_stack_head_results(any_model: HookedALM, run: Run) -> None:
    """Every head, recomputed from z or cached as `hook_result`, and the rest of the stream."""
    found, labels = run.cache.stack_head_results(incl_remainder=True, return_labels=True)
    expected = head_results(run)
    run.check(found[:-1], expected)
    run.check(found[-1:], (streams(run.seen)[-1] - expected.sum(0))[None])
    assert labels[-2:] == ["L3H5", "remainder"]
    any_model.set_use_attn_result(True)
    _, cache = any_model.run_with_cache(run.x)
    any_model.set_use_attn_result(False)
    assert "blocks.0.attn.hook_result" in cache
    run.check(cache.stack_head_results(layer=2), head_results(run, 2))


@torch.no_grad()
def test_stack_neuron_results(run: Run) -> None:
    """Every neuron, a few of them, and their shares of a direction after the norm."""
    expected = neuron_results(run, 3)
    run.check(run.cache.stack_neuron_results(3), expected)
    d_mlp = len(expected) // 3
    picked, labels = run.cache.stack_neuron_results(
        3, neuron_slice=[1, 7], incl_remainder=True, return_labels=True
    )
    rows = [layer * d_mlp + neuron for layer in range(3) for neuron in (1, 7)]
    run.check(picked[:-1], expected[rows])
    stream = streams(run.seen)[3]
    run.check(picked[-1:], (stream - expected[rows].sum(0))[None])
    assert len(labels) == 7
    direction = token_direction(run, TOKEN)
    shares = run.cache.stack_neuron_results(3, apply_ln=True, project_output_onto=direction)
    run.check(shares, (expected / rms(run, stream)) @ direction)


@torch.no_grad()
def test_get_full_resid_decomposition(run: Run) -> None:
    """Heads, neurons, embedding and (zero) biases are the whole stream, row by row."""
    parts, labels = run.cache.get_full_resid_decomposition(return_labels=True)
    expected = [head_results(run), neuron_results(run), run.seen["hook_embed"][None]]
    run.check(parts[:-1], torch.cat(expected))
    assert labels[-2:] == ["embed", "bias"]
    assert not parts[-1].any()
    run.check(parts.sum(0)[None], streams(run.seen)[-1:])
    to_mlp = run.cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=False)
    run.check(to_mlp.sum(0)[None], run.seen["blocks.1.hook_resid_mid"][None])


@torch.no_grad()
def test_apply_ln_to_stack(run: Run) -> None:
    """The scale of each norm, as Hugging Face divides by it."""
    decoder = run.hf.model.language_model
    for layer, mlp_input, stream, weight, out in (
        (1, False, "blocks.1.hook_resid_pre", decoder.layers[1].input_layernorm.weight,
         "blocks.1.ln1.out"),
        (2, True, "blocks.2.hook_resid_mid", decoder.layers[2].post_attention_layernorm.weight,
         "blocks.2.ln2.out"),
        (-1, False, "blocks.3.hook_resid_post", decoder.norm.weight, "ln_final.out"),
    ):  # fmt: skip
        found = run.cache.apply_ln_to_stack(run.cache[stream][None], layer, mlp_input)
        run.check(found * weight, run.seen[out][None])


@torch.no_grad()
def test_logit_attrs(run: Run) -> None:
    """Shares of a logit, and of a difference, on weights that nobody folded; per row as well."""
    assert (run.hf.model.language_model.norm.weight - 1).abs().max() > 0.1
    parts = run.cache.decompose_resid()
    scaled = components(run.seen) / rms(run, streams(run.seen)[-1])
    found = run.cache.logit_attrs(parts, TOKEN)
    run.check(found, scaled @ token_direction(run, TOKEN))
    run.check(found.sum(0)[None], run.seen["unembed.hook_out"][..., TOKEN][None])
    difference = run.cache.logit_attrs(parts, TOKEN, OTHER)
    run.check(difference, found - run.cache.logit_attrs(parts, OTHER))
    last = run.cache.decompose_resid(pos_slice=-1)
    per_row = run.cache.logit_attrs(last, torch.tensor([TOKEN, OTHER]), pos_slice=-1).sum(0)
    logits = run.seen["unembed.hook_out"]
    torch.testing.assert_close(
        per_row, torch.stack([logits[0, -1, TOKEN], logits[1, -1, OTHER]]), **CLOSE
    )


@torch.no_grad()
def test_logit_lens(any_model: HookedALM, run: Run) -> None:
    """On an input, on a cache, and on vectors: Hugging Face's norm and head at every depth."""
    hf_norm = run.hf.model.language_model.norm
    expected = torch.stack([run.hf.lm_head(hf_norm(stream)) for stream in streams(run.seen)])
    run.check(logit_lens(any_model, run.x, positions=None).readout.values, expected)
    run.check(run.cache.logit_lens(positions=None).readout.values, expected)
    last = logit_lens(any_model, run.x, targets=TOKEN)
    ranks = (expected[:, :, -1] > expected[:, :, -1, TOKEN, None]).sum(-1)
    assert torch.equal(last.rank_trajectory(TOKEN), ranks)
    some = run.cache.logit_lens(vocab=[TOKEN, OTHER], layers=[1, 4], incl_mid=True)
    mid = run.hf.lm_head(hf_norm(run.seen["blocks.0.hook_resid_mid"]))[:, -1, [TOKEN, OTHER]]
    torch.testing.assert_close(some.readout.values[0], mid, **CLOSE)
    vectors = run.cache["blocks.2.hook_resid_post"]
    values = logit_readout(any_model, vectors).values
    torch.testing.assert_close(values[run.real], expected[3][run.real], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_direct_logit_attribution(any_model: HookedALM, run: Run, unit: str) -> None:
    """Each unit's share of the readout logit and of a difference, at the model's own scale."""
    parts = {"component": components(run.seen), "head": head_results(run)}.get(unit)
    if parts is None:
        mids = [run.seen[f"blocks.{layer}.hook_resid_mid"] for layer in range(N_LAYERS)]
        depths = streams(run.seen)
        parts = torch.stack(
            [s for pair in zip(depths, mids, strict=False) for s in pair] + [depths[-1]]
        )
    scaled = (parts / rms(run, streams(run.seen)[-1]))[:, :, -1]
    found = direct_logit_attribution(any_model, run.x, TOKEN, unit=unit)
    shares = found.attribution[: len(parts)]
    torch.testing.assert_close(shares, scaled @ token_direction(run, TOKEN), **CLOSE)
    versus = direct_logit_attribution(any_model, run.x, TOKEN, OTHER, unit=unit, cache=run.cache)
    direction = token_direction(run, TOKEN) - token_direction(run, OTHER)
    torch.testing.assert_close(versus.attribution[: len(parts)], scaled @ direction, **CLOSE)
    whole = found.attribution[-1] if unit == "layer" else found.attribution.sum(0)
    torch.testing.assert_close(whole, run.seen["unembed.hook_out"][:, -1, TOKEN], **CLOSE)


@torch.no_grad()
def test_tokens_may_be_named(gqa: HookedALM) -> None:
    """A token given as text."""
    x, *_ = two_clips(gqa)
    by_name = direct_logit_attribution(gqa, x, "a").attribution
    by_id = direct_logit_attribution(gqa, x, gqa.to_single_token("a")).attribution
    assert torch.equal(by_name, by_id)
