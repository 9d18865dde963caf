"""Donors that another model of the same shape has run."""

from typing import Any

import numpy as np
import pytest
import torch

from engine_runs import BASE, OTHER, PLAIN_SITES, TAIL, both, moved
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.donors import Mean
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.points import Site
from tiny import TinyModels, randomise


@pytest.fixture(scope="module")
def pair(tiny_models: TinyModels) -> tuple[HookedALM, HookedALM]:
    """A model, and one that differs in a block's weights, its final norm and its unembedding."""
    folder = str(tiny_models.folder("gqa"))
    model, other = (HookedALM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for part in (other.blocks[2], other.ln_final, other.unembed):
        randomise(part, seed=11)
    return model, other


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_equal_to_the_plain_loop(pair: tuple[HookedALM, HookedALM], site: Site) -> None:
    """Whole spans, too: the other's rows further up are not what this model makes of them."""
    model, other = pair
    base, donor = model.encode(**BASE), model.encode(**OTHER)
    fast, plain = both(model, base, donor, site=site, places=["text", "readout"], donor_model=other)
    own = patch(model, base, donor, TAIL, site=site, places=["text", "readout"])
    assert moved(plain) > 1e-3
    assert np.abs(fast.values - own.values).max() > 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_agreeing_runs_are_not_spliced(pair: tuple[HookedALM, HookedALM], site: Site) -> None:
    """The same prompt: its rows further up are what either model makes of them."""
    model, other = pair
    base = model.encode(**BASE)
    fast, _ = both(model, base, base, site=site, places=[(10, 11, 12)], donor_model=other)
    assert np.abs(fast.effect).max() > 1e-2


@torch.no_grad()
def test_the_donor_metric_is_the_others(pair: tuple[HookedALM, HookedALM]) -> None:
    model, other = pair
    base, donor = model.encode(**BASE), model.encode(**OTHER)
    found = patch(model, base, donor, Logits([7, 9]), layers=[1], donor_model=other)
    expected = other(donor)[:, -1, [7, 9]]
    np.testing.assert_allclose(found.donor, expected, rtol=0, atol=1e-4)
    assert np.abs(found.donor - model(donor)[:, -1, [7, 9]].numpy()).max() > 1e-2


def test_what_is_below_the_difference_is_the_base(pair: tuple[HookedALM, HookedALM]) -> None:
    """The same prompt: only from the block on that differs does anything change."""
    model, other = pair
    base = model.encode(**BASE)
    found = patch(
        model, base, base, Logits([7, 9]), site="attn_out", places=["all"], donor_model=other
    )
    effects = np.abs(found.effect).max(axis=(1, 2, 3))
    assert effects[:2].max() < 1e-4
    assert effects[2:].min() > 1e-3
    mean = patch(
        model, base[[0]], Mean(base[[0]], by_position=True), Logits([7, 9]), site="attn_out",
        places=["all"], donor_model=other,
    )  # fmt: skip
    np.testing.assert_allclose(mean.values[:, 0, 0], found.values[:, 0, 0], rtol=0, atol=1e-4)


def test_refusals(pair: tuple[HookedALM, HookedALM], tiny_models: TinyModels) -> None:
    model, other = pair
    base = model.encode(**BASE)
    ungrouped: Any = tiny_models.hooked("mha")
    with pytest.raises(InputError, match=r"n_key_value_heads 6 for 2.*of the same shape"):
        patch(model, base, base, TAIL, donor_model=ungrouped)
    for donor in ("zero", "self"):
        with pytest.raises(InputError, match=f"donor '{donor}' and a donor_model: .* is no run"):
            patch(model, base, donor, TAIL, donor_model=other)  # type: ignore[arg-type]
