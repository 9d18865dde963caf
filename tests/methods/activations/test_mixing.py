"""Rows of runs, mixed: every row once, other orders, and going on after a stop."""

from itertools import accumulate, chain

import pytest
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.activations.mixing import MixedRows

CPU = torch.profiler.ProfilerActivity.CPU
SIZES = (5, 1, 7, 3, 6, 2)


class Runs:
    """Parts whose rows are their own numbers; counts which ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def __call__(self, part: int) -> dict[str, Tensor]:
        self.ran.append(part)
        first = sum(SIZES[:part])
        rows = torch.arange(first, first + SIZES[part], dtype=torch.float32)
        return {"a": rows[:, None], "b": 100 + rows[:, None].expand(-1, 2)}

    def mixed(self, max_rows: int = 9) -> MixedRows:
        return MixedRows(self, SIZES, row_bytes=12, max_bytes=12 * max_rows)


def numbers(mixed: MixedRows, batch_size: int = 4, **settings: int) -> list[list[int]]:
    batches = [*mixed.epoch(batch_size, **settings)]
    for batch in batches:
        assert torch.equal(batch["a"].expand(-1, 2) + 100, batch["b"])
    return [batch["a"].flatten().int().tolist() for batch in batches]


@pytest.mark.parametrize("max_rows", [1, 9, 1000])
def test_every_row_once(max_rows: int) -> None:
    found = numbers(Runs().mixed(max_rows), batch_size=3)
    assert [len(batch) for batch in found] == [3] * 8
    assert sorted(chain.from_iterable(found)) == [*range(24)]
    assert len(Runs().mixed()) == 24


def test_rows_that_fill_no_batch_are_left_out() -> None:
    found = numbers(Runs().mixed(), batch_size=5)
    assert [len(batch) for batch in found] == [5] * 4
    assert len({*chain.from_iterable(found)}) == 20


def test_orders() -> None:
    mixed = Runs().mixed(1000)
    first = numbers(mixed)
    assert first == numbers(mixed)
    assert first != numbers(mixed, epoch=1) != numbers(mixed, seed=1)
    # Rows of several parts are in a batch, and neighbours are not beside each other.
    parts = [{sum(n >= sum(SIZES[:i]) for i in range(1, 6)) for n in batch} for batch in first]
    assert max(map(len, parts)) > 1


@pytest.mark.parametrize("start", range(7))
def test_going_on(start: int) -> None:
    whole, runs = numbers(Runs().mixed(), epoch=3), Runs()
    assert numbers(runs.mixed(), epoch=3, start=start) == whole[start:]
    if start > 3:
        assert len(runs.ran) < len(SIZES)


def test_the_bound_is_kept() -> None:
    runs, held = Runs(), []
    batches = runs.mixed(9).epoch(1)
    n = 0
    for _ in batches:
        held.append(sum(SIZES[part] for part in runs.ran) - n)
        n += 1
    assert max(held) <= 9


@pytest.mark.parametrize("max_rows", [20, 100])
def test_what_is_held(max_rows: int) -> None:
    """Bytes of all tensors together, by the allocator's records: a chunk, a part, two batches."""
    width, n_rows, batch_size = 5_000, [7, 10, 8, 10, 9, 6, 10], 4

    def run(part: int) -> dict[str, Tensor]:
        return {name: torch.full((n_rows[part], width), part) for name in ("a", "b")}

    row_bytes = 2 * width * 8
    mixed = MixedRows(run, n_rows, row_bytes=row_bytes, max_bytes=max_rows * row_bytes)
    with torch.profiler.profile(profile_memory=True, activities=[CPU]) as profile:
        for epoch in range(2):
            for _ in mixed.epoch(batch_size, epoch=epoch):
                pass
    events = profile.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    peak = max(accumulate(allocated)) / row_bytes
    chunk = min(max_rows, sum(n_rows))
    assert chunk - max(n_rows) <= peak
    assert peak <= chunk + max(n_rows) + 2 * batch_size + 0.1


def test_other_rows_than_were_told_are_refused() -> None:
    mixed = MixedRows(Runs(), [5, 1, 8], row_bytes=12, max_bytes=10**6)
    with pytest.raises(InputError, match="part 2 gave 7 rows of a, expected 8"):
        [*mixed.epoch(2)]
    with pytest.raises(InputError, match="got none"):
        MixedRows(Runs(), [0, 0], row_bytes=12, max_bytes=10**6)


def test_parts_run_once_if_all_fit() -> None:
    runs = Runs()
    mixed = runs.mixed(24)
    first, second = numbers(mixed), numbers(mixed, epoch=1)
    assert sorted(runs.ran) == [*range(6)]
    assert first != second
    runs = Runs()
    mixed = runs.mixed(23)
    assert numbers(mixed) + numbers(mixed, epoch=1) != []
    assert len(runs.ran) == 12
