"""Tones for ``grounding`` on a tiny model of which one head carries everything."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuits_toy import write_tones
from hooked_alm import HookedALM
from hooked_alm.experiments.workbench import figures
from hooked_alm.experiments.workbench.executors import Executor
from stopped_runs import run_experiment

N_TONES = 12
PROMPTS = {
    "en": {
        "ask": "Sound? ", "label_only": "Say.", "obey": "Say {label}.", "mention": "Not {label}.",
        "choose": "Of {labels}.", "unrelated": "x",
    }
}  # fmt: skip
LABELS = {"en": {"q": "q", "z": "z"}}


@torch.no_grad()
def write_labelled_tones(folder: Path, checkpoint: Path) -> None:
    """As many tones, half of either label: those that the model rather answers it to."""
    model = HookedALM.from_pretrained(checkpoint)
    names = write_tones(folder, N_TONES)
    q, z = (model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "qz")
    logits = [model(model.prepare(str(folder / one), "Sound? Say q."))[0, -1] for one in names]
    order = np.argsort(np.argsort([float(one[z] - one[q]) for one in logits]))
    lines = [
        f"{name},{'qz'[int(n >= N_TONES // 2)]},en" for name, n in zip(names, order, strict=True)
    ]
    (folder / "table.csv").write_text("\n".join(["path,emotion,language", *lines]), "utf-8")


def settings_of(folder: Path, model: str = "model", **settings: Any) -> dict[str, Any]:
    """Of a run on these tones, in three units and one for their sound."""
    return {
        "model": str(folder / model), "audio": str(folder / "table.csv"), "prompts": PROMPTS,
        "labels": LABELS, "min_effect": 1e-4, "n_resamples": 1000, "align": "error",
        "batch_size": 4, **settings,
    }  # fmt: skip


def run_small(out: Path, executor: Executor | None = None, **settings: Any) -> None:
    """A run whose figures are small: drawing them takes longer."""
    figures.DOTS_PER_INCH = 30
    run_experiment("grounding", out, executor, **settings)
