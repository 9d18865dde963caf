"""The meter of ``head_statistics`` on every audio backbone, clips in the prompt."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from all_cases import CASES
from family_case import Case
from hooked_alm import HookedALM
from hooked_alm.methods.reading.head_norms import CONTRIBUTION, OUTPUT, HeadMeter
from tolerances import HEAD_NORMS


@torch.no_grad()
def hf_z(reference: Any, inputs: dict[str, Any]) -> list[Tensor] | None:
    """Inputs of the output projections at the last position, ``[batch, head * d_head]`` a layer.

    None for a reference whose stack of blocks is not laid out as transformers does it.
    """
    layers = getattr(getattr(reference, "decoder", None), "layers", None)
    if layers is None or not hasattr(layers[0].self_attn, "o_proj"):
        return None
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in layers
    ]
    try:
        reference.run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [one[:, -1] for one in seen]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backbone(case: Case, tmp_path: Path) -> None:
    """Equal to the reference's heads; what they write adds up to what the block wrote."""
    folder = tmp_path / "checkpoint" / "model"
    folder.mkdir(parents=True)
    case.save(folder, torch.float32)
    model = HookedALM.from_pretrained(folder, components=case.components(folder))
    short, middling, _ = case.clips
    inputs = case.inputs([[middling], [short]], [9, 14])
    norms = HeadMeter(model)(model.encode(**inputs))
    assert norms.identity_error < HEAD_NORMS
    z = hf_z(case.reference(folder, torch.float32, "sdpa"), inputs)
    if z is None:
        return
    by_head = [one.unflatten(-1, (model.cfg.n_heads, -1)) for one in z]
    expected = torch.stack([one.norm(dim=-1) for one in by_head], dim=1).numpy()
    np.testing.assert_array_equal(norms.heads[OUTPUT], expected)
    for layer, one in enumerate(by_head):
        written = torch.einsum("bhe,hed->bhd", one, model.blocks[layer].attn.W_O).norm(dim=-1)
        found = norms.heads[CONTRIBUTION][:, layer]
        np.testing.assert_allclose(found, written.detach().numpy(), rtol=HEAD_NORMS)
