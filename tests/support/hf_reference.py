"""Plain Hugging Face runs, recorded with PyTorch hooks under our hook names, in firing order."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hooked_alm.inputs import positions_from_mask
from tiny import PLACEHOLDER

Activations = dict[str, Tensor]


def with_positions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a Hugging Face forward, with the positions that our input makes."""
    return {**inputs, "position_ids": positions_from_mask(inputs["attention_mask"])}


def decoder_of(hf: Any) -> Any:
    """The stack of blocks of an audio model or of a text model."""
    return getattr(hf.model, "language_model", hf.model)


def hf_activations(hf: Any, inputs: Mapping[str, Tensor]) -> Activations:
    """Activations of one forward, by the name of our hook point that should equal them.

    Names ending in ``.out`` are outputs of norms, which have no hook point of their own.

    Args:
        hf: Qwen2-Audio, LLaMA, Qwen2 or Qwen3; pattern and scores exist under eager attention only.
        inputs: of its ``forward``.
    """
    found: Activations = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.detach().clone()

    def heads(name: str, width: int) -> Callable[..., None]:
        return lambda value: keep(name, value.unflatten(-1, (-1, width)))

    def whole(name: str) -> Callable[..., None]:
        return lambda value: keep(name, value)

    decoder = decoder_of(hf)
    modeling = sys.modules[type(decoder).__module__]
    d_head = decoder.layers[0].self_attn.head_dim
    before: list[tuple[nn.Module, Callable[..., None]]] = []
    after: list[tuple[nn.Module, Callable[..., None]]] = [
        (decoder.embed_tokens, whole("hook_text_embed")),
        (decoder.norm, whole("ln_final.out")),
        (hf.lm_head, whole("unembed.hook_out")),
    ]
    before += [
        (decoder.layers[0], whole("hook_embed")),
        (hf.lm_head, whole("unembed.hook_in")),
    ]
    if decoder is not hf.model:
        before += [
            (hf.model.audio_tower, whole("audio.hook_encoder_in")),
            (hf.model.multi_modal_projector, whole("audio.hook_projector_in")),
        ]
        after += [
            (hf.model.audio_tower.layer_norm, whole("audio.hook_encoder_out")),
            (hf.model.multi_modal_projector, whole("audio.hook_projector_out")),
        ]
    for layer, block in enumerate(decoder.layers):
        name = f"blocks.{layer}"
        attn, mlp = block.self_attn, block.mlp
        before += [
            (block, whole(f"{name}.hook_resid_pre")),
            (attn.o_proj, heads(f"{name}.attn.hook_z", d_head)),
            (block.post_attention_layernorm, whole(f"{name}.hook_resid_mid")),
            (mlp.down_proj, whole(f"{name}.mlp.hook_post")),
        ]
        after += [
            (block.input_layernorm, whole(f"{name}.ln1.out")),
            (attn.q_proj, heads(f"{name}.attn.hook_q", d_head)),
            (attn.k_proj, heads(f"{name}.attn.hook_k", d_head)),
            (attn.v_proj, heads(f"{name}.attn.hook_v", d_head)),
            (attn.o_proj, whole(f"{name}.hook_attn_out")),
            (block.post_attention_layernorm, whole(f"{name}.ln2.out")),
            (mlp.gate_proj, whole(f"{name}.mlp.hook_pre")),
            (mlp.act_fn, whole(f"{name}.mlp.hook_gate")),
            (mlp.up_proj, whole(f"{name}.mlp.hook_pre_linear")),
            (mlp.down_proj, whole(f"{name}.hook_mlp_out")),
            (block, whole(f"{name}.hook_resid_post")),
        ]

    rotate, eager = modeling.apply_rotary_pos_emb, modeling.eager_attention_forward
    rotated = iter(range(len(decoder.layers)))

    def recording_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        q, k = rotate(q, k, cos, sin, **options)
        name = f"blocks.{next(rotated)}.attn"
        keep(f"{name}.hook_rot_q", q.transpose(1, 2))
        keep(f"{name}.hook_rot_k", k.transpose(1, 2))
        return q, k

    def recording_eager(module: nn.Module, *args: Any, **options: Any) -> Any:
        softmax = F.softmax

        def recording_softmax(scores: Tensor, **options: Any) -> Tensor:
            keep(f"blocks.{module.layer_idx}.attn.hook_attn_scores", scores)
            return softmax(scores, **options)

        with mock.patch.object(F, "softmax", recording_softmax):
            return eager(module, *args, **options)

    def attention_weights(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
            if output[1] is not None:
                keep(name, output[1])

        return hook

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", recording_rotate))
        stack.enter_context(mock.patch.object(modeling, "eager_attention_forward", recording_eager))
        for module, record in before:
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, record=record: record(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        for module, record in after:
            handle = module.register_forward_hook(lambda _, args, out, record=record: record(out))
            stack.callback(handle.remove)
        for layer, block in enumerate(decoder.layers):
            handle = block.self_attn.register_forward_hook(
                attention_weights(f"blocks.{layer}.attn.hook_pattern")
            )
            stack.callback(handle.remove)
        logits = hf(**inputs).logits
    assert torch.equal(found["unembed.hook_out"], logits)
    return found


def every_point(hf: Any, inputs: Mapping[str, Tensor]) -> Activations:
    """``hf_activations``, and what every other hook point should hold, made from the same run.

    Norms by their own code with a scale of ones, their root mean squares from what they read;
    inputs that heads share, once per head; the heads' results by the output projection's columns.
    """
    decoder = decoder_of(hf)
    attn = decoder.layers[0].self_attn
    n_heads, n_kv_heads = (p.out_features // attn.head_dim for p in (attn.q_proj, attn.k_proj))
    found: Activations = {"hook_tokens": inputs["input_ids"]}
    norms = {"ln_final": decoder.norm}
    for layer, block in enumerate(decoder.layers):
        norms[f"blocks.{layer}.ln1"] = block.input_layernorm
        norms[f"blocks.{layer}.ln2"] = block.post_attention_layernorm
        if hasattr(block.self_attn, "q_norm"):
            norms[f"blocks.{layer}.attn.q_norm"] = block.self_attn.q_norm
            norms[f"blocks.{layer}.attn.k_norm"] = block.self_attn.k_norm

    def record_norm(name: str) -> Callable[..., None]:
        def hook(norm: Any, args: tuple[Tensor], _: Tensor) -> None:
            ones = {"weight": torch.ones_like(norm.weight)}
            with ExitStack() as quiet:  # without this hook, which would call itself
                quiet.enter_context(mock.patch.object(norm, "_forward_hooks", {}))
                found[f"{name}.hook_normalized"] = functional_call(norm, ones, args)
            mean_square = args[0].float().pow(2).mean(-1, keepdim=True)
            found[f"{name}.hook_scale"] = (mean_square + norm.variance_epsilon).sqrt()

        return hook

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(record_norm(name)).remove)
        recorded = hf_activations(hf, inputs)
    found |= {name: value for name, value in recorded.items() if not name.endswith(".out")}
    for layer, block in enumerate(decoder.layers):
        name = f"blocks.{layer}"
        shared = found[f"{name}.hook_resid_pre"].unsqueeze(2)
        for letter, n in {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}.items():
            for prefix in (name, f"{name}.attn"):
                found[f"{prefix}.hook_{letter}_input"] = shared.repeat(1, 1, n, 1)
        if n_heads == n_kv_heads:
            found[f"{name}.hook_attn_in"] = shared.repeat(1, 1, n_heads, 1)
        found[f"{name}.hook_mlp_in"] = found[f"{name}.hook_resid_mid"]
        columns = block.self_attn.o_proj.weight.split(attn.head_dim, dim=1)
        z = found[f"{name}.attn.hook_z"].unbind(2)
        written = [F.linear(*pair) for pair in zip(z, columns, strict=True)]
        found[f"{name}.attn.hook_result"] = torch.stack(written, 2)
    if decoder is not hf.model:
        found["hook_audio_embed"] = _heard(found["audio.hook_projector_out"], inputs)
    return found


def _heard(projected: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Each clip's embeddings, cut to its placeholders and padded with zeros to the longest.

    Rows must have one clip at most.
    """
    counts = (inputs["input_ids"] == PLACEHOLDER).sum(1)
    counts = counts[counts > 0].tolist()
    heard = torch.zeros(len(counts), max(counts), projected.shape[-1], dtype=projected.dtype)
    for clip, n in enumerate(counts):
        heard[clip, :n] = projected[clip, :n]
    return heard


def first_difference(
    reference: Mapping[str, Tensor], ours: Mapping[str, Tensor], rows: Tensor | None = None
) -> str | None:
    """Name of the first activation that is not bit-equal, with its largest deviation; or None.

    Args:
        reference: in firing order.
        ours: a cache of at least the same names.
        rows: ``[batch, pos]`` of the rows to compare; None for all of them, pads included.
    """
    for name, expected in reference.items():
        got = ours[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{name}: {got.dtype} {list(got.shape)}, {expected.dtype} {list(expected.shape)}"
        if rows is not None and not name.startswith("audio."):
            # Positions are on axis 2 there, after the heads.
            if name.endswith(("hook_attn_scores", "hook_pattern")):
                got, expected = got.transpose(1, 2), expected.transpose(1, 2)
            got, expected = got[rows], expected[rows]
        if not torch.equal(got, expected):
            worst = (got.float() - expected.float()).abs().max().item()
            return f"{name} differs by {worst:.3g}"
    return None
