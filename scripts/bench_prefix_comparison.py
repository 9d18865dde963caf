"""Time and memory of ``prefix_comparison`` at full vocabulary, depth and length, on a narrow model.

A random Qwen2 with 28 blocks of width 64 and a vocabulary of 151 936 reads one continuation of 2000
tokens after two prefixes. Loading is left out: peak memory is what the run adds to the loaded
model. Holding both runs' logits at every depth would take depths x tokens x vocabulary x 2 numbers.

    python scripts/bench_prefix_comparison.py [--tokens 2000] [--vocab 151936] [--layers 28]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from bench_forward import memory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hooked_alm import HookedALM
from hooked_alm.experiments.prefix_comparison.experiment import PrefixComparison
from hooked_alm.experiments.prefix_comparison.settings import PrefixComparisonConfig
from hooked_alm.experiments.workbench import runner


def make_checkpoint(folder: Path, vocab: int, n_layers: int) -> None:
    """A random narrow model, and a tokenizer that makes every byte a token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=n_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=32_768,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)


def write_items(file: Path, n_tokens: int, n_items: int) -> None:
    """Items in the form of a code agent's runs: prefixes of 1000 and 500 tokens."""
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        letters = torch.randint(ord("a"), ord("z") + 1, (n,), generator=generator).tolist()
        return "".join(map(chr, letters))

    lines = []
    for number in range(n_items):
        conditions = {
            "agentic": {"prefix": [["spec", text(500)], ["tool_response", text(500)]]},
            "assisted": {"prefix": [["spec", text(500)]]},
        }
        lines.append(
            {"id": f"item{number}", "continuation": text(n_tokens), "conditions": conditions}
        )
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")


def main() -> None:
    """Run the experiment once, and print its time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--items", type=int, default=1)
    parser.add_argument("--max-bytes", type=int, default=2**28)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, items = Path(scratch) / "model", Path(scratch) / "items.jsonl"
        make_checkpoint(folder, options.vocab, options.layers)
        write_items(items, options.tokens, options.items)
        config = PrefixComparisonConfig(
            model=str(folder), items=str(items), interventions=(), pos_modes=("as_run",),
            max_bytes=options.max_bytes, n_threads=1,
        )  # fmt: skip
        experiment = PrefixComparison(config)
        # Once before, for imports and lazily made tables.
        HookedALM.from_pretrained(str(folder))(torch.ones(1, 8, dtype=torch.long))
        experiment.identify()
        experiment.load()
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory("VmRSS"), time.perf_counter()
        for unit in experiment.units():
            experiment.measure(unit)
        seconds = (time.perf_counter() - began) / options.items
        grown = memory("VmHWM") - before
        whole = 4 * 2 * (options.layers + 1) * options.tokens * options.vocab
        print(
            f"{options.layers} layers, {options.tokens} tokens, vocabulary {options.vocab}, budget "
            f"{options.max_bytes / 2**20:.0f} MiB: {seconds:.0f} s an item on one thread, peak "
            f"memory grew by {grown / 2**20:.0f} MiB; all logits would be {whole / 2**30:.0f} GiB"
        )
        began = time.perf_counter()
        run = runner.run(PrefixComparison(config), Path(scratch) / "run")
        print(f"the whole command, report included: {time.perf_counter() - began:.0f} s")
        size = sum(path.stat().st_size for path in run.path.rglob("units/*.json"))
        print(f"shards: {size / 2**20 / options.items:.1f} MiB an item")


if __name__ == "__main__":
    main()
