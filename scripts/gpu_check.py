"""What an accelerator does at published size: parity, sweeps, an experiment and more, one JSON.

Random weights of the size of Qwen2-Audio in bf16, without peers: four minutes on an H200. Called by
``bench_sweeps.py --gpu-check OUT``, whose other options give other sizes.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_sweeps
import numpy as np
import torch
from sweep_peers import METRIC, Models, Sizes, make_hearing_checkpoint

from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.workbench.runner import run
from hooked_alm.methods.attribution.edges import attribute_edges

N_TOKENS = 32
N_ATTRIBUTED = 200
"""Positions, the last ones, that edges are attributed at."""
REPEATS = 5


def check(out: Path, sizes: Sizes) -> dict[str, Any]:
    """Run everything, and write one JSON with the figures."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = Models(sizes, Path(folder))
    found: dict[str, Any] = {"machine": bench_sweeps.machine(sizes)}
    found["load_s"] = time.monotonic() - begun
    for name, part in (
        ("parity", parity), ("sweeps", sweeps), ("attribution", attribution),
        ("generation", generation), ("experiment", experiment),
    ):  # fmt: skip
        start = time.monotonic()
        found[name] = part(models)
        found[f"{name}_s"] = time.monotonic() - start
        # As it goes: a call that runs out of time leaves what it has.
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


@torch.no_grad()
def parity(models: Models) -> dict[str, Any]:
    """Whether the logits of both prompts are Hugging Face's, bit for bit."""
    ours = [
        models.model(stream, start_at_layer=0, inputs=x)
        for stream, x in zip(models.embedded, (models.base, models.donor), strict=True)
    ]
    theirs = [models.forward(which) for which in (0, 1)]
    equal = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return {"is_equal": all(equal), "max_difference": worst}


def sweeps(models: Models) -> list[dict[str, Any]]:
    """Seconds of every sweep, alone and with its runs, in forwards of Hugging Face."""
    forward = seconds(models, models.forward)
    positions = bench_sweeps.middles(4, models.sizes.positions)
    rows = []
    for work in bench_sweeps.works(models, positions, bench_sweeps.WORKS):
        if not work.cells:
            continue
        result = work.call()
        with bench_sweeps.runs_timed(models.sizes.device) as runs:
            whole = seconds(models, work.call)
        alone = whole - float(np.median(runs))
        noise = None if result.noise is None else float(np.sqrt((result.noise**2).mean()))
        rows.append({
            "work": work.name, "n_cells": len(work.cells), "forward_s": forward, "whole_s": whole,
            "sweep_s": alone, "whole_forwards": whole / forward, "sweep_forwards": alone / forward,
            "model_forwards": work.model_forwards(models.sizes),
            "ms_per_cell": 1e3 * alone / len(work.cells), "noise": noise,
            "effect_std": float(np.nanstd(result.effect)),
            "operations": bench_sweeps.operations(work.call, models.sizes.device),
        })  # fmt: skip
    return rows


def attribution(models: Models) -> list[dict[str, Any]]:
    """Seconds of EAP from all heads to all queries, and of EAP-IG to every receiver."""
    n = models.sizes.positions
    pair = models.model, models.base, models.donor, METRIC, "blocks.*.attn.hook_z[*]"
    queries = [f"blocks.*.attn.hook_{part}_input[*]" for part in "qkv"]
    place = tuple(range(max(n - N_ATTRIBUTED, 0), n))
    rows = []
    for name, to, options in (
        ("eap, z to q, 32 checked", queries[:1], {"check": 32}),
        ("eap-ig, 5 steps, z to q, k, v, mlp", [*queries, "blocks.*.hook_mlp_in"],
         {"method": "eap-ig", "steps": 5}),
    ):  # fmt: skip
        call = partial(attribute_edges, *pair, to, places=[place], **options)
        found = call()
        spent = seconds(models, call, repeats=2)
        pearson = None if found.checked is None else found.pearson
        rows.append({"work": name, "n_positions": len(place), "seconds": spent, "pearson": pearson,
                     "operations": bench_sweeps.operations(call, models.sizes.device)})  # fmt: skip
    return rows


@torch.no_grad()
def generation(models: Models) -> dict[str, Any]:
    """Whether greedy tokens are Hugging Face's, and seconds of both."""
    x = models.base
    given = models.generation_inputs()
    options = {"max_new_tokens": N_TOKENS, "do_sample": False}
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: models.model.generate(x, return_type="tokens", **options),
        "hf": lambda: models.hf.generate(**given, **options),
    }
    tokens = {name: call() for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):  # in turn, so that noise of the machine hits both
        for name, call in calls.items():
            spent[name].append(seconds(models, call, repeats=1))
    ours, theirs = (tokens[name][0].tolist() for name in ("ours", "hf"))
    ratio = np.median(np.array(spent["ours"]) / np.array(spent["hf"]))
    return {
        "is_equal": ours[-N_TOKENS:] == theirs[-N_TOKENS:],
        "ours_s": float(np.median(spent["ours"])), "hf_s": float(np.median(spent["hf"])),
        "ratio": float(ratio),
    }  # fmt: skip


def experiment(models: Models) -> dict[str, Any]:
    """Seconds of ``emotion_conflict`` on the bundled clips, one donor, all blocks and spans.

    Its model has the bundled one's ears, words and processor, and a decoder of these sizes.
    """
    with tempfile.TemporaryDirectory() as root:
        # As the hub's cache names folders: weights of gigabytes are not hashed.
        folder = Path(root) / "snapshots" / ("0" * 40)
        make_hearing_checkpoint(folder, models.sizes)
        begun = time.monotonic()
        config = EmotionConflictConfig(
            model=str(folder), device=models.sizes.device, dtype=models.sizes.dtype,
            modes=("audio_only", "conflict"), donors=("text_swap",), n_resamples=1000,
        )  # fmt: skip
        done = run(EmotionConflict(config), Path(root) / "run")
        spent = time.monotonic() - begun
        patching, runs = (done.read_table(name) for name in ("patching", "runs"))
    sweeps = patching.drop_duplicates(["clip", "target", "donor"])
    return {
        "name": EmotionConflict.name, "seconds": spent, "n_cells": len(patching),
        "n_sweeps": len(sweeps), "n_runs": len(runs), "n_tokens": float(runs.n_tokens.mean()),
        "noise": float(sweeps.noise.median()), "shift_std": float(patching["shift"].std()),
    }  # fmt: skip


def seconds(models: Models, call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of a call, that of the device among them."""
    watch = bench_sweeps.Watch(models.sizes.device)
    for _ in range(repeats):
        watch("call", call)
    return float(np.median(watch.seconds["call"]))


def published(device: str) -> Sizes:
    """Sizes of the published Qwen2-Audio's decoder, but for its MLP and vocabulary."""
    return Sizes(layers=32, heads=32, kv_heads=32, d_model=4096, device=device, dtype="bfloat16")
