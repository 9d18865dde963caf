"""How much each head of the decoder is for a transcript, to first order, from one gradient.

Every head's output is multiplied by a gate, 1 everywhere. Minus the gradient of the objective with
respect to a gate is what closing it would change, to first order, whatever the number of heads:
zero ablation of self- and cross-attention, screened by one forward and backward.

Source: Michel et al. 2019 (arXiv 1905.10650), equation 3, with its sign; M-BT-7.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ...hooks import Hook, HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name

HeadKind = Literal["self", "cross"]
_POINTS = {"self": "z", "cross": "cross_attn.z"}
OfHeads = Float[Tensor, "layer head batch"]
HeadMeans = Mapping[str, Float32[np.ndarray, " feature"]]
"""Point -> mean output of its heads, one after the other."""


@dataclass(frozen=True, kw_only=True)
class HeadScreen:
    """Heads of one kind."""

    effect: OfHeads
    """What zeroing a head's output would change, to first order."""
    norm: OfHeads
    """Root mean square over positions of the norm of its output."""


def head_kinds(model: HookedALM) -> tuple[HeadKind, ...]:
    """Kinds of heads that a model's decoder has."""
    kinds: tuple[HeadKind, ...] = get_args(HeadKind)
    return kinds if model.cfg.cross_attention else kinds[:1]


def head_point(model: HookedALM, kind: HeadKind, layer: int) -> str:
    """The hook point of the outputs of a layer's heads."""
    return hook_name(_POINTS[kind], model.path[layer])


def screen_heads(
    model: HookedALM,
    x: ALMInput,
    objective: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]],
) -> dict[HeadKind, HeadScreen]:
    """The screen of every head of the decoder; one forward, one backward.

    Args:
        model: to run; its weights get no gradients.
        x: prompts.
        objective: logits -> a number for every prompt, of its own logits alone.
    """
    found: dict[HeadKind, HeadScreen] = {}
    real = x.attention_mask.bool()
    with torch.inference_mode(False), torch.enable_grad():
        gates = {
            (kind, layer): torch.ones(len(x), model.cfg.n_heads, 1, requires_grad=True)
            for kind in head_kinds(model)
            for layer in range(len(model.path))
        }
        norms: dict[tuple[HeadKind, int], Tensor] = {}

        def closing(kind: HeadKind, layer: int) -> Iterator[tuple[str, object]]:
            def gate(z: Tensor, hook: HookPoint) -> Tensor:
                square = z.detach().float().square().sum(-1) * real[..., None].to(z.device)
                norms[kind, layer] = (square.sum(1) / real.sum(-1)[:, None].to(z.device)).sqrt()
                return z * gates[kind, layer][:, None].to(z)

            yield head_point(model, kind, layer), gate

        hooks = [pair for key in gates for pair in closing(*key)]
        with model.hooks(fwd_hooks=hooks):
            total = objective(model(x)).sum()
        slopes = torch.autograd.grad(total, [*gates.values()])
    by_cell = dict(zip(gates, slopes, strict=True))
    for kind in head_kinds(model):
        layers = range(len(model.path))
        found[kind] = HeadScreen(
            effect=torch.stack([-by_cell[kind, layer][..., 0].T.cpu() for layer in layers]),
            norm=torch.stack([norms[kind, layer].T.cpu() for layer in layers]),
        )
    return found


def without_head(points: Sequence[str], head: int, stead: HeadMeans | None = None) -> list[Hook]:
    """Hooks under which a head writes nothing of its own, at every step of a generation.

    Args:
        points: where its output stands, from ``head_point``; of several blocks, its index in all.
        head: its number.
        stead: what a point holds instead, of all heads one after the other; zero where it has none.
    """

    def leave_out(z: Tensor, hook: HookPoint) -> Tensor:
        z, mean = z.clone(), (stead or {}).get(str(hook.name))
        own = torch.zeros(z.shape[2:]) if mean is None else torch.from_numpy(mean)
        z[:, :, head] = own.view(z.shape[2:])[head].to(z)
        return z

    return [(name, leave_out) for name in points]
