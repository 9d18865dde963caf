"""What passes through a Hugging Face model, under the names of our hook points."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hooked_alm.errors import InputError
from hooked_alm.model import HookedALM
from hooked_alm.points import hook_name

_POINTS = (
    ("resid_pre", "", "in"),
    ("q", "self_attn.q_proj", "out"),
    ("k", "self_attn.k_proj", "out"),
    ("v", "self_attn.v_proj", "out"),
    ("z", "self_attn.o_proj", "in"),
    ("attn_out", "self_attn.o_proj", "out"),
    ("resid_mid", "post_attention_layernorm", "in"),
    ("pre", "mlp.gate_proj", "out"),
    ("pre_linear", "mlp.up_proj", "out"),
    ("post", "mlp.down_proj", "in"),
    ("mlp_out", "mlp.down_proj", "out"),
    # Whisper's decoder.
    ("z", "self_attn.out_proj", "in"),
    ("attn_out", "self_attn.out_proj", "out"),
    ("resid_mid", "encoder_attn_layer_norm", "in"),
    ("cross_attn.q", "encoder_attn.q_proj", "out"),
    ("cross_attn.k", "encoder_attn.k_proj", "out"),
    ("cross_attn.v", "encoder_attn.v_proj", "out"),
    ("cross_attn.z", "encoder_attn.out_proj", "in"),
    ("cross_attn_out", "encoder_attn.out_proj", "out"),
    ("resid_mid_cross", "final_layer_norm", "in"),
    ("pre", "fc1", "out"),
    ("post", "fc2", "in"),
    ("mlp_out", "fc2", "out"),
    ("resid_post", "", "out"),
)
"""Points of a block in firing order, each with the module that reads or writes it, if there is one
of that name."""
_PER_HEAD = {"z", "q", "k", "v", *(f"cross_attn.{part}" for part in "qkvz")}
_ADDED = {"attn_out", "mlp_out"}


@torch.no_grad()
def run_hugging_face(
    hf: Any, model: HookedALM, inputs: Mapping[str, Tensor], points: set[str] | None = None
) -> dict[str, Tensor]:
    """Values of one forward on the CPU, by the hook point that should equal them, and ``logits``.

    Args:
        hf: a model of transformers, or one with its ``get_decoder`` and ``logits``; in eval mode.
        model: asked for names and sizes alone; its weights may be missing.
        inputs: arguments of the Hugging Face ``forward``.
        points: names to keep; None keeps all that a module reads or writes.

    Raises:
        InputError: a model in training mode, or one with another number of blocks.
    """
    decoder, blocks = hf.get_decoder(), model.stacks["text"].block_names
    if hf.training or len(decoder.layers) != len(blocks):
        state = "in training mode" if hf.training else f"with {len(decoder.layers)} blocks"
        raise InputError(
            f"comparing with Hugging Face: got a model {state}, expected one in eval mode with "
            f"{len(blocks)} blocks. Call `hf.eval()`, and load the checkpoint that ours came from."
        )
    found: dict[str, Tensor] = {}
    handles = [
        hook(found) for name, hook in _hooks(decoder, model) if points is None or name in points
    ]
    device = next(hf.parameters()).device
    moved = {key: value.to(device) for key, value in inputs.items()}
    # Some encoders take features in their own dtype only.
    cast = {k: v.to(hf.dtype) for k, v in moved.items() if v.is_floating_point()}
    try:
        logits = hf(**{**moved, **cast}).logits.cpu()
    finally:
        for handle in handles:
            handle.remove()
    # In the order of the table, whatever order the modules ran in.
    return {**{n: found[n] for n, _ in _hooks(decoder, model) if n in found}, "logits": logits}


def _hooks(
    decoder: Any, model: HookedALM
) -> Iterator[tuple[str, Callable[[dict[str, Tensor]], Any]]]:
    """Points of all blocks in the order in which they fire, each with what attaches its hook."""
    modules = dict(decoder.named_modules())
    for layer, block in enumerate(model.stacks["text"].block_names):
        for point, path, side in _POINTS:
            module = modules.get(f"layers.{layer}.{path}".removesuffix("."))
            name = hook_name(point, block)
            if module is not None and name in model.hook_dict:
                yield name, _attach(module, name, side == "in", _as_hooked(point, model))


def _as_hooked(point: str, model: HookedALM) -> Callable[[Tensor], Tensor]:
    """Function from the module's value to the point's: parted by head, or as it is added."""
    cfg = model.cfg
    if point in _PER_HEAD:
        return lambda value: value.unflatten(-1, (-1, cfg.d_head))
    if point in _ADDED and cfg.residual_multiplier != 1:
        return lambda value: value * cfg.residual_multiplier
    return lambda value: value


def _attach(
    module: nn.Module, name: str, is_input: bool, as_hooked: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor]], Any]:
    """Function of a store that lets the module's values into it."""

    def attach(found: dict[str, Tensor]) -> Any:
        def keep(value: Any) -> None:
            value = value[0] if isinstance(value, tuple) else value
            found[name] = as_hooked(value.detach()).to("cpu", copy=True)

        if not is_input:
            return module.register_forward_hook(lambda _, args, output: keep(output))
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )

    return attach
