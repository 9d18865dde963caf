"""Stores on disk: what is written, killed at any moment, resumed, damaged, refused."""

import errno
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import hooked_alm
from activation_rows import BATCHES, collect, rows, write_slowly, written
from hooked_alm.errors import InputError
from hooked_alm.methods.activations import store
from hooked_alm.methods.activations.reader import ActivationReader
from hooked_alm.methods.activations.rows import DTYPES, ActivationRows
from hooked_alm.methods.activations.writer import ActivationWriter
from stopped_runs import start


def files(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store") / "whole")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path: Path, dtype: Any) -> None:
    """By safetensors and parquet themselves, and by the reader."""
    folder = written(tmp_path / "store", dtype)
    reader = ActivationReader(folder)
    whole = ActivationRows.joined([collect(batch) for batch in BATCHES])
    for name, value in whole.values.items():
        assert torch.equal(reader.read(name, range(20)), value.to(DTYPES[dtype]))
    for name, column in whole.index.items():
        found = reader.column(name)
        assert all(a == b or a != a for a, b in zip(found, column, strict=True)), name
    first = collect(BATCHES[0])
    plain = load_file(folder / "shards/00000.safetensors")
    assert torch.equal(plain["q"], first.values["q"].to(DTYPES[dtype]))
    table = pq.read_table(folder / "shards/00000.parquet").to_pandas()
    assert table["speaker"].tolist() == first.index["speaker"].tolist()
    assert reader.shape("q") == (2, 5)
    assert reader.card.contents.about == {"model": "m"}
    assert reader.card.n_rows == len(reader) == 20
    on_disk = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    assert reader.card.n_bytes == on_disk
    reader.check()


def test_names_for_a_notebook(whole: Path) -> None:
    assert hooked_alm.ActivationReader is ActivationReader
    assert hooked_alm.ActivationWriter is ActivationWriter
    assert hooked_alm.ActivationReader(str(whole)).points == ["p", "q"]


# --- Killed and resumed


class Killed(BaseException):
    """What a process that is gone would not do."""


def test_stopped_before_or_after_any_write_it_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_writes = 2 * len(BATCHES) + 1
    write = store.write_atomic
    for stop, is_after in itertools.product(range(1, n_writes + 1), (False, True)):
        folder, calls = tmp_path / f"{stop} {is_after}", itertools.count(1)

        def stopping(
            path: Path,
            *parts: Any,
            stop: int = stop,
            is_after: bool = is_after,
            calls: Any = calls,
        ) -> None:
            number = next(calls)
            if number == stop and not is_after:
                # As far as a kill lets it: part of the file, under another name.
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.tmp").write_bytes(b"".join(parts)[:-1])
                raise Killed
            write(path, *parts)
            if number == stop:
                raise Killed

        monkeypatch.setattr(store, "write_atomic", stopping)
        with pytest.raises(Killed):
            written(folder)
        if stop < n_writes:
            with pytest.raises(InputError, match="expected a finished store"):
                ActivationReader(folder)
        monkeypatch.setattr(store, "write_atomic", write)
        done = [ActivationWriter(folder, dtype="float16", about={"model": "m"}).is_done(i)
                for i in range(4)]  # fmt: skip
        assert done == [2 * (i + 1) < stop + is_after for i in range(4)]
        assert files(written(folder)) == files(whole), (stop, is_after)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_processes(whole: Path, tmp_path: Path) -> None:
    """``kill -9``, at moments all over the run, each resumed from what the one before left."""
    ended = []
    for i in range(5):
        folder = tmp_path / f"store{i % 2}"
        process = start(write_slowly, str(folder))
        deadline = time.monotonic() + 60
        # Of a whole shard two files are left; the one at work has a name of its own.
        while len([*folder.glob("shards/*")]) < i and time.monotonic() < deadline:
            if not process.is_alive():
                break
            time.sleep(0.0005)
        process.kill()
        process.join()
        ended.append(process.exitcode)
    assert -signal.SIGKILL in ended, "all ran to their ends"
    for i in range(2):
        assert files(written(tmp_path / f"store{i}")) == files(whole)


def test_what_is_done_is_not_collected_again(whole: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "store")
    (folder / "shards/00001.parquet").unlink()
    again = list[tuple[int, int]]()

    def counted(batch: tuple[int, int]) -> ActivationRows:
        again.append(batch)
        return collect(batch)

    ActivationWriter(folder, dtype="float16", about={"model": "m"}).write_all(BATCHES, counted)
    assert again == [BATCHES[1]]
    assert files(folder) == files(whole)


# --- Damaged


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
        (lambda path: path.write_bytes(b""), "0 bytes, expected"),
        (flip, "other bytes than were written"),
        (lambda path: flip(path, 0), "other bytes than were written"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(
    tmp_path: Path, suffix: str, damage: Callable[[Path], Any], message: str
) -> None:
    folder = written(tmp_path / "store")
    damage(folder / f"shards/00001.{suffix}")
    with pytest.raises(InputError, match=rf"reading .*00001.{suffix}: got a damaged .*{message}"):
        ActivationReader(folder).check()


def test_a_resumed_writer_meets_a_damaged_shard(tmp_path: Path) -> None:
    folder = written(tmp_path / "store")
    path = folder / "shards/00003.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"reading .*00003.safetensors.*Delete the shard's"):
        written(folder)
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"00003.parquet: it is damaged"):
        written(folder)


def test_tensors_that_are_no_tensors(whole: Path, tmp_path: Path) -> None:
    """Of the right size, and with a header that no longer fits the card."""
    folder = written(tmp_path / "store")
    path = folder / "shards/00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"q"', b'"r"'))
    with pytest.raises(InputError, match=r"reading .*00000.safetensors: got a damaged shard"):
        ActivationReader(folder).read("q", [0])


def test_cards_that_are_none(tmp_path: Path) -> None:
    folder = written(tmp_path / "store")
    card = json.loads((folder / "store.json").read_text("utf-8"))
    for content, message in (
        ("{", "store.json is damaged"),
        (json.dumps({**card, "format": "other"}), "none of this version's.*expected hooked_alm"),
        (json.dumps({**card, "more": 1}), "none of this version's"),
        (json.dumps({**card, "shards": [{}]}), "none of this version's"),
    ):
        (folder / "store.json").write_text(content, "utf-8")
        with pytest.raises(InputError, match=message):
            ActivationReader(folder)
    with pytest.raises(InputError, match=r"got no store.json \(No such file.*Give its folder"):
        ActivationReader(tmp_path / "nowhere")


# --- Refused


def test_folders_and_settings_that_do_not_fit(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match=r"other files in it \(notes.txt\), expected a new"):
        ActivationWriter(tmp_path / "mine", dtype="float16")
    with pytest.raises(InputError, match=r"other files in it \(notes.txt\)"):
        ActivationWriter(tmp_path / "mine/notes.txt", dtype="float16")
    with pytest.raises(InputError, match="no JSON"):
        ActivationWriter(tmp_path / "new", dtype="float16", about={"model": object()})
    for settings in ({"dtype": "float32", "about": {"model": "m"}}, {"dtype": "float16"}):
        with pytest.raises(InputError, match="resuming the activations .* shard 0 was kept in"):
            ActivationWriter(whole, **settings).is_done(0)  # type: ignore[arg-type]
    assert files(whole) == files(written(tmp_path / "new"))


def test_shards_that_are_not_alike(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "store", dtype="float16")
    writer.write(0, rows())
    other = rows()
    del other.index["speaker"]
    with pytest.raises(InputError, match=r"shard 1 has module rows of p \[3\].*expected .*speaker"):
        writer.write(1, other)
    with pytest.raises(InputError, match="got 1 shards, expected 3 and at least one; there is no"):
        writer.finish(3)
    writer.write(1, rows())
    with pytest.raises(InputError, match="shard 1 is too many"):
        writer.finish(1)
    with pytest.raises(InputError, match="got number -1"):
        writer.write(-1, rows())
    ActivationWriter(tmp_path / "store", dtype="float16", about={"other": 1}).write(1, rows())
    with pytest.raises(InputError, match="shard 1 has"):
        ActivationWriter(tmp_path / "store", dtype="float16").finish(2)


def test_a_value_that_the_dtype_does_not_hold_writes_nothing(tmp_path: Path) -> None:
    large = rows()
    large.values["q"][1, 1] = 1e5
    with pytest.raises(InputError, match="keeping q in float16: got values up to 100000"):
        ActivationWriter(tmp_path / "store", dtype="float16").write(0, large)
    assert not (tmp_path / "store").exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """It says so; what is whole stays, and the same call goes on when there is room."""
    write, calls = store.write_atomic, itertools.count(1)

    def full(path: Path, *parts: Any) -> None:
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *parts)

    monkeypatch.setattr(store, "write_atomic", full)
    with pytest.raises(InputError, match=r"writing .*00002.*: got 'No space left .* room for 0\.0"):
        written(tmp_path / "store")
    monkeypatch.setattr(store, "write_atomic", write)
    assert files(written(tmp_path / "store")) == files(whole)
