"""Plain Hugging Face runs, recorded with PyTorch hooks under our hook names, in firing order."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration
from transformers.models.qwen2 import modeling_qwen2

from hooked_alm.inputs import positions_from_mask

Activations = dict[str, Tensor]


def with_positions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a Hugging Face forward, with the positions that our input makes."""
    return {**inputs, "position_ids": positions_from_mask(inputs["attention_mask"])}


def hf_activations(
    hf: Qwen2AudioForConditionalGeneration, inputs: Mapping[str, Tensor]
) -> Activations:
    """Activations of one forward, by the name of our hook point that should equal them.

    Names ending in ``.out`` are outputs of norms, which have no hook point of their own.
    """
    found: Activations = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.detach().clone()

    def heads(name: str, width: int) -> Callable[..., None]:
        return lambda value: keep(name, value.unflatten(-1, (-1, width)))

    def whole(name: str) -> Callable[..., None]:
        return lambda value: keep(name, value)

    decoder = hf.model.language_model
    d_head = decoder.layers[0].self_attn.head_dim
    before: list[tuple[nn.Module, Callable[..., None]]] = []
    after: list[tuple[nn.Module, Callable[..., None]]] = [
        (decoder.embed_tokens, whole("hook_text_embed")),
        (decoder.norm, whole("ln_final.out")),
        (hf.lm_head, whole("unembed.hook_out")),
        (hf.model.multi_modal_projector, whole("audio.hook_projector_out")),
    ]
    before += [
        (hf.model.audio_tower, whole("audio.hook_encoder_in")),
        (hf.model.multi_modal_projector, whole("audio.hook_projector_in")),
        (decoder.layers[0], whole("hook_embed")),
        (hf.lm_head, whole("unembed.hook_in")),
    ]
    after += [(hf.model.audio_tower.layer_norm, whole("audio.hook_encoder_out"))]
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

    rotate = modeling_qwen2.apply_rotary_pos_emb
    rotated = iter(range(len(decoder.layers)))

    def recording_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        q, k = rotate(q, k, cos, sin, **options)
        name = f"blocks.{next(rotated)}.attn"
        keep(f"{name}.hook_rot_q", q.transpose(1, 2))
        keep(f"{name}.hook_rot_k", k.transpose(1, 2))
        return q, k

    def attention_weights(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
            if output[1] is not None:
                keep(name, output[1])

        return hook

    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(modeling_qwen2, "apply_rotary_pos_emb", recording_rotate)
        )
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
            # Patterns have positions on axis 2, after the heads.
            per_row = (
                (lambda t: t.transpose(1, 2)) if name.endswith("hook_pattern") else (lambda t: t)
            )
            got, expected = per_row(got)[rows], per_row(expected)[rows]
        if not torch.equal(got, expected):
            worst = (got.float() - expected.float()).abs().max().item()
            return f"{name} differs by {worst:.3g}"
    return None
