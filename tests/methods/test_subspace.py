"""Distributed alignment search: a known direction is found, all are a patch, none is nothing.

M-DAS. The known one is that between two tokens' embeddings, in prompts that end in either of them.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_reference import hf_activations, with_positions
from hooked_alm import ALMInput, HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.patching.subspace import (
    align_subspace,
    exchange_subspace,
    random_directions,
)
from tiny import TinyModels, hf_inputs
from tolerances import OTHER_KERNEL

D_MODEL = 54
TOKENS = 17, 40
CLOSE = {"rtol": 0, "atol": OTHER_KERNEL[torch.float32]}


def pairs(model: HookedALM, n: int, seed: int) -> list[ALMInput]:
    """Bases and donors, which differ in their last token alone: one of two, by turns."""
    first, other = torch.tensor(TOKENS).repeat(n // 2), torch.tensor(TOKENS[::-1]).repeat(n // 2)
    inputs = []
    for last in (first, other):
        one = hf_inputs([[60]] * n, [9] * n, seed=seed)
        one["input_ids"][:, -1] = last
        inputs.append(model.encode(**one))
    return inputs


def test_all_directions_are_the_whole_patch_whatever_the_rotation(
    gqa: HookedALM, tiny_models: TinyModels
) -> None:
    """Against plain Hugging Face with a hook; and no direction of the difference, nothing."""
    inputs = hf_inputs([[60], [60]], [9, 9])
    base, donor = ({name: value[row : row + 1] for name, value in inputs.items()} for row in (0, 1))
    hf = tiny_models.hf("gqa")
    for depth in (1, 3):
        theirs = hf_activations(hf, with_positions(donor))[f"blocks.{depth - 1}.hook_resid_post"]

        def write(_: object, args: object, output: Tensor, value: Tensor = theirs) -> Tensor:
            changed = output.clone()
            changed[:, -1] = value[:, -1]
            return changed

        handle = hf.model.language_model.layers[depth - 1].register_forward_hook(write)
        expected = hf(**with_positions(base)).logits[:, -1]
        handle.remove()
        x, y = gqa.encode(**base), gqa.encode(**donor)
        for seed in (0, 1):
            every = random_directions(D_MODEL, D_MODEL, seed)
            found = exchange_subspace(gqa, x, y, every, depth=depth)
            torch.testing.assert_close(found, expected, **CLOSE)
        # What is left of the difference when it is taken out of every direction.
        gap = (gqa(y, stop_at_layer=depth) - gqa(x, stop_at_layer=depth))[:, -1]
        rest = torch.linalg.svd(gap)[2][1:]
        same = exchange_subspace(gqa, x, y, rest, depth=depth)
        torch.testing.assert_close(same, gqa(x)[:, -1], **CLOSE)


def test_a_run_exchanged_with_itself_stays_as_it_is(gqa: HookedALM) -> None:
    x = gqa.encode(**hf_inputs([[60], [40]], [9, 14]))
    directions = random_directions(7, D_MODEL)
    torch.testing.assert_close(directions @ directions.T, torch.eye(7), rtol=0, atol=1e-6)
    for place in ("readout", "audio"):
        found = exchange_subspace(gqa, x, x, directions, depth=2, place=place)
        torch.testing.assert_close(found, gqa(x)[:, -1], **CLOSE)


def test_training_finds_the_direction_that_tells_the_prompts_apart(gqa: HookedALM) -> None:
    """By chance a direction has 1/54 of the difference's square; what counts are held-out pairs."""
    base, donor = pairs(gqa, 24, seed=1)
    with torch.no_grad():
        whole = gqa(donor)[:, -1]
    told = whole.argmax(-1)
    found = align_subspace(gqa, base, donor, told.tolist(), depth=0, n_directions=1, n_steps=60)
    assert all(one.grad is None for one in gqa.parameters())
    assert len(found.losses) == 60
    # The known direction alone would be the whole patch: a trained one does not do worse.
    assert found.losses[-1] <= float(F.cross_entropy(whole, told))
    [direction] = found.directions
    assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
    embeddings = gqa.W_E.detach()
    known = F.normalize(embeddings[TOKENS[0]] - embeddings[TOKENS[1]], dim=0)
    [drawn] = random_directions(1, D_MODEL)
    assert abs(float(direction @ known)) > 0.7
    assert abs(float(drawn @ known)) < 0.3

    base, donor = pairs(gqa, 24, seed=2)
    with torch.no_grad():
        start, moved = gqa(base)[:, -1], gqa(donor)[:, -1] - gqa(base)[:, -1]

    def recovered(directions: Tensor) -> float:
        logits = exchange_subspace(gqa, base, donor, directions, depth=0)
        return float(((logits - start) * moved).sum() / moved.pow(2).sum())

    assert recovered(known[None]) == pytest.approx(1, abs=1e-4)
    assert recovered(found.directions) > 0.5
    assert recovered(drawn[None]) < 0.1


def test_what_there_is_not_is_refused(gqa: HookedALM) -> None:
    x = gqa.encode(**hf_inputs([[60]], [9]))
    for options, match in (
        ({"depth": 5, "n_directions": 1}, "at depth 5: the model has depths 0 to 4"),
        ({"depth": 1, "n_directions": 0}, "got n_directions=0, expected 1 to 54"),
        ({"depth": 1, "n_directions": 55}, "got n_directions=55, expected 1 to 54"),
    ):
        with pytest.raises(InputError, match=match):
            align_subspace(gqa, x, x, [3], **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 2 answers for 1 prompts"):
        align_subspace(gqa, x, x, [3, 4], depth=1, n_directions=1)
