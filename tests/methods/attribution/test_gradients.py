"""Gradients at hook points equal autograd through Hugging Face, audio and frozen weights included.

The reference keeps the gradients of Hugging Face's own tensors (``retain_grad``); deviations are
relative to a tensor's largest entry.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_reference import decoder_of, with_positions
from hooked_alm import ALMInput, HookedALM
from tiny import PLACEHOLDER, TinyModels, hf_inputs
from tiny_text import FAMILIES, TextModels, text_batch
from tolerances import GRADIENT

TOKEN = 5
INPUTS = with_positions(hf_inputs([[63], [23], []], [9, 14, 6]))
"""Left-padded, audio of different lengths, and a row without."""
IS_AUDIO = INPUTS["input_ids"] == PLACEHOLDER
AUDIO_POINTS = [
    *("audio.hook_encoder_in", "audio.hook_encoder_out", "audio.hook_projector_in"),
    *("audio.hook_projector_out", "hook_audio_embed"),
]
Gradients = dict[str, Tensor]


def readout(logits: Tensor) -> Tensor:
    """The logit of one token where the answer begins, added over rows."""
    return logits[:, -1, TOKEN].sum()


def text_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of every real word after a real token, one at a time."""
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    losses = [
        F.cross_entropy(logits[row, pos - 1], ids[row, pos])
        for row in range(len(ids))
        for pos in range(1, ids.shape[1])
        if mask[row, pos - 1] and mask[row, pos] and ids[row, pos] != PLACEHOLDER
    ]
    return torch.stack(losses).mean()


def hf_gradients(hf: Any, inputs: Mapping[str, Tensor], objective: Any) -> Gradients:
    """Gradients of the objective at Hugging Face's tensors, by the name of our hook point."""
    decoder = decoder_of(hf)
    d_head = decoder.layers[0].self_attn.head_dim
    kept: dict[str, Tensor] = {}
    before: list[tuple[Any, str]] = [(hf.lm_head, "unembed.hook_in")]
    after: list[tuple[Any, str]] = [(hf.lm_head, "unembed.hook_out")]
    for layer, block in enumerate(decoder.layers):
        name, attn, mlp = f"blocks.{layer}", block.self_attn, block.mlp
        before += [
            (block, f"{name}.hook_resid_pre"),
            (attn.o_proj, f"{name}.attn.hook_z"),
            (block.post_attention_layernorm, f"{name}.hook_resid_mid"),
            (mlp.down_proj, f"{name}.mlp.hook_post"),
        ]
        after += [
            *((getattr(attn, f"{kind}_proj"), f"{name}.attn.hook_{kind}") for kind in "qkv"),
            (attn, f"{name}.attn.hook_pattern"),
            (attn.o_proj, f"{name}.hook_attn_out"),
            (mlp.gate_proj, f"{name}.mlp.hook_pre"),
            (mlp.up_proj, f"{name}.mlp.hook_pre_linear"),
            (mlp.down_proj, f"{name}.hook_mlp_out"),
            (block, f"{name}.hook_resid_post"),
        ]
    inputs = dict(inputs)
    if decoder is not hf.model:
        tower, projector = hf.model.audio_tower, hf.model.multi_modal_projector
        features = inputs["input_features"].clone().requires_grad_()
        inputs["input_features"] = kept["audio.hook_encoder_in"] = features
        after += [(tower.layer_norm, "audio.hook_encoder_out")]
        after += [(projector, "audio.hook_projector_out")]
        before += [(projector, "audio.hook_projector_in")]
        for layer, block in enumerate(tower.layers):
            name, attn = f"audio.encoder.blocks.{layer}", block.self_attn
            before += [
                (block, f"{name}.hook_resid_pre"),
                (attn.out_proj, f"{name}.attn.hook_z"),
                (block.final_layer_norm, f"{name}.hook_resid_mid"),
                (block.fc2, f"{name}.mlp.hook_post"),
            ]
            after += [
                *((getattr(attn, f"{kind}_proj"), f"{name}.attn.hook_{kind}") for kind in "qkv"),
                (attn.out_proj, f"{name}.hook_attn_out"),
                (block.fc1, f"{name}.mlp.hook_pre"),
                (block.fc2, f"{name}.hook_mlp_out"),
                (block, f"{name}.hook_resid_post"),
            ]

    def keep(name: str, value: Tensor | None) -> None:
        if value is not None:
            value.retain_grad()
            kept[name] = value

    with ExitStack() as stack:
        for module, name in before:
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: keep(
                    name, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        for module, name in after:
            handle = module.register_forward_hook(
                lambda _, args, out, name=name: keep(name, out[1] if type(out) is tuple else out)
            )
            stack.callback(handle.remove)
        objective(hf(**inputs).logits).backward()
    hf.zero_grad()
    found = {name: value.grad for name, value in kept.items()}
    for name, gradient in found.items():
        assert gradient is not None, name
        if name.endswith(("hook_q", "hook_k", "hook_v", "hook_z")):
            width = d_head if name.startswith("blocks.") else tower.layers[0].self_attn.head_dim
            found[name] = gradient.unflatten(-1, (-1, width))
    found["hook_embed"] = found["blocks.0.hook_resid_pre"]
    if decoder is not hf.model:
        projected = found["audio.hook_projector_out"]
        counts = IS_AUDIO.sum(1)
        counts = counts[counts > 0]
        # Beyond a clip's own positions nothing is read, so both gradients are zero there.
        found["audio.encoder.hook_embed"] = found["audio.encoder.blocks.0.hook_resid_pre"]
        found["hook_audio_embed"] = projected[:, : counts.max()]
    return found


def our_gradients(
    model: HookedALM, x: ALMInput, names: list[str], objective: Any = readout
) -> Gradients:
    found: Gradients = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        assert hook.name not in found
        found[hook.name] = gradient.clone()

    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        objective(model(x)).backward()
    model.zero_grad()
    return found


def check(found: Gradients, expected: Gradients, names: list[str]) -> None:
    """Every name is there and within the tolerance, and nothing is compared with zeros."""
    assert set(found) == set(names)
    for name in names:
        got, reference = found[name], expected[name]
        if got.shape != reference.shape:  # kv heads shown per query head: their group's sum
            assert name.endswith(("hook_k", "hook_v"))
            got = got.unflatten(2, (reference.shape[2], -1)).sum(3)
        size = reference.abs().max()
        assert size > 0, name
        assert (got - reference).abs().max() <= GRADIENT * size, name


def check_audio_is_reached(gradient: Tensor) -> None:
    """At every audio position of the merged embeddings."""
    assert (gradient[IS_AUDIO].abs().amax(-1) > 0).all()


@pytest.fixture(params=["mha", "gqa", "ungrouped"])
def heads(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["trainable", "frozen"])
def frozen(request: pytest.FixtureRequest) -> bool:
    return request.param


@contextmanager
def ours(
    models: TinyModels, heads: str, frozen: bool, attention: str = "sdpa"
) -> Iterator[HookedALM]:
    """The shared model with that layout of heads, its parameters trainable or not."""
    model = models.hooked("mha" if heads == "mha" else "gqa", attention=attention)
    model.set_ungroup_grouped_query_attention(heads == "ungrouped")
    model.requires_grad_(not frozen)
    try:
        yield model
    finally:
        model.set_ungroup_grouped_query_attention(False)
        model.requires_grad_(True)


def hf_of(models: TinyModels, heads: str, attention: str) -> Any:
    return models.hf("mha" if heads == "mha" else "gqa", attention=attention)


@contextmanager
def no_encoding(model: HookedALM) -> Iterator[None]:
    def refuse(*args: Any) -> None:
        raise AssertionError("the encoder must not run again")

    with mock.patch.object(type(model.audio), "encode", refuse):
        yield


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_point(tiny_models: TinyModels, heads: str, frozen: bool, attention: str) -> None:
    """All of Hugging Face's tensors at once; then one at a time, as hooks depend on each other."""
    expected = hf_gradients(hf_of(tiny_models, heads, attention), INPUTS, readout)
    assert ("blocks.0.attn.hook_pattern" in expected) == (attention == "eager")
    with ours(tiny_models, heads, frozen, attention) as model:
        x = model.encode(**INPUTS)
        found = our_gradients(model, x, list(expected))
        check(found, expected, list(expected))
        check_audio_is_reached(found["hook_embed"])
        for name in [n for n in expected if n in AUDIO_POINTS or n.startswith("blocks.1.")]:
            check(our_gradients(model, x, [name]), expected, [name])


def test_reused_audio_embeddings(tiny_models: TinyModels, heads: str, frozen: bool) -> None:
    """Also where they were first made without gradient, or in inference mode."""
    expected = hf_gradients(hf_of(tiny_models, heads, "sdpa"), INPUTS, readout)
    names = ["hook_audio_embed", "hook_embed", "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z"]
    with ours(tiny_models, heads, frozen) as model:
        for first in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            x = model.encode(**INPUTS)
            with first():
                model(x)
            with no_encoding(model):
                for _ in range(2):
                    found = our_gradients(model, x, names)
                    check(found, expected, names)
                    check_audio_is_reached(found["hook_embed"])
                    for name in names:
                        check(our_gradients(model, x, [name]), expected, [name])


def test_pattern_under_a_fused_kernel(tiny_models: TinyModels, heads: str, frozen: bool) -> None:
    """Waiting for a pattern's gradient makes its layer explicit; the encoder stays as it was."""
    hf = hf_of(tiny_models, heads, "eager")
    encoder = hf_of(tiny_models, heads, "sdpa").model.audio_tower
    with mock.patch.dict(hf.model._modules, audio_tower=encoder):
        expected = hf_gradients(hf, INPUTS, readout)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    names += ["hook_embed", "hook_audio_embed"]
    with ours(tiny_models, heads, frozen) as model:
        x = model.encode(**INPUTS)
        found = our_gradients(model, x, names)
        check(found, expected, names)
        check_audio_is_reached(found["hook_embed"])
        audio_keys = found["blocks.1.attn.hook_pattern"][0, :, -1, IS_AUDIO[0]]
        assert (audio_keys != 0).all()


def test_cached_with_the_loss(tiny_models: TinyModels, heads: str, frozen: bool) -> None:
    """``run_with_cache(incl_bwd=True)``; the loss is computed here once more, word by word."""
    hf = hf_of(tiny_models, heads, "eager")
    expected = hf_gradients(hf, INPUTS, text_loss)
    with ours(tiny_models, heads, frozen, "eager") as model:
        for names in (None, [*expected]):
            loss, cache = model.run_with_cache(
                model.encode(**INPUTS), return_type="loss", incl_bwd=True, names_filter=names
            )
            model.zero_grad()
            assert torch.allclose(loss, text_loss(model(model.encode(**INPUTS))))
            points = model.matching(names)
            assert set(cache) == {*points, *(f"{point}_grad" for point in points)}
            both = [point for point in points if point in expected]
            found = {point: cache[f"{point}_grad"] for point in both}
            check(found, expected, both)
            check_audio_is_reached(cache["hook_embed_grad"])


@pytest.mark.parametrize("family", FAMILIES)
def test_text_models(tmp_path_factory: pytest.TempPathFactory, family: str, frozen: bool) -> None:
    models = TextModels(tmp_path_factory.mktemp("text"))
    expected = hf_gradients(models.hf(family, attention="eager"), text_batch(), readout)
    model = models.hooked(family, attention="eager")
    model.requires_grad_(not frozen)
    found = our_gradients(model, model.encode(**text_batch()), list(expected))
    check(found, expected, list(expected))


def test_resuming_with_frozen_weights(tiny_models: TinyModels) -> None:
    """From a residual stream without gradient, which stays without."""
    expected = hf_gradients(tiny_models.hf(), INPUTS, readout)
    names = ["blocks.2.hook_resid_pre", "blocks.3.attn.hook_z"]
    with ours(tiny_models, "gqa", True) as model:
        x = model.encode(**INPUTS)
        resid = model(x, stop_at_layer=2)
        found = our_gradients(model, x, names, lambda logits: readout(logits))
        resumed: Gradients = {}
        hooks: list[Any] = [
            (name, lambda gradient, hook: resumed.__setitem__(hook.name, gradient.clone()))
            for name in names
        ]
        with model.hooks(bwd_hooks=hooks):
            readout(model(resid, start_at_layer=2, inputs=x)).backward()
        check(found, expected, names)
        check(resumed, expected, names)
        assert not resid.requires_grad
        assert resid.grad is None


def test_edits_of_the_embedding(tiny_models: TinyModels, frozen: bool) -> None:
    """In place, where the gradient starts; and by a tensor of the user's, which has none."""
    with ours(tiny_models, "gqa", frozen) as model:
        x = model.encode(**INPUTS)
        with torch.no_grad():
            _, cache = model.run_with_cache(x, names_filter="hook_embed")
        mine = cache["hook_embed"] * 2
        names = ["blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"]
        plain = our_gradients(model, x, names)
        edits: list[Any] = [lambda value, hook: value.mul_(2), lambda value, hook: mine]
        found = []
        for edit in edits:
            with model.hooks(fwd_hooks=[("hook_embed", edit)]):
                found.append(our_gradients(model, x, names))
        for name in names:
            assert torch.equal(found[0][name], found[1][name])
            assert not torch.equal(found[0][name], plain[name])
        assert not mine.requires_grad


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_result"])
def test_retain_grad_in_a_forward_hook(tiny_models: TinyModels, point: str) -> None:
    """The other way to ask for a gradient, also on points that are computed on the side."""
    name = f"blocks.1.attn.{point}"
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        seen[hook.name] = value

    with ours(tiny_models, "gqa", False) as model:
        x = model.encode(**INPUTS)
        with model.hooks(fwd_hooks=[(name, keep)]):
            readout(model(x)).backward()
        model.zero_grad()
        assert torch.equal(seen[name].grad, our_gradients(model, x, [name])[name])
