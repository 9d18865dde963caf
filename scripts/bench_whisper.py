"""Time Whisper against Hugging Face, and its sweeps against the loop and against what is possible.

Random weights of the geometry of tiny, base or both; a spectrogram of noise and 40 tokens. Ratios
are of calls that alternate in one process, with their intervals. For sweeps, ``loop`` is the time
of one run with hooks, times the number of cells; ``allowed`` is what exact reuse permits, counted
in multiplications: a cell in the decoder runs what is behind its edit, and reads the memory's keys
and values that the base run has made; one in the encoder runs the blocks above, then all of the
decoder; a path from an encoder head into a decoder head's values makes those of one head.

    python scripts/bench_whisper.py [--sizes tiny base] [--pairs 30] [--rounds 6]
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_encoder_sweeps import measured
from bench_forward import paired_ratio
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import path_patch

SIZES = {"tiny": (4, 384, 6), "base": (6, 512, 8)}
"""Layers of each stack, width and heads."""
ROWS, TOKENS, VOCAB, MELS = 1500, 40, 51865, 80
METRIC = LogitDiff(3, 5)


def made(folder: Path, size: str) -> tuple[HookedALM, WhisperForConditionalGeneration]:
    """Ours and theirs, with the same weights."""
    n, d, heads = SIZES[size]
    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=MELS, d_model=d, encoder_layers=n, decoder_layers=n,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * d,
        decoder_ffn_dim=4 * d,
    )  # fmt: skip
    theirs = WhisperForConditionalGeneration(config).eval()
    theirs.generation_config = GenerationConfig(decoder_start_token_id=1, eos_token_id=2)
    theirs.save_pretrained(folder)
    return HookedALM.from_pretrained(str(folder)), theirs


def prompt(model: HookedALM, seed: int) -> ALMInput:
    """Noise, and 40 tokens."""
    draw = torch.Generator().manual_seed(seed)
    return model.encode(
        input_features=torch.randn(1, MELS, 2 * ROWS, generator=draw),
        decoder_input_ids=torch.randint(0, VOCAB, (1, TOKENS), generator=draw),
    )


def bench_forward(
    model: HookedALM, hf: WhisperForConditionalGeneration, size: str, n_pairs: int
) -> None:
    """Whole runs, the encoder anew every time; the decoder alone; with activations kept."""
    x = prompt(model, 0)
    inputs = model.hf_arguments(x)
    memory = model.run_with_cache(x, names_filter="hook_audio_embed")[1]["hook_audio_embed"]
    given = {**{k: v for k, v in inputs.items() if k != "input_features"},
             "encoder_outputs": (memory,)}  # fmt: skip
    ends = ("hook_resid_pre", "hook_resid_post", "_z")
    names = [n for n in model.hook_dict if "blocks." in n and n.endswith(ends)]

    def hooked() -> torch.Tensor:
        x.clips[0].forget()
        found: torch.Tensor = model(x)
        return found

    assert torch.equal(hooked(), hf(**inputs).logits)
    whole = partial(hf, **inputs, use_cache=False)
    decoder = partial(hf, **given, use_cache=False)
    for what, ours, theirs in (
        ("whole forward / HF sdpa", hooked, whole),
        ("decoder alone / HF sdpa", partial(model, x, memory=memory), decoder),
        ("run_with_cache(resid, z of both) / HF", partial(model.run_with_cache, x,
                                                         names_filter=names), whole),
    ):  # fmt: skip
        print(f"Whisper {size}: {what:<40} {paired_ratio(ours, theirs, n_pairs)}", flush=True)


def block(rows: int, d: int) -> dict[str, float]:
    """Multiplications of parts of a block over some rows; keys are counted where they are made."""
    return {"qkv": 3 * rows * d * d, "out": rows * d * d, "mlp": 8 * rows * d * d}


def costs(size: str) -> dict[str, float]:
    """Multiplications of what runs and cells are made of."""
    n, d, heads = SIZES[size]
    encoder, rows = block(ROWS, d), TOKENS
    own = {**block(rows, d), "attend": 2 * rows * rows / 2 * d,
           "cross q, out": 2 * rows * d * d, "cross attend": 2 * rows * ROWS * d}  # fmt: skip
    return {
        "stem": 3 * MELS * d * 2 * ROWS + 3 * d * d * ROWS,
        "encoder block": sum(encoder.values()) + 2 * ROWS * ROWS * d,
        "encoder behind z": encoder["out"] + encoder["mlp"],
        "memory's keys and values": n * 2 * ROWS * d * d,
        "decoder block": sum(own.values()),
        "decoder behind cross z": rows * d * d + own["mlp"],
        "cross queries and behind": own["cross q, out"] + own["cross attend"] + own["mlp"],
        "values of one head": ROWS * d * d / heads,
        "norm and message": ROWS * d * d / heads,
        "unembedding": rows * d * VOCAB,
    }


def bench_sweeps(model: HookedALM, size: str, rounds: int) -> None:
    """Heads of the cross-attention, heads of the encoder, and paths from the one to the other."""
    n, _, heads = SIZES[size]
    x, y = prompt(model, 0), prompt(model, 1)
    cost = costs(size)
    decoder = n * cost["decoder block"]
    # The loop has the encoder's output of its clip, and runs the decoder with its memory.
    run = cost["memory's keys and values"] + decoder + cost["unembedding"]
    above = [n - 1 - layer for layer in range(n)]
    cells = sum(heads * (cost["decoder behind cross z"] + a * cost["decoder block"]) for a in above)
    encoder = model.towards("encoder")
    rng = np.random.default_rng(0)

    def at_random() -> dict[str, Any]:
        return {"heads": [int(rng.integers(heads))], "layers": [int(rng.integers(n))]}

    decoding: dict[str, Any] = {"site": "cross_attn.z", "places": ["all"]}
    print(measured(
        f"Whisper {size}: heads of the cross-attention, every position", n * heads,
        n * heads * run / cells,
        partial(patch, model, x, y, METRIC, heads="each", **decoding),
        lambda: patch(model, x, y, METRIC, engine="hooks", **decoding, **at_random()), rounds,
    ), flush=True)  # fmt: skip
    whole = cost["stem"] + n * cost["encoder block"] + run
    cells = sum(
        heads * (cost["encoder behind z"] + a * cost["encoder block"]
                 + cost["memory's keys and values"] + decoder)
        for a in above
    )  # fmt: skip
    hearing: dict[str, Any] = {"site": "z", "places": ["audio"]}
    print(measured(
        f"Whisper {size}: heads of the encoder, whole clip", n * heads, n * heads * whole / cells,
        partial(patch, encoder, x, y, METRIC, heads="each", **hearing),
        lambda: patch(encoder, x, y, METRIC, engine="hooks", **hearing, **at_random()), rounds,
    ), flush=True)  # fmt: skip
    last, pairs = n - 1, heads * heads
    senders = f"audio.encoder.blocks.{last}.attn.hook_z"
    values = "blocks.0.cross_attn.hook_v"
    cells = heads * (cost["norm and message"] + heads * cost["values of one head"]) + pairs * (
        cost["cross queries and behind"] + (n - 1) * cost["decoder block"]
    )
    print(measured(
        f"Whisper {size}: encoder heads to values of decoder heads", pairs, pairs * run / cells,
        partial(path_patch, model, x, y, METRIC, f"{senders}[*]", f"{values}[*]", places=["all"]),
        lambda: path_patch(model, x, y, METRIC, f"{senders}[{rng.integers(heads)}]",
                           f"{values}[{rng.integers(heads)}]", places=["all"], engine="hooks"),
        rounds,
    ), flush=True)  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Run both for every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            model, hf = made(Path(scratch), size)
            bench_forward(model, hf, size, options.pairs)
            bench_sweeps(model, size, options.rounds)


if __name__ == "__main__":
    main()
