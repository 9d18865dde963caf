"""Whisper-type encoders of Hugging Face, recorded with PyTorch hooks under our hook names."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

Activations = dict[str, Tensor]
CLOSE = ("hook_result", "hook_scale", "hook_normalized")
"""Points whose value the fused kernels of the reference never hold: equal up to rounding."""


def layers_that_run(call: Callable[[], Any]) -> list[nn.Module]:
    """Whisper's encoder layers that a call runs, in order, wherever it keeps them."""
    found: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        is_layer = hasattr(module, "self_attn_layer_norm") and hasattr(module, "fc1")
        if is_layer and not hasattr(module, "encoder_attn") and module not in found:
            found.append(module)

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(note).remove)
        call()
    return found


@contextmanager
def encoder_recorded(layers: list[nn.Module]) -> Iterator[Activations]:
    """What every hook point of an encoder should hold, of the run within the context.

    Scores and pattern are there under eager attention alone. Of an encoder that runs several times
    it is the last run.
    """
    found: Activations = {}
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            _record(stack, found, f"audio.encoder.blocks.{i}", layer)
        yield found
    if layers:
        found["audio.encoder.hook_embed"] = found["audio.encoder.blocks.0.hook_resid_pre"]
    for i, layer in enumerate(layers):
        _derive(found, f"audio.encoder.blocks.{i}", layer)


def _record(stack: ExitStack, found: Activations, name: str, layer: Any) -> None:
    attn, width = layer.self_attn, layer.self_attn.head_dim

    def keep(point: str, n: int | None = None) -> Callable[[Any], None]:
        def record(value: Any) -> None:
            value = value[0] if isinstance(value, tuple) else value
            value = value[None] if value.ndim == 2 else value  # packed: no batch
            value = value if n is None else value.unflatten(-1, (-1, n))
            found[f"{name}.{point}"] = value.detach().clone()

        return record

    before = {
        layer: keep("hook_resid_pre"),
        attn.out_proj: keep("attn.hook_z", width),
        layer.final_layer_norm: keep("hook_resid_mid"),
        layer.fc2: keep("mlp.hook_post"),
    }
    after: list[tuple[nn.Module, Callable[[Any], None]]] = [
        (attn.q_proj, keep("attn.hook_q", width)),
        (attn.k_proj, keep("attn.hook_k", width)),
        (attn.v_proj, keep("attn.hook_v", width)),
        (attn.out_proj, keep("hook_attn_out")),
        (layer.fc1, keep("mlp.hook_pre")),
        (layer.fc2, keep("hook_mlp_out")),
        (layer, keep("hook_resid_post")),
    ]
    for module, record in before.items():
        stack.callback(module.register_forward_pre_hook(
            lambda _, args, kwargs, record=record: record(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        ).remove)  # fmt: skip
    for module, record in after:
        handle = module.register_forward_hook(lambda _, args, out, record=record: record(out))
        stack.callback(handle.remove)
    if attn.config._attn_implementation == "eager":
        _record_scores(stack, found, name, attn)


def _record_scores(stack: ExitStack, found: Activations, name: str, attn: Any) -> None:
    """Scores and pattern; of several chunks on the diagonal, where nothing else is seen."""
    chunks: list[tuple[Tensor, Tensor]] = []

    def join(*_: Any) -> None:
        for i, (point, fill) in enumerate(
            (("hook_attn_scores", torch.finfo(chunks[0][0].dtype).min), ("hook_pattern", 0.0))
        ):
            pieces = [chunk[i] for chunk in chunks]
            n = sum(piece.shape[-1] for piece in pieces)
            joined = pieces[0].new_full((*pieces[0].shape[:2], n, n), fill)
            at = 0
            for piece in pieces:
                end = at + piece.shape[-1]
                joined[..., at:end, at:end] = piece
                at = end
            found[f"{name}.attn.{point}"] = joined
        chunks.clear()

    stack.callback(attn.register_forward_hook(join).remove)
    modeling = sys.modules[type(attn).__module__]
    eager = modeling.eager_attention_forward  # of the layers recorded before, too

    def recording(module: nn.Module, *args: Any, **options: Any) -> Any:
        if module is not attn:
            return eager(module, *args, **options)
        softmax = F.softmax

        def recording_softmax(scores: Tensor, *more: Any, **options: Any) -> Tensor:
            pattern = softmax(scores, *more, **options)
            chunks.append((scores.clone(), pattern.to(scores.dtype)))
            return pattern

        with mock.patch.object(F, "softmax", recording_softmax):
            return eager(module, *args, **options)

    stack.enter_context(mock.patch.object(modeling, "eager_attention_forward", recording))


def _derive(found: Activations, name: str, layer: Any) -> None:
    """Points that Hugging Face has no tensor for."""
    resid, heads = found[f"{name}.hook_resid_pre"], found[f"{name}.attn.hook_z"].shape[2]
    shared = resid.unsqueeze(2).repeat(1, 1, heads, 1)
    for letter in "qkv":
        for prefix in (name, f"{name}.attn"):
            found[f"{prefix}.hook_{letter}_input"] = shared
    found[f"{name}.hook_attn_in"] = shared
    found[f"{name}.hook_mlp_in"] = found[f"{name}.hook_resid_mid"]
    columns = layer.self_attn.out_proj.weight.split(layer.self_attn.head_dim, dim=1)
    z = found[f"{name}.attn.hook_z"].unbind(2)
    written = [F.linear(*pair) for pair in zip(z, columns, strict=True)]
    found[f"{name}.attn.hook_result"] = torch.stack(written, 2)
    norms = {"ln1": ("hook_resid_pre", layer.self_attn_layer_norm),
             "ln2": ("hook_resid_mid", layer.final_layer_norm)}  # fmt: skip
    for norm, (stream, module) in norms.items():
        x = found[f"{name}.{stream}"]
        variance = x.double().var(-1, unbiased=False, keepdim=True)
        found[f"{name}.{norm}.hook_scale"] = (variance + module.eps).sqrt().float()
        found[f"{name}.{norm}.hook_normalized"] = F.layer_norm(x, x.shape[-1:], eps=module.eps)
