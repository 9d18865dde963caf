"""Noise like some rows: their mean and covariance, the same whenever it is drawn."""

import torch

from hooked_alm.methods.dictionary.noise import RowNoise


def test_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    # Rows that are no noise at all: corners of a cube, mixed.
    rows = torch.randint(2, (300, 5), generator=generator).double() @ mix + 3
    noise = RowNoise.like(rows)
    torch.testing.assert_close(noise.factor @ noise.factor.T, torch.cov(rows.T, correction=0))
    torch.testing.assert_close(noise.mean, rows.mean(0))
    drawn = RowNoise(noise.mean.float(), noise.factor.float()).drawn(40_000, (0, 1)).double()
    spread = rows.std(0)
    # Standard errors of a mean and of a covariance over 40,000 rows are 0.5 and 0.7 % of these.
    assert ((drawn.mean(0) - noise.mean).abs() < 0.03 * spread).all()
    off = torch.cov(drawn.T) - torch.cov(rows.T)
    assert (off.abs() < 0.04 * spread[:, None] * spread).all()


def test_rows_follow_from_the_key() -> None:
    noise = RowNoise.like(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    first = noise.drawn(6, (7, 3))
    assert torch.equal(first, noise.drawn(6, (7, 3)))
    assert not torch.equal(first, noise.drawn(6, (7, 4)))
