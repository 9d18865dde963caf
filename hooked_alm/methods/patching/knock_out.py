"""Attention knockout: some queries do not see some keys, and read the rest in their stead.

Source: Geva et al. 2023; M-AL-4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.cells import Edits, Indices
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from .alignment import Place, align_place
from .choice import Choice
from .measurement import Measurement, in_precision
from .metrics import Metric, OnLogits
from .options import Engine, Joint, Precision
from .placement import Placement
from .results import PatchResult

KeyMask = Bool[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class WithoutKeys:
    """Patterns without some keys, renormalised: what scores of minus infinity make of them."""

    hidden: Bool[Tensor, "of pos"]
    of: Indices
    """Row of ``hidden`` for every entry."""

    def __call__(self, own: Float[Tensor, " entry *head pos"], entries: Indices) -> Tensor:
        """New patterns of some entries."""
        hidden = self.hidden[on_device(self.of[entries], self.hidden)].to(own.device)
        hidden = hidden.reshape(len(own), *[1] * (own.ndim - 2), -1)
        rest = own.float().masked_fill(hidden, 0.0)
        return rest / rest.sum(dim=-1, keepdim=True)


@torch.no_grad()
def knock_out(
    model: HookedALM,
    x: ALMInput,
    metric: Metric | OnLogits,
    *,
    keys: Mapping[str, Place | KeyMask],
    queries: Place = "readout",
    layers: Sequence[Joint] | None = None,
    heads: Sequence[Joint] | None = None,
    engine: Engine = "fast",
    precision: Precision = "model",
    max_bytes: int | None = None,
) -> PatchResult:
    """The metric where queries do not see a set of keys, for every window of blocks and every set.

    The pattern is renormalised over the keys that are left, as if the scores of the others had been
    minus infinity. In half precision it was rounded before that; see ``precision``.

    Args:
        model: to run.
        x: prompts.
        metric: what is read off each run; see ``metrics``.
        keys: name -> set of keys: what ``patch`` takes as a place, or a mask over the prompts'
            positions, which may be another set in every row, or empty.
        queries: place whose queries do not see them.
        layers: blocks; a tuple knocks out in several at once, as a window. None is each.
        heads: query heads, each alone or a tuple at once. None is all at once.
        engine: "fast", or "hooks" for the plain loop.
        precision: "float32" runs the decoder in fp32 from the weights as they are.
        max_bytes: memory budget of the fast engine; see ``patch``.

    Returns:
        Axes ``layer``, ``head`` if heads were given, ``keys``, ``example`` and, if the metric has
        several values, ``label``. ``donor``, and so recovery, is NaN.

    Raises:
        InputError: blocks or heads that do not exist, a place that no row has, or a query that no
            key would be left to.
    """
    model.refuse_encoder("knocking attention out")
    placement = Placement(model, x, None, [queries])
    choice = Choice.of(
        model, x.shape[1], {"site": "pattern", "layers": layers, "heads": heads, "neurons": None,
                            "places": [queries]},
    )  # fmt: skip
    hidden = torch.stack([_positions(x, name, one) for name, one in keys.items()])
    _refuse_blind(x, placement, keys, hidden)
    spots, n_rows, n_sets = placement.spots, len(x), len(keys)
    units = [None] if choice.unit is None else choice.units
    with in_precision(precision, model):
        measured = Measurement(model, x, None, metric, engine=engine, max_bytes=max_bytes)
        edits = []
        for i, joint_layers in enumerate(choice.layers):
            for j, joint in enumerate(units):
                # An entry per set, spot and, where heads are apart, head.
                grid = np.meshgrid(
                    range(n_sets), range(len(spots.rows)), joint or (-1,), indexing="ij"
                )
                sets, of, head = (one.ravel() for one in grid)
                rows = spots.rows[of]
                cells = ((i * len(units) + j) * n_sets + sets) * n_rows + rows
                write = WithoutKeys(hidden.flatten(0, 1), sets * n_rows + rows)
                edits += [
                    Edits(
                        site="pattern", layer=layer, cells=cells, positions=spots.positions[of],
                        units=None if joint is None else head, write=write,
                    )
                    for layer in joint_layers
                ]  # fmt: skip
        n_cells = len(choice.layers) * len(units) * n_sets
        found, noise = measured.swept(n_cells, edits)
        _refuse_lost(found, measured.base_values)
        axes = {name: ticks for name, ticks in choice.axes.items() if name != "place"}
        return measured.result(
            {**axes, "keys": tuple(keys)}, found, noise, site="pattern", mode="knock_out"
        )


def windows(n_blocks: int, size: int) -> list[tuple[int, ...]]:
    """Every window of so many blocks, the last block alone, and all blocks at once; each once.

    What positions before the readout see in the last block, nothing reads any more: a control.
    """
    some = [tuple(range(first, first + size)) for first in range(n_blocks - size + 1)]
    last, every = (n_blocks - 1,), tuple(range(n_blocks))
    return [one for one in dict.fromkeys([*some, last]) if one != every] + [every]


def random_keys(x: ALMInput, sizes: Sequence[int], draws: Sequence[np.random.Generator]) -> KeyMask:
    """So many keys of every row, drawn from all but its first position and its last: a control.

    Args:
        x: prompts.
        sizes: of each row.
        draws: of each row.
    """
    found = torch.zeros(x.shape, dtype=torch.bool)
    for row, (size, rng) in enumerate(zip(sizes, draws, strict=True)):
        inner = x.is_real[row].nonzero()[0][1:-1]
        found[row, inner[rng.permutation(len(inner))[:size]]] = True
    return found


def _positions(x: ALMInput, name: str, keys: Place | KeyMask) -> KeyMask:
    """Where a set of keys stands, in every row."""
    if isinstance(keys, Tensor):
        if keys.shape != x.shape:
            raise InputError(
                f"knocking out {name!r}: got a mask of {tuple(keys.shape)}, expected one of "
                f"{tuple(x.shape)}, a row per prompt."
            )
        return keys.cpu() & torch.from_numpy(x.is_real)
    found = torch.zeros(x.shape, dtype=torch.bool)
    for row in range(len(x)):
        found[row, align_place(x, x, keys, row=row).base] = True
    if not found.any():
        raise InputError(
            f"knocking out {name!r}: no row has such a position. Its spans are "
            + ", ".join(span for span in x.spans if any(x.spans[span]))
            + "."
        )
    return found


def _refuse_blind(
    x: ALMInput,
    placement: Placement,
    keys: Mapping[str, Place | KeyMask],
    hidden: Bool[Tensor, "set batch pos"],
) -> None:
    """Refuse sets that hold every key of a query.

    Raises:
        InputError: one of them does.
    """
    left = (torch.from_numpy(x.is_real) & ~hidden).cumsum(dim=-1)
    spots = placement.spots
    blind = (left[:, spots.rows, spots.positions] == 0).numpy()
    if blind.any():
        name = [*keys][int(blind.any(axis=1).argmax())]
        row, position = (column[blind.any(axis=0).argmax()] for column in spots[1:3])
        raise InputError(
            f"knocking out {name!r}: the query at position {position} of row {row} would have no "
            "key left. Leave it one, such as itself."
        )


def _refuse_lost(found: Tensor, base: Tensor) -> None:
    """Refuse numbers of patterns whose every key that was left had underflowed to 0.

    Raises:
        InputError: there are some.
    """
    if (found.isnan() & ~base.isnan()).any():
        raise InputError(
            "knocking attention out: got a query whose attention to all keys that are left is 0 in "
            "this precision, so that nothing can be renormalised. Take precision='float32', or "
            "leave more keys."
        )
