"""Positions of a sweep's places in the base, and in the run that values come from."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER
from .alignment import Alignment, AlignPolicies, Place, align_place

Chosen = Int[np.ndarray, " chosen"]
"""Indices of spots."""


class Spots(NamedTuple):
    """Every position of every place and row, as columns.

    A donor value is ``(1 - weight) * donor[lower] + weight * donor[upper]``.
    """

    cells: Int[np.ndarray, " spot"]
    """Place and row: ``place * n_rows + row``."""
    rows: Int[np.ndarray, " spot"]
    positions: Int[np.ndarray, " spot"]
    """Positions in the base."""
    lower: Int[np.ndarray, " spot"]
    upper: Int[np.ndarray, " spot"]
    weight: Float[np.ndarray, " spot"]

    def of_base(self, value: Float[Tensor, "batch pos *features"], chosen: Chosen) -> Tensor:
        """The base's values ``[chosen, *features]`` at some spots."""
        return value[on_device(self.rows[chosen], value), on_device(self.positions[chosen], value)]

    def of_donor(
        self,
        value: Float[Tensor, "batch pos *features"],
        chosen: Chosen,
        units: Chosen | None = None,
    ) -> Tensor:
        """The donor's values ``[chosen, *features]`` at some spots, of one unit each or of all."""
        rest = [] if units is None else [on_device(units, value)]
        rows = on_device(self.rows[chosen], value)
        low = value[(rows, on_device(self.lower[chosen], value), *rest)]
        if not self.weight[chosen].any():
            return low
        high = value[(rows, on_device(self.upper[chosen], value), *rest)]
        weight = on_device(self.weight[chosen], value).to(value.dtype)
        return low + weight.reshape(-1, *[1] * (low.ndim - 1)) * (high - low)


class Placement:
    """Places of a base batch, aligned with another batch of as many rows."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        other: ALMInput | None,
        places: Sequence[Place],
        policy: AlignPolicies = "error",
    ) -> None:
        """Align every place in every row; for ``dtw``, prompts are embedded, else nothing runs.

        Args:
            model: the one that embeds, and says which positions there are.
            base: the run to be patched.
            other: the run that values come from; None is the base itself.
            places: places to align.
            policy: for places of unequal length; see ``align``.

        Raises:
            InputError: batches of different size, or places that no row has or that do not align.
        """
        other = base if other is None else other
        if len(other) != len(base):
            raise InputError(
                f"patching {len(base)} base rows with {len(other)} donor rows. Give one donor "
                "prompt per base prompt."
            )
        features: list[tuple[Tensor, Tensor] | None] = [None] * len(base)
        # Compared as they enter the first block, before positions mix.
        if "dtw" in ({policy} if isinstance(policy, str) else policy.values()):
            pair = _entering(model, base), _entering(model, other)
            features = [(pair[0][row], pair[1][row]) for row in range(len(base))]
        self.given = base
        base, other = model.positions_of(base), model.positions_of(other)
        self.base, self.places = base, list(places)
        self.alignments: list[list[Alignment]] = [
            [
                align_place(base, other, place, row=row, policy=policy, features=features[row])
                for row in range(len(base))
            ]
            for place in places
        ]
        """The alignment of every place in every row: ``alignments[place][row]``."""
        for place, rows in zip(places, self.alignments, strict=True):
            # A single position may be a pad of every row; a span that is nowhere is a mistake.
            if not isinstance(place, int) and not any(one.base for one in rows):
                raise InputError(
                    f"patching at {place!r}: no row of the base has such a position. Its spans are "
                    + ", ".join(name for name in base.spans if any(base.spans[name]))
                    + "."
                )

    def positions(self, place: int, row: int) -> list[int]:
        """Base positions of a place in a row, in the padded prompt."""
        return self.alignments[place][row].base

    @cached_property
    def spots(self) -> Spots:
        """All positions of all places."""
        n_rows = len(self.base)
        flat = [
            (k * n_rows + r, r, one)
            for k, rows in enumerate(self.alignments)
            for r, one in enumerate(rows)
        ]
        sizes = [len(one.base) for *_, one in flat]
        columns = [
            np.fromiter((x for *_, one in flat for x in getattr(one, name)), dtype, sum(sizes))
            for name, dtype in (("base", int), ("lower", int), ("upper", int), ("weight", float))
        ]
        cells, rows = (np.repeat([one[i] for one in flat], sizes) for i in (0, 1))
        return Spots(cells, rows, *columns)

    @property
    def length_ratios(self) -> tuple[dict[str, float], ...]:
        """Ratios of each row: span -> donor length / base length."""
        return tuple(
            {name: r for rows in self.alignments for name, r in rows[row].length_ratio.items()}
            for row in range(len(self.base))
        )


def _entering(model: HookedALM, x: ALMInput) -> Tensor:
    """What enters the first block of the path, ``[batch, pos, d_model]``."""
    if model.part is None:
        found: Tensor = model(x, stop_at_layer=0)
        return found
    name = f"{ENCODER}hook_embed"
    _, cache = model.run_with_cache(x, names_filter=name)
    return model.encoder_rows(x).by_prompt(name, cache[name])
