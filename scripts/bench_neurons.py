"""Time a forward that logs every neuron against the same forward, and measure a log's memory.

The model has the 28 blocks of 18,944 neurons of Qwen2.5-7B at ``d_model`` 64, with random weights:
its own work is small beside what is logged, which is the worst case. Calls alternate; prints the
median of the pairwise ratios of throughput, by processor time, with its interval, the bytes of a
log, and by how much the peak of the process's memory grows from the first log to the last.

    python scripts/bench_neurons.py [--pairs 30] [--rows 2] [--positions 200]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bench_forward import paired_times, shown
from bench_head_statistics import batch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.neurons.activity import ActivityLog, item_activity

N_CLASSES = 5


def make_checkpoint(folder: Path, d_model: int, n_layers: int, d_mlp: int) -> None:
    """A random Qwen2 with heads of 16 and as many neurons as asked for."""
    config = Qwen2Config(
        hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=n_layers,
        num_attention_heads=d_model // 16, num_key_value_heads=d_model // 32, vocab_size=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def peak_mib() -> float:
    """Most memory that the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def bench(folder: Path, n_rows: int, n_pos: int, n_pairs: int) -> None:
    """Print speed, size and growth."""
    model = HookedALM.from_pretrained(str(folder))
    x: ALMInput = model.encode(**batch(n_rows, n_pos))
    cfg = model.path_cfg
    log = ActivityLog.empty(N_CLASSES, len(model.path), cfg.d_mlp)
    classes = [row % N_CLASSES for row in range(n_rows)]

    def logged() -> None:
        log.add(item_activity(model, x)[1], classes)

    logged()
    first = peak_mib()
    times = paired_times(logged, lambda: model(x), n_pairs, time.process_time)
    size = sum(one.nbytes for one in log.arrays.values()) / 2**20
    print(f"{n_rows} x {n_pos}, {len(model.path)} x {cfg.d_mlp} neurons, {N_CLASSES} classes")
    with_log, alone = np.median(times, axis=0)
    print(f"forward / log and forward   {shown(times[:, 1] / times[:, 0])}, {n_pairs} pairs, in "
          f"seconds of one core: {with_log:.3f} against {alone:.3f}")  # fmt: skip
    print(f"log: {size:.0f} MiB; {n_pairs} more batches raise the peak by {peak_mib() - first:.0f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--neurons", type=int, default=18_944)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch), options.d_model, options.layers, options.neurons)
        bench(Path(scratch), options.rows, options.positions, options.pairs)


if __name__ == "__main__":
    main()
