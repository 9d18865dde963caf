"""Time the activation store: forwards that keep rows, and shuffled reads, against bare work.

    write    clips whose rows are written to a store, against the same runs of the model that write
             nothing. The stream behind every block is kept, at every position; a shard is the rows
             of some clips, which are heard one at a time.
    read     an epoch in shuffled batches, against the same bytes of the same files read in order,
             in pieces of a batch's size, each into memory of its own as a batch has it. (Memory for
             a whole file may be new to the process each time, which is slow.) The files are in the
             system's cache, so that no disk is timed.

Calls alternate in one process; prints medians of the ratio of throughputs with their bootstrap
interval: 1 is as fast as the bare work.

    python scripts/bench_activations.py [--pairs 30] [--positions 200 800] [--dtype float16]
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_forward import make_checkpoint, paired_times, prompt, shown

from hooked_alm import ActivationReader, ActivationWriter, HookedALM
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.activations.rows import DTYPES, ActivationRows, StoreDtype
from hooked_alm.methods.activations.selection import KeptPoint, kept_points

POINTS = "blocks.*.hook_resid_post"
BATCH = 4096
"""Rows of a batch that is read."""


def paired_throughput(
    ours: Callable[[], object], bare: Callable[[], object], n: int, n_bytes: int
) -> str:
    """Median of bare / ours in seconds over alternating calls, with its 95 % interval."""
    times = paired_times(ours, bare, n)
    rates = n_bytes / np.median(times, axis=0) / 1e6
    return (
        f"{shown(times[:, 1] / times[:, 0])}   "
        f"({rates[0]:.0f} MB/s against {rates[1]:.0f} MB/s, {n} pairs)"
    )


@torch.no_grad()
def bench_write(
    folder: Path, positions: list[int], n_clips: int, dtype: StoreDtype, n_pairs: int
) -> None:
    """One shard against the same runs of the model, stopped at the same block."""
    make_checkpoint(folder / "model")
    model = HookedALM.from_pretrained(str(folder / "model"))
    for n_pos in positions:
        prompts = [prompt(model, n_pos) for _ in range(n_clips)]
        for x in prompts:  # clips are encoded once, and reused by both sides
            model(x, stop_at_layer=0)
        numbers, points = itertools.count(), kept_points(model, POINTS)
        writer = ActivationWriter(folder / f"store{n_pos}", dtype=dtype)

        def written(
            prompts: list[Any] = prompts,
            points: list[KeptPoint] = points,
            writer: ActivationWriter = writer,
            numbers: Iterator[int] = numbers,
        ) -> object:
            parts = [rows_of(model, x, points, "all")["prompt"] for x in prompts]
            return writer.write(next(numbers), ActivationRows.joined(parts))

        def bare(prompts: list[Any] = prompts) -> object:
            return [model(x, stop_at_layer=len(model.path)) for x in prompts]

        n_bytes = n_clips * n_pos * len(model.path) * model.cfg.d_model * DTYPES[dtype].itemsize
        ratio = paired_throughput(written, bare, n_pairs, n_bytes)
        print(f"write, T = {n_pos}, {n_bytes / 1e6:.0f} MB a shard: {ratio}")
        shutil.rmtree(writer.folder)


def bench_read(folder: Path, width: int, sizes: list[int], dtype: StoreDtype, n_pairs: int) -> None:
    """A shuffled epoch against the bytes of the same files."""
    for shard_bytes in sizes:
        n = shard_bytes // (width * DTYPES[dtype].itemsize)
        n_shards = max(2**28 // shard_bytes, 2)
        where = folder / f"read{shard_bytes}"
        index = {
            "clip": np.array(["clip"] * n, object), "prompt": np.arange(n) // 1500,
            "position": np.arange(n) % 1500, "seconds": np.arange(n) % 1500 * 0.02,
            "span": np.array(["audio"] * n, object),
        }  # fmt: skip
        ActivationWriter(where, dtype=dtype).write_all(
            range(n_shards),
            lambda _, n=n, index=index: ActivationRows(  # type: ignore[misc]
                "module", {"p": torch.randn(n, width)}, {"p": (width,)}, index
            ),
        )
        reader, epochs = ActivationReader(where), itertools.count()
        files = sorted((where / "shards").glob("*.safetensors"))
        n_bytes = sum(file.stat().st_size for file in files)
        for max_bytes in (2**25, 2**26, 2**29):

            def epoch(
                reader: ActivationReader = reader, epochs: Any = epochs, bound: int = max_bytes
            ) -> int:
                batches = reader.epoch("p", BATCH, epoch=next(epochs), max_bytes=bound)
                return sum(len(batch.values["p"]) for batch in batches)

            raw = partial(_read_in_order, files, BATCH * reader.card.contents.row_bytes)
            assert (epoch(), raw()) == (len(reader), n_bytes)
            ratio = paired_throughput(epoch, raw, n_pairs, n_bytes)
            print(
                f"read, {n_shards} shards of {shard_bytes >> 20} MiB, window of "
                f"{max_bytes >> 20} MiB: {ratio}"
            )
        shutil.rmtree(where)


def _read_in_order(files: list[Path], piece_bytes: int) -> int:
    """Bytes of the files, read in pieces; one is kept until the next is read, as a batch is."""
    found = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            piece = np.empty(piece_bytes, np.uint8)
            while n := file.readinto(piece.data):
                found, piece = found + n, np.empty(piece_bytes, np.uint8)
    return found


def main() -> None:
    """Parse arguments and run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--positions", type=int, nargs="*", default=[200, 800])
    parser.add_argument("--clips", type=int, default=4, help="of a shard that is written")
    parser.add_argument("--width", type=int, default=1280, help="of a row that is read")
    parser.add_argument("--shards", type=int, nargs="*", default=[16, 64], help="MiB, to be read")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, dtype = Path(scratch), options.dtype
        if options.positions:
            bench_write(folder, options.positions, options.clips, dtype, options.pairs)
        sizes = [one << 20 for one in options.shards]
        bench_read(folder, options.width, sizes, dtype, options.pairs)


if __name__ == "__main__":
    main()
