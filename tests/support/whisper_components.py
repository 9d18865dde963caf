"""Components of Hugging Face's Whisper, patched by PyTorch hooks: what ours is held against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Write = Callable[[Tensor], Tensor]
MODULES = {"attn_out": "self_attn.out_proj", "cross_attn_out": "encoder_attn.out_proj",
           "mlp_out": "fc2", "z": "self_attn.out_proj", "cross_attn.z": "encoder_attn.out_proj",
           "resid_post": ""}  # fmt: skip
"""Site -> the module of a layer that shows it; heads are what the projection reads."""


def sites_of_stack(stack: str) -> list[str]:
    return [site for site in MODULES if stack == "decoder" or "cross" not in site]


@contextmanager
def written(hf: Any, stack: str, site: str, layer: int, write: Write) -> Iterator[None]:
    """Within the context a component's output is ours; heads are ``[batch, pos, head, d_head]``."""
    block = getattr(hf.model, stack).layers[layer]
    module = block.get_submodule(MODULES[site])

    def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        attention = block.encoder_attn if "cross" in site else block.self_attn
        z = args[0].unflatten(-1, (attention.num_heads, -1))
        return (write(z).flatten(-2), *args[1:])

    def after(module: Any, args: Any, output: Any) -> Any:
        return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

    handle = (
        module.register_forward_pre_hook(before)
        if site.endswith("z")
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def activation(hf: Any, inputs: dict[str, Any], stack: str, site: str, layer: int) -> Tensor:
    """What a component has in a run."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.clone())
        return value

    with written(hf, stack, site, layer, keep):
        hf(**inputs)
    return kept[0]


@torch.no_grad()
def patched(
    hf: Any, inputs: dict[str, Any], stack: str, site: str, layer: int, head: int | None,
    reference: Tensor, alpha: float,
) -> Tensor:  # fmt: skip
    """Logits of a run with (1 − α) a + α a_ref in a component, or in one of its heads."""

    def write(value: Tensor) -> Tensor:
        mixed = (1 - alpha) * value + alpha * reference
        if head is None:
            return mixed
        value = value.clone()
        value[:, :, head] = mixed[:, :, head]
        return value

    with written(hf, stack, site, layer, write):
        logits: Tensor = hf(**inputs).logits
    return logits
