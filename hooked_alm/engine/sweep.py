"""A sweep: all cells in one pass over the blocks."""

import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..model import HookedALM
from ..turns import in_turn
from .blocks import run_block
from .cells import Marks, forget
from .groups import CellIndices, Finals, Group, RecordRows
from .mixing import KERNEL_ROWS
from .planning import grouped
from .record import Record

CPU_BYTES = 2**26
"""Bytes of a sweep's activations on a CPU. Tensors of 32 MiB and more come fresh from the operating
system in every operation, page by page. Measured on 8,192 edges into one of 32 blocks, 120
positions, width 128: 6.1 s with twice as much, 4.4 s with this, 4.2 s with half."""


def sweep(
    model: HookedALM,
    records: Sequence[Record],
    marks: Sequence[Marks],
    read: Sequence[RecordRows],
    *,
    only: CellIndices | None = None,
    max_bytes: int | None = None,
) -> Iterator[Finals]:
    """Compute every cell at the rows that are read, a memory budget's worth at a time.

    Args:
        model: the one that made the records.
        records: base runs, one per row of the batch.
        marks: edits of all cells, and looks at them.
        read: per row of the batch, the record's rows to return, ascending.
        only: cells to compute, where not all that are edited.
        max_bytes: budget for activations; None takes a quarter of what is free, and at most 64 MiB
            on a CPU. It changes results by rounding only.

    Raises:
        InputError: an edit at a pad or at a block that does not exist.
    """
    groups = grouped(model, records, marks, read, only)
    for part in _climbed(model, groups, len(model.path), max_bytes):
        yield from (group.finals() for group in part)


def observe(
    model: HookedALM,
    records: Sequence[Record],
    marks: Sequence[Marks],
    layer: int,
    *,
    max_bytes: int | None = None,
) -> Iterator[CellIndices]:
    """Run cells up to a block, for the looks at them: yields those whose looks hold values.

    Arguments and errors are those of ``sweep``.
    """
    everywhere = [np.arange(len(record)) for record in records]
    groups = grouped(model, records, marks, everywhere)
    for part in _climbed(model, groups, layer + 1, max_bytes):
        yield np.concatenate([group.cells for group in part])


def _climbed(
    model: HookedALM, groups: list[Group], stop: int, max_bytes: int | None
) -> Iterator[list[Group]]:
    """Groups that have climbed up to a block, a memory budget's worth at a time."""
    budget = _budget(model.cfg.device) if max_bytes is None else max_bytes
    while groups:
        part, rest = _split(model, groups, budget)
        try:
            _climb(model, part, stop)
        except torch.OutOfMemoryError:
            n_cells = sum(len(group.cells) for group in part)
            if n_cells == 1:
                raise
            budget = max(sum(int(_bytes(model, group).sum()) for group in part) // 2, 1)
            warnings.warn(
                f"sweep: {n_cells} cells at once did not fit into memory; going on with "
                f"{budget / 2**30:.2f} GiB at a time.",
                RuntimeWarning,
                stacklevel=2,
            )
            # From the start: a climb that broke off leaves its groups between two blocks.
            groups = [group.restarted() for group in part] + rest
            continue
        yield part
        groups = rest


# Not on the generator above, which a decorator sees as such only where nothing else wraps it.
@in_turn
@torch.no_grad()
def _climb(model: HookedALM, groups: Sequence[Group], stop: int) -> None:
    """Run the blocks below one, bottom to top (rule 3): every cell joins at its own."""
    # Where no row that is read can change, what stands beside the group is the answer.
    reached = [group for group in groups if not group.is_still]
    forget(one.mark for group in groups for one in group.marks)
    stacks = model.path_stacks
    n_layers = len(stacks)
    first = min((int(group.layers.min()) for group in reached), default=n_layers)
    for layer in range(first, stop):
        block = model.block(layer)
        is_last = layer == n_layers - 1
        bundles = []
        for group in reached:
            group.enter(layer, n_layers)
            bundles.append(group.bundles(block, layer, is_last))
        # All groups in one call: the weights of a block are read once per climb.
        every = [bundle for some in bundles for bundle in some]
        outputs = iter(run_block(block, stacks[layer], every) if every else [])
        for group, some in zip(reached, bundles, strict=True):
            group.absorb([next(outputs) for _ in some], layer, is_last)
    for group in reached:
        # Edits of the stream behind the last block; nothing runs after them.
        group.enter(n_layers, n_layers)


def _split(
    model: HookedALM, groups: Sequence[Group], budget: int
) -> tuple[list[Group], list[Group]]:
    """Groups of as many cells as fit into the budget, at least one, and groups of the others."""
    part: list[Group] = []
    for i, group in enumerate(groups):
        sizes = _bytes(model, group).cumsum()
        fit = int(np.searchsorted(sizes, budget, side="right"))
        if fit < len(sizes):
            n = max(fit, 0 if part else 1)
            now = [group.part(0, n)] if n else []
            left = [group.part(n, len(sizes))] if n < len(sizes) else []
            return part + now, [*left, *groups[i + 1 :]]
        part.append(group)
        budget -= int(sizes[-1])
    return part, []


def _bytes(model: HookedALM, group: Group) -> CellIndices:
    """Bytes of each cell within a block, estimated: streams, MLP, and attention over all keys."""
    cfg, size = model.path_cfg, group.record.resid[0].element_size()
    heads = cfg.n_heads * cfg.d_head
    per_row = size * (6 * cfg.d_model + 4 * cfg.d_mlp + 4 * heads)
    n_rows = group.counts.clip(min=1)
    # Scores, and a softmax in fp32, where no kernel runs that holds none.
    n_keys = len(group.record)
    if group.record.memory is not None:
        per_row += size * (2 * cfg.d_model + 3 * heads)
        n_keys = max(n_keys, group.record.memory[0][0].shape[1])
    scores = cfg.n_heads * n_keys * (2 * size + 8)
    # Keys and values of a memory that a cell has of its own, and copies of them.
    own = 4 * size * group.n_own_memory * cfg.d_head
    return own + n_rows * (per_row + np.where(n_rows < KERNEL_ROWS, scores, 0))


def _budget(device: torch.device) -> int:
    """Bytes for activations: a quarter of what is free; on a CPU no more than ``CPU_BYTES``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free // 4, CPU_BYTES)
