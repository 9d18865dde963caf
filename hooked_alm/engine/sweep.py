"""A sweep: all cells in one pass over the blocks."""

import os
import warnings
from collections.abc import Iterator, Sequence

import torch

from ..model import HookedALM
from ..turns import in_turn
from .cells import Cell
from .groups import Finals, Group, RecordRows, grouped
from .record import Record
from .rows import KERNEL_ROWS, run_block

CPU_BYTES = 2**27
"""Bytes of a sweep's activations on a CPU. Larger tensors come fresh from the operating system in
every operation, page by page. Measured on a sweep over layers and positions, 800 positions, width
512: 7.3 forwards without a limit, 6.2 with this one, 6.4 to 6.5 with half or a quarter of it."""


def sweep(
    model: HookedALM,
    records: Sequence[Record],
    cells: Sequence[Cell],
    read: Sequence[RecordRows],
    *,
    max_bytes: int | None = None,
) -> Iterator[Finals]:
    """Compute every cell at the rows that are read, a memory budget's worth at a time.

    Args:
        model: the one that made the records.
        records: base runs, one per row of the batch.
        cells: edits to answer, in any order.
        read: per row of the batch, the record's rows to return, ascending.
        max_bytes: budget for activations; None takes a quarter of what is free, and at most 128 MiB
            on a CPU. It changes results by rounding only.

    Raises:
        InputError: an edit at a pad or at a block that does not exist.
    """
    budget = _budget(model.cfg.device) if max_bytes is None else max_bytes
    groups = grouped(model, records, cells, read)
    while groups:
        part, rest = _split(model, groups, budget)
        try:
            _climb(model, part)
        except torch.OutOfMemoryError:
            n_cells = sum(len(group.members) for group in part)
            if n_cells == 1:
                raise
            budget = max(sum(_bytes(model, group) for group in part) // 2, 1)
            warnings.warn(
                f"sweep: {n_cells} cells at once did not fit into memory; going on with "
                f"{budget / 2**30:.2f} GiB at a time.",
                RuntimeWarning,
                stacklevel=2,
            )
            # From the start: a climb that broke off leaves its groups between two blocks.
            groups = [group.restarted() for group in part] + rest
            continue
        yield from (group.finals() for group in part)
        groups = rest


# Not on the generator above, which a decorator sees as such only where nothing else wraps it.
@in_turn
@torch.no_grad()
def _climb(model: HookedALM, groups: Sequence[Group]) -> None:
    """Run the blocks once, bottom to top (rule 3): every cell joins at its own."""
    # Where no row that is read can change, what stands beside the group is the answer.
    reached = [group for group in groups if len(group.read_changed)]
    stacks = model.path_stacks
    n_layers = len(stacks)
    first = min((group.first_layer for group in reached), default=n_layers)
    for layer in range(first, n_layers):
        block = model.block(layer)
        is_last = layer == n_layers - 1
        steps = []
        for group in reached:
            group.enter(layer)
            steps.append(group.step(block, layer, is_last))
        # All groups in one call: the weights of a block are read once per climb.
        bundles = [bundle for step in steps for bundle in step.bundles]
        outputs = iter(run_block(block, stacks[layer], bundles))
        for group, step in zip(reached, steps, strict=True):
            group.absorb(step, [next(outputs) for _ in step.bundles], layer)
    for group in reached:
        # Edits of the stream behind the last block; nothing runs after them.
        group.enter(n_layers)


def _split(
    model: HookedALM, groups: Sequence[Group], budget: int
) -> tuple[list[Group], list[Group]]:
    """Groups of as many cells as fit into the budget, at least one, and groups of the others."""
    part: list[Group] = []
    for i, group in enumerate(groups):
        fit = budget // max(_bytes(model, group) // len(group.members), 1)
        if fit < len(group.members):
            n = max(fit, 0 if part else 1)
            now = [group.with_members(group.members[:n])] if n else []
            left = [group.with_members(group.members[n:])] if n < len(group.members) else []
            return part + now, [*left, *groups[i + 1 :]]
        part.append(group)
        budget -= _bytes(model, group)
    return part, []


def _bytes(model: HookedALM, group: Group) -> int:
    """Bytes a group holds within a block, estimated: streams, MLP, and attention over all keys."""
    cfg, size = model.cfg, group.resid.element_size()
    heads = cfg.n_heads * cfg.d_head
    per_row = size * (6 * cfg.d_model + 4 * cfg.d_mlp + 4 * heads)
    n_rows = max(group.n_rows, 1)
    if n_rows < KERNEL_ROWS:
        per_row += cfg.n_heads * len(group.record) * (2 * size + 8)  # scores, a softmax in fp32
    return per_row * n_rows * len(group.members)


def _budget(device: torch.device) -> int:
    """Bytes for activations: a quarter of what is free; on a CPU no more than ``CPU_BYTES``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free // 4, CPU_BYTES)
