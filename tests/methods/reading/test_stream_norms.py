"""Norms of the stream, and rows that have most of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.methods.reading.stream_norms import stream_norms
from tiny import hf_inputs


@pytest.fixture(scope="module")
def model(tiny_models: Any) -> HookedALM:
    found: HookedALM = tiny_models.hooked()
    return found


@torch.no_grad()
@pytest.mark.parametrize("part", ["text", "encoder"])
def test_norms_of_every_depth(model: HookedALM, part: str) -> None:
    """Those of the cached streams, over the rows that run; what stands out is found, and apart."""
    along = model.towards(part)
    x = model.encode(**hf_inputs([[63, 40], [23]], [9, 14]))
    at = (1, 0, 55) if part == "encoder" else (1, 0, 20)

    def raise_row(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        if part == "encoder":
            value[1, 5] *= 300.0  # window 1 is the second of the first prompt
        else:
            value[0, 20] *= 300.0
        return value

    names = along.depth_names()
    with along.hooks(fwd_hooks=[(names[1], raise_row)]):
        found = stream_norms(along, x, factor=50.0)
        kept = along.run_with_cache(x, names_filter=names)[1]
    real = along.positions_of(x).is_real
    assert found.norms.shape == (len(names), *real.shape)
    assert (np.isnan(found.norms) == ~real).all()
    assert found.is_massive[at]
    assert not found.is_massive[0].any()
    assert found.is_massive[1].sum() == 1
    rows = model.encoder_rows(x) if part == "encoder" else None
    for depth, name in enumerate(names):
        value = kept[name] if rows is None else rows.by_prompt(name, kept[name])
        for row in range(len(x)):
            own = value[row][torch.from_numpy(real[row])]
            np.testing.assert_allclose(found.total()[depth, row], float(own.norm()), rtol=1e-5)
    others = np.sqrt(np.nansum(found.norms[1, 0] ** 2) - found.norms[at] ** 2)
    np.testing.assert_allclose(found.without_massive()[1, 0], others, rtol=1e-6)
    assert 0.9 < found.massive_share()[1, 0] < 1
    assert (found.massive_share()[0] == 0).all()
    own = real & along.positions_of(x).spans.mask("audio").numpy()
    assert (found.total(own) <= found.total()).all()
