"""Whether dictionaries of a point have found the same directions, and what chance finds.

Source: M-SAE-2.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm.methods.dictionary.autoencoder import SparseAutoencoder
from hooked_alm.methods.dictionary.stability import (
    PARTNERS_AT,
    ActivationCorrelation,
    Matching,
    match_dictionaries,
    random_directions,
)

from ..workbench import figures
from ..workbench.claims import Finding, few, judged, shown
from ..workbench.controls import Control, at_most
from ..workbench.intervals import Draws, numbers, prefixed, unprefixed
from ..workbench.page import Page
from ..workbench.results import Row, parts_by

Dictionaries = Mapping[Any, SparseAutoencoder]
"""Name, or seed, -> a dictionary of the same point."""
PARTNERS = ("point", "source", "first", "second", "how", "latent", "partner", "cosine")
"""Columns of the table of partners."""
SOURCES = {"rows": "the model's rows", "noise": "noise of their covariance",
           "untrained": "no training"}  # fmt: skip
"""What two dictionaries were made from, in words."""
NamePair = tuple[str, str]
"""Names of two dictionaries of a point."""
ROUNDED = 1e-5
"""Largest difference of a cosine from 1, in fp32."""


def partner_rows(
    point: str, source: str, directions: Mapping[Any, Tensor], dead: Mapping[Any, Sequence[int]]
) -> Iterator[Row]:
    """Partners of every living latent among those of every other dictionary of the point."""
    gone = {
        name: torch.zeros(len(one), dtype=torch.bool).index_fill(0, torch.tensor(
            dead[name], dtype=torch.long), True)
        for name, one in directions.items()
    }  # fmt: skip
    for first, second in combinations(directions, 2):
        for how in get_args(Matching):
            found = match_dictionaries(
                directions[first], directions[second], how, dead=(gone[first], gone[second])
            )
            pairs = zip(found.partner.tolist(), found.cosine.tolist(), strict=True)
            for latent, (partner, cosine) in enumerate(pairs):
                if not gone[first][latent]:
                    values = (point, source, first, second, how, latent, partner, cosine)
                    yield dict(zip(PARTNERS, values, strict=True))


def copy_row(directions: Float[Tensor, "latent d_in"], seed: int) -> Row:
    """How far partners in a shuffled, rescaled copy of a dictionary are from being the same."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(directions), generator=generator)
    sizes = 0.5 + torch.rand(len(directions), 1, generator=generator)
    found = match_dictionaries(directions, directions[order] * sizes.to(directions))
    return {"difference": float((1 - found.cosine).abs().max())}


COPY_CONTROL = Control(
    name="a shuffled, rescaled copy has the same directions", of=("partners",),
    check=lambda run: at_most(run["copies"]["difference"], ROUNDED, "of a cosine"),
    guards_against="an assignment that loses partners",
)  # fmt: skip


def untrained(saes: Dictionaries) -> dict[Any, Tensor]:
    """Directions of no training, as many as the dictionaries have."""
    return {
        name: random_directions(sae.cfg.d_sae, sae.cfg.d_in, seed=1_000_003 + number)
        for number, (name, sae) in enumerate(saes.items())
    }


class PartnerCorrelations:
    """Of every pair of dictionaries of a point, beside latents that are dealt out as partners."""

    def __init__(
        self, saes: Mapping[str, SparseAutoencoder], partners: Sequence[Row], seed: int
    ) -> None:
        """Begin without rows.

        Args:
            saes: of the point.
            partners: their latents' partners; those matched one to one are held together.
            seed: of the deals.
        """
        self._saes, found = saes, dict[NamePair, list[tuple[int, int]]]()
        for row in partners:
            if row["how"] == "matched" and row["partner"] >= 0:
                pair = (row["first"], row["second"])
                found.setdefault(pair, []).append((row["latent"], row["partner"]))
        self._latents: dict[NamePair, tuple[Tensor, Tensor, Tensor]] = {}
        self._counts: dict[NamePair, tuple[ActivationCorrelation, ActivationCorrelation]] = {}
        for pair, both in found.items():
            first, second = torch.tensor(both).unbind(1)
            order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
            self._latents[pair] = first, second, second[order]
            self._counts[pair] = ActivationCorrelation(), ActivationCorrelation()

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Count a batch of rows of the point."""
        named = {name for pair in self._latents for name in pair}
        codes = {name: self._saes[name].encode(rows.float()) for name in sorted(named)}
        for (first, second), (latents, *others) in self._latents.items():
            for count, other in zip(self._counts[first, second], others, strict=True):
                count.add(codes[first][:, latents], codes[second][:, other])

    def rows(self, point: str) -> Iterator[Row]:
        """A row for each latent that has a partner."""
        for (first, second), (latents, _, _) in self._latents.items():
            counts = (one.correlation().tolist() for one in self._counts[first, second])
            for latent, found, chance in zip(latents.tolist(), *counts, strict=True):
                yield {
                    "point": point, "first": first, "second": second, "latent": latent,
                    "correlation": found, "by_chance": chance,
                }  # fmt: skip


# --- What is made of it


def stability_table(partners: pd.DataFrame, draws: Draws, *by: str) -> pd.DataFrame:
    """Share of the living latents with a partner, and the mean cosine; intervals over latents.

    Over several pairs of dictionaries, each latent of each pair counts; a latent with no partner
    left for it has a cosine of NaN, which is no partner.

    Args:
        partners: see `partner_rows`.
        draws: of the run.
        by: columns that tell rows apart, beside point, source and how.
    """
    rows = []
    for names, some in parts_by(partners, "point", "source", "how", *by):
        has = (some["cosine"] >= PARTNERS_AT).to_numpy(np.float64)
        share = numbers(draws.mean(has, _latents(some)))
        cosine = numbers(draws.mean(some["cosine"].to_numpy(np.float64), _latents(some)))
        pairs = some[["first", "second"]].drop_duplicates()
        rows.append({
            **names, **prefixed("share", share, ""),
            **prefixed("cosine", cosine, ""), "n_latents": len(some), "n_pairs": len(pairs),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _latents(some: pd.DataFrame) -> list[str]:
    return [
        f"{first}/{latent}" for first, latent in zip(some["first"], some["latent"], strict=True)
    ]


def found_again(claim: str, matched: pd.DataFrame) -> Finding:
    """The claim that dictionaries have directions in common that noise does not have.

    Args:
        claim: in words.
        matched: rows of `stability_table`, one for each source.
    """
    mine = matched.set_index("source")
    ours, nulls = mine.loc["rows"], mine.drop(index="rows")
    share = unprefixed("share", ours, "")
    worst = float(nulls["share_high"].fillna(np.inf).max())
    said = ", ".join(f"{100 * row['share']:.1f} % of {SOURCES[source]}"
                     for source, row in nulls.iterrows())  # fmt: skip
    return judged(
        claim,
        f"{shown(share)} of the latents have a partner at a cosine of {PARTNERS_AT:g} or more; "
        f"{said}",
        {
            **few(ours["n_latents"], "latents"),
            "not trained on noise": "noise" not in mine.index,
            "not surely more than either null": not ours["share_low"] > worst,
        },
        numbers={**share, "n": ours["n_latents"]},
        unit="share",
    )


def draw_partners(page: Page, matched: pd.DataFrame, name: str, what: str) -> None:
    """How near partners are: the share of latents above each cosine.

    Args:
        page: that has the figure.
        matched: rows of the table of partners.
        name: of the figure's files.
        what: is compared, in words.
    """
    cosines = [round(0.02 * step, 2) for step in range(51)]
    curves = pd.DataFrame([
        {"of": SOURCES[source], "cosine": at, "share": float((some["cosine"] >= at).mean())}
        for source, some in matched.groupby("source", sort=False)
        for at in cosines
    ])  # fmt: skip
    drawing = figures.curves(
        curves, "cosine", "share", group="of", title=what, x_label="cosine of the partners",
        y_label="share of latents at it or above", y_limits=(-0.03, 1.03),
    )  # fmt: skip
    page.figure(
        name, drawing, curves, f"Latents that another dictionary has, too: {what}",
        "Partners are dealt out one to one, with the largest sum of cosines. A dictionary of "
        "directions that are there lies above both others; one of noise may lie below no training.",
    )  # fmt: skip
