"""TransformerLens' tools on Whisper's decoder, and lenses on both of its stacks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformer_lens.head_detector import detect_head

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.encoder_lens import encoder_lens, heard_by_depth
from hooked_alm.methods.reading.lens import logit_lens, residual_rows
from hooked_alm.methods.reading.tuned_lens import TunedLens
from whisper_toy import LAYERS, Whispers, noise
from whisper_toy import prompts as prompts_of

CLOSE = {"atol": 1e-5, "rtol": 0}
TOKEN, OTHER = 5, 11


@pytest.fixture(scope="module")
def model(whispers: Whispers) -> HookedALM:
    return whispers.hooked()


@pytest.fixture(scope="module")
def x(model: HookedALM) -> ALMInput:
    return model.encode(**prompts_of())


@pytest.fixture(scope="module")
def cache(model: HookedALM, x: ALMInput) -> ActivationCache:
    with torch.no_grad():
        return model.run_with_cache(x)[1]


def test_outputs_add_up_to_the_stream(cache: ActivationCache) -> None:
    for layer, stream in ((0, "blocks.0.hook_resid_pre"), (1, "blocks.1.hook_resid_pre"),
                          (None, "blocks.1.hook_resid_post")):  # fmt: skip
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        torch.testing.assert_close(parts.sum(0), cache[stream], **CLOSE)
        assert labels[:2] == ["embed", "pos_embed"]
        assert len(labels) == len(parts) == 2 + 3 * (2 if layer is None else layer)
    parts, labels = cache.decompose_resid(1, mlp_input=True, return_labels=True)
    torch.testing.assert_close(parts.sum(0), cache["blocks.1.hook_resid_mid_cross"], **CLOSE)
    assert labels[-2:] == ["1_attn_out", "1_cross_attn_out"]
    assert len(cache.decompose_resid(mode="mlp", incl_embeds=False)) == 2
    last = cache.decompose_resid(pos_slice=-1)
    torch.testing.assert_close(last, cache.decompose_resid()[:, :, -1], **CLOSE)


@torch.no_grad()
def test_direct_logit_attribution(model: HookedALM, x: ALMInput, cache: ActivationCache) -> None:
    """Normed components, times what tells two tokens apart: the difference of their logits."""
    directions = model.tokens_to_residual_directions([TOKEN, OTHER])
    apart = directions[0] - directions[1]
    parts = cache.decompose_resid(apply_ln=True) @ apart
    logits = model(x)
    # The final norm's shift is nobody's output.
    shift = (model.unembed.directions([TOKEN, OTHER]) @ model.ln_final.b).diff()
    expected = logits[..., TOKEN] - logits[..., OTHER] + shift
    torch.testing.assert_close(parts.sum(0), expected, **CLOSE)
    assert (parts[[3, 6]].abs() > 1e-3).any()  # what the cross-attentions write
    assert (shift.abs() > 1e-3).all()


def test_what_would_leave_something_out_is_refused(cache: ActivationCache) -> None:
    for call in (
        cache.get_full_resid_decomposition,
        lambda: cache.accumulated_resid(mlp_input=True),
        lambda: cache.accumulated_resid(1, False, False, None, True),
        lambda: cache.decompose_resid(1, mlp_input=True, apply_ln=True),
    ):
        with pytest.raises(InputError, match="which TransformerLens knows nothing of"):
            call()
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(stack[-1], cache["blocks.1.hook_resid_post"])


@torch.no_grad()
def test_biases_add_up(model: HookedALM) -> None:
    """Of a decoder whose attentions and MLPs write nothing else."""
    muted = ["attn.hook_z", "cross_attn.hook_z", "mlp.hook_post"]
    hooks: Any = [
        (lambda name: name.startswith("blocks.") and name.endswith(tuple(muted)),
         lambda value, hook: torch.zeros_like(value))
    ]  # fmt: skip
    x = model.encode(**prompts_of((6,)))
    names = ["hook_embed", "hook_pos_embed", "blocks.1.hook_resid_mid_cross",
             "blocks.1.hook_resid_post"]  # fmt: skip
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(x, names_filter=names)
    start = cache[names[0]] + cache[names[1]]
    torch.testing.assert_close(cache[names[3]] - start, _all(start, model.accumulated_bias(2)))
    found = model.accumulated_bias(1, mlp_input=True)
    torch.testing.assert_close(cache[names[2]] - start, _all(start, found), **CLOSE)
    left = model.accumulated_bias(2) - model.accumulated_bias(2, include_mlp_biases=False)
    torch.testing.assert_close(left, model.b_out.sum(0))


def _all(like: Tensor, bias: Tensor) -> Tensor:
    return bias.expand_as(like)


def test_weights_are_no_hooked_transformers(model: HookedALM) -> None:
    for call in (model.process_weights_, model.fold_layer_norm, model.tl_parameters,
                 model.to_hooked_transformer_state_dict):  # fmt: skip
        with pytest.raises(InputError, match="cross_attention = True"):
            call()
    assert model.W_Q.shape == (2, 2, 48, 24)
    assert torch.equal(model.W_pos, model.pos_embed.weight)


@torch.no_grad()
def test_transformer_lens_patches_with_the_audio(
    model: HookedALM, x: ALMInput, whispers: Whispers
) -> None:
    """Its loops give what ours do; the base's clip is heard in every cell."""
    base = x[[0]]
    inputs = prompts_of((9, 6), seed=5)
    donor = model.encode(**inputs)[[0]]
    _, clean = model.run_with_cache(donor)
    metric = Logits([TOKEN])
    readout = model(base)[0, -1, TOKEN]

    def score(logits: Tensor) -> Tensor:
        return logits[0, -1, TOKEN]

    theirs = patching.get_act_patch_attn_head_out_all_pos(model, base, clean, score)
    ours = patch(model, base, donor, metric, site="z", places=["all"], heads="each")
    torch.testing.assert_close(
        theirs, torch.from_numpy(ours.values[:, :, 0, 0, 0]).float(), **CLOSE
    )
    assert (theirs - readout).abs().max() > 1e-3
    streams = patching.get_act_patch_resid_pre(model, base, clean, score)
    each = patch(model, base, donor, metric, site="resid_pre", places="each")
    torch.testing.assert_close(streams, torch.from_numpy(each.values[:, :, 0, 0]).float(), **CLOSE)
    found = detect_head(model, base, "previous_token_head")
    assert found.shape == (2, 2)


@torch.no_grad()
def test_lens_on_the_decoder(model: HookedALM, x: ALMInput) -> None:
    """Depth L is the model's own answer; each depth is Hugging Face's norm and head on it."""
    rows = residual_rows(model, x)
    read = logit_lens(model, x, tokens=[TOKEN, OTHER])
    logits = model(x)[:, -1, [TOKEN, OTHER]]
    torch.testing.assert_close(read[-1, :, 0], logits, **CLOSE)
    assert len(rows) == LAYERS["decoder"] + 1


@torch.no_grad()
def test_lens_on_the_encoder(model: HookedALM, whispers: Whispers) -> None:
    """Depth L is what is heard; each depth's scores are those of Hugging Face's own parts."""
    clips = [noise(0.5), noise(0.8, seed=1)]
    x = model.prepare(clips, ["", "What"], language="en", answer_prefix=" happy sad")
    memories = heard_by_depth(model, x)
    assert memories.shape == (LAYERS["encoder"] + 1, 2, 50, 48)
    heard = model.run_with_cache(x, names_filter="hook_audio_embed")[1]["hook_audio_embed"]
    assert torch.equal(memories[-1], heard)
    scores = encoder_lens(model, x)
    assert scores.shape == (4, 2, x.shape[1] - 1)
    hf = whispers.hf()
    features = torch.cat([clip.features for clip in x.clips])
    states = hf.model.encoder(features, output_hidden_states=True).hidden_states
    given = {k: v for k, v in model.hf_arguments(x).items() if k != "input_features"}
    for depth in range(3):
        memory = hf.model.encoder.layer_norm(states[depth])
        logits = hf(**given, encoder_outputs=(memory,)).logits
        expected = logits[:, :-1].log_softmax(-1).gather(-1, x.tokens[:, 1:, None])[..., 0]
        real = x.attention_mask[:, :-1].bool()
        torch.testing.assert_close(scores[depth][real], expected[real], **CLOSE)
        assert not scores[depth][~real].any()
    assert (scores[0] - scores[-1]).abs().max() > 1e-3
    texts = model.generate(x, 6, memory=memories[-1], return_type="tokens")
    assert torch.equal(texts, model.generate(x, 6, return_type="tokens"))


@torch.no_grad()
def test_a_tuned_lens_reads_the_decoder(model: HookedALM, x: ALMInput) -> None:
    """One that is not trained yet is the logit lens."""
    lens = TunedLens.untrained(model)
    found = logit_lens(model, x, tokens=[TOKEN, OTHER], lens=lens)
    torch.testing.assert_close(found, logit_lens(model, x, tokens=[TOKEN, OTHER]), **CLOSE)
