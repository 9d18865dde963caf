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
from hooked_alm.methods.adapters.turning import TurnedStream, cka_by_depth, pooled_stream
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


@pytest.fixture(scope="module")
def both(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, HookedALM]:
    """PEFT's model, and ours."""
    peft = adapted(tiny_models.folder(), torch.float32)
    peft.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return peft, HookedALM.from_pretrained(tiny_models.folder(), lora=folder, merge_lora=False)


def test_states_and_gradients_are_pefts(both: tuple[Any, HookedALM]) -> None:
    peft, model = both
    x = model.encode(**INPUTS)
    found = {}
    for way, on in (("adapted", adapted_blocks(model)), ("base", [])):
        with switched(model, on):
            found[way] = pooled_stream(model, x, LogProb(TOKEN), ["audio"])["audio"]
    with peft.disable_adapter():
        plain = theirs(peft)
    for way, (states, gradients) in (("base", plain), ("adapted", theirs(peft))):
        for ours, expected in zip(found[way], (states, gradients), strict=True):
            scale = float(torch.stack(expected).abs().max())
            np.testing.assert_allclose(ours, torch.stack(expected), atol=1e-5 * scale)
    assert (found["base"].states[1:] - found["adapted"].states[1:]).abs().max() > 1e-3
    assert torch.equal(found["base"].states[0], found["adapted"].states[0])
    silent = model.encode(**hf_inputs([[63], []], [9, 14]))
    with pytest.raises(InputError, match="averaging over audio: some prompts have no"):
        pooled_stream(model, silent, LogProb(TOKEN), ["audio"])


def test_clips_of_all_batches_are_compared(both: tuple[Any, HookedALM]) -> None:
    _, model = both
    turned, parts = TurnedStream(model), dict[str, list[Tensor]]()
    for inputs in (INPUTS, hf_inputs([[40], [31]], [11, 7]), hf_inputs([[52]], [8])):
        x = model.encode(**inputs)
        turned.add(x, LogProb(TOKEN), ["audio"])
        for way, on in (("base", []), ("adapted", adapted_blocks(model))):
            with switched(model, on):
                pooled = pooled_stream(model, x, LogProb(TOKEN), ["audio"])["audio"]
            parts.setdefault(way, []).append(pooled.gradients)
    base, with_adapter = (torch.cat(parts[way], dim=1) for way in ("base", "adapted"))
    found = [one for one in turned.similarity(0) if one.of == "gradients"]
    assert {one.n for one in found} == {5}
    expected = [linear_cka(a, b) for a, b in zip(base, with_adapter, strict=True)]
    np.testing.assert_array_equal([one.cka for one in found], expected)
    assert [one.dealt for one in found][:-1] != expected[:-1]


def test_cka_is_of_clips_depth_by_depth() -> None:
    """A rotation and a scale turn nothing."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(3, 12, 5, generator=draw)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=draw)).Q
    other = torch.stack([one[0], 3 * one[1] @ rotation, torch.randn(12, 5, generator=draw)])
    found = cka_by_depth(one, other)
    assert found[:2] == pytest.approx([1, 1])
    assert found[2] == linear_cka(one[2], other[2]) < 0.6
