"""``device_map`` as transformers takes it; anything else is refused before weights are read."""

from typing import Any

import pytest
import torch

from hooked_alm import HookedALM, InputError
from hooked_alm.converters.devices import STRATEGIES
from tiny import TinyModels, hf_inputs


@pytest.mark.parametrize(
    "device_map",
    [*STRATEGIES, "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")},
     {"": "cpu", "blocks.1": "cpu"}, "disk", {"": "cpu", "audio": "disk", "audio.encoder": "cpu"}],
)  # fmt: skip
@torch.no_grad()
def test_placements(tiny_models: TinyModels, device_map: Any) -> None:
    model = HookedALM.from_pretrained(tiny_models.folder(), device_map=device_map)
    inputs = hf_inputs([[63]], [9])
    whole = tiny_models.hooked()
    assert torch.equal(model(model.encode(**inputs)), whole(whole.encode(**inputs)))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("balance", r"device 'balance'.*cpu is always there"),
        ("cuda:99", "device 'cuda:99'"),
        (99, "device '99'"),
        (-1, "got device_map={'': -1}, expected one of auto, balanced"),
        (True, "got device_map=True, expected"),
        ([], r"got device_map=\[\], expected"),
        ({}, "got device_map={}, expected"),
        ({"": None}, "got device_map={'': None}, expected"),
        ("meta", "got device_map={'': 'meta'}, expected"),
        ({"": "cpu", "blocks.1.attn": "cpu"}, "names 'blocks.1.attn', expected blocks whole"),
        ({3: "cpu"}, "got device_map={3: 'cpu'}, expected"),
        ({"model.layers.0": "cpu"}, "names 'model.layers.0' .*as they are called here"),
        ({"blocks": "cpu"}, "has no place for .* tensors, audio.encoder.conv1.weight among"),
    ],
)
def test_maps_that_are_none(tiny_models: TinyModels, device_map: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HookedALM.from_pretrained(tiny_models.folder(), device_map=device_map)
