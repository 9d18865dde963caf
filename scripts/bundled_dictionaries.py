"""Trains the dictionaries that the package carries: two of each model, from two seeds.

    .venv/bin/python scripts/bundled_dictionaries.py OUT        # runs of sae_train, and the assets
    .venv/bin/python scripts/bundled_dictionaries.py --whisper

``follows_voice_sae`` and ``follows_voice_sae_1`` (likewise ``follows_text``) are of the stream
behind block 1 at the clip's positions; ``tiny_whisper_sae`` and ``tiny_whisper_sae_1`` of the last
depth of its encoder, on clips of speech and of none that are drawn for them. 4 × 96 latents, in
half precision.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from train_whisper_truths import drawn_no_speech, held_out_sentences
from whisper_data import draw_recordings

from hooked_alm import ALMInput, DictionaryTrainer, HookedALM
from hooked_alm.bundled import DICTIONARIES
from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.training import DictionaryTraining

TWINS = ("follows_voice", "follows_text")
SETTINGS = ("expansion=4", "n_rows=2000000")
POINT = "blocks.1.hook_resid_post"
WHISPER, DEPTH = "tiny_whisper", "audio.encoder.blocks.5.hook_resid_post"
N_CLIPS, N_STEPS, STEP_ROWS, SEED = 200, 500, 1024, 90
"""Clips of either kind that Whisper hears, and steps over their rows."""


def save(stored: SparseAutoencoder, name: str, point: str, model: str, about: Any) -> None:
    """Writes an asset in half precision."""
    shutil.rmtree(folder := DICTIONARIES / name, ignore_errors=True)
    save_dictionary(
        stored, folder, point=point, model=f"bundled:{model}", about=about, dtype="float16"
    )


def whisper() -> None:
    """Trains and writes those of the Whisper."""
    model = HookedALM.from_pretrained(f"bundled:{WHISPER}")
    without = frozenset(held_out_sentences(7))
    clips = draw_recordings(N_CLIPS, "heard", SEED, without)
    clips += drawn_no_speech(N_CLIPS, SEED + 1)
    parts = []
    for start in range(0, len(clips), 20):
        x = ALMInput.joined([model.prepare(one.samples) for one in clips[start : start + 20]])
        parts.append(rows_of(model, x, DEPTH)["encoder"].values[DEPTH])
    rows = torch.cat(parts)
    cfg = DictionaryConfig(d_in=96, d_sae=384, architecture="batchtopk", k=8)
    for seed, name in enumerate((f"{WHISPER}_sae", f"{WHISPER}_sae_1")):
        plan = DictionaryTraining(n_steps=N_STEPS, batch_size=STEP_ROWS)
        trainer, draw = DictionaryTrainer(cfg, plan, rows, seed=seed), torch.Generator()
        draw.manual_seed(seed)
        for _ in range(N_STEPS):
            step = trainer.step(rows[torch.randint(len(rows), (STEP_ROWS,), generator=draw)])
        print(f"{name}: {len(rows)} rows, unexplained {step.fvu:.3f}, dead {step.dead}", flush=True)
        about = {"seed": seed, "spans": ["audio"], "n_rows": len(rows), "n_steps": N_STEPS}
        save(trainer.trained(), name, DEPTH, WHISPER, about)


def main(out: Path) -> None:
    """Trains what is not trained yet, and writes the assets."""
    for twin in TWINS:
        words = [word for one in SETTINGS for word in ("-s", one)]
        command = [str(Path(sys.executable).with_name("hooked-alm")), "run", "sae_train"]
        run = out / twin
        subprocess.run(
            [*command, "--model", f"bundled:{twin}", "--out", str(run), *words], check=True
        )
        for seed, name in enumerate((f"{twin}_sae", f"{twin}_sae_1")):
            stored = load_dictionary(run / "sae" / POINT / f"seed_{seed}")
            about = {key: stored.about[key] for key in ("seed", "spans", "prompt", "dead")}
            save(stored.sae, name, POINT, twin, about)


if __name__ == "__main__":
    torch.set_num_threads(1)
    whisper() if sys.argv[1] == "--whisper" else main(Path(sys.argv[1]))
