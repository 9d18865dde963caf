"""A log of how neurons are active for items of several classes, in memory that does not grow.

Source: arXiv 2601.03115; M-ESN-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from ...hooks import HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name, sites_of
from ..statistics.class_neurons import ClassActivity

NeuronSite = Literal["gate", "post"]
"""The activated gate, or what the MLP's last projection reads."""
ALL = "all"
"""Every position of a prompt."""
BLOCK_BYTES = {True: 2**21, False: 2**26}
"""Positions of an item are summed in blocks of this size in fp32, so that what is made of them is
bounded; on a CPU (True) so small that it stays in its cache."""


class ItemActivity(NamedTuple):
    """What one batch adds to a log, item by item."""

    rows: Int[Tensor, " item"]
    """Positions that were read."""
    fired: Float[Tensor, "item block neuron"]
    """Of these, those at which the neuron fired: was above 0, or what was asked for."""
    total: Float[Tensor, "item block neuron"]
    """Sum of its values."""
    squares: Float[Tensor, "item block neuron"]
    """Sum of their squares."""


@dataclass(eq=False)
class ActivityLog:
    """Counts and sums of every neuron, class by class, in float64.

    An item is summed by itself before it is added, in fp32, and items in their order: the log is
    the same, bit for bit, in whatever batches equal values arrive.
    """

    items: Int[Tensor, " cls"]
    rows: Int[Tensor, " cls"]
    fired: Float[Tensor, "cls block neuron"]
    total: Float[Tensor, "cls block neuron"]
    squares: Float[Tensor, "cls block neuron"]

    @classmethod
    def empty(cls, n_classes: int, n_blocks: int, d_mlp: int) -> "ActivityLog":
        """A log of nothing: 24 bytes for every class and neuron."""
        sums = (torch.zeros(n_classes, n_blocks, d_mlp, dtype=torch.float64) for _ in range(3))
        counts = (torch.zeros(n_classes, dtype=torch.int64) for _ in range(2))
        return cls(*counts, *sums)

    def add(self, found: ItemActivity, classes: Sequence[int | None]) -> None:
        """Add the items of a batch, each to its class; those of None are left out.

        Raises:
            InputError: values that are not finite.
        """
        for item, one in enumerate(classes):
            if one is None:
                continue
            if not bool(found.squares[item].amax().isfinite()):  # a NaN is the highest
                raise InputError(
                    "logging neurons: got values that are NaN or infinite, expected finite ones. "
                    "Run the model in a wider dtype, or look at its input."
                )
            self.items[one] += 1
            self.rows[one] += found.rows[item]
            for name in ("fired", "total", "squares"):
                getattr(self, name)[one] += getattr(found, name)[item]

    def merge(self, other: "ActivityLog") -> None:
        """Add a log of other items.

        Raises:
            InputError: the two are of other classes or neurons.
        """
        if self.fired.shape != other.fired.shape:
            raise InputError(
                f"merging logs of neurons: got {tuple(other.fired.shape)} classes, blocks and "
                f"neurons, expected {tuple(self.fired.shape)}. Merge logs of one model."
            )
        for name, value in other.arrays.items():
            getattr(self, name).add_(value)

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What it holds, by name: as many make a log again."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def activity(self) -> ClassActivity:
        """How often every neuron fires for each class, and its mean.

        Raises:
            InputError: a class has no item.
        """
        if not bool(self.rows.all()) or len(self.rows) < 2:
            raise InputError(
                f"activity by class: got {self.items.tolist()} items of the classes, expected two "
                "classes at least, and items of each. Leave out classes that no item has."
            )
        n = self.rows.double()[:, None, None]
        return ClassActivity(lap=(self.fired / n).numpy(), mean=(self.total / n).numpy())

    @property
    def std(self) -> Float[Tensor, "cls block neuron"]:
        """Standard deviation of a neuron's values, by class; NaN without two rows."""
        n = self.rows.double()[:, None, None]
        spread = (self.squares - self.total.square() / n).clamp(min=0)
        return (spread / (n - 1)).sqrt().where(n > 1, torch.nan)

    @property
    def magnitude(self) -> Float[Tensor, "block neuron"]:
        """Root mean square of a neuron's values, of all classes together."""
        return (self.squares.sum(0) / self.rows.sum()).sqrt()


@dataclass(eq=False)
class _Sums:
    """Sums of items at the hook points of some blocks, made as each fires; no value is kept."""

    spots: list[Int[Tensor, " _spot"]]
    blocks: dict[str, int]
    """Hook point -> number of its block."""
    found: Float[Tensor, "3 item block neuron"]
    above: int | float

    def hook(self, value: Float[Tensor, "batch pos d_mlp"], hook: HookPoint) -> None:
        """Sum what passes a point; it stays as it is."""
        every = [summed(_rows_at(value[row], at), self.above) for row, at in enumerate(self.spots)]
        self.found[:, :, self.blocks[str(hook.name)]] = torch.stack(every, dim=1).cpu()


@torch.no_grad()
def item_activity(
    model: HookedALM,
    x: ALMInput,
    *,
    site: NeuronSite = "gate",
    span: str = ALL,
    above: int | float = 0.0,
) -> tuple[Float[Tensor, "batch label_pos d_vocab"], ItemActivity]:
    """Logits of some prompts, and what each adds to a log; one forward.

    Args:
        model: to run.
        x: prompts.
        site: what counts as a neuron's value.
        span: of the prompts, whose positions are read; ``all`` is every one, pads left out.
        above: a neuron fires where its value is above it.

    Raises:
        InputError: a site that the model's blocks do not have, or a prompt without the span.
    """
    if site not in sites_of(model.path_cfg):
        raise InputError(
            f"logging neurons at {site!r}: the blocks have no such point, for their MLPs have no "
            "gate. Take site='post'."
        )
    spots = [_positions_of(x, span, row) for row in range(len(x))]
    if empty := [row for row, at in enumerate(spots) if not len(at)]:
        raise InputError(
            f"logging neurons over {span!r}: got no such position in the prompts {empty}. Their "
            f"spans are {', '.join(name for name in x.spans if any(x.spans[name]))}."
        )
    points = {hook_name(site, block): number for number, block in enumerate(model.path)}
    made = torch.zeros(3, len(x), len(points), model.path_cfg.d_mlp)
    sums = _Sums(spots, points, made, above)
    logits = model.run_with_hooks(x, fwd_hooks=[(name, sums.hook) for name in points])
    return logits, ItemActivity(torch.tensor([len(at) for at in spots]), *made)


def _positions_of(x: ALMInput, span: str, row: int) -> Int[Tensor, " spot"]:
    """Positions of a span of one prompt, or of all of it, without pads."""
    if span == ALL:
        return torch.from_numpy(x.is_real[row]).nonzero().flatten()
    return torch.tensor(x.spans.positions(span, row), dtype=torch.int64)


def _rows_at(
    value: Float[Tensor, "pos d_mlp"], at: Int[Tensor, " spot"]
) -> Float[Tensor, "spot d_mlp"]:
    first, last = int(at[0]), int(at[-1])
    if last - first + 1 == len(at):  # a view of neighbours; others are copied
        return value[first : last + 1]
    return value[at.to(value.device)]


def summed(
    values: Float[Tensor, "spot d_mlp"], above: int | float = 0.0
) -> Float[Tensor, "3 d_mlp"]:
    """How many values of each neuron are above a bar, their sum, and that of their squares.

    In fp32, by blocks of positions: beside the sums, one block is held (`BLOCK_BYTES`).
    """
    n_spots, width = values.shape
    size = min(max(BLOCK_BYTES[values.device.type == "cpu"] // (4 * width), 1), n_spots)
    ones = values.new_ones(size, dtype=torch.float32)
    work = values.new_empty(size, width, dtype=torch.float32)
    found = values.new_zeros(3, width, dtype=torch.float32)
    for part in values.split(size):
        some, made, n = part.float(), work[: len(part)], ones[: len(part)]
        found[1].addmv_(some.T, n)
        found[2].addmv_(torch.mul(some, some, out=made).T, n)
        found[0].addmv_(torch.gt(some, above, out=made).T, n)
    return found
