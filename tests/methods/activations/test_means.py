"""Means over clips and spans against plain Hugging Face, and where points stand."""

import numpy as np
import pytest
import torch

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.activations.depths import PlacedPoint, placed_points
from hooked_alm.methods.activations.means import means_of
from hooked_alm.points import hook_name
from tiny import N_LAYERS, PLACEHOLDER, TinyModels, hf_inputs
from tolerances import ENCODER_BATCH
from whisper_toy import LAYERS, Whispers

FRAMES = (40, 77)
TOLERANCE = ENCODER_BATCH[torch.float32]


def test_means_are_those_of_plain_hugging_face(gqa: HookedALM, tiny_models: TinyModels) -> None:
    """Decoder: hidden states at the placeholders. Encoder: what layers give, valid frames alone."""
    inputs, hf = hf_inputs([[n] for n in FRAMES], [9, 6]), tiny_models.hf("gqa")
    heard: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: heard.append(output[0])
                                    if isinstance(output, tuple) else heard.append(output))
        for layer in hf.model.audio_tower.layers
    ]  # fmt: skip
    with torch.no_grad():
        states = hf(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    kept, places = placed_points(gqa)
    x = gqa.encode(**inputs)
    found = means_of(gqa, x, kept)
    at_readout = means_of(gqa, x, kept, "readout")
    assert [*found] == [one.name for one in places]
    n_compared = 0
    for place in places:
        for row, frames in enumerate(FRAMES):
            if place.stream == "encoder" and place.depth > 0:
                # Two mel frames are one of the encoder's.
                expected = heard[place.depth - 1][row, : (frames - 1) // 2 + 1].double().mean(0)
                readout = expected
            elif place.stream == "decoder" and place.depth < N_LAYERS:  # the last one is normed
                is_audio = inputs["input_ids"][row] == PLACEHOLDER
                expected = states[place.depth][row, is_audio].double().mean(0)
                readout = states[place.depth][row, -1]
            else:
                continue
            n_compared += 1
            np.testing.assert_allclose(found[place.name][row], expected, atol=TOLERANCE)
            np.testing.assert_allclose(at_readout[place.name][row], readout, atol=TOLERANCE)
    assert n_compared == 2 * (2 + N_LAYERS)


def test_points_stand_at_depths(gqa: HookedALM, whispers: Whispers) -> None:
    _, places = placed_points(gqa)
    assert places == [
        PlacedPoint("audio.encoder.blocks.0.hook_resid_pre", "encoder", 0),
        *(PlacedPoint(f"audio.encoder.blocks.{i}.hook_resid_post", "encoder", i + 1)
          for i in range(2)),
        PlacedPoint(hook_name("resid_pre", "blocks.0"), "decoder", 0),
        *(PlacedPoint(hook_name("resid_post", f"blocks.{i}"), "decoder", i + 1)
          for i in range(N_LAYERS)),
    ]  # fmt: skip
    _, places = placed_points(whispers.hooked())
    deepest = {one.stream: one.depth for one in places}
    assert deepest == {"encoder": LAYERS["encoder"], "decoder": LAYERS["decoder"]}


def test_what_a_block_gets_and_what_the_last_gave_are_read_once(gqa: HookedALM) -> None:
    kept, places = placed_points(
        gqa, ["blocks.{1,2}.hook_resid_{pre,post}", "blocks.2.attn.hook_z"]
    )
    assert [(one.stream, one.depth) for one in places] == [
        ("decoder", 1), ("decoder", 2), ("decoder attn.hook_z", 3), ("decoder", 3),
    ]  # fmt: skip
    assert [one.name for one in kept] == [one.name for one in places]
    _, (embedded,) = placed_points(gqa, ["hook_embed"])
    assert embedded == PlacedPoint("hook_embed", "hook_embed", 0)


def test_a_span_that_prompts_lack_is_refused(gqa: HookedALM) -> None:
    kept, _ = placed_points(gqa, ["blocks.1.hook_resid_post"])
    with pytest.raises(InputError, match="choosing spans"):
        means_of(gqa, gqa.encode(**hf_inputs([[40]], [9])), kept, "nowhere")
