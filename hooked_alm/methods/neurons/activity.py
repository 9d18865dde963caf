"""A log of how neurons are active for items of several classes, in memory that does not grow.

Source: arXiv 2601.03115; M-ESN-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
CHUNK = 1024
"""Neurons that are summed at once on a CPU, so that what is made of them stays in its cache."""


class ItemActivity(NamedTuple):
    """What one batch adds to a log, item by item."""

    rows: Int[Tensor, " item"]
    """Positions that were read."""
    fired: Float[Tensor, "item block neuron"]
    """Of these, those at which the neuron was above 0."""
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
            if not bool(torch.isfinite(found.squares[item]).all()):
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
    """Sums of items at the hook points of some blocks, one after the other."""

    spots: list[Int[Tensor, " _spot"]]
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def hook(self, value: Float[Tensor, "batch pos d_mlp"], hook: HookPoint) -> None:
        """Sum what passes a point; it stays as it is."""
        parts = [_summed(_rows_at(value[row], at)) for row, at in enumerate(self.spots)]
        fired, total, squares = (torch.stack(one).cpu() for one in zip(*parts, strict=True))
        self.found[str(hook.name)] = fired, total, squares


@torch.no_grad()
def item_activity(
    model: HookedALM, x: ALMInput, *, site: NeuronSite = "gate", span: str = ALL
) -> tuple[Float[Tensor, "batch label_pos d_vocab"], ItemActivity]:
    """Logits of some prompts, and what each adds to a log; one forward.

    Args:
        model: to run.
        x: prompts.
        site: what counts as a neuron's value.
        span: of the prompts, whose positions are read; ``all`` is every one, pads left out.

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
    names, sums = [hook_name(site, block) for block in model.path], _Sums(spots)
    logits = model.run_with_hooks(x, fwd_hooks=[(name, sums.hook) for name in names])
    parts = zip(*(sums.found[name] for name in names), strict=True)
    rows = torch.tensor([len(at) for at in spots])
    return logits, ItemActivity(rows, *(torch.stack(one, dim=1) for one in parts))


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


def _summed(values: Float[Tensor, "spot d_mlp"]) -> tuple[Tensor, Tensor, Tensor]:
    """How many values of each neuron are above 0, their sum, and that of their squares, in fp32."""
    n_spots, width = values.shape
    size = min(CHUNK, width) if values.device.type == "cpu" else width
    ones = values.new_ones(n_spots, dtype=torch.float32)
    work = values.new_empty(n_spots, size, dtype=torch.float32)
    found = values.new_empty(3, width, dtype=torch.float32)
    for first in range(0, width, size):
        there = slice(first, min(first + size, width))
        part = values[:, there].float()
        made = work[:, : part.shape[1]]
        found[1, there] = ones @ part
        found[2, there] = ones @ torch.mul(part, part, out=made)
        found[0, there] = ones @ torch.gt(part, 0, out=made)
    fired, total, squares = found
    return fired, total, squares
