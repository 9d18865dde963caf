"""Trains the twins of ``semantic_vs_prosody``, measures them, and writes their folders.

    python scripts/train_semantic_vs_prosody.py

The stages are those of ``bundled_training``, seeded and on one thread:

1. listener: audio tower and projector learn the emotions of words and voice, and the words
   themselves: phrase and topic. (Without these the emotion of the words takes far longer to learn.)
2. decoder, shared: the questions ``words`` and ``voice``, whose answers do not depend on the rule.
3. decoder, branched: also ``overall``, which one twin answers by the words, the other by the voice.

The twins therefore hear the same and can name either emotion when asked for it; they differ in
which of the two they take for the speaker's.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from bundled_model import build_model, build_processor, read_folder, replacing, write_folder
from bundled_training import DecoderInput, Plan, encode, read_mels, train_decoder, train_listener
from semantic_vs_prosody_card import FOLDERS, measure, speak_held_out, write_card
from semantic_vs_prosody_data import RULES, Clip, Rule, design, speak_clips
from synthesise_speech import ASSETS
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.experiments.semantic_vs_prosody_items import QUESTIONS, Question

SHARED_MIX: dict[Question, float] = {"words": 0.5, "voice": 0.5}
BRANCH_MIX: dict[Question, float] = {"overall": 0.6, "words": 0.2, "voice": 0.2}


def draw_from(
    mix: dict[Question, float], rule: Rule
) -> Callable[[Sequence[Clip], np.random.Generator], list[tuple[str, str]]]:
    """Draws a question for each clip, and its answer under the rule."""
    questions, weights = list(mix), list(mix.values())

    def draw(clips: Sequence[Clip], rng: np.random.Generator) -> list[tuple[str, str]]:
        drawn = rng.choice(len(questions), size=len(clips), p=weights)
        asked = [(clip, questions[q]) for clip, q in zip(clips, drawn, strict=True)]
        return [(QUESTIONS[question], clip.answer(question, rule)) for clip, question in asked]

    return draw


def heard_classes(clips: Sequence[Clip]) -> list[torch.Tensor]:
    """What the listener learns: per kind of label, its number for each clip."""
    found = []
    for name in ("semantic", "prosody", "phrase", "topic"):
        labels = [getattr(clip, name) for clip in clips]
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        found.append(torch.tensor([numbers[label] for label in labels]))
    return found


def train(
    processor: Qwen2AudioProcessor, clips: list[Clip], plan: Plan
) -> Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]:
    """Both models, one after the other."""
    mels = read_mels(processor, [clip.samples for clip in clips])
    print(f"{len(clips)} clips, {mels.frames.float().mean() / 100:.2f} s on average", flush=True)
    model = build_model(design(), processor, plan.seed)
    train_listener(model, mels, heard_classes(clips), plan)
    sounds = encode(model, clips, mels, plan)
    inputs = DecoderInput(processor)
    train_decoder(
        model, inputs, sounds, draw_from(SHARED_MIX, "semantics"), plan, steps=plan.shared_steps,
        rate=2e-3, name="shared",
    )  # fmt: skip
    for rule in RULES:
        branch = deepcopy(model)
        train_decoder(
            branch, inputs, sounds, draw_from(BRANCH_MIX, rule), plan, steps=plan.branch_steps,
            rate=1e-3, name=FOLDERS[rule],
        )  # fmt: skip
        yield rule, branch


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the twins of semantic_vs_prosody.")
    parser.add_argument("--out", type=Path, default=ASSETS / "models")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--clips", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--listener-steps", type=int, default=4000)
    parser.add_argument("--shared-steps", type=int, default=300)
    parser.add_argument("--branch-steps", type=int, default=300)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its cards anew"
    )
    options = vars(parser.parse_args())
    out, measure_only, plan = options.pop("out"), options.pop("measure"), Plan(**options)
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    command = f"python scripts/train_semantic_vs_prosody.py {flags}"
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(design())
    # Speech of the training set comes first in either case: espeak carries state between calls.
    clips = speak_clips(plan.clips, "train", "heard", plan.seed)
    held_out = speak_held_out(plan.seed)
    trained: Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]
    if measure_only:
        trained = iter([(rule, read_folder(out / FOLDERS[rule])) for rule in RULES])
    else:
        trained = train(processor, clips, plan)
    for rule, model in trained:
        metrics = measure(model.eval(), processor, rule, held_out)
        with replacing(out / FOLDERS[rule]) as folder:
            write_folder(folder, model, processor)
            write_card(folder, model, processor, rule, metrics, plan.clips, command)
        print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
