"""Time sweeps along an audio encoder against the loop of whole runs, and against what is possible.

A random Qwen2-Audio whose encoder has the geometry of Whisper-base, and a clip that fills its
window. ``loop`` is the time of one run with hooks, times the number of cells; ``ours`` that of the
sweep, base and donor runs left out on both sides. ``allowed`` is what exact reuse permits, counted
in multiplications: a cell runs what is behind its edit in its own block, the blocks above, the
projector, and the decoder from the first audio position on. ``reached`` is the measured ratio over
the allowed one.

    python scripts/bench_encoder_sweeps.py [--rounds 8] [--layers 6]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_forward import median_and_interval
from bench_sweeps import runs_timed
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch

ROWS, D, HEADS, MLP = 1500, 512, 8, 2048
DECODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
           "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000}  # fmt: skip
METRIC = LogitDiff(3, 5)


def made(folder: Path, n_layers: int) -> HookedALM:
    """The model."""
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", "max_position_embeddings": 4096, **DECODER},
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": D, "encoder_layers": n_layers,
            "encoder_attention_heads": HEADS, "encoder_ffn_dim": MLP, "num_mel_bins": 80,
            "max_source_positions": ROWS,
        },
        audio_token_index=999,
    )  # fmt: skip
    Qwen2AudioForConditionalGeneration(config).eval().save_pretrained(folder)
    return HookedALM.from_pretrained(str(folder))


def prompt(model: HookedALM, n_text: int = 20) -> ALMInput:
    """A clip of noise that fills the window, some text around it."""
    assert model.audio is not None
    ids = [1] * n_text + [999] * model.audio.n_tokens(2 * ROWS) + [2] * n_text
    return model.encode(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        input_features=torch.randn(1, 80, 2 * ROWS),
        feature_attention_mask=torch.ones(1, 2 * ROWS, dtype=torch.long),
    )


def block_cost(rows: int, keys: int, d: int, d_mlp: int, gated: bool) -> dict[str, float]:
    """Multiplications of a block, by part."""
    return {
        "qkv": 3 * rows * d * d, "attend": 2 * rows * keys * d, "out": rows * d * d,
        "mlp": (3 if gated else 2) * rows * d * d_mlp,
    }  # fmt: skip


def costs(n_layers: int, n_text: int = 20) -> tuple[dict[str, float], dict[str, float]]:
    """Multiplications of an encoder block, and of what else a run, or a cell, has."""
    block = block_cost(ROWS, ROWS, D, MLP, gated=False)
    d, d_mlp = DECODER["hidden_size"], DECODER["intermediate_size"]
    tokens = ROWS // 2

    def decoder(rows: int, every: int) -> float:
        # A causal block attends to half of what it could.
        part = block_cost(rows, every // 2, d, d_mlp, gated=True)
        return DECODER["num_hidden_layers"] * sum(part.values())

    every = tokens + 2 * n_text
    return block, {
        "stem": 3 * 80 * D * 2 * ROWS + 3 * D * D * ROWS,
        "projector": tokens * D * d,
        "decoder": decoder(every, every),
        "decoder of a cell": decoder(every - n_text, every),
    }


def allowed(cells: list[tuple[int, float]], n_layers: int) -> float:
    """Ratio of the loop to exact reuse: cells by their block and what of it they run."""
    block, rest = costs(n_layers)
    whole = sum(block.values())
    run = rest["stem"] + n_layers * whole + rest["projector"] + rest["decoder"]
    reuse = sum(
        own + (n_layers - 1 - layer) * whole + rest["projector"] + rest["decoder of a cell"]
        for layer, own in cells
    )
    return len(cells) * run / reuse


def measured(
    name: str, n_cells: int, limit: float, ours: Callable[..., Any], cell: Callable[[], Any],
    rounds: int,
) -> str:  # fmt: skip
    """The sweep and one cell of the loop in turn; ratios over the rounds."""
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            with runs_timed("cpu") as runs:
                start = time.perf_counter()
                (ours, cell)[which]()
                times[i, which] = time.perf_counter() - start - sum(runs)
    ratio, (low, high) = median_and_interval(n_cells * times[:, 1] / times[:, 0])
    seconds = np.median(times, axis=0)
    return (
        f"{name}: {n_cells} cells, ours {seconds[0]:.2f} s, a run {seconds[1]:.3f} s: "
        f"ratio {ratio:.2f} [{low:.2f}, {high:.2f}], allowed {limit:.2f}, "
        f"reached {ratio / limit:.2f} [{low / limit:.2f}, {high / limit:.2f}]"
    )


@torch.no_grad()
def main() -> None:
    """Run both sweeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = made(Path(scratch), options.layers)
    x, y = prompt(model), prompt(model)
    n, layers = options.layers, range(options.layers)
    block, _ = costs(n)
    behind_z = block["out"] + block["mlp"]
    run = model.towards("encoder"), x, y, METRIC
    rng = np.random.default_rng(0)

    def loop(**cell: Any) -> Any:
        return patch(*run, engine="hooks", **cell)

    heads = [(b, behind_z) for b in layers for _ in range(HEADS)]
    print(measured(
        "heads' z, whole clip", len(heads), allowed(heads, n),
        partial(patch, *run, site="z", heads="each", places=("audio",)),
        lambda: loop(site="z", heads=[int(rng.integers(HEADS))], layers=[int(rng.integers(n))],
                     places=("audio",)),
        options.rounds,
    ))  # fmt: skip
    windows = [Window(float(s), float(s + 1)) for s in range(0, 30, 5)]
    # The stream before a block: all of its rows run, and so do those above.
    streams = [(b, sum(block.values())) for b in layers for _ in windows]
    print(measured(
        "stream, windows of a second", len(streams), allowed(streams, n),
        partial(patch, *run, site="resid_pre", places=windows),
        lambda: loop(site="resid_pre", layers=[int(rng.integers(n))], places=windows[:1]),
        options.rounds,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
