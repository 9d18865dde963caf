"""States and gradients of the stream with and without an adapter, against PEFT's model."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import adapted
from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.adapters.switching import adapted_blocks, switched
from hooked_alm.methods.adapters.turning import (
    PooledStream,
    cka_by_depth,
    pooled_stream,
    stacked,
)
from hooked_alm.methods.patching.metrics import LogProb
from hooked_alm.methods.statistics.similarity import linear_cka
from tiny import PLACEHOLDER, TinyModels, hf_inputs

INPUTS = hf_inputs([[63], [23]], [9, 14])
TOKEN = 77


def theirs(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Means over the audio of states and gradients at every depth, by PEFT's model and hooks."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    decoder = model.get_base_model().model.language_model
    handles = [
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        for layer in [*decoder.layers, decoder.norm]
    ]
    embeds = model.get_input_embeddings().weight.requires_grad_()  # so that there is a graph
    logits = model(**INPUTS).logits[:, -1]
    logits.log_softmax(-1)[:, TOKEN].sum().backward()
    embeds.requires_grad_(False)
    for handle in handles:
        handle.remove()
    mask = (INPUTS["input_ids"] == PLACEHOLDER).double()[..., None]

    def pooled(values: Any) -> Tensor:
        return (values.detach().double() * mask).sum(1) / mask.sum(1)

    return [pooled(one) for one in kept], [pooled(one.grad) for one in kept]


def test_states_and_gradients_are_pefts(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    peft = adapted(tiny_models.folder(), torch.float32)
    peft.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    model = HookedALM.from_pretrained(tiny_models.folder(), lora=folder, merge_lora=False)
    x = model.encode(**INPUTS)
    places = {"audio": x.spans.mask("audio")}
    found = {}
    for way, on in (("adapted", adapted_blocks(model)), ("base", [])):
        with switched(model, on):
            found[way] = pooled_stream(model, x, LogProb(TOKEN), places)["audio"]
    with peft.disable_adapter():
        plain = theirs(peft)
    for way, (states, gradients) in (("base", plain), ("adapted", theirs(peft))):
        for ours, expected in zip(found[way], (states, gradients), strict=True):
            scale = float(torch.stack(expected).abs().max())
            np.testing.assert_allclose(ours, torch.stack(expected), atol=1e-5 * scale)
    assert (found["base"].states[1:] - found["adapted"].states[1:]).abs().max() > 1e-3
    assert torch.equal(found["base"].states[0], found["adapted"].states[0])
    with pytest.raises(InputError, match="averaging over words"):
        pooled_stream(model, x, LogProb(TOKEN), {"words": torch.zeros(x.shape, dtype=torch.bool)})


def test_cka_is_of_clips_depth_by_depth() -> None:
    """A rotation turns nothing; batches are one after the other."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(3, 12, 5, generator=draw)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=draw)).Q
    other = torch.stack([one[0], 3 * one[1] @ rotation, torch.randn(12, 5, generator=draw)])
    found = cka_by_depth(one, other)
    assert found[:2] == pytest.approx([1, 1])
    assert found[2] == linear_cka(one[2], other[2]) < 0.6
    halves = [PooledStream(some, -some) for some in (one[:, :4], one[:, 4:])]
    assert torch.equal(stacked(halves).gradients, -one)
