"""Sweeps of runs in which reconstructions stand in for rows: against one run a cell, by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_runs import BASE, N_TAIL, OTHER, TAIL, both, close, moved
from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.splice import Splice, feature_edit, reconstruction
from hooked_alm.methods.patching.donors import Mean
from hooked_alm.methods.patching.patch import patch

MIDDLE, LAST = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
ENCODED, HEADS = "audio.encoder.blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
HOOKS = {"z": "attn.hook_z", "mlp_out": "hook_mlp_out", "k": "attn.hook_k",
         "resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post"}  # fmt: skip


@pytest.fixture
def batches(gqa: HookedALM) -> tuple[ALMInput, ALMInput]:
    return gqa.encode(**BASE), gqa.encode(**OTHER)


def splice(model: HookedALM, x: ALMInput, points: Sequence[str], spans: str = "audio") -> Splice:
    """Dictionaries of some points that reconstruct badly; the second one's features are halved."""
    edits = {}
    for number, point in enumerate(points):
        rows = next(iter(rows_of(model, x, point).values())).values[point]
        cfg = DictionaryConfig(d_in=rows.shape[1], d_sae=23, architecture="topk", k=4)
        sae = SparseAutoencoder.initialised(cfg, rows, seed=number)
        edits[point] = feature_edit(sae, lambda f: 0.5 * f) if number else reconstruction(sae)
    return Splice(edits, spans)


def by_hand(
    model: HookedALM, base: ALMInput, donor: ALMInput, made: Splice, site: str, span: str
) -> Tensor:
    """The last logits of every row, block by block: the donor's rows in a spliced run."""
    names = [f"{block}.{HOOKS[site]}" for block in model.path]
    theirs: dict[str, Tensor] = {}
    kept = [(name, lambda value, hook: theirs.update({hook.name: value})) for name in names]
    model.run_with_hooks(donor, fwd_hooks=[*made.hooks(model, donor), *kept])
    found = []
    for name in names:

        def write(value: Tensor, hook: Any) -> Tensor:
            new = value.clone()
            mask, other = base.spans.mask(span), donor.spans.mask(span)
            new[mask] = theirs[hook.name][other]
            return new

        logits = model.run_with_hooks(base, fwd_hooks=[*made.hooks(model, base), (name, write)])
        found.append(logits[:, -N_TAIL:].flatten(1))
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("site", "points", "span"),
    [
        ("z", [MIDDLE], "audio"),
        ("z", [MIDDLE, ENCODED], "readout"),
        ("k", [MIDDLE, LAST], "audio"),
        ("mlp_out", [ENCODED], "audio"),
        ("resid_pre", [MIDDLE], "audio"),
        ("resid_post", ["blocks.0.hook_resid_post", LAST], "text"),
    ],
)
@pytest.mark.parametrize("spans", ["audio", "text"])
def test_every_run_is_spliced(
    gqa: HookedALM, batches: tuple[ALMInput, ALMInput], site: Any, points: list[str], span: str,
    spans: str,
) -> None:  # fmt: skip
    base, donor = batches
    made = splice(gqa, base, points, spans)
    fast, plain = both(gqa, base, donor, site=site, places=[span], splice=made)
    expected = by_hand(gqa, base, donor, made, site, span)
    unpatched = gqa.run_with_hooks(base, fwd_hooks=made.hooks(gqa, base))[:, -N_TAIL:].flatten(1)
    for found in (fast, plain):
        close(torch.from_numpy(found.values[:, 0]).float(), expected)
        close(torch.from_numpy(found.base).float(), unpatched)
    assert moved(fast) > 1e-3
    if spans == "audio" or ENCODED not in points[:1]:
        assert (unpatched - gqa(base)[:, -N_TAIL:].flatten(1)).abs().max() > 1e-2


@torch.no_grad()
def test_sweeps_within_the_encoder(gqa: HookedALM, batches: tuple[ALMInput, ALMInput]) -> None:
    """Blocks of the encoder below and above the splice, and the splice's own."""
    base, donor = batches
    made, part = splice(gqa, base, [ENCODED]), gqa.towards("encoder")
    cases: dict[Any, Any] = {"z": "audio", "resid_post": (1, 2)}
    for site, place in cases.items():
        fast, _ = both(part, base, donor, site=site, places=[place], splice=made)
        without, _ = both(part, base, donor, site=site, places=[place])
        assert np.abs(fast.values - without.values).max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("donor", ["zero", "self"])
def test_donors_that_are_no_run(gqa: HookedALM, batches: Any, donor: Any) -> None:
    base, other = batches
    made = splice(gqa, base, [MIDDLE])
    for one in (donor, Mean(other)):
        both(gqa, base, one, site="mlp_out", places=["audio"], splice=made)


def test_points_that_the_fast_engine_does_not_splice(gqa: HookedALM, batches: Any) -> None:
    base, donor = batches
    made = splice(gqa, base, [HEADS])
    with pytest.raises(InputError, match=r"splicing blocks.0.attn.hook_z .* engine='hooks'"):
        patch(gqa, base, donor, TAIL, splice=made)
    assert patch(gqa, base, donor, TAIL, splice=made, engine="hooks", layers=[1]).values.size
    into = splice(gqa, base, [MIDDLE])
    with pytest.raises(InputError, match="under a sweep of audio.encoder.blocks.0 and on"):
        patch(gqa.towards("encoder"), base, donor, TAIL, site="z", splice=into)
