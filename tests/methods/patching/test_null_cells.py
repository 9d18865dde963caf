"""Noise of low precision: a few cells without a change in every sweep, and what is said of it."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from engine_runs import BASE, OTHER
from hooked_alm import HookedALM
from hooked_alm.engine.runs import record_runs
from hooked_alm.methods.patching.metrics import Logits, OnLogits
from hooked_alm.methods.patching.null_cells import ONE_IN, PER_BLOCK, with_null_cells
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, path_patch
from hooked_alm.methods.patching.results import PatchResult
from tiny import TinyModels

METRIC = Logits([5, 17])
HEADS: dict[str, Any] = {"site": "z", "heads": "each", "places": ["readout", "audio"]}


@pytest.fixture(scope="module")
def low(tiny_models: TinyModels) -> HookedALM:
    return tiny_models.hooked("gqa", torch.bfloat16)


def swept(model: HookedALM, **options: Any) -> PatchResult:
    base, donor = model.encode(**BASE), model.encode(**OTHER)
    return patch(model, base, donor, METRIC, **{**HEADS, **options})


def test_the_spread_of_cells_that_change_nothing(low: HookedALM) -> None:
    """As a whole sweep of such cells shows it, of which these are a part."""
    found = swept(low)
    assert found.noise is not None
    assert found.noise.shape == found.base.shape
    null = patch(low, low.encode(**BASE), "self", METRIC, **HEADS)
    whole = np.sqrt((null.effect**2).mean(axis=(0, 1, 2)))
    assert (found.noise > 0.3 * whole).all()
    assert (found.noise < 3 * whole).all()
    assert whole.min() > 1e-3


def test_values_stay_with_their_cells(low: HookedALM) -> None:
    """The null cells stand between them while they run."""
    found, plain = swept(low), swept(low, engine="hooks")
    assert found.noise is not None
    assert np.abs(found.values - plain.values).max() < 12 * found.noise.max()
    assert np.corrcoef(found.effect.ravel(), plain.effect.ravel())[0, 1] > 0.99
    assert plain.noise is None


def test_none_in_fp32(gqa: HookedALM) -> None:
    found = swept(gqa)
    assert found.noise is None
    assert not found.is_within_noise.any()
    assert "noise" not in found.to_dataframe()
    assert "noise" not in repr(found)


def test_paths_and_chains_have_it(low: HookedALM) -> None:
    base, donor = low.encode(**BASE), low.encode(**OTHER)
    head, query = "blocks.0.attn.hook_z[1]", "blocks.1.attn.hook_q_input[2]"
    for mode in ("edge", "ioi"):
        found = path_patch(low, base, donor, METRIC, head, [query, "logits"], mode=mode)  # type: ignore[arg-type]
        assert found.noise is not None
    chains = patch_chains(low, base, donor, METRIC, [(head, query, "logits")])
    assert chains.noise is not None
    assert np.isfinite(chains.noise).all()


def test_said_wherever_the_result_is_shown(low: HookedALM) -> None:
    found = swept(low)
    assert found.noise is not None
    within = found.is_within_noise
    assert within.shape == (4, 6, 2, 2)
    error = np.sqrt((found.noise**2).mean(axis=0) / 2)
    means = np.abs(found.effect.mean(axis=3))
    assert np.array_equal(within, means <= 2 * error)
    assert f"{within.sum()} of 96 mean effects are within" in repr(found)
    frame = found.to_dataframe()
    assert frame["noise"].nunique() == found.noise.size
    part = found.select(place="readout")
    assert part.noise is found.noise
    axes = part.plot(label=1)
    (dots,) = axes.lines
    there = {(int(x), int(y)) for x, y in zip(*dots.get_data(), strict=True)}
    assert there == {(h, b) for b, h in np.argwhere(within[:, :, 0, 1])}
    plt.close(axes.figure)


def test_few_of_them_next_to_what_they_copy(low: HookedALM) -> None:
    """At most three a block and one in eight cells, spread over the batch."""
    seen: list[Any] = []

    def looked(logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return logits[:, -1, 5]

    base, donor = low.encode(**BASE), low.encode(**OTHER)
    options: dict[str, Any] = {**HEADS, "places": ["readout"], "site": "post", "heads": None}
    found = patch(low, base, donor, OnLogits(looked), **options, neurons="each")
    n_cells = found.values[..., 0].size
    # A call for each of the two runs, and a call for every cell of a row of the batch.
    n_null = len(seen) // 2 - n_cells - 1
    assert n_null == min(PER_BLOCK * low.cfg.n_layers, n_cells // ONE_IN)


def test_what_may_be_spliced_is_spliced(low: HookedALM) -> None:
    """A null cell of a whole span runs no more rows than the cells beside it."""
    from dataclasses import replace

    from engine_runs import Cell, Edit, marks_of

    base = low.encode(**BASE)
    records = record_runs(low, base).records
    (edit,) = marks_of([Cell(1, [Edit("resid_pre", 1, [9, 10], lambda own: own)])], 2)
    plain = with_null_cells([edit], 1, records).marks[1]
    assert plain.donors is None  # type: ignore[attr-defined]
    given = replace(edit, donors=records, sources=edit.positions)
    marks, n_cells, cells, null, is_edited = with_null_cells([given], 1, records)
    assert (n_cells, cells.tolist(), null.tolist()) == (2, [0], [1])
    assert is_edited.tolist() == [[False, True]]
    assert marks[1].donors is records  # type: ignore[attr-defined]
    assert marks[1].cells.tolist() == [3, 3]
