"""Blocks of an adapter, switched: the plain runs' bits, and shares that add up."""

import itertools

import pytest
import torch
from torch import Tensor

from adapters import adapted
from hooked_alm import ALMInput, HookedALM
from hooked_alm.components.lora import updates_of
from hooked_alm.errors import InputError
from hooked_alm.methods.adapters.switching import (
    adapted_blocks,
    every_combination,
    shapley_values,
    switch_blocks,
    switched,
)
from hooked_alm.methods.adapters.updates import update_sizes
from tiny import TinyModels, hf_inputs

INPUTS = hf_inputs([[63], [23]], [9, 14])


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> HookedALM:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny_models.folder(), torch.float32).save_pretrained(folder)
    return HookedALM.from_pretrained(tiny_models.folder(), lora=folder, merge_lora=False)


@pytest.fixture(scope="module")
def x(model: HookedALM) -> ALMInput:
    return model.encode(**INPUTS)


def read(logits: Tensor) -> Tensor:
    return logits[:, :5]


def test_switched_blocks_are_the_plain_runs(model: HookedALM, x: ALMInput) -> None:
    blocks, at = adapted_blocks(model), x.spans.positions("readout", 0)[-1]
    found = switch_blocks(model, x, read)

    def plainly(on: list[int]) -> Tensor:
        model.switch_lora(False)
        if on:
            model.switch_lora(True, layers=on)
        logits = model(x)
        model.switch_lora(True)
        return logits[:, at, :5]

    assert torch.equal(found.off, plainly([]))
    assert torch.equal(found.on, plainly(blocks))
    assert not torch.equal(found.on, found.off)
    assert torch.equal(found.resumed, found.on)
    for n, block in enumerate(blocks):
        assert torch.equal(found.denoise[n], plainly([block]))
        assert torch.equal(found.noise[n], plainly([b for b in blocks if b != block]))
        assert torch.equal(found.erased[n], plainly(blocks[n + 1 :]))
    assert torch.equal(found.erased[-1], found.off)


def test_every_combination_is_the_plain_run(model: HookedALM, x: ALMInput) -> None:
    at, found = x.spans.positions("readout", 0)[-1], every_combination(model, x, read)
    blocks = adapted_blocks(model)
    assert len(found) == 2 ** len(blocks)
    for some in itertools.chain([()], itertools.combinations(blocks, 2)):
        with switched(model, some):
            assert torch.equal(found[frozenset(some)], model(x)[:, at, :5])


def test_shapley_values_add_up(model: HookedALM, x: ALMInput) -> None:
    worth = every_combination(model, x, lambda logits: read(logits).double())
    found, blocks = shapley_values(worth), frozenset(adapted_blocks(model))
    assert set(found) == blocks
    total = worth[blocks] - worth[frozenset()]
    torch.testing.assert_close(sum(found.values()), total, rtol=0, atol=1e-9)


def test_shapley_values_by_hand() -> None:
    """Two players: v(0) = 0, v(a) = 1, v(b) = 2, v(ab) = 6 share the 6 as 2.5 and 3.5."""
    worth = {(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 6.0}
    found = shapley_values({frozenset(k): torch.tensor([[v]]) for k, v in worth.items()})
    assert {k: v.item() for k, v in found.items()} == {0: 2.5, 1: 3.5}


def test_one_block_alone_is_the_whole_adapter(model: HookedALM, x: ALMInput) -> None:
    """If other blocks' updates are zero, the one that is left does all of it."""
    kept = {name: update.b for name, update in updates_of(model)}
    try:
        for name, update in updates_of(model):
            if not name.startswith("blocks.1."):
                update.b = torch.zeros_like(update.b)
        found, at = switch_blocks(model, x, read), adapted_blocks(model).index(1)
        assert torch.equal(found.denoise[at], found.on)
        assert torch.equal(found.noise[at], found.off)
        others = [n for n in range(len(found.blocks)) if n != at]
        assert all(torch.equal(found.noise[n], found.on) for n in others)
    finally:
        for name, update in updates_of(model):
            update.b = kept[name]


def test_switches_are_as_they_were(model: HookedALM, x: ALMInput) -> None:
    model.switch_lora(False, layers=[1])
    before = [update.is_on for _, update in updates_of(model)]
    switch_blocks(model, x, read)
    assert [update.is_on for _, update in updates_of(model)] == before
    model.switch_lora(True)


def test_a_merged_adapter_is_refused(tiny_models: TinyModels) -> None:
    plain = HookedALM.from_pretrained(tiny_models.folder())
    with pytest.raises(InputError, match="merge_lora=False"):
        switch_blocks(plain, plain.encode(**INPUTS), read)


def test_too_many_combinations_are_refused(
    model: HookedALM, x: ALMInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_alm.methods.adapters.switching.MOST_COMBINED", 2)
    with pytest.raises(InputError, match="one by one"):
        every_combination(model, x, read)


def test_sizes_of_updates(model: HookedALM) -> None:
    """As of the products themselves."""
    products = {
        name: (update.b.double() @ update.a.double()) * update.scaling
        for name, update in updates_of(model)
    }
    found = update_sizes(model)
    assert len(found) == len(products)
    for one in found:
        product = products[f"{model.path[one.block]}.{one.module}"]
        assert one.rank == 3
        assert one.frobenius == pytest.approx(float(product.norm()), rel=1e-9)
        assert one.spectral == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-9)
