"""Time the measurement of head norms against a plain Hugging Face forward over the same batches.

Both models hold the same random weights, of LLaMA 3.2's geometry at a smaller size, in one process;
calls alternate, so that noise of the machine hits both. The measurement is everything that
``head_statistics`` does with a batch: the hooked run, the norms, and their moments. It is compared
with the forward a script would make (with logits), and with the decoder alone (without). Prints
medians of the pairwise ratios with their bootstrap interval.

    python scripts/bench_head_statistics.py [--pairs 30] [--positions 160] [--dtype float32]
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_forward import paired_ratio
from transformers import LlamaConfig, LlamaForCausalLM

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.reading.head_norms import OUTPUT, HeadMeter, Norms, TokenAgg
from hooked_alm.methods.statistics.moments import Moments

HEADS_PER_KV_HEAD = 4
AGGREGATIONS: tuple[TokenAgg, ...] = ("last", "all")


def make_checkpoint(folder: Path, d_model: int, n_layers: int) -> None:
    """A random LLaMA 3.2: heads of 64, one kv head for four, tied head, its own rope scaling."""
    n_heads = d_model // 64
    config = LlamaConfig(
        hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads // HEADS_PER_KV_HEAD,
        head_dim=64, vocab_size=8192, max_position_embeddings=16384, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def batch(n_rows: int, n_pos: int) -> dict[str, torch.Tensor]:
    """Left-padded rows of unequal length, as questions are."""
    ids = torch.randint(1, 8192, (n_rows, n_pos))
    n_pads = torch.linspace(0, n_pos // 4, n_rows).long()[:, None]
    mask = (torch.arange(n_pos) >= n_pads).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def summed_up(norms: Norms) -> list[Moments]:
    """Moments of a batch, as the experiment keeps them."""
    kept = [Moments() for _ in range(4)]
    for moments, values in zip(kept, (*norms.heads.values(), norms.kept), strict=True):
        moments.update(values)
    return kept


@torch.no_grad()
def z_norms(hf: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """‖z‖ at the last token, from hooks on the output projections: ``[sample, layer, head]``."""
    found: list[torch.Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for layer in hf.model.layers
    ]
    hf(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    z = torch.stack([one[:, -1].unflatten(-1, (-1, 64)) for one in found], dim=1)
    return z.float().norm(dim=-1).numpy()


@torch.no_grad()
def bench(folder: Path, positions: Sequence[int], n_rows: int, n_pairs: int, dtype: str) -> None:
    """Print a line for every length, aggregation and opponent."""
    hf = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model = HookedALM.from_pretrained(str(folder), dtype=dtype)
    for n_pos in positions:
        inputs = batch(n_rows, n_pos)
        x: ALMInput = model.encode(**inputs)
        # The same work, to the bit.
        assert np.array_equal(HeadMeter(model)(x).heads[OUTPUT], z_norms(hf, inputs))
        opponents = {
            "HF forward": lambda inputs=inputs: hf(**inputs, use_cache=False).logits,
            "HF decoder alone": lambda inputs=inputs: hf.model(**inputs, use_cache=False),
        }
        for token_agg in AGGREGATIONS:
            meter = HeadMeter(model, token_agg=token_agg)
            for name, call in opponents.items():
                ratio = paired_ratio(lambda m=meter, x=x: summed_up(m(x)), call, n_pairs)
                print(f"{n_rows} x {n_pos}, {dtype}, {token_agg:<4} / {name:<16}  {ratio}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--positions", type=int, nargs="+", default=[160])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch), options.d_model, options.layers)
        bench(Path(scratch), options.positions, options.rows, options.pairs, options.dtype)


if __name__ == "__main__":
    main()
