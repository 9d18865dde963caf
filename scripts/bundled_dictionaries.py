"""Trains the dictionaries that the package carries: two of each rule twin, from two seeds.

    .venv/bin/python scripts/bundled_dictionaries.py OUT    # runs of sae_train, and the assets

``follows_voice_sae`` and ``follows_voice_sae_1`` (likewise ``follows_text``) are of the stream
behind block 1 at the clip's positions, 4 × 96 latents, in half precision.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from hooked_alm.bundled import DICTIONARIES
from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary

TWINS = ("follows_voice", "follows_text")
SETTINGS = ("expansion=4", "n_rows=2000000")
POINT = "blocks.1.hook_resid_post"


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
            shutil.rmtree(folder := DICTIONARIES / name, ignore_errors=True)
            about = {key: stored.about[key] for key in ("seed", "spans", "prompt", "dead")}
            save_dictionary(
                stored.sae, folder, point=POINT, model=f"bundled:{twin}", about=about,
                dtype="float16",
            )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
