"""Edits of rows: the engine against the plain loop, hooks by hand, and exchanged features."""

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM, LogitDiff
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.splice import RowEdit, reconstruction, splice_hooks
from hooked_alm.methods.dictionary.steering import exchange
from hooked_alm.methods.patching.features import patch_features
from hooked_alm.methods.patching.row_edits import patch_rows
from tiny import hf_inputs
from tolerances import ENGINE

POINT, ENCODER = "blocks.1.hook_resid_post", "audio.encoder.blocks.0.hook_resid_post"
TOLERANCE = ENGINE[torch.float32] * 10  # logits of the order of 10
METRIC = LogitDiff(3, 7)


def inputs(model: HookedALM, seed: int = 1) -> ALMInput:
    return model.encode(**hf_inputs([[40], [77]], [9, 6], seed))


def rows_by_prompt(model: HookedALM, x: ALMInput, point: str) -> list[Tensor]:
    (found,) = rows_of(model, x, point).values()
    prompt = torch.as_tensor(found.index["prompt"].astype(int))
    return [found.values[point][prompt == row] for row in range(len(x))]


def dictionary(rows: Tensor) -> SparseAutoencoder:
    cfg = DictionaryConfig(d_in=rows.shape[1], d_sae=31, architecture="topk", k=4)
    return SparseAutoencoder.initialised(cfg, rows, seed=0)


def edits_of(sae: SparseAutoencoder, donors: list[Tensor]) -> dict[str, list[RowEdit]]:
    some, none, every = torch.tensor([2, 5, 11, 30]), torch.tensor([], dtype=int), torch.arange(31)
    theirs = [sae.encode(rows) for rows in donors]
    return {
        "none": [exchange(sae, none, one) for one in theirs],
        "some": [exchange(sae, some, one) for one in theirs],
        "half": [exchange(sae, some, one, 0.5) for one in theirs],
        "mean": [exchange(sae, some, one.mean(0)) for one in theirs],
        "all": [exchange(sae, every, one) for one in theirs],
        "reconstruction": [reconstruction(sae)] * len(donors),
    }


@pytest.mark.parametrize("point", [POINT, ENCODER])
@torch.no_grad()
def test_the_engine_is_the_loop_and_a_run_with_hooks(gqa: HookedALM, point: str) -> None:
    base = inputs(gqa)
    sae = dictionary(torch.cat(rows_by_prompt(gqa, base, point)))
    edits = edits_of(sae, rows_by_prompt(gqa, inputs(gqa, seed=2), point))
    fast = patch_rows(gqa, base, METRIC, edits, point)
    loop = patch_rows(gqa, base, METRIC, edits, point, engine="hooks")
    assert fast.axes == loop.axes == {"edit": (*edits,), "example": (0, 1)}
    values = [torch.tensor(one.values) for one in (fast, loop)]
    torch.testing.assert_close(*values, rtol=0, atol=TOLERANCE)
    assert (loop.effect[0] == 0).all()
    assert (abs(fast.effect[1:]) > 1e-3).mean() > 0.8
    for number, name in enumerate(edits):
        for row in range(2):  # prompt by prompt, as every one has an edit of its own
            one = base[row]
            hooks = splice_hooks(gqa, one, {point: edits[name][row]})
            logits = gqa.run_with_hooks(one, fwd_hooks=hooks)[0, -1]
            expected = float(logits[3] - logits[7])
            assert fast.values[number, row] == pytest.approx(expected, abs=TOLERANCE)


def test_exchanged_features_are_those_that_are_patched(gqa: HookedALM) -> None:
    """Against ``patch_features``, which adds up what each feature changes."""
    base, donor = inputs(gqa), inputs(gqa, seed=2)
    sae = dictionary(torch.cat(rows_by_prompt(gqa, base, POINT)))
    edits = edits_of(sae, rows_by_prompt(gqa, donor, POINT))
    found = patch_rows(gqa, base, METRIC, edits, POINT)
    joint = [(), (2, 5, 11, 30), (*range(31),)]
    expected = patch_features(
        gqa, base, donor, METRIC, sae, POINT, features=joint, places=("audio",)
    )
    ours = torch.tensor(found.values[[0, 1, 4]])
    torch.testing.assert_close(ours, torch.tensor(expected.values[:, 0]), rtol=0, atol=TOLERANCE)


def test_refused(gqa: HookedALM) -> None:
    base = inputs(gqa)
    for edits in ({}, {"one": [torch.nn.Identity()]}):
        with pytest.raises(InputError, match="expected one or more, for each prompt"):
            patch_rows(gqa, base, METRIC, edits, POINT)
    with pytest.raises(InputError, match="expected a point of the blocks"):
        patch_rows(gqa, base, METRIC, {"one": [torch.nn.Identity()] * 2}, "blocks.0.attn.hook_z")
