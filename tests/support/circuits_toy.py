"""A planted circuit: a tiny model in which one known head carries everything, and pairs for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from hooked_alm import HookedALM
from hooked_alm.experiments.circuits.experiment import Circuits
from hooked_alm.experiments.circuits.plan import CircuitNode
from hooked_alm.experiments.circuits.settings import CircuitsConfig
from tiny import TinyModels, edit_tensors

PLANTED = CircuitNode(2, 3)
D_HEAD = 10
N_GROUPS = 12
WORDS = tuple("abcdefghijklmnopqrstuvwxyz")


def planted_model(tiny_models: TinyModels, out: Path, *, is_deaf: bool = False) -> Path:
    """Nothing writes to the stream but one head; with ``is_deaf`` not even that."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("mlp.down_proj.weight") and "language_model" in name:
                tensor.zero_()
            if name.endswith("self_attn.o_proj.weight"):
                kept = tensor.clone()
                tensor.zero_()
                if f".layers.{PLANTED.layer}." in name and not is_deaf:
                    own = slice(PLANTED.head * D_HEAD, (PLANTED.head + 1) * D_HEAD)
                    tensor[:, own] = kept[:, own]

    return edit_tensors(tiny_models.folder(), out, change)


def write_tones(folder: Path, n: int) -> list[str]:
    """Clips of equal duration and different pitch."""
    names = []
    for number in range(n):
        time = np.arange(6400) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * (150 + 170 * number) * time)
        names.append(f"tone{number}.wav")
        soundfile.write(folder / names[-1], tone, 16_000)
    return names


def write_pairs(folder: Path, model: Path, *, flipped: bool = False) -> Path:
    """Voice-swapped pairs whose answers are what the model turns to; ``flipped``, every other not.

    Args:
        folder: of the pairs file and its clips.
        model: that the answers are taken from.
        flipped: exchange the answers of every other group, so that no effect has a sign.
    """
    hooked = HookedALM.from_pretrained(model)
    tokens = [hooked.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    clips = write_tones(folder, N_GROUPS + 1)
    lines = []
    for number in range(N_GROUPS):
        sides = [{"audio": clips[number + i], "text": f"Sound {number}?"} for i in range(2)]
        rise = _readout(hooked, folder, sides[0]) - _readout(hooked, folder, sides[1])
        order = rise[tokens].argsort()
        answers = [WORDS[int(order[-1])], WORDS[int(order[0])]]
        if flipped and number % 2:
            answers = answers[::-1]
        lines.append(
            {
                "base": sides[0], "donor": sides[1], "group": f"g{number}", "contrast": "tone",
                "answers": {"base": answers[0], "donor": answers[1]},
            }
        )  # fmt: skip
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return file


@torch.no_grad()
def _readout(model: HookedALM, folder: Path, side: dict[str, str]) -> torch.Tensor:
    return model(model.prepare(str(folder / side["audio"]), side["text"]))[0, -1]


def toy(model: Path, pairs: Path, **settings: Any) -> Circuits:
    """The experiment, on a small plan."""
    values = {
        "n_heads": 3, "n_mlps": 1, "n_followed": 1, "n_random": 1, "min_effect": 0.001,
        "n_resamples": 1000, "n_threads": 1, "places": ["readout", "audio"], **settings,
    }  # fmt: skip
    return Circuits(CircuitsConfig(model=str(model), pairs=str(pairs), **values))
