"""Time patch sweeps against TransformerLens' bridge, nnsight and plain Hugging Face hooks.

The same random weights in one process, and the same merged embeddings: every side hears the audio,
and only the decoder is timed. Calls alternate, so that noise of the machine hits all sides.

    head_z_readout         one head's z at the readout position: all layers x heads
    audio_span_resid       the residual stream of the whole audio span: every layer
    mlp_out_audio          the MLP's output over the whole audio span: every layer
    layer_position_resid   the residual stream at one position: every layer x sampled positions
    head_to_head_q_edges   the direct edge of a head to a later head's query, at the readout: all
    edges_into_block       those of all heads below a quarter of the layers into the block there
    eap, eap_ig            scores of all edges from heads to queries, keys, values and MLPs, by one
                           gradient and by five: no peer, the whole call in forwards

A peer runs one forward per cell. Cells are drawn at random, one a round; their time is multiplied
by the number of cells. Base and donor runs are left out on both sides: of our call, the time of
``Measurement.__init__``, which makes them, is taken off. All else counts, making the cells too.
``ratio`` is the peer's time over ours, the median over the rounds with its bootstrap interval.
``whole call`` is our call with those runs, in forwards of the Hugging Face model under sdpa;
``sweep`` the same without them; ``model`` what the sweep would cost if time went by the (layer,
position) pairs that it has to compute. ``max error`` is the largest difference from the peer's
value of a cell, ``effect`` the largest of any cell on the metric. ``operations`` is what our call
dispatches: on a CPU operations of PyTorch, on CUDA launches, copies and waits.

nnsight is left out where it is not installed (``pip install -e .[peers]``).

    python scripts/bench_sweeps.py --quick --out sweeps.json       # ten minutes on two cores
    python scripts/bench_sweeps.py [--positions 800] [--kv-heads 2] [--sampled-positions 0]
    python scripts/bench_sweeps.py --scaling
    python scripts/bench_sweeps.py --device cuda --dtype bfloat16 --heads 32 --d-model 4096
    python scripts/bench_sweeps.py --gpu-check figures.json    # all that an accelerator is asked
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_forward import median_and_interval
from sweep_peers import METRIC, N_BEFORE, PEERS, Cell, HuggingFace, Models, Sizes, made_peers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging as transformers_logging

from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.patching.measurement import Measurement
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import path_patch

MIN_PAIRS = 8
WORKS = (
    "head_z_readout", "audio_span_resid", "mlp_out_audio", "layer_position_resid",
    "head_to_head_q_edges", "edges_into_block", "eap", "eap_ig",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A sweep: its cells, and our call that answers them all."""

    name: str
    cells: list[Cell]
    """Cells that peers can make; none of an attribution, to which they have no like."""
    call: Callable[[], Any]

    def model_forwards(self, sizes: Sizes) -> float:
        """Pairs of layer and position that the cells reach, relative to those of one forward."""
        # A whole span that a donor's run replaces is that run's span: only what follows is run.
        is_spliced = self.name == "audio_span_resid"
        starts = (c.where.stop if is_spliced else c.where.start for c in self.cells)
        pairs = (
            (sizes.positions - start) * (sizes.layers - cell.layer)
            for start, cell in zip(starts, self.cells, strict=True)
        )
        return sum(pairs) / (sizes.layers * sizes.positions)


def works(models: Models, positions: Sequence[int], names: Sequence[str]) -> list[Work]:
    """Sweeps by their names; the stream is patched at these positions."""
    s, run = models.sizes, (models.model, models.base, models.donor, METRIC)
    readout = slice(s.positions - 1, s.positions)
    layers, heads = range(s.layers), range(s.heads)
    edges = ("blocks.*.attn.hook_z[*]", "blocks.*.attn.hook_q_input[*]")
    into = max(s.layers // 4, 1)
    below = [f"blocks.{b}.attn.hook_z[*]" for b in range(into)]
    readers = [f"blocks.*.attn.hook_{part}_input[*]" for part in "qkv"] + ["blocks.*.hook_mlp_in"]
    every = [
        Work(
            "head_z_readout",
            [Cell((b, h, 0), "z", b, readout, h) for b in layers for h in heads],
            partial(patch, *run, site="z", heads="each", places=("readout",)),
        ),
        Work(
            "audio_span_resid",
            [Cell((b, 0), "resid_pre", b, s.audio) for b in layers],
            partial(patch, *run, site="resid_pre", places=("audio",)),
        ),
        Work(
            "mlp_out_audio",
            [Cell((b, 0), "mlp_out", b, s.audio) for b in layers],
            partial(patch, *run, site="mlp_out", places=("audio",)),
        ),
        Work(
            "layer_position_resid",
            [
                Cell((b, i), "resid_pre", b, slice(at, at + 1))
                for b in layers
                for i, at in enumerate(positions)
            ],
            partial(patch, *run, site="resid_pre", places=list(positions)),
        ),
        Work(
            "head_to_head_q_edges",
            [
                Cell((b * s.heads + h, c * s.heads + g, 0), "q", c, readout, g, (b, h))
                for b, h, c, g in itertools.product(layers, heads, layers, heads)
                if b < c
            ],
            partial(path_patch, *run, *edges, places=("readout",)),
        ),
        Work(
            "edges_into_block",
            [
                Cell((b * s.heads + h, g, 0), "q", into, readout, g, (b, h))
                for b, h, g in itertools.product(range(into), heads, heads)
                if into < s.layers
            ],
            partial(
                path_patch, *run, below, f"blocks.{min(into, s.layers - 1)}.attn.hook_q_input[*]",
                places=("readout",),
            ),
        ),
        *(
            Work(name, [], partial(attribute_edges, *run, edges[0], readers, method=method))
            for name, method in (("eap", "eap"), ("eap_ig", "eap-ig"))
        ),
    ]  # fmt: skip
    return [work for work in every if work.name in names]


class Watch:
    """Seconds, and on an accelerator the peak of the memory, of calls by name."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, int] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a call and return its value; time and memory are kept under the name."""
        held = 0
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        found = call()
        if self.is_cuda:
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - held
            self.peak[name] = max(self.peak.get(name, 0), grown)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found


@contextmanager
def runs_timed(device: str) -> Iterator[list[float]]:
    """Seconds of every pair of base and donor runs."""
    watch, run = Watch(device), Measurement.__init__
    watch.seconds["runs"] = []

    def timed(*args: Any, **options: Any) -> None:
        watch("runs", partial(run, *args, **options))

    with mock.patch.object(Measurement, "__init__", timed):
        yield watch.seconds["runs"]


class _Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any], device: str) -> dict[str, int]:
    """Operations of a call: dispatched ones, or what the driver of an accelerator was asked for."""
    if not device.startswith("cuda"):
        with _Operations() as counted:
            call()
        return {"dispatched": counted.n}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    asked = {"launches": "LaunchKernel", "copies": "Memcpy", "waits": "Synchronize"}
    seen = profile.key_averages()
    return {
        name: sum(one.count for one in seen if word in one.key and one.key.startswith("cu"))
        for name, word in asked.items()
    }


def attributed(models: Models, work: Work, pairs: int) -> dict[str, Any]:
    """A row for an attribution: calls and forwards in turn."""
    work.call()
    watch = Watch(models.sizes.device)
    for _ in range(min(pairs, MIN_PAIRS)):
        watch("ours", work.call)
        with torch.no_grad():
            watch("forward", models.forward)
    ours, forward = (np.array(watch.seconds[name]) for name in ("ours", "forward"))
    return {
        "work": work.name,
        "whole_call_s": float(np.median(ours)),
        "forward_s": float(np.median(forward)),
        "whole_call_forwards": float(np.median(ours / forward)),
        "operations": operations(work.call, models.sizes.device),
    }


@torch.no_grad()
def measure(
    models: Models, work: Work, peers: Sequence[Any], pairs: int, seconds: float
) -> list[dict[str, Any]]:
    """Alternate our call, one forward, and one cell of every peer; a row for every peer.

    Stops after ``pairs`` rounds, or when the time is over and ``MIN_PAIRS`` are done.
    """
    result, cells = work.call(), work.cells  # the first calls are not timed
    ours = np.array([result.values[*cell.index, 0] for cell in cells])
    deck = np.random.default_rng(0).permutation(len(cells))
    models.forward()
    for peer in peers:
        peer.value(cells[deck[0]])
    watch, begun = Watch(models.sizes.device), time.monotonic()
    errors: dict[str, list[float]] = {peer.name: [] for peer in peers}
    with runs_timed(models.sizes.device) as runs:
        for done in itertools.count(1):
            chosen = deck[done % len(deck)]
            calls = {"ours": work.call, "forward": models.forward}
            calls |= {peer.name: partial(peer.value, cells[chosen]) for peer in peers}
            for name in list(calls)[:: 1 if done % 2 else -1]:
                found = watch(name, calls[name])
                if name in errors:
                    errors[name].append(abs(found - ours[chosen]))
            is_late = time.monotonic() - begun > seconds
            if done >= (min(pairs, MIN_PAIRS) if is_late else pairs):
                break
    times = {name: np.array(spent) for name, spent in watch.seconds.items()}
    sweep = times["ours"] - np.array(runs)
    shared = {
        "n_cells": len(cells),
        "peer_cells_timed": done,
        "largest_effect": float(np.abs(ours - result.base[0]).max()),
        "ours_s": float(np.median(sweep)),
        "whole_call_s": float(np.median(times["ours"])),
        "forward_s": float(np.median(times["forward"])),
        "whole_call_forwards": float(np.median(times["ours"] / times["forward"])),
        "sweep_forwards": float(np.median(sweep / times["forward"])),
        "model_forwards": work.model_forwards(models.sizes),
        "ours_peak_bytes": watch.peak.get("ours"),
        "operations": operations(work.call, models.sizes.device),
    }
    rows = []
    for name, differences in errors.items():
        ratio, interval = median_and_interval(times[name] * len(cells) / sweep)
        own = {
            "max_abs_error": float(np.max(differences)),
            "peer_s_per_cell": float(np.median(times[name])),
            "peer_peak_bytes": watch.peak.get(name),
        }
        about = {"work": work.name, "peer": name, "ratio": ratio, "interval": interval}
        rows.append({**about, **own, **shared})
    return rows


def middles(n: int, n_pos: int) -> list[int]:
    """Positions in the middle of n equal parts of a prompt; with n = 0, all of them."""
    return [int((i + 0.5) * n_pos / n) for i in range(n)] if 0 < n < n_pos else list(range(n_pos))


HEADER = (
    f"{'work':21}{'peer':9}{'cells':>7}{'ratio':>9}{'95 % interval':>19}{'pairs':>6}"
    f"{'max error':>11}{'effect':>8}{'whole call':>12}{'sweep':>8}{'model':>8}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table; with memory over the weights where there is an accelerator."""
    interval = "[{:.1f}, {:.1f}]".format(*row["interval"])
    memory = [row[f"{side}_peak_bytes"] for side in ("ours", "peer")]
    return (
        (
            f"{row['work']:21}{row['peer']:9}{row['n_cells']:7}{row['ratio']:9.1f}{interval:>19}"
            f"{row['peer_cells_timed']:6}{row['max_abs_error']:11.1e}{row['largest_effect']:8.2g}"
            f"{row['whole_call_forwards']:12.2f}{row['sweep_forwards']:8.3f}{row['model_forwards']:8.3f}"
        )
        + (
            ""
            if None in memory
            else "   peak {:.0f} / {:.0f} MiB".format(*np.array(memory) / 2**20)
        )
        + (f"   {listed(row)}")
    )


def listed(row: dict[str, Any]) -> str:
    """Operations of a row, in words."""
    return ", ".join(f"{n} {name}" for name, n in row["operations"].items())


def table(options: argparse.Namespace, sizes: Sizes, n_positions: int) -> list[dict[str, Any]]:
    """Measure every sweep against every peer; one row each."""
    positions = middles(n_positions, sizes.positions)
    print(f"layer_position_resid: {len(positions)} of {sizes.positions} positions, evenly spread")
    with tempfile.TemporaryDirectory() as folder:
        models = Models(sizes, Path(folder))
    peers = made_peers(models, options.peers)
    print(HEADER)
    rows = []
    for work in works(models, positions, options.works):
        if work.cells:
            rows += measure(models, work, peers, options.pairs, options.seconds)
            print("\n".join(line(row) for row in rows[-len(peers) :]), flush=True)
        elif work.name in ("eap", "eap_ig"):
            rows.append(attributed(models, work, options.pairs))
            print(
                f"{work.name:21}{'-':9}{'whole call':>46}{rows[-1]['whole_call_forwards']:12.2f} "
                f"forwards, {rows[-1]['whole_call_s']:.2f} s   {listed(rows[-1])}",
                flush=True,
            )
    return rows


def scaling_sizes(sizes: Sizes) -> list[tuple[str, Sizes]]:
    """Three sizes of each of T, L and H; fewer where the smallest coincide."""
    grouping = sizes.heads // sizes.kv_heads
    least = N_BEFORE + sizes.text + 1
    chosen = {
        **{f"T = {n}": replace(sizes, positions=n)
           for n in (max(sizes.positions // 4, least), max(sizes.positions // 2, least),
                     sizes.positions)},
        **{f"L = {n}": replace(sizes, layers=n)
           for n in (max(sizes.layers // 4, 1), max(sizes.layers // 2, 1), sizes.layers)},
        **{f"H = {n}": replace(sizes, heads=n, kv_heads=max(n // grouping, 1))
           for n in (max(sizes.heads // 2, 1), sizes.heads, 2 * sizes.heads)},
    }  # fmt: skip
    return list(chosen.items())


def scaling(options: argparse.Namespace, sizes: Sizes, n_positions: int) -> list[dict[str, Any]]:
    """Measure the growth of our cost, beside the count of (layer, position) pairs."""
    print(f"{'work':21}{'size':10}{'cells':>7}{'whole call':>12}{'sweep':>9}{'model':>9}")
    known: dict[Sizes, list[dict[str, Any]]] = {}
    found = []
    for label, one in scaling_sizes(sizes):
        if one not in known:
            with tempfile.TemporaryDirectory() as folder:
                models = Models(one, Path(folder))
            asked = works(models, middles(n_positions, one.positions), options.works)
            peer = HuggingFace(models)
            known[one] = [
                measure(models, w, [peer], options.pairs, 0.0)[0] for w in asked if w.cells
            ]
        for row in known[one]:
            found.append({"size": label, **row, **asdict(one)})
            print(
                f"{row['work']:21}{label:10}{row['n_cells']:7}{row['whole_call_forwards']:12.2f}"
                f"{row['sweep_forwards']:9.3f}{row['model_forwards']:9.3f}",
                flush=True,
            )
    return found


def machine(sizes: Sizes) -> dict[str, Any]:
    """Machine, versions and sizes that the figures are taken with."""
    is_cuda = sizes.device.startswith("cuda")
    packages = ("torch", "transformers", "transformer-lens")
    return {
        "processor": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **asdict(sizes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in asdict(Sizes()).items():
        option = f"--{name.replace('_', '-')}"
        told = "as many as heads" if name == "kv_heads" else default
        parser.add_argument(option, type=type(default), help=f"{told} unless told")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--pairs", type=int, default=30, help="rounds of every work, at most")
    parser.add_argument(
        "--seconds", type=float, help=f"for every work; {MIN_PAIRS} rounds are done in any case"
    )
    parser.add_argument("--sampled-positions", type=int, help="of layer_position_resid; 0 is all")
    parser.add_argument("--threads", type=int, help="torch's default unless told")
    parser.add_argument("--quick", action="store_true", help="ten minutes on two cores")
    parser.add_argument("--scaling", action="store_true", help="how our cost grows, instead")
    parser.add_argument(
        "--gpu-check", type=Path, metavar="OUT",
        help="parity, sweeps, attribution and generation at published size, into one JSON, instead",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.seconds is None:
        options.seconds = 90.0 if options.quick else float("inf")
    given = {name: getattr(options, name) for name in asdict(Sizes())}
    given["kv_heads"] = given["kv_heads"] or given["heads"]
    chosen = {name: value for name, value in given.items() if value is not None}
    if options.gpu_check:
        import gpu_check  # which imports this module

        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpu_check.check(options.gpu_check, replace(gpu_check.published(device), **chosen))
        return
    sizes = Sizes(**chosen)
    if sizes.n_audio < 1:
        parser.error(f"--positions must exceed {N_BEFORE} + --text")
    n_positions = options.sampled_positions
    if n_positions is None:
        n_positions = 4 if options.quick or options.scaling else 40
    transformers_logging.disable_progress_bar()
    about = machine(sizes)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = (scaling if options.scaling else table)(options, sizes, n_positions)
    if options.out:
        text = json.dumps({"rows": rows, "machine": about}, indent=1, allow_nan=False)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
