"""Batches: which prompts run together, decided before any of them runs."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field

from .experiment import Experiment, Unit, UnitResult
from .results import Row
from .settings import ExperimentConfig

BatchSize = Annotated[
    int,
    Field(ge=1, le=10_000, description="prompts that run together; numbers of a batch differ from "
          "those of single prompts by rounding"),
]  # fmt: skip
UnitBatches = Annotated[
    int,
    Field(ge=1, le=10**6, description="batches that are kept together; a killed run loses fewer"),
]
BatchPositions = Annotated[
    int | None,
    Field(ge=1, le=10**9, description="positions of a batch, padding included; None is no bound"),
]  # fmt: skip


class BatchedConfig(ExperimentConfig):
    """Settings of an experiment that runs several prompts in one forward."""

    batch_size: BatchSize = 1
    unit_batches: UnitBatches = 1
    batch_positions: BatchPositions = None


B = TypeVar("B", bound=BatchedConfig)


class BatchedExperiment(Experiment[B]):
    """An experiment that measures prompts, or sweeps of them, in batches.

    A unit's payload is a tuple of works: those of some batches, as `batch_units` puts them
    together. Within a unit, works of one kind and about one length run together.
    """

    @abstractmethod
    def n_positions(self, work: Any) -> int:
        """Positions of a work's prompt; of a sweep, of the longer one."""

    def batch_kind(self, work: Any) -> Hashable:
        """What the works of a batch have in common, beside their type."""
        return None

    @abstractmethod
    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """The result of every work of a batch."""

    def try_batch(self, size: int) -> int:
        """Runs the longest works of every type, as many of one kind as there are; see `auto_batch`.

        What the results of other units decide is not among them.
        """
        by_kind: dict[Hashable, list[Any]] = defaultdict(list)
        for unit in self.units():
            for work in unit.payload if isinstance(unit.payload, tuple) else ():
                by_kind[type(work), self.batch_kind(work)].append(work)
        largest: dict[type, tuple[tuple[int, int], list[Any]]] = {}
        for works in by_kind.values():
            lengths = [self.n_positions(work) for work in works]
            some = heaviest(lengths, size, self.config.batch_positions)
            found = (len(some), lengths[some[0]]), [works[i] for i in some]
            kind = type(works[0])
            largest[kind] = max(largest.get(kind, found), found, key=lambda one: one[0])
        for _, works in largest.values():
            self.measure_batch(works)
        return max(len(works) for _, works in largest.values())

    def measure(self, unit: Unit) -> UnitResult:
        """The works of a unit, in batches; results and records are in the order of the works."""
        works, config = unit.payload, self.config
        is_alone = config.batch_size == 1  # where no length decides anything
        batches = bucketed(
            [0 if is_alone else self.n_positions(work) for work in works],
            config.batch_size,
            config.batch_positions,
            kinds=[(type(work), self.batch_kind(work)) for work in works],
        )
        found: dict[int, UnitResult] = {}
        for batch in batches:
            found |= zip(batch, self.measure_batch([works[i] for i in batch]), strict=True)
        tables: dict[str, list[Row]] = defaultdict(list)
        in_order = [found[i] for i in range(len(works))]
        for one in in_order:
            for name, rows in one.tables.items():
                tables[name] += rows
        return UnitResult(dict(tables), {"works": [one.record for one in in_order]})


def batch_units(
    works: Iterable[tuple[str, Any]], config: BatchedConfig, after: str | None = None
) -> list[Unit]:
    """Units of so many batches as the settings say, in the order of their works.

    Args:
        works: of one type, with their names; a unit is called after its first work, and says how
            many follow.
        config: of the run.
        after: the unit that all of them come after.
    """
    every, size = [*works], config.batch_size * config.unit_batches
    parts = [every[first : first + size] for first in range(0, len(every), size)]
    return [
        Unit(
            part[0][0] + (f"+{len(part) - 1}" if part[1:] else ""),
            tuple(work for _, work in part),
            after,
        )
        for part in parts
    ]


def bucketed(
    lengths: Sequence[int],
    size: int,
    positions: int | None = None,
    *,
    kinds: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Batches of prompts that are about as long as each other, the shortest first, by their index.

    Args:
        lengths: of the prompts.
        size: of a batch, at most.
        positions: that a batch fills at most, padding included; a longer prompt runs alone.
        kinds: of the prompts; those of a batch are of one.
    """
    kinds = kinds or [None] * len(lengths)
    order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (order[kinds[i]], lengths[i])):
        batch = batches[-1] if batches else []
        # The new one is the longest so far.
        filled = (len(batch) + 1) * lengths[index]
        is_full = len(batch) == size or (positions is not None and filled > positions)
        if batch and not is_full and kinds[batch[0]] == kinds[index]:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def heaviest(lengths: Sequence[int], size: int, positions: int | None = None) -> list[int]:
    """The batch of the longest prompts, by their index; see `bucketed`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    most = size if positions is None else min(size, positions // max(lengths[order[0]], 1))
    return order[: max(most, 1)]
