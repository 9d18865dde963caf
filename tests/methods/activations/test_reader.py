"""Epochs: every row once, within a memory bound, in an order of the seed's; splits by group."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from activation_rows import rows
from hooked_alm.errors import HookNameError, InputError
from hooked_alm.methods.activations import reader as reader_module
from hooked_alm.methods.activations.reader import ActivationBatch, ActivationReader
from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.writer import ActivationWriter

SIZES = (700, 1, 0, 311, 988)
N = sum(SIZES)
ROW_BYTES = 13 * 4
"""Of both points in float32."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ActivationReader:
    folder = tmp_path_factory.mktemp("store")
    starts = np.cumsum((0, *SIZES)).tolist()
    writer = ActivationWriter(folder / "store", dtype="float32")
    batches = [*zip(SIZES, starts, strict=False)]
    writer.write_all(batches, lambda one: rows(one[0], first=one[1], n_speakers=7))
    return ActivationReader(folder / "store")


def everything() -> ActivationRows:
    parts = [
        rows(n, first=first, n_speakers=7)
        for n, first in zip(SIZES, np.cumsum((0, *SIZES)).tolist(), strict=False)
    ]
    return ActivationRows.joined(parts)


def numbers(batches: Iterator[ActivationBatch]) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


BOUNDS = [
    pytest.param(10 * ROW_BYTES, id="one batch"),
    pytest.param(333 * ROW_BYTES, id="some"),
    pytest.param(2**20, id="all"),
]


@pytest.mark.parametrize("max_bytes", BOUNDS)
@pytest.mark.parametrize("batch_size", [7, 10])
def test_every_row_once_with_its_values(
    reader: ActivationReader, max_bytes: int, batch_size: int
) -> None:
    expected = everything().values
    batches = [*reader.epoch(["p", "q"], batch_size, max_bytes=max_bytes)]
    rest = [N % batch_size] if N % batch_size else []
    assert [len(batch.rows) for batch in batches] == [batch_size] * (N // batch_size) + rest
    for batch in batches:
        index = torch.from_numpy(batch.rows)
        for name in ("p", "q"):
            assert torch.equal(batch.values[name], expected[name][index])
    seen = np.concatenate([batch.rows for batch in batches])
    assert np.sort(seen).tolist() == [*range(N)]
    assert seen.tolist() != [*range(N)]


@pytest.mark.parametrize("max_bytes", BOUNDS)
def test_the_order_is_the_seed_and_the_epoch(reader: ActivationReader, max_bytes: int) -> None:
    def order(**key: int) -> list[list[int]]:
        return numbers(reader.epoch(["p", "q"], 10, max_bytes=max_bytes, **key))

    first = order(seed=1, epoch=0)
    assert first == order(seed=1, epoch=0) == order(seed=1)
    others = [order(seed=2, epoch=0), order(seed=1, epoch=1), order(seed=0, epoch=1)]
    assert all(first != other for other in others)
    assert len({str(other) for other in others}) == 3


@pytest.mark.parametrize("max_bytes", BOUNDS)
def test_it_goes_on_at_any_batch(reader: ActivationReader, max_bytes: int) -> None:
    whole = numbers(reader.epoch("*", 10, max_bytes=max_bytes))
    for start in (0, 1, 32, 33, 34, 100, len(whole) - 1, len(whole), len(whole) + 9):
        rest = numbers(reader.epoch("*", 10, max_bytes=max_bytes, start=start))
        assert rest == whole[start:]


def test_the_window_is_as_large_as_it_may_be(
    reader: ActivationReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes of the points that are read."""
    windows = []
    stretch = reader_module._stretch

    def counted(*arguments: Any) -> np.ndarray:
        windows.append(stretch(*arguments))
        return windows[-1]

    monkeypatch.setattr(reader_module, "_stretch", counted)
    for points, row_bytes in (["p", "q"], ROW_BYTES), (["p"], 12):
        for max_bytes in (10 * row_bytes, 333 * row_bytes + 5, N * row_bytes, 2**24):
            windows.clear()
            batches = [*reader.epoch(points, 10, max_bytes=max_bytes)]
            first, seen = len(windows[0]), np.concatenate([batch.rows for batch in batches])
            assert first == N or max_bytes - 10 * row_bytes < first * row_bytes <= max_bytes
            for i, window in enumerate(windows):
                drawn = seen[i * first : (i + 1) * first]
                assert np.sort(drawn).tolist() == np.sort(window).tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the process's own memory")
def test_an_epoch_holds_no_more_than_a_batch(tmp_path: Path) -> None:
    """Of 48 MiB in a window; what files are mapped to is the system's."""
    n, width = 4096, 1024
    index = rows(n).index

    def shard(number: int) -> ActivationRows:
        value = torch.full((n, width), float(number))
        return ActivationRows("module", {"p": value}, {"p": (width,)}, index)

    ActivationWriter(tmp_path / "store", dtype="float32").write_all(range(3), shard)
    reader, most = ActivationReader(tmp_path / "store"), 0
    before = own_bytes()
    for batch in reader.epoch("p", 256, max_bytes=2**26):
        assert torch.equal(batch.values["p"][:, 0], torch.from_numpy(batch.rows // n).float())
        most = max(most, own_bytes() - before)
    assert most < 8 * 2**20, "two batches are 2 MiB"


def own_bytes() -> int:
    """Memory of this process that no file is behind."""
    (line,) = (one for one in Path("/proc/self/status").read_text("utf-8").splitlines()
               if one.startswith("RssAnon"))  # fmt: skip
    return int(line.split()[1]) * 1024


def test_chunks_come_from_everywhere(reader: ActivationReader) -> None:
    """A window of a tenth of the rows has neighbours, and these from all over the store."""
    batches = numbers(reader.epoch("p", 100, max_bytes=200 * 12))
    together = np.array(batches[0] + batches[1])
    assert together.min() < N // 5
    assert together.max() > 4 * N // 5
    # Not in the order of the store within a batch.
    assert abs(np.corrcoef(np.arange(100), batches[0])[0, 1]) < 0.4


@pytest.mark.parametrize("max_bytes", [40 * 12, 2**20])
def test_some_rows(reader: ActivationReader, max_bytes: int) -> None:
    """Scattered ones, and neighbours."""
    for some in (
        reader.rows_where(span="text"),
        reader.rows_where(span="audio"),
        np.arange(690, 1005),
        np.array([5]),
        np.array([], dtype=np.int64),
    ):
        batches = [*reader.epoch("p", 8, rows=some, max_bytes=max_bytes)]
        assert sorted(row for batch in batches for row in batch.rows.tolist()) == some.tolist()
        for batch in batches:
            assert batch.values["p"][:, 0].tolist() == batch.rows.tolist()


def test_any_rows_in_any_order(reader: ActivationReader) -> None:
    for wanted in ([3, 1999, 700, 3, 699, 701, 1011, 1012], [], [*range(1500, 1400, -1)]):
        found = reader.read("p", wanted)
        assert found[:, 0].tolist() == wanted
    assert torch.equal(reader.read("q", range(N)), everything().values["q"])


def test_what_is_read_is_nobody_elses(reader: ActivationReader) -> None:
    """Neither the store's nor that of another batch."""
    batches = reader.epoch("p", 1000, max_bytes=1000 * 12)
    first = next(batches)
    kept = first.values["p"].clone()
    first.values["p"].add_(1)
    next(batches)
    assert torch.equal(first.values["p"], kept + 1)
    reader.read("p", [0]).zero_()
    reader.check()
    assert reader.read("p", [1])[0, 0] == 1


def test_rows_by_what_is_known_of_them(reader: ActivationReader) -> None:
    column = everything().index
    found = reader.rows_where(span="audio", speaker=["speaker1", "speaker3"])
    expected = (column["span"] == "audio") & np.isin(column["speaker"].astype(str),
                                                     ["speaker1", "speaker3"])  # fmt: skip
    assert found.tolist() == expected.nonzero()[0].tolist()
    assert reader.rows_where(prompt=3).tolist() == [12, 13, 14, 15]
    assert reader.rows_where().tolist() == [*range(N)]
    assert len(reader.rows_where(span="none")) == 0
    frame = reader.index.to_pandas()
    assert len(frame) == N
    assert (frame.position == column["position"]).all()


def test_a_column_holds_every_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's texts would be 8 bytes a row; and other columns are not read."""
    n = 100_000
    index = {
        **{name: np.arange(n) for name in ("prompt", "position")}, "seconds": np.zeros(n),
        **{name: np.array(["a", "b"], object)[np.arange(n) % 2] for name in ("clip", "span")},
    }  # fmt: skip
    one = ActivationRows("module", {"p": torch.zeros(n, 1)}, {"p": (1,)}, index)
    ActivationWriter(tmp_path / "store", dtype="float16").write_all(range(3), lambda _: one)
    reader = ActivationReader(tmp_path / "store")
    asked, read = [], reader_module.read_index

    def recorded(folder: Path, number: int, columns: list[str] | None) -> Any:
        asked.append(columns)
        return read(folder, number, columns)

    monkeypatch.setattr(reader_module, "read_index", recorded)
    before = pa.total_allocated_bytes()
    column = reader.column("clip")
    reader.rows_where(clip="a")
    assert asked == [["clip"]] * 3
    assert column.nbytes < 2 * 3 * n
    assert pa.total_allocated_bytes() - before < 6 * 3 * n
    assert column[[0, 1, n, -1]].tolist() == ["a", "b", "a", "b"]
    assert (column == "b").sum() == 3 * n / 2


@pytest.mark.parametrize("by", ["speaker", "clip"])
def test_no_group_is_on_both_sides(reader: ActivationReader, by: str) -> None:
    column = reader.column(by)
    n_groups = len({*column})
    draws = set()
    for seed in range(4):
        train, held_out = reader.split(by, 0.3, seed=seed)
        assert np.sort(np.concatenate([train, held_out])).tolist() == [*range(N)]
        assert not {*column[train]} & {*column[held_out]}
        assert len({*column[held_out]}) == round(0.3 * n_groups)
        draws.add(frozenset(column[held_out]))
    assert len(draws) > 1
    again = reader.split(by, 0.3, seed=2)
    assert [*map(list, again)] == [*map(list, reader.split(by, 0.3, seed=2))]
    audio = reader.rows_where(span="audio")
    train, held_out = reader.split(by, 0.01, rows=audio)
    assert np.sort(np.concatenate([train, held_out])).tolist() == audio.tolist()
    assert len({*column[held_out]}) == max(1, round(0.01 * n_groups))


def test_rows_without_a_group_could_be_of_either_side(tmp_path: Path) -> None:
    one = rows(20)
    one.index["speaker"][3:5] = ""
    ActivationWriter(tmp_path / "store", dtype="float32").write_all([0], lambda _: one)
    reader = ActivationReader(tmp_path / "store")
    with pytest.raises(InputError, match="splitting 20 rows by 'speaker': 2 rows have none"):
        reader.split("speaker", 0.5)
    named = np.delete(np.arange(20), [3, 4])
    assert sum(map(len, reader.split("speaker", 0.5, rows=named))) == 18


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda r: r.epoch("r", 4), HookNameError, "matches none of the 2 names"),
        (lambda r: r.epoch("p", 0), InputError, "got batch_size=0.*expected nothing below 0"),
        (lambda r: r.epoch("p", 4, max_bytes=47), InputError, "hold: 12 bytes a row. Give small"),
        (lambda r: r.epoch("p", 4, start=-1), InputError, "start=-1"),
        (lambda r: r.epoch("p", 4, seed=-1), InputError, "seed=-1"),
        (lambda r: r.epoch("p", 4, rows=np.array([2000])), InputError, "from 0 to 1999"),
        (lambda r: r.read("p", [-1]), InputError, "expected numbers from 0 to 1999"),
        (lambda r: r.column("who"), InputError, "got 'who', expected one of clip, prompt"),
        (lambda r: r.rows_where(who=1), InputError, "got 'who', expected one of clip"),
        (lambda r: r.rows_where(prompt="x"), InputError, "choosing rows by 'prompt': got .'x'."),
        (lambda r: r.split("speaker", 1.0), InputError, "got share=1.0 of 7 groups"),
        (lambda r: r.split("speaker", 0.5, rows=np.arange(3)), InputError, "of 1 groups"),
    ],
)
def test_what_makes_no_sense_is_refused(
    reader: ActivationReader, attempt: Any, error: type[Exception], message: str
) -> None:
    """At the call, not at the first batch."""
    with pytest.raises(error, match=message):
        attempt(reader)


def test_it_opens_in_another_process(reader: ActivationReader) -> None:
    reader.read("p", [0])
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(again.read("q", range(N)), reader.read("q", range(N)))


def test_rows_may_be_flags_and_nothing_else_is_guessed_at(reader: ActivationReader) -> None:
    flags = reader.column("speaker") == "speaker1"
    wanted = flags.nonzero()[0]
    assert 0 < len(wanted) < N
    assert torch.equal(reader.read("p", flags), reader.read("p", wanted))
    (by_flag,) = numbers(reader.epoch("p", N, rows=flags))
    (by_number,) = numbers(reader.epoch("p", N, rows=wanted))
    assert by_flag == by_number
    assert sorted(by_flag) == wanted.tolist()
    assert reader.split("clip", 0.3, rows=flags)[0].tolist() == (
        reader.split("clip", 0.3, rows=wanted)[0].tolist()
    )
    for wrong in (np.array([0.9, 1.7]), np.ones(3, bool), [[0]], np.array(["a"])):
        with pytest.raises(InputError, match="or a flag for each"):
            reader.read("p", wrong)
