"""Features of one kind of rows exchanged for another's, and the edits that this has to beat.

Source: M-SAE-3, M-SP-5; the error is kept as in Marks et al. 2024 (arXiv 2403.19647).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .autoencoder import SparseAutoencoder
from .splice import RowEdit, reconstruction
from .steering import (
    Activity,
    Latents,
    as_active,
    as_far,
    differing,
    exchange,
    most_frequent,
    shift,
)

EditFamily = Literal[
    "chosen", "matched", "scaled", "frequent", "random", "push", "none", "all", "rows",
    "reconstruction",
]  # fmt: skip
"""``chosen`` exchanges the latents that differ most, ``matched`` as many that are as active,
``frequent`` as many that are active most often; ``scaled`` is matched, ``push`` the difference of
the mean rows and ``random`` a drawn direction, all of them as far as chosen. ``none`` and ``all``
latents; the whole ``rows``; the ``reconstruction`` of the rows as they are."""


class KindEdit(NamedTuple):
    """An edit of rows of one kind, and what it is of."""

    family: EditFamily
    n_latents: int
    """Chosen of either kind; 0 where none are."""
    alpha: float
    edit: RowEdit
    activity: float = float("nan")
    """Mean activation of its latents."""


@dataclass(frozen=True, eq=False)
class KindExchange:
    """A dictionary, and its activity on rows of two kinds and of all, other than are edited."""

    sae: SparseAutoencoder
    own: Activity
    other: Activity
    every: Activity

    def latents(self, n: int) -> Latents:
        """The ``n`` that are most above in either kind; those that tell nothing may be in both.

        Raises:
            InputError: more than there are.
        """
        sides = differing(self.other, self.own, n), differing(self.own, self.other, n)
        return torch.cat(sides).unique()

    def edits(
        self,
        sizes: Sequence[int],
        n_latents: int,
        alphas: Sequence[float],
        donor: Float[Tensor, "row d_in"] | None,
        seed: int,
    ) -> Iterator[KindEdit]:
        """Every edit of some rows of the first kind towards the second.

        Args:
            sizes: numbers of latents of either kind, each exchanged with strength 1.
            n_latents: the one of them that has other strengths, too.
            alphas: these strengths.
            donor: rows of the second kind, one for each that is edited; None is their mean.
            seed: of the others that are as active, and of the random direction.

        Raises:
            InputError: too few latents for as many others.
        """
        sae, features = self.sae, self._features(donor)
        push = self.other.rows - self.own.rows
        drawn = torch.Generator().manual_seed(seed)
        direction = torch.randn(len(push), generator=drawn)
        for n in sizes:
            some = self.latents(n)
            sets: dict[EditFamily, Latents] = {
                "chosen": some,
                "matched": as_active(some, self.every, seed),
                "frequent": most_frequent(self.every, len(some)),
            }
            made = {family: exchange(sae, one, features) for family, one in sets.items()}
            for family, edit in made.items():
                activity = float(self.every.mean[sets[family]].mean())
                yield KindEdit(family, n, 1.0, edit, activity)
            yield KindEdit("scaled", n, 1.0, as_far(made["matched"], made["chosen"]))
            yield KindEdit("random", n, 1.0, shift(direction, made["chosen"]))
            yield KindEdit("push", n, 1.0, shift(push, made["chosen"]))
        for alpha in alphas:
            some_way = exchange(sae, self.latents(n_latents), features, alpha)
            yield KindEdit("chosen", n_latents, alpha, some_way)
            yield KindEdit("push", n_latents, alpha, shift(push, some_way))
        yield KindEdit("none", 0, 1.0, exchange(sae, torch.arange(0), features))
        yield KindEdit("all", 0, 1.0, exchange(sae, torch.arange(sae.cfg.d_sae), features))
        rows = self.other.rows if donor is None else donor.float()
        yield KindEdit("rows", 0, 1.0, lambda x: rows.to(x).expand_as(x))
        yield KindEdit("reconstruction", 0, 1.0, reconstruction(sae))

    def error_change(
        self, x: Float[Tensor, "row d_in"], donor: Float[Tensor, "row d_in"] | None
    ) -> float:
        """How far the error moves if all features are exchanged, in shares of the largest value.

        What is left of a row beside the features that are written in has to be its own error.
        """
        sae, features = self.sae, self._features(donor).to(x.device)
        new = exchange(sae, torch.arange(sae.cfg.d_sae), features)(x)
        moved = (new - sae.decode(features)) - (x - sae(x))
        return float(moved.abs().max() / x.abs().max())

    def _features(self, donor: Float[Tensor, "row d_in"] | None) -> Float[Tensor, "*row latent"]:
        return self.other.mean if donor is None else self.sae.encode(donor.float())
