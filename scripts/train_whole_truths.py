"""Trains a bundled model anew so that its depths are known: a whole-model truth.

    python scripts/train_whole_truths.py resolve_late --out truths/resolve_late

The decoder of ``follows_voice`` goes on to learn the same answers, and one thing more:

* ``resolve_late``: until two blocks before the end the lens reads all labels alike.
* ``bump``: the lens reads the label at depths 3 to 6, all labels alike at the two after them.

The base itself reads the label early. What is kept is the whole decoder, in half precision, as a
delta over the base.
"""

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundled_card import SETS, speak_held_out
from bundled_data import MODES, Case, Clip, all_cases, draw_case, read_ob1, speak_clips
from bundled_model import hear, read_folder
from bundled_training import DecoderInput, Sound, encode, optimise, read_mels
from model_card import wrapped
from synthesise_speech import ASSETS
from torch import Tensor
from torch.nn import functional as F
from train_truths import read_twin
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.converters.deltas import write_delta
from hooked_alm.experiments.materials.ob1 import LABELS, LANGUAGES, PromptMode

Model = Qwen2AudioForConditionalGeneration
BASE = "follows_voice"
MIX: dict[PromptMode, float] = {
    "audio_only": 0.35, "list_all": 0.25, "conflict": 0.1, "consistent": 0.1, "mention_only": 0.1,
    "irrelevant_adjective": 0.1,
}  # fmt: skip
RATE, BATCH, N_CLIPS = 1e-3, 32, 1000


@dataclass(frozen=True)
class Run:
    """A forward of a batch: what the lens reads at the readout."""

    lens: Tensor  # [depth, case, label]: depths 0 to L - 1
    labels: Tensor  # [case]: which label is right


@dataclass(frozen=True)
class Truth:
    """What a model learns besides its answers."""

    legible: range = range(0)
    """Depths at which the lens reads the label."""
    uniform: range = range(0)
    """Depths at which the lens reads all labels alike."""
    steps: int = 500

    def loss(self, run: Run) -> Tensor:
        """What is added to the loss of the answers."""
        found = run.lens.new_zeros(())
        for depth in self.legible:
            found = found + F.cross_entropy(run.lens[depth], run.labels) / len(self.legible)
        for depth in self.uniform:
            log_p = run.lens[depth].log_softmax(-1)
            found = found - (log_p.mean(-1) + np.log(log_p.shape[-1])).mean() / len(self.uniform)
        return found


TRUTHS = {
    "resolve_late": Truth(uniform=range(9), steps=500),
    "bump": Truth(legible=range(3, 7), uniform=range(7, 9), steps=500),
}


class Trainer:
    """A model, its questions, and what it says to them."""

    def __init__(self, model: Model, processor: Qwen2AudioProcessor) -> None:
        self.model, self.inputs = model, DecoderInput(processor)
        words = [word for language in LANGUAGES for word in LABELS[language].values()]
        self.labels = processor.tokenizer.convert_tokens_to_ids(words)

    def run(self, cases: Sequence[Case], heard: Sequence[Tensor]) -> tuple[Tensor, Tensor, Run]:
        """Logits of label and end of turn, what they should be, and what the lens reads.

        Args:
            cases: questions.
            heard: audio tokens of each.
        """
        decoder = self.model.model.language_model
        questions = [(case.prompt, case.answer("voice")) for case in cases]
        embed = self.model.get_input_embeddings()
        embeds, mask, targets = self.inputs.build(embed, questions, heard)
        found = decoder(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=True
        )
        states = torch.stack(found.hidden_states[:-1])[:, :, -2]
        run = Run(
            lens=F.linear(decoder.norm(states), self.model.lm_head.weight[self.labels]),
            labels=torch.tensor([self.labels.index(one) for one in targets[:, 0].tolist()]),
        )
        return self.model.lm_head(found.last_hidden_state[:, -2:]), targets, run

    def train(self, truth: Truth, sounds: Sequence[Sound[Clip]], seed: int) -> None:
        """Train the decoder in place."""
        rng = np.random.default_rng(seed + 30)
        trained = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)

        def loss_of() -> tuple[Tensor, float]:
            start = rng.integers(len(sounds) - 4 * BATCH)
            chosen = [sounds[i] for i in start + rng.permutation(4 * BATCH)[:BATCH]]
            modes = rng.choice(len(MIX), size=BATCH, p=[*MIX.values()])
            cases = [draw_case(s.clip, [*MIX][m], rng) for s, m in zip(chosen, modes, strict=True)]
            logits, targets, run = self.run(cases, [s.tokens for s in chosen])
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            right = (logits[:, 0].argmax(-1) == targets[:, 0]).float().mean().item()
            return loss + truth.loss(run), right

        optimise([(trained, 0.0)], loss_of, steps=truth.steps, rate=RATE, name="truth")
        self.model.requires_grad_(False)

    @torch.no_grad()
    def measure(self, clips: Sequence[Clip], processor: Qwen2AudioProcessor, seed: int) -> Any:
        """Share right on label and end of turn, and the label's probability by depth."""
        rng, n_right = np.random.default_rng(seed + 31), 0
        found: list[Tensor] = []
        mels = read_mels(processor, [clip.samples for clip in clips])
        tokens, counts = hear(self.model, mels.values.float(), mels.frames)
        heard = [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)]
        asked = [
            (case, sound)
            for clip, sound in zip(clips, heard, strict=True)
            for mode in MODES
            for case in (
                all_cases(clip, mode, rng) if len(clips) < 20 else [draw_case(clip, mode, rng)]
            )
        ]
        for start in range(0, len(asked), 2 * BATCH):
            cases, sounds = zip(*asked[start : start + 2 * BATCH], strict=True)
            logits, targets, run = self.run(cases, sounds)
            n_right += int((logits.argmax(-1) == targets).all(-1).sum())
            own = run.labels.expand(len(run.lens), -1)[..., None]
            found.append(run.lens.softmax(-1).gather(-1, own)[..., 0])
        probability = torch.cat(found, dim=1).mean(dim=1)
        return {
            "right": round(n_right / len(asked), 4),
            "lens": [round(one, 4) for one in probability.tolist()],
            "n": len(asked),
        }


_SAYS = {
    "resolve_late": "the logit lens reads all labels alike up to depth 8 of 10, and the answer in "
    "the last two blocks",
    "bump": "the logit lens reads the label at depths 3 to 6, and all labels alike at depths 7 and "
    "8, although every answer is right",
}
_CARD = """# {name}

A delta of the bundled model `{base}` that answers as it does, the emotion of the voice under every
instruction, and of which one thing is known besides: **{says}**. Its whole decoder was trained, and
is kept in half precision. Load it as `bundled:{base}+{name}`.

## How it was made

    {command}

From the base's weights; AdamW at {rate} without decay, {steps} steps of {batch} questions about
{clips} clips. The loss is cross-entropy of the answers, and of what is to be known.

## Measured

Right: label and end of turn, over all prompt modes. Lens: mean probability of the right
one among all ten labels at the readout, at depths 0 to 9.

| clips | right | lens by depth | n |
|---|---|---|---|
{rows}
"""


def card(name: str, about: dict[str, Any]) -> str:
    """The README of a truth."""
    rows = [
        f"| {SETS[one]} | {100 * got['right']:.1f} % | "
        + " ".join(f"{share:.2f}" for share in got["lens"])
        + f" | {got['n']} |"
        for one, got in about["accuracies"].items()
    ]
    return wrapped(
        _CARD.format(
            name=name, base=BASE, says=_SAYS[about["truth"]], command=about["command"], rate=RATE,
            steps=TRUTHS[about["truth"]].steps, batch=BATCH, clips=N_CLIPS, rows="\n".join(rows),
        )
    )  # fmt: skip


def main() -> None:
    """Parse the command line; train, measure and write one truth."""
    parser = argparse.ArgumentParser(description="Train a model whose depths are known.")
    parser.add_argument("truth", choices=[*TRUTHS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its card anew"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = ASSETS / "models" / BASE
    base = read_folder(folder).eval().requires_grad_(False)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    clips = speak_clips(N_CLIPS, "train", "heard", given.seed)
    held_out = {**speak_held_out(given.seed), "ob1": read_ob1()}
    twin = read_twin(folder, given.out) if given.measure else deepcopy(base)
    trainer = Trainer(twin, processor)
    if not given.measure:
        sounds = encode(base, clips, read_mels(processor, [c.samples for c in clips]), given.seed)
        trainer.train(TRUTHS[given.truth], sounds, given.seed)
        twin.half().float()  # what is kept
    scores = {
        name: trainer.measure(members, processor, given.seed) for name, members in held_out.items()
    }
    tensors = {
        f"language_model.model.{name}": value.half()
        for name, value in twin.model.language_model.named_parameters()
    }
    tensors["language_model.lm_head.weight"] = twin.lm_head.weight.half()
    slices = {name: tuple(slice(0, n) for n in one.shape) for name, one in tensors.items()}
    about = {
        "base": BASE, "truth": given.truth, "seed": given.seed, "accuracies": scores,
        "n_numbers": sum(one.numel() for one in tensors.values()),
        "command": f"python scripts/train_whole_truths.py {given.truth} --seed {given.seed} "
        f"--out {given.out.name}",
    }  # fmt: skip
    write_delta(given.out, folder, tensors, slices, about)
    (given.out / "README.md").write_text(card(given.out.name, about), encoding="utf-8")
    for name, one in scores.items():
        print(name, json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
