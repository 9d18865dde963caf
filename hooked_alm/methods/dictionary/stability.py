"""Whether two dictionaries have found the same directions."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError

Matching = Literal["matched", "greedy"]
"""``matched``: one to one, with the largest sum of cosines (Hungarian). ``greedy``: each with its
nearest, so that many may share one, which inflates."""
PARTNERS_AT = 0.7
"""Cosine from which two directions are partners."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What of a first dictionary is in a second; dead latents are of neither, and counted."""

    cosine: Float[Tensor, " latent"]
    """Of each latent of the first with its partner; NaN without one. Signed: a direction and its
    opposite are not the same feature."""
    partner: Int[Tensor, " latent"]
    """Its number in the second; −1 without one."""
    n_dead: tuple[int, int]

    @property
    def mean(self) -> float:
        """Mean cosine of those that have a partner (PW-MCC if matched)."""
        return float(self.cosine.nanmean())

    def share(self, at: float = PARTNERS_AT) -> float:
        """Share of the first's living latents with a partner at a cosine or above."""
        n_alive = len(self.cosine) - self.n_dead[0]
        return float((self.cosine >= at).sum()) / n_alive if n_alive else float("nan")


def match_dictionaries(
    first: Float[Tensor, "latent d_in"],
    second: Float[Tensor, "other_latent other_d_in"],
    how: Matching = "matched",
    *,
    dead: tuple[Bool[Tensor, " latent"] | None, Bool[Tensor, " other_latent"] | None] = (
        None,
        None,
    ),
) -> Match:
    """Partners of a dictionary's directions among those of another.

    Source: Paulo & Belrose 2025 (arXiv 2501.16615) for the assignment; the mean matched cosine is
    their PW-MCC.

    Args:
        first: directions, of any length but 0.
        second: those of the other.
        how: see ``Matching``.
        dead: latents of either that count as absent.

    Raises:
        InputError: other widths, or directions of length 0.
    """
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"matching dictionaries: got directions of width {first.shape[1]} and "
            f"{second.shape[1]}, expected the same. Take dictionaries of the same point."
        )
    alive = [
        torch.ones(len(one), dtype=torch.bool) if gone is None else ~gone.cpu()
        for one, gone in zip((first, second), dead, strict=True)
    ]
    numbers = [one.nonzero().flatten() for one in alive]
    parts = [
        one.detach().float().cpu()[at] for one, at in zip((first, second), numbers, strict=True)
    ]
    if any(bool((part.norm(dim=-1) == 0).any()) for part in parts):
        raise InputError(
            "matching dictionaries: got living directions of length 0, expected none. Say which "
            "latents are dead, or train the dictionary."
        )
    cosine = torch.full((len(first),), torch.nan)
    partner = torch.full((len(first),), -1, dtype=torch.long)
    n_dead = (len(first) - len(numbers[0]), len(second) - len(numbers[1]))
    if all(map(len, parts)):
        table = F.normalize(parts[0], dim=-1) @ F.normalize(parts[1], dim=-1).T
        if how == "matched":
            rows, columns = map(
                torch.from_numpy, linear_sum_assignment(table.numpy(), maximize=True)
            )
        else:
            rows, columns = torch.arange(len(table)), table.argmax(1)
        cosine[numbers[0][rows]] = table[rows, columns]
        partner[numbers[0][rows]] = numbers[1][columns]
    return Match(cosine=cosine, partner=partner, n_dead=n_dead)


def random_directions(n: int, d_in: int, seed: int) -> Float[Tensor, "latent d_in"]:
    """A dictionary of no training, the lower of the nulls of a match."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d_in, generator=generator), dim=-1)


class ActivationCorrelation:
    """Pearson's correlation of partners' activations over the same rows, batch by batch.

    Sums are kept in float64 of what activations are above those of the first row, so that one that
    is constant is known to be.
    """

    def __init__(self) -> None:
        self._n = 0
        self._origin: tuple[Tensor, Tensor] | None = None
        self._sums: Tensor | float = 0.0

    def add(self, first: Float[Tensor, "row latent"], second: Float[Tensor, "row latent"]) -> None:
        """Count a batch.

        Args:
            first: features of one dictionary.
            second: those of the other, in the order of the partners.
        """
        self._origin = self._origin or (first[0].double(), second[0].double())
        a, b = (one.double() - at for one, at in zip((first, second), self._origin, strict=True))
        self._sums = self._sums + torch.stack([one.sum(0) for one in (a, b, a * a, b * b, a * b)])
        self._n += len(a)

    def correlation(self) -> Float[Tensor, " latent"]:
        """One number a latent; NaN where either is constant, or there are no rows."""
        if self._origin is None:
            return torch.full((0,), torch.nan)
        a, b, aa, bb, ab = torch.as_tensor(self._sums).cpu()
        spread = (aa - a * a / self._n) * (bb - b * b / self._n)
        found = (ab - a * b / self._n) / spread.sqrt()
        return found.where(found.isfinite(), torch.nan)


def activation_correlation(
    first: Float[Tensor, "row latent"], second: Float[Tensor, "row latent"]
) -> Float[Tensor, " latent"]:
    """Pearson's correlation of partners' activations; see `ActivationCorrelation`."""
    found = ActivationCorrelation()
    found.add(first, second)
    return found.correlation()
