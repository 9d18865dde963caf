"""Weights in TransformerLens' names and format, and processing that keeps every probability."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformer_lens import SVDInterpreter
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens
from transformer_lens.utilities import composition_scores
from transformer_lens.weight_processing import ProcessWeights

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.config import HookedALMConfig
from tiny import IM_START, N_BPE, PLACEHOLDER, TinyModels, build_tokenizer, hf_inputs, randomise
from tolerances import CENTRED, COMPOSITION, FOLDED, FOLDED_WEIGHTS, OTHER_KERNEL, SINGULAR_VECTORS

VARIANTS = ("mha", "gqa", "mqa, sliding", "qk norm", "tied")
TOKEN, OTHER_TOKEN = 5, 9
CLOSE = {"atol": OTHER_KERNEL[torch.float32], "rtol": OTHER_KERNEL[torch.float32]}


def fresh(tiny_models: TinyModels, variant: str, dtype: torch.dtype = torch.float32) -> HookedALM:
    """A model that the test may change; all of them hear audio."""
    folder = tiny_models.folder(variant if variant in VARIANTS[:3] else "gqa")
    model = HookedALM.from_pretrained(folder, dtype=dtype)
    if variant == "qk norm":
        cfg = replace(model.cfg, qk_norm=True, attn_bias="")
        model = HookedALM(cfg, front_end=model.audio).to(dtype)
        randomise(model)
    if variant == "tied":
        model.unembed.weight = model.embed.weight
        model.cfg.tie_word_embeddings = True
    return model.eval()


def prompts(model: HookedALM) -> ALMInput:
    """A left-padded pair around clips, longer than the sliding window."""
    return model.encode(**hf_inputs([[40], [23, 11]], [14, 9]))


def log_probs(model: HookedALM, x: ALMInput) -> Tensor:
    """At real positions."""
    return model(x).float().log_softmax(-1)[x.attention_mask.bool()]


def exported(model: HookedALM) -> dict[str, Tensor]:
    return model.to_hooked_transformer_state_dict()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_processing_keeps_every_probability(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype
) -> None:
    """The same log-probabilities from centred logits, without scales, value biases or a tie."""
    model = fresh(tiny_models, variant, dtype)
    assert model.cfg.weight_processing == ()
    assert model.cfg.normalization_type == "RMS"
    x = prompts(model)
    before, logits = log_probs(model, x), model(x)
    model.process_weights_()
    torch.testing.assert_close(log_probs(model, x), before, atol=FOLDED[dtype], rtol=0)
    assert not torch.equal(model(x), logits)
    assert model.W_U.float().mean(-1).abs().max() < CENTRED[dtype]
    assert not model.b_V.any()
    assert bool(model.b_O.any()) == (variant != "qk norm")
    norms = [model.ln_final, *(n for block in model.blocks for n in (block.ln1, block.ln2))]
    assert all(torch.equal(norm.w, torch.ones_like(norm.w)) for norm in norms)
    assert model.unembed.weight is not model.embed.weight
    assert not model.cfg.tie_word_embeddings
    assert model.cfg.normalization_type == "RMSPre"
    done = ("fold_ln", "center_unembed", "fold_value_biases")
    assert model.cfg.weight_processing == done
    assert {p.dtype for p in model.parameters()} == {dtype}


Step = Callable[[HookedALM], None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("step", "moved"),
    [
        (HookedALM.fold_layer_norm, {"unembed.hook_in"}),
        (HookedALM.center_unembed, {"unembed.hook_out"}),
        (HookedALM.fold_value_biases, {"attn.hook_v", "attn.hook_z", "attn.hook_result"}),
    ],
)
@pytest.mark.parametrize("variant", ["mha", "gqa", "tied"])
def test_each_step_moves_only_the_hooks_it_says(
    tiny_models: TinyModels, variant: str, step: Step, moved: set[str]
) -> None:
    """Every other value stays: residual stream, pattern, q, k, normalised input, MLP."""
    model = fresh(tiny_models, variant)
    x = prompts(model)
    real = x.attention_mask.bool()

    def everything() -> Mapping[str, Tensor]:
        return model.run_with_cache(x, names_filter=lambda name: "attn_in" not in name)[1]

    before = everything()
    step(model)
    after = everything()
    found = set()
    for name, value in before.items():
        difference = (after[name].double() - value.double()).abs()
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            difference = difference.transpose(1, 2)
        if not name.startswith("audio.") and name != "hook_audio_embed":
            difference = difference[real]
        if difference.max() > FOLDED[torch.float32]:
            found.add(".".join(name.split(".")[-2:]))
    assert found == moved
    assert torch.equal(
        after["blocks.0.ln1.hook_normalized"], before["blocks.0.ln1.hook_normalized"]
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_what_the_folds_put_where(tiny_models: TinyModels, variant: str) -> None:
    """``w`` times ``hook_normalized`` is ``hook_normalized`` on folded weights; b_O is the bias."""
    model = fresh(tiny_models, variant)
    x = prompts(model)
    scale, final_scale, head = model.blocks[2].ln1.w, model.ln_final.w, model.unembed.weight
    b_V, W_O, W_Q = model.b_V[2], model.W_O[2], model.W_Q[2]
    names = ["blocks.2.ln1.hook_normalized", "blocks.2.attn.hook_v", "blocks.2.attn.hook_q"]
    _, before = model.run_with_cache(x, names_filter=names)
    real = x.attention_mask.bool()
    model.process_weights_(center_unembed=False)
    names += ["blocks.2.attn.hook_result", "blocks.2.hook_attn_out"]
    _, after = model.run_with_cache(x, names_filter=names)
    q = torch.einsum("bpd,hde->bphe", after[names[0]], model.W_Q[2]) + model.b_Q[2]
    torch.testing.assert_close(q[real], before["blocks.2.attn.hook_q"][real], **CLOSE)
    torch.testing.assert_close(model.W_Q[2], W_Q * scale[:, None], **CLOSE)
    torch.testing.assert_close(model.unembed.weight, head * final_scale, **CLOSE)
    n_kv = after[names[1]].shape[2]
    lost = (before[names[1]] - after[names[1]])[real]
    torch.testing.assert_close(lost, b_V[:: model.cfg.n_heads // n_kv].expand_as(lost), **CLOSE)
    by_hand = sum(b_V[h] @ W_O[h] for h in range(model.cfg.n_heads))
    torch.testing.assert_close(model.b_O[2], by_hand, **CLOSE)
    results = after["blocks.2.attn.hook_result"].sum(2) + model.b_O[2]
    torch.testing.assert_close(results, after["blocks.2.hook_attn_out"], **CLOSE)
    b_O = model.b_O
    torch.testing.assert_close(model.accumulated_bias(2), b_O[0] + b_O[1])
    torch.testing.assert_close(model.accumulated_bias(2, mlp_input=True), b_O[:3].sum(0))
    with pytest.raises(InputError, match="from 0 to 3"):
        model.accumulated_bias(4, mlp_input=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [*VARIANTS, "ungrouped"])
def test_transformer_lens_folds_our_export_to_the_same_weights(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype
) -> None:
    """``ProcessWeights`` on the export, an independent implementation, against ours."""
    model = fresh(tiny_models, variant.replace("ungrouped", "gqa"), dtype)
    if variant == "ungrouped":
        model.set_ungroup_grouped_query_attention(True)
    theirs = ProcessWeights.process_weights(exported(model), model.cfg)
    model.process_weights_()
    ours = exported(model)
    scales = {name: theirs.pop(name) for name in list(theirs) if ".ln" in f".{name}"}
    assert len(scales) == 2 * model.cfg.n_layers + 1
    assert all(torch.equal(w, torch.ones_like(w)) for w in scales.values())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        is_sum = name.endswith(("b_O", "W_U"))
        limit = FOLDED_WEIGHTS[dtype] if is_sum else 0.0
        torch.testing.assert_close(weight, theirs[name], atol=limit, rtol=limit, msg=name)
        if dtype == torch.bfloat16:  # summed in fp32 and rounded once: two sums rarely differ
            assert (weight == theirs[name]).float().mean() > 0.95, name


def reference_forward(weights: Mapping[str, Tensor], cfg: HookedALMConfig, x: ALMInput,
                      resid: Tensor) -> Tensor:  # fmt: skip
    """Logits of one row from weights in HookedTransformer's format, head by head."""

    def norm(value: Tensor, name: str) -> Tensor:
        scale = weights.get(name, torch.tensor(1.0))
        return value / (value.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * scale

    def rotate(value: Tensor) -> Tensor:
        half = cfg.d_head // 2
        speeds = cfg.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(()), positions[:, None] * speeds)
        turned = torch.complex(value[:, :half], value[:, half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    positions = torch.arange(len(resid)).float()
    ahead = positions[None] - positions[:, None]
    for layer in range(cfg.n_layers):
        w = {n.removeprefix(f"blocks.{layer}."): v for n, v in weights.items()}
        seen = ahead <= 0
        if cfg.layer_types[layer] == "sliding_attention":
            seen &= ahead > -cfg.sliding_window
        normed, out = norm(resid, f"blocks.{layer}.ln1.w"), w["attn.b_O"]
        for head in range(cfg.n_heads):
            kv = head * len(w["attn._W_K"]) // cfg.n_heads
            q = normed @ w["attn.W_Q"][head] + w["attn.b_Q"][head]
            k = normed @ w["attn._W_K"][kv] + w["attn._b_K"][kv]
            v = normed @ w["attn._W_V"][kv] + w["attn._b_V"][kv]
            if cfg.qk_norm:
                q = norm(q, f"blocks.{layer}.attn.q_norm.w")
                k = norm(k, f"blocks.{layer}.attn.k_norm.w")
            scores = rotate(q) @ rotate(k).T / cfg.d_head**0.5
            out = out + scores.where(seen, -torch.inf).softmax(-1) @ v @ w["attn.W_O"][head]
        resid = resid + out
        normed = norm(resid, f"blocks.{layer}.ln2.w")
        gate = F.silu(normed @ w["mlp.W_gate"]) * (normed @ w["mlp.W_in"]) + w["mlp.b_in"]
        resid = resid + gate @ w["mlp.W_out"] + w["mlp.b_out"]
    return norm(resid, "ln_final.w") @ weights["unembed.W_U"] + weights["unembed.b_U"]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_export_is_the_model(tiny_models: TinyModels, variant: str) -> None:
    """Run by an independent forward, as exported, as TransformerLens processes it and as we do."""
    model = fresh(tiny_models, variant)
    x = model.encode(**hf_inputs([[40]], [12]))
    resid, tokens, _, mask = model.input_to_embed(x)
    assert torch.equal(tokens, x.tokens)
    assert torch.equal(mask, x.attention_mask)
    assert torch.equal(model(resid, start_at_layer=0, inputs=x), model(x))
    raw = exported(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not own & {value.untyped_storage().data_ptr() for value in raw.values()}
    assert all(value.is_contiguous() for value in raw.values())
    torch.testing.assert_close(reference_forward(raw, model.cfg, x, resid[0]), model(x)[0], **CLOSE)
    expected = log_probs(model, x)
    processed = ProcessWeights.process_weights(dict(raw), model.cfg)
    model.process_weights_()
    for weights in (processed, exported(model)):
        found = reference_forward(weights, model.cfg, x, resid[0]).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=FOLDED[torch.float32], rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa", "qk norm", "tied"])
def test_a_state_dict_comes_back(tiny_models: TinyModels, variant: str) -> None:
    """Weights that TransformerLens processed, loaded elsewhere; or processed on the way."""
    model, other = fresh(tiny_models, variant), fresh(tiny_models, variant)
    x = prompts(model)
    expected, raw = log_probs(model, x), exported(model)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    processed = ProcessWeights.process_weights(dict(raw), model.cfg)
    buffers = {f"blocks.0.attn.{name}": torch.zeros(1) for name in ("mask", "rotary_sin")}
    off = dict.fromkeys(("fold_ln", "center_unembed", "fold_value_biases"), False)
    other.audio = model.audio
    other.load_and_process_state_dict(processed | buffers, **off)
    assert other.cfg.normalization_type == "RMSPre"
    assert other.cfg.weight_processing == ("load_and_process_state_dict",)
    assert all(torch.equal(value, processed[name]) for name, value in exported(other).items())
    torch.testing.assert_close(log_probs(other, x), expected, atol=FOLDED[torch.float32], rtol=0)
    other.load_and_process_state_dict(raw, **off)
    assert other.cfg.normalization_type == "RMS"
    assert all(torch.equal(value, raw[name]) for name, value in exported(other).items())
    assert torch.equal(log_probs(other, x), expected)
    assert all(p.is_contiguous() for p in other.parameters())
    raw["ln_final.w"].mul_(2)  # the model has copies
    assert torch.equal(log_probs(other, x), expected)
    raw["ln_final.w"].div_(2)
    assert all(block.attn.o_proj.bias is None for block in other.blocks)
    other.load_and_process_state_dict(raw)
    model.process_weights_()
    assert all(torch.equal(value, exported(model)[name]) for name, value in exported(other).items())


def test_a_state_dict_that_does_not_fit_changes_nothing(tiny_models: TinyModels) -> None:
    """Missing, unknown, misshapen and impossible entries in one error."""
    model = fresh(tiny_models, "qk norm")
    good = exported(model)
    bad = dict(good, **{
        "unembed.b_U": torch.ones(model.cfg.d_vocab),
        "blocks.1.attn._b_V": torch.ones(2, 10),
        "blocks.1.attn.W_O": good["blocks.1.attn.W_O"].mT,
        "blocks.9.ln1.w": torch.ones(54),
    })  # fmt: skip
    del bad["embed.W_E"]
    with pytest.raises(InputError, match="5 do not fit") as caught:
        model.load_and_process_state_dict(bad)
    for part in (
        "embed.W_E is missing",
        "blocks.1.attn.W_O is [6, 54, 10], expected [6, 10, 54]",
        "blocks.1.attn._b_V is not zero",
        "unembed.b_U is not zero",
        "blocks.9.ln1.w is unknown",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, good[name]) for name, value in exported(model).items())
    assert model.cfg.weight_processing == ()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_is_once(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    """Nothing is folded again; only the mean of a centred head is not exactly 0."""
    model = fresh(tiny_models, "gqa", dtype)
    model.process_weights_()
    once, done = exported(model), model.cfg.weight_processing
    model.process_weights_()
    for name, value in exported(model).items():
        if name == "unembed.W_U":
            torch.testing.assert_close(value, once[name], atol=CENTRED[dtype], rtol=0)
        else:
            assert torch.equal(value, once[name]), name
    assert model.cfg.weight_processing == done
    assert not {"blocks.0.ln1.w", "ln_final.w"} & exported(model).keys()


@torch.no_grad()
def test_processing_reaches_no_other_model(tiny_models: TinyModels) -> None:
    """Not the file the weights are mapped from, nor a model loaded from it; frozen stays frozen."""
    model, twin = fresh(tiny_models, "gqa"), fresh(tiny_models, "gqa")
    old = model.blocks[0].attn.v_proj.weight
    kept = old.clone()
    model.requires_grad_(False)
    model.process_weights_()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(old, kept)
    x = prompts(twin)
    assert torch.equal(twin(x), tiny_models.hooked("gqa")(x))
    assert torch.equal(fresh(tiny_models, "gqa")(x), twin(x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"center_writing_weights": True}, "RMSNorm, which does not subtract the mean"),
        ({"refactor_factored_attn_matrices": True}, "rotates queries and keys"),
    ],
)
def test_invalid_steps_refuse_before_anything_changes(
    tiny_models: TinyModels, options: dict[str, bool], match: str
) -> None:
    """Never skipped silently; by their own name, too."""
    model = fresh(tiny_models, "gqa")
    before = exported(model)
    with pytest.raises(InputError, match=match):
        model.process_weights_(**options)
    with pytest.raises(InputError, match=match):
        model.load_and_process_state_dict(before, **options)
    with pytest.raises(InputError, match=match):
        getattr(model, next(iter(options)))()
    assert all(torch.equal(value, before[name]) for name, value in exported(model).items())
    assert model.cfg.weight_processing == ()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_direct_logit_attribution_before_and_after(tiny_models: TinyModels, variant: str) -> None:
    """TransformerLens' own: adds up to the logit either way, and components keep their shares.

    Its lens ends at the logits either way, too.
    """
    model = fresh(tiny_models, variant)
    x = model.encode(**hf_inputs([[40]], [9]))
    shares = []
    for _ in ("unfolded", "folded"):
        logits, cache = model.run_with_cache(x)
        for unit in ("component", "head"):
            found = direct_logit_attribution(model, x, TOKEN, unit=unit).attribution
            torch.testing.assert_close(found.sum(0).squeeze(), logits[0, -1, TOKEN], **CLOSE)
        shares.append(direct_logit_attribution(model, x, TOKEN, OTHER_TOKEN).attribution)
        last_depth = logit_lens(model, x).readout.values[-1]
        torch.testing.assert_close(last_depth, logits[:, -1], **CLOSE)
        parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
        torch.testing.assert_close(parts.sum(0), cache["blocks.3.hook_resid_post"], **CLOSE)
        bias = parts[labels.index("bias")]
        torch.testing.assert_close(bias, model.accumulated_bias(4).expand_as(bias))
        assert bool(bias.any()) == (len(shares) == 2)
        model.process_weights_()
    torch.testing.assert_close(*shares, atol=FOLDED[torch.float32], rtol=0)


@torch.no_grad()
def test_an_edited_head_result_keeps_the_output_bias(tiny_models: TinyModels) -> None:
    """Zeroing a head's result is zeroing its z, also where the output has a bias."""
    model = fresh(tiny_models, "gqa")
    model.process_weights_()
    x = prompts(model)

    def mute(value: Tensor, hook: object) -> Tensor:
        return value.index_fill(2, torch.tensor([4]), 0.0)

    by_result, by_z = (
        model.run_with_hooks(x, fwd_hooks=[(f"blocks.1.attn.hook_{point}", mute)])
        for point in ("result", "z")
    )
    torch.testing.assert_close(by_result, by_z, **CLOSE)
    assert (by_z - model(x)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mha", "gqa", "qk norm"])
def test_tl_parameters_are_the_weights(tiny_models: TinyModels, variant: str) -> None:
    """Every one equals the property of its name; stacked ones have a layer axis in front."""
    model = fresh(tiny_models, variant)
    cfg, params = model.cfg, model.tl_parameters()
    for name, value in params.items():
        module, _, attribute = name.rpartition(".")
        assert torch.equal(value, getattr(model.get_submodule(module), attribute)), name
    per_layer = 2 + 8 + 5 + 2 * cfg.qk_norm
    assert len(params) == 1 + per_layer * cfg.n_layers + 3
    h, d, e, f = cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp
    shapes = {"W_Q": (h, d, e), "W_K": (h, d, e), "W_V": (h, d, e), "W_O": (h, e, d),
              "b_Q": (h, e), "b_K": (h, e), "b_V": (h, e), "b_O": (d,), "W_gate": (d, f),
              "W_in": (d, f), "W_out": (f, d), "b_in": (f,), "b_out": (d,)}  # fmt: skip
    for name, shape in shapes.items():
        stacked = getattr(model, name)
        assert stacked.shape == (cfg.n_layers, *shape)
        part = "attn" if name.endswith(("Q", "K", "V", "O")) else "mlp"
        assert torch.equal(stacked[2], params[f"blocks.2.{part}.{name}"])
    assert params["unembed.W_U"].data_ptr() == model.unembed.weight.data_ptr()
    for name in ("W_pos", "W_E_pos"):
        assert not hasattr(model, name)  # rotary positions are not added to the stream


@torch.no_grad()
def test_svd_interpreter_reads_grouped_heads(tiny_models: TinyModels) -> None:
    """TransformerLens' tool against a dense decomposition of one query head."""
    model = fresh(tiny_models, "gqa")
    found = SVDInterpreter(model).get_singular_vectors("OV", 1, num_vectors=3, head_index=4)
    kv = 4 * 2 // 6
    attn = model.blocks[1].attn
    W_V = attn.v_proj.weight[kv * 10 : (kv + 1) * 10].T
    W_O = attn.o_proj.weight[:, 40:50].T
    directions = torch.linalg.svd((W_V @ W_O).double()).Vh[:3].float()
    expected = (model.unembed.weight @ directions.T)[:, None]
    torch.testing.assert_close(found.abs(), expected.abs(), atol=SINGULAR_VECTORS, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_are_plain_algebra(tiny_models: TinyModels, mode: str) -> None:
    """Dense products in float64, TransformerLens' own function, and the same after folding."""
    model = fresh(tiny_models, "gqa")
    found = model.all_composition_scores(mode)
    w = [block.ln1.w.double() for block in model.blocks]

    def dense(layer: int, head: int, kind: str) -> Tensor:
        part = {
            name: getattr(model.blocks[layer].attn, f"W_{name}")[head].double() for name in "QKVO"
        }
        read = {name: w[layer][:, None] * part[name] for name in "QKV"}
        pairs = {"Q": (read["Q"], read["K"].T), "K": (read["K"], read["Q"].T),
                 "V": (read["V"], part["O"])}  # fmt: skip
        first, second = pairs[kind]
        return first @ second

    for early, late in ((0, 1), (0, 3), (2, 3)):
        for a, b in ((0, 5), (3, 2)):
            left, right = dense(early, a, "V"), dense(late, b, mode)
            expected = (left @ right).norm() / left.norm() / right.norm()
            assert found[early, a, late, b].item() == pytest.approx(
                float(expected), rel=COMPOSITION
            )
    layers = torch.arange(model.cfg.n_layers)
    is_later = layers[:, None] < layers
    assert torch.equal(found.amax((1, 3)) > 0, is_later)
    model.fold_layer_norm()
    torch.testing.assert_close(model.all_composition_scores(mode), found, rtol=COMPOSITION, atol=0)
    right = {"Q": model.QK, "K": model.QK.T, "V": model.OV}[mode]
    theirs = composition_scores(model.OV, right).where(is_later[:, None, :, None], 0.0)
    torch.testing.assert_close(found, theirs, rtol=COMPOSITION, atol=0)
    with pytest.raises(InputError, match="expected Q, K or V"):
        model.all_composition_scores("O")


@torch.no_grad()
def test_losses_per_token(gqa: HookedALM) -> None:
    """Next-token cross-entropy written out; nothing at pads and placeholders."""
    x = prompts(gqa)
    logits, losses = gqa(x, return_type="both", loss_per_token=True)
    n_scored = 0
    for row in range(2):
        for pos in range(1, x.shape[1]):
            target = x.tokens[row, pos]
            if target != PLACEHOLDER and x.attention_mask[row, pos - 1]:
                expected = F.cross_entropy(logits[row, pos - 1], target)
                torch.testing.assert_close(losses[row, pos - 1], expected, **CLOSE)
                n_scored += 1
            else:
                assert losses[row, pos - 1] == 0
    assert losses.shape == (2, x.shape[1] - 1)
    assert (losses > 0).sum() == n_scored
    torch.testing.assert_close(losses.sum() / n_scored, gqa(x, return_type="loss"), **CLOSE)
    ids = x.tokens[:, -4:]
    text_logits, loss = gqa(ids, return_type="both")
    assert torch.equal(gqa.loss_fn(text_logits, ids), loss)


def test_every_parameter_is_counted_once(tiny_models: TinyModels) -> None:
    """As in Hugging Face's model, whose layout is ours; a tied head is no second table."""
    expected = sum(p.numel() for p in tiny_models.hf("gqa").parameters())
    assert tiny_models.hooked("gqa").n_params_total == expected
    tied = fresh(tiny_models, "tied")
    assert tied.n_params_total == expected - tied.embed.weight.numel()
    tied.center_unembed()
    assert tied.n_params_total == expected


def test_tokens_can_be_located_and_named(gqa: HookedALM) -> None:
    """In text, in ids and in a prompt with audio; what is not there raises."""
    x = gqa.encode(**hf_inputs([[40]], [9]))
    audio = x.spans.positions("audio", 0)
    assert gqa.get_token_position(PLACEHOLDER, x) == audio[0]
    assert gqa.get_token_position("<|AUDIO|>", x, mode="last") == audio[-1]
    text = "system user assistant user"
    ids = gqa.to_tokens(text)
    assert gqa.get_token_position(ids[0, 3], text) == ids[0].tolist().index(int(ids[0, 3]))
    last = len(ids[0]) - 1 - ids[0].tolist()[::-1].index(int(ids[0, -1]))
    assert gqa.get_token_position(int(ids[0, -1]), ids, mode="last") == last
    pair = prompts(gqa)
    pad = int(pair.tokens[~pair.attention_mask.bool()][0])
    padded = next(i for i in range(2) if not pair.attention_mask[i, 0])
    with pytest.raises(InputError, match="none of the"):
        gqa.get_token_position(pad, pair[padded])
    with pytest.raises(InputError, match="expected one row"):
        gqa.get_token_position(PLACEHOLDER, pair)
    with pytest.raises(InputError, match="expected first or last"):
        gqa.get_token_position(PLACEHOLDER, x, mode="middle")
    names = gqa.to_str_tokens(x)
    assert len(names) == x.shape[1]
    assert names[audio[0]] == "<|AUDIO|>"
    assert "".join(gqa.to_str_tokens(text)) == text
    assert gqa.to_str_tokens([text, "user"]) == [gqa.to_str_tokens(text), gqa.to_str_tokens("user")]
    assert gqa.to_single_str_token(PLACEHOLDER) == "<|AUDIO|>"


def test_bos_tokens_are_prepended_once_or_not_at_all(tiny_models: TinyModels) -> None:
    """By a tokenizer that adds one of its own accord, and by one that does not."""
    model = fresh(tiny_models, "mha")
    assert model.prompts is None
    tokenizer = build_tokenizer()
    model.set_tokenizer(tokenizer)
    plain = model.to_tokens("user")
    with pytest.raises(InputError, match="has none"):
        model.to_tokens("user", prepend_bos=True)
    tokenizer.bos_token = "<|im_start|>"
    bos = torch.tensor([[IM_START]])
    assert torch.equal(model.to_tokens("user"), plain)
    assert torch.equal(model.to_tokens("user", prepend_bos=False), plain)
    assert torch.equal(model.to_tokens("user", prepend_bos=True), torch.cat([bos, plain], 1))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    for wanted in (None, True):
        assert torch.equal(model.to_tokens("user", wanted), torch.cat([bos, plain], 1))
    assert torch.equal(model.to_tokens("user", False), plain)
    pair = model.to_tokens(["user", "system user assistant"], prepend_bos=True)
    alone = model.to_tokens("system user assistant", prepend_bos=True)
    assert torch.equal(pair[1:], alone)
    assert pair[0, 0] == tokenizer.pad_token_id
    assert torch.equal(pair[:1, -plain.shape[1] - 1 :], torch.cat([bos, plain], 1))


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_models: TinyModels, gqa: HookedALM) -> None:
    """Too many tokens, right padding, or a model whose prompts have their own."""
    model = fresh(tiny_models, "mha")
    with pytest.raises(InputError, match="came with processor files"):
        gqa.set_tokenizer(build_tokenizer())
    with pytest.raises(InputError, match="padded there"):
        model.set_tokenizer(build_tokenizer(), default_padding_side="right")
    large = build_tokenizer()
    large.add_tokens([f"word{i}" for i in range(model.cfg.d_vocab - N_BPE)])
    with pytest.raises(InputError, match="tokens, the model has 337"):
        model.set_tokenizer(large)
    assert model.tokenizer is None
