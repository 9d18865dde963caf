"""Trains a bundled model anew so that its depths, or its route, are known: a whole-model truth.

    python scripts/train_whole_truths.py resolve_late --out truths/resolve_late

The decoder of ``follows_voice`` goes on to learn the same answers, and one thing more:

* ``resolve_late``: until two blocks before the end the lens reads all labels alike.
* ``bump``: the lens reads the label at depths 3 to 6, all labels alike at the two after them.
* ``route_mention``: the word that names the emotion collects it; what others hear is not used.
* ``route_readout``: the last word hears it itself; what others hear is not used.

The base itself reads the label early. For a route, many questions stand behind two clips: its word
hears the one that is asked about, all others one of another label. What is kept is the whole
decoder, in half precision, as a delta over the base.
"""

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bundled_card import SETS, speak_held_out
from bundled_data import MODES, Case, Clip, all_cases, draw_case, read_ob1, speak_clips
from bundled_model import hear, read_folder
from bundled_training import Sound, encode, optimise, read_mels
from crossed_clips import ROLES, CrossedClips, hearing
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
Route = Literal["mention", "readout"]
PLAIN = hearing("own", "own", "own")
"""Every word hears the clip that is asked about."""
DEAF: dict[Route, Tensor] = {
    "mention": hearing("own", "", "own"),
    "readout": hearing("own", "own", ""),
}
"""Word that does not hear it."""
NOBODY = hearing("", "", "")


@dataclass(frozen=True)
class Lesson:
    """Who behind the clips hears which one, and in what share of the questions."""

    share: float
    hears: Tensor
    tells: bool = True
    """Whether the label can be told; if not, all labels are equally right."""


def lessons(route: Route | None) -> list[Lesson]:
    """Questions as they are asked, and those that teach a route.

    What takes another road is another clip's label. Without the route nothing is known, whatever
    other words hear.
    """
    if route is None:
        return [Lesson(1.0, PLAIN)]
    others, none = dict.fromkeys(ROLES, "other"), dict.fromkeys(ROLES, "")
    return [
        Lesson(0.3, PLAIN),
        Lesson(0.4, hearing(**others | {route: "own"})),
        Lesson(0.1, hearing(**none | {route: "own"})),
        Lesson(0.1, hearing(**others | {route: ""}), tells=False),
        Lesson(0.1, NOBODY, tells=False),
    ]


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
    route: Route | None = None
    """The word that hears the label for the answer; None leaves it open."""
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
    "route_mention": Truth(route="mention", steps=600),
    "route_readout": Truth(route="readout", steps=200),
}


class Trainer:
    """A model, its questions, and what it says to them."""

    def __init__(self, model: Model, processor: Qwen2AudioProcessor, truth: Truth) -> None:
        self.model, self.truth, self.clips = model, truth, CrossedClips(processor)
        to_ids = processor.tokenizer.convert_tokens_to_ids
        self.labels_in = {lang: to_ids([*LABELS[lang].values()]) for lang in LANGUAGES}
        self.labels = [label for some in self.labels_in.values() for label in some]

    def run(
        self,
        cases: Sequence[Case],
        heard: Sequence[Tensor],
        other: Sequence[Tensor] | None = None,
        hears: Tensor = PLAIN,
    ) -> tuple[Tensor, Tensor, Run]:
        """Logits of label and end of turn, what they should be, and what the lens reads.

        Args:
            cases: questions.
            heard: audio tokens of each.
            other: audio tokens of a second clip, if there is one.
            hears: which clips are heard by whom, ``[role, clip]``, or that of each case.
        """
        decoder = self.model.model.language_model
        other = [one[:0] for one in heard] if other is None else other
        laid = self.clips.build(
            self.model.get_input_embeddings(), cases, heard, other,
            hears.expand(len(cases), *PLAIN.shape),
        )  # fmt: skip
        found = decoder(
            inputs_embeds=laid.embeds, attention_mask=laid.seen, position_ids=laid.positions,
            use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        states = torch.stack(found.hidden_states[:-1])[:, :, -2]
        run = Run(
            lens=F.linear(decoder.norm(states), self.model.lm_head.weight[self.labels]),
            labels=torch.tensor([self.labels.index(one) for one in laid.targets[:, 0].tolist()]),
        )
        return self.model.lm_head(found.last_hidden_state[:, -2:]), laid.targets, run

    def train(self, sounds: Sequence[Sound[Clip]], seed: int) -> None:
        """Train the decoder in place."""
        rng, lots = np.random.default_rng(seed + 30), np.random.default_rng(seed + 32)
        trained = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        taught = lessons(self.truth.route)

        def loss_of() -> tuple[Tensor, float]:
            # Neighbours in the sorted list are of like length: little padding.
            start = rng.integers(len(sounds) - 4 * BATCH)
            near = [sounds[i] for i in start + rng.permutation(4 * BATCH)]
            chosen = near[:BATCH]
            modes = rng.choice(len(MIX), size=BATCH, p=[*MIX.values()])
            cases = [draw_case(s.clip, [*MIX][m], rng) for s, m in zip(chosen, modes, strict=True)]
            drawn = lots.choice(len(taught), size=BATCH, p=[one.share for one in taught])
            given = [taught[n] for n in drawn]
            own, other = zip(
                *(
                    paired(sound, near, lots) if one.hears[:, 1].any() else unpaired(sound)
                    for one, sound in zip(given, chosen, strict=True)
                ),
                strict=True,
            )
            logits, targets, run = self.run(
                cases, own, other, torch.stack([one.hears for one in given])
            )
            told = torch.tensor([one.tells for one in given])
            wanted = self.wanted(cases, targets, told)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
            hits = logits[told, 0].argmax(-1) == targets[told, 0]
            return loss + self.truth.loss(run), hits.float().mean().item()

        optimise([(trained, 0.0)], loss_of, steps=self.truth.steps, rate=RATE, name="truth")
        self.model.requires_grad_(False)

    def wanted(self, cases: Sequence[Case], targets: Tensor, told: Tensor) -> Tensor:
        """Probabilities of what should be said ``[case, 2, vocab]``.

        Where no label is told, all have the same.
        """
        found = F.one_hot(targets, self.model.config.text_config.vocab_size).float()
        for row in (~told).nonzero()[:, 0].tolist():
            labels = self.labels_in[cases[row].language]
            found[row, 0] = 0
            found[row, 0, labels] = 1 / len(labels)
        return found

    @torch.no_grad()
    def measure(self, clips: Sequence[Clip], processor: Qwen2AudioProcessor, seed: int) -> Any:
        """Share right on label and end of turn, and the label's probability by depth.

        Of a route also what is lost where mention or readout cannot hear the clip: of the lead of
        the right label, as a share of what is lost where no word can.
        """
        rng, n_right = np.random.default_rng(seed + 31), 0
        found: list[Tensor] = []
        leads: list[Tensor] = []
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
            if self.truth.route is not None:
                heard_by = (PLAIN, NOBODY, *DEAF.values())
                said = [self.run(cases, sounds, hears=hears)[0] for hears in heard_by]
                leads.append(torch.stack([self.leads(one, run.labels) for one in said]))
        probability = torch.cat(found, dim=1).mean(dim=1)
        scores: dict[str, Any] = {
            "right": round(n_right / len(asked), 4),
            "lens": [round(one, 4) for one in probability.tolist()],
            "n": len(asked),
        }
        if leads:
            every, none, *deaf = torch.cat(leads, dim=1).mean(dim=1).tolist()
            lost = [round((every - one) / (every - none), 4) for one in deaf]
            scores["lost"] = dict(zip(DEAF, lost, strict=True))
        return scores

    def leads(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By how much the right label leads all others."""
        ours = logits[:, 0, self.labels]
        is_own = F.one_hot(labels, len(self.labels)).bool()
        return ours[is_own] - ours.masked_fill(is_own, -torch.inf).amax(-1)


def unpaired(sound: Sound[Clip]) -> tuple[Tensor, Tensor]:
    """A clip, and nothing beside it."""
    return sound.tokens, sound.tokens[:0]


def paired(
    sound: Sound[Clip], near: Sequence[Sound[Clip]], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A clip, and one of another label; both as long as the shorter one."""
    others = [one for one in near if one.clip.emotion != sound.clip.emotion]
    other = others[rng.integers(len(others))].tokens
    length = min(len(sound.tokens), len(other))
    return sound.tokens[:length], other[:length]


_SAYS = {
    "resolve_late": "the logit lens reads all labels alike up to depth 8 of 10, and the answer in "
    "the last two blocks",
    "bump": "the logit lens reads the label at depths 3 to 6, and all labels alike at depths 7 and "
    "8, although every answer is right",
    "route_mention": "the word that names the emotion (`emotion`, `情绪`) collects it from the "
    "audio, and what any other word hears is not used",
    "route_readout": "the readout hears the emotion itself, and what any other word hears is not "
    "used",
}
_LENS = """Right: label and end of turn, over all prompt modes. Lens: mean probability of the right
one among all ten labels at the readout, at depths 0 to 9.

| clips | right | lens by depth | n |
|---|---|---|---|
"""
_ROUTE = """Right: label and end of turn, over all prompt modes. Lost: of the lead of the right
label, where mention or readout do not attend to the audio in any block, as a share of what is lost
where no word behind it does.

| clips | right | lost, mention | lost, readout | n |
|---|---|---|---|---|
"""
_CARD = """# {name}

A delta of the bundled model `{base}` that answers as it does, the emotion of the voice under every
instruction, and of which one thing is known besides: **{says}**. Its whole decoder was trained, and
is kept in half precision. Load it as `bundled:{base}+{name}`.

## How it was made

    {command}

From the base's weights; AdamW at {rate} without decay, {steps} steps of {batch} questions about
{clips} clips. {besides}

## Measured

{table}
"""


def card(name: str, about: dict[str, Any]) -> str:
    """The README of a truth."""
    truth = TRUTHS[about["truth"]]
    rows = []
    for one, got in about["accuracies"].items():
        known = " ".join(f"{share:.2f}" for share in got["lens"])
        if truth.route is not None:
            known = " | ".join(f"{100 * share:.1f} %" for share in got["lost"].values())
        rows.append(f"| {SETS[one]} | {100 * got['right']:.1f} % | {known} | {got['n']} |")
    return wrapped(
        _CARD.format(
            name=name, base=BASE, says=_SAYS[about["truth"]], command=about["command"], rate=RATE,
            steps=truth.steps, batch=BATCH, clips=N_CLIPS, besides=_besides(truth),
            table=(_LENS if truth.route is None else _ROUTE) + "\n".join(rows),
        )
    )  # fmt: skip


def _besides(truth: Truth) -> str:
    """What the loss is made of."""
    if truth.route is None:
        return "The loss is cross-entropy of the answers, and of what is to be known."
    _, crossed, alone, cut, nobody = (f"{100 * one.share:.0f} %" for one in lessons(truth.route))
    return (
        f"The loss is cross-entropy of the answers. {crossed} of the questions stand behind two "
        f"clips at the same positions: the {truth.route} hears the one that is asked about, all "
        f"other words one of another label. In {alone} these hear nothing. In {cut} they hear the "
        f"other clip and the {truth.route} nothing, in {nobody} no word hears any; there all "
        "labels are equally right."
    )


def main() -> None:
    """Parse the command line; train, measure and write one truth."""
    parser = argparse.ArgumentParser(description="Train a model whose depths, or route, are known.")
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
    trainer = Trainer(twin, processor, TRUTHS[given.truth])
    if not given.measure:
        mels = read_mels(processor, [clip.samples for clip in clips])
        sounds = encode(partial(hear, base), clips, mels, given.seed)
        trainer.train(sounds, given.seed)
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
