"""Time steps of training a sparse autoencoder beside SAELens, dictionary_learning and sparsify.

    .venv/bin/python scripts/bench_dictionaries.py \
        --peer saelens=PYTHON --peer dictionary_learning=PYTHON --peer sparsify=PYTHON
    .venv/bin/python scripts/bench_dictionaries.py --live WHISPER CLIPS

Each peer runs in an environment of its own, whose Python is given (sae-lens 6.54.12 with
transformer-lens 3.9; dictionary-learning 0.1.0 without torchvision; eai-sparsify 1.3.3), in a
process that stays; steps alternate, one of each a round, on one thread, over the same rows. Printed
are CPU seconds a step, and every peer's over ours: medians of the rounds, with 95 % intervals by
resampling rounds.

``--live`` says instead what of a live pass, clips -> shuffled rows, is the model's forward: CPU
seconds a thousand rows behind an encoder's block, by what they are spent on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], object]
SETTINGS = ("architecture", "d_in", "d_sae", "k", "batch_size")


def rows(d_in: int, n: int) -> list[Tensor]:
    """Two batches of sparse sums of random directions with noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2000, d_in, generator=generator), dim=-1)

    def batch() -> Tensor:
        chosen = torch.rand(n, 2000, generator=generator).topk(20).indices
        sizes = torch.rand(n, 20, generator=generator) + 0.5
        sums = torch.zeros(n, 2000).scatter(1, chosen, sizes) @ directions
        return sums + 0.05 * torch.randn(n, d_in, generator=generator)

    return [batch(), batch()]


def ours(architecture: str, d_in: int, d_sae: int, k: int, first: Tensor) -> Step:
    """Our trainer's step."""
    from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig
    from hooked_alm.methods.dictionary.training import DictionaryTrainer, DictionaryTraining

    shape: Any = {"d_in": d_in, "d_sae": d_sae, "architecture": architecture, "k": k}
    training = DictionaryTraining(n_steps=10_000, batch_size=len(first))
    return DictionaryTrainer(DictionaryConfig(**shape), training, first, seed=0).step


def saelens(architecture: str, d_in: int, d_sae: int, k: int, first: Tensor) -> Step:
    """``SAETrainer.step`` of SAELens."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": d_in, "d_sae": d_sae, "k": k, "device": "cpu", "dtype": "float32"}
    sae = {
        "topk": lambda: saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**shape)),
        "batchtopk": lambda: saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**shape)),
    }[architecture]()
    settings = SAETrainerConfig(10_000 * len(first), len(first), lr_end=3e-5)
    return SAETrainer(settings, sae, iter([])).step


def dictionary_learning(architecture: str, d_in: int, d_sae: int, k: int, first: Tensor) -> Step:
    """``update`` of dictionary_learning's trainers."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[architecture]
    shape = {"activation_dim": d_in, "dict_size": d_sae, "k": k}
    trainer = kind(steps=10_000, **shape, layer=0, lm_name="none", device="cpu")
    trainer.update(0, first)
    return lambda x: trainer.update(1, x)


def sparsify(architecture: str, d_in: int, d_sae: int, k: int, first: Tensor) -> Step:
    """A step as sparsify's trainer makes one, with Adam; topk alone."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    if architecture != "topk":
        raise SystemExit("sparsify has topk alone")
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=4e-4)

    def step(x: Tensor) -> None:
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


TOOLS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def work(tool: str, settings: dict[str, Any]) -> None:
    """Makes a step for every line on standard input, and prints its CPU seconds."""
    torch.set_num_threads(1)
    n = settings.pop("batch_size")
    batches = rows(settings["d_in"], n)
    step = TOOLS[tool](**settings, first=batches[0])
    for number in range(3):
        step(batches[number % 2])
    out = os.fdopen(os.dup(1), "w")
    print("ready", file=out, flush=True)
    for number, _ in enumerate(sys.stdin):
        began = time.process_time()
        step(batches[number % 2])
        print(time.process_time() - began, file=out, flush=True)


def live(model: str, clips: str, point: str, batch_size: int) -> None:
    """Runs a pass over the clips that a training would learn, and prints what it is spent on."""
    from hooked_alm.experiments.sae_train.experiment import TrainDictionaries
    from hooked_alm.experiments.sae_train.settings import SAETrainConfig

    torch.set_num_threads(1)
    config = SAETrainConfig(
        model=model, audio=clips, points=[point], step_rows=batch_size, batch_size=2
    )
    one = TrainDictionaries(config)
    one.identify()
    one.load()
    rows, spent = one.rows, dict[str, float]()

    def timed(name: str, owner: Any, method: str) -> None:
        """Counts what a method takes, without what others that are counted take within it."""
        plain = getattr(owner, method)

        def call(*args: Any, **options: Any) -> Any:
            began, within = time.process_time(), sum(spent.values())
            made = plain(*args, **options)
            took = time.process_time() - began - (sum(spent.values()) - within)
            spent[name] = spent.get(name, 0.0) + took
            return made

        vars(owner)[method] = call

    timed("files and mel frames", one.model, "read_clip")
    timed("forward", one.model, "run_with_hooks")
    timed("prompts and rows", rows, "values")
    mixed = rows.mixed(one.split.learnt, config.max_bytes)
    began, n = time.process_time(), 0
    for batch in mixed.epoch(batch_size):
        n += len(batch[point])
    whole = time.process_time() - began
    spent["shuffling"] = whole - sum(spent.values())
    print(f"{n} rows of {point}, {1000 * whole / n:.2f} CPU seconds a thousand")
    for name, seconds in spent.items():
        print(f"{name:22} {1000 * seconds / n:8.3f} s  {seconds / whole:6.1%}")


def interval(values: Tensor) -> str:
    """Median with its 95 % interval by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (2000, len(values)), generator=generator)]
    low, high = drawn.median(1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(values.median()):8.3f} [{low:.3f}, {high:.3f}]"


def compare(pythons: dict[str, str], settings: dict[str, Any], n_rounds: int) -> None:
    """Alternates the tools' steps, and prints what came of it."""
    command = ["scripts/bench_dictionaries.py", "--settings", json.dumps(settings), "--tool"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = {
        tool: subprocess.Popen(
            [python, *command, tool], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for tool, python in pythons.items()
    }  # fmt: skip

    def answer(worker: "subprocess.Popen[str]") -> str:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("ready") or line[:1].isdigit():
                return line
        raise SystemExit(f"{worker.args} ended without an answer")

    def step(worker: "subprocess.Popen[str]") -> float:
        assert worker.stdin is not None
        print(file=worker.stdin, flush=True)
        return float(answer(worker))

    for worker in workers.values():
        answer(worker)
    times = torch.tensor([[step(worker) for worker in workers.values()] for _ in range(n_rounds)])
    for worker in workers.values():
        worker.kill()
    own, n = times[:, 0], settings["batch_size"]
    print(", ".join(f"{name} {value}" for name, value in settings.items()), f"- {n_rounds} rounds")
    for number, tool in enumerate(workers):
        column = times[:, number]
        speed = n / float(column.median())
        print(
            f"{tool:20} {interval(column)} s {speed:8.0f} rows/s  {interval(column / own)} x ours"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--architectures", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--live", nargs=2, metavar=("WHISPER", "CLIPS"))
    parser.add_argument("--point", default="audio.encoder.blocks.2.hook_resid_post")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tool:
        work(given.tool, given.settings)
        return
    if given.live:
        live(*given.live, given.point, given.batch_size)
        return
    peers = dict(one.split("=", 1) for one in given.peer)
    for architecture in given.architectures:
        settings = {name: getattr(given, name, architecture) for name in SETTINGS}
        having = {k: v for k, v in peers.items() if architecture == "topk" or k != "sparsify"}
        compare({"ours": sys.executable, **having}, settings, given.rounds)


if __name__ == "__main__":
    main()
