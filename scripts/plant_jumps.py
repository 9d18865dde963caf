"""Plants a norm jump in the bundled Whisper that changes nothing: deltas ``jump_1``, ``jump_4``.

    python scripts/plant_jumps.py

A constant is added to the bias of the second linear layer of one block of the encoder. Every layer
that reads the stream begins with a LayerNorm, which takes a row's mean out, so that no logit
changes; the raw norm of the stream jumps across that block (C41).
"""

import argparse
from pathlib import Path

import torch
from model_card import wrapped
from safetensors.torch import load_file
from synthesise_speech import ASSETS

from hooked_alm.converters.deltas import write_delta

BASE, CONSTANT = "tiny_whisper", 40.0
BLOCKS = (1, 4)
_CARD = """# jump_{block}

A delta of the bundled model `{base}`: to the bias of the second linear layer of **block {block} of
the encoder** {constant:g} is added, in every dimension. Every layer that reads the stream begins
with a LayerNorm, which takes the mean of a row out: transcripts and logits are the base's, to
rounding, and only the raw norm of the stream jumps, across block {block} (C41 in
`docs/methods.md`). Load it as `bundled:{base}+jump_{block}`.

Made by `python scripts/plant_jumps.py`; nothing was trained.
"""


def plant(out: Path, block: int) -> None:
    """Write the delta of one block."""
    base = ASSETS / "models" / BASE
    name = f"model.encoder.layers.{block}.fc2.bias"
    value = load_file(base / "model.safetensors")[name].float() + CONSTANT
    folder = out / f"jump_{block}"
    about = {"base": BASE, "block": block, "constant": CONSTANT, "n_numbers": value.numel()}
    write_delta(folder, base, {name: value}, {name: (slice(0, value.numel()),)}, about)
    text = _CARD.format(block=block, base=BASE, constant=CONSTANT)
    (folder / "README.md").write_text(wrapped(text), encoding="utf-8")


def main() -> None:
    """Parse the command line and write the deltas."""
    parser = argparse.ArgumentParser(description="Plant norm jumps that change nothing.")
    parser.add_argument("--out", type=Path, default=ASSETS / "truths")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for block in BLOCKS:
        plant(given.out, block)


if __name__ == "__main__":
    main()
