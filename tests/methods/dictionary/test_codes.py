"""Sparse products and choices of latents, against dense ones in float64."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from hooked_alm.methods.dictionary.codes import (
    Active,
    above_threshold,
    batch_top_k,
    decoded,
    encoded,
    top_k,
)

N, D, F = 7, 5, 11


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mask(active: Active) -> Tensor:
    return active.dense(torch.ones(len(active.row), dtype=torch.float64))


@pytest.mark.parametrize("choose", ["top_k", "batch_top_k", "above_threshold"])
def test_sparse_products_are_the_dense_ones(choose: str) -> None:
    x, weight, bias = draw(N, D), draw(F, D, seed=1), draw(F, seed=2)
    directions, towards = draw(F, D, seed=3), draw(N, D, seed=4)
    pre = x @ weight.T + bias
    active = {
        "top_k": lambda: top_k(pre, 3),
        "batch_top_k": lambda: batch_top_k(pre, 3),
        "above_threshold": lambda: above_threshold(pre, bias.abs()),
    }[choose]()
    leaves = [one.requires_grad_() for one in (x, weight, bias, directions)]

    def gradients(loss: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(loss, leaves)]

    value = encoded(pre.detach(), x, weight, bias, active)
    sparse = decoded(value, directions, active)
    dense = ((x @ weight.T + bias) * mask(active)) @ directions
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    found = gradients((sparse * towards).sum())
    expected = gradients((dense * towards).sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_top_k_takes_k_of_each_row() -> None:
    pre = draw(N, F)
    assert (mask(top_k(pre, 4)).sum(1) == 4).all()
    lowest_kept = pre.where(mask(top_k(pre, 4)) > 0, torch.inf).amin(1)
    highest_left = pre.where(mask(top_k(pre, 4)) == 0, -torch.inf).amax(1)
    assert (lowest_kept > highest_left).all()


def test_batch_top_k_takes_k_a_row_on_average() -> None:
    pre = draw(5, F).abs()
    active = batch_top_k(pre, 4)
    assert len(active.row) == 20
    assert sorted(pre[active.row, active.latent].tolist()) == sorted(pre.flatten().tolist())[-20:]
    assert mask(active).sum(1).unique().numel() > 1


def test_batch_top_k_never_takes_what_is_not_positive() -> None:
    pre = draw(5, F)
    assert torch.equal(mask(batch_top_k(pre, F)) > 0, pre > 0)
    assert len(batch_top_k(-pre.abs(), 2).row) == 0


@pytest.mark.parametrize("above", [0.3, 1.2, 50.0])
def test_a_guess_changes_nothing(above: float) -> None:
    pre = draw(40, F)
    plain, guessed = batch_top_k(pre, 2), batch_top_k(pre, 2, above=above)
    assert torch.equal(plain.row, guessed.row)
    assert torch.equal(plain.latent, guessed.latent)


def test_parts_of_the_latents() -> None:
    active = top_k(draw(N, F), 3)
    values = torch.arange(len(active.row), dtype=torch.float64) + 1
    whole, parts = active.dense(values), torch.zeros(N, F, dtype=torch.float64)
    for first, stop in ((0, 4), (4, F)):
        some, kept = active.part(first, stop)
        parts += some.dense(values[kept])
    assert torch.equal(parts, whole)


def test_shapes_are_checked() -> None:
    pre = draw(N, F)
    with pytest.raises(TypeCheckError):
        encoded(pre, draw(N, D), draw(F + 1, D), draw(F), top_k(pre, 2))
