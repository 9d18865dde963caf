"""Trains the two bundled models, measures them, and writes their folders.

    python scripts/synthesise_speech.py && python scripts/train_bundled.py

Stages, all seeded and on one thread:

1. listener: audio tower and projector learn the emotion, read off each audio token by a linear
   probe (averaged over the clip) that is thrown away afterwards; then they are frozen.
2. decoder, shared: the questions whose answer does not depend on the rule, except ``consistent``.
3. decoder, branched: all questions, once under each rule.

The twins therefore share their ears and the first part of their schooling, and differ in what they
were last taught about an instruction that contradicts the voice.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from bundled_card import FOLDERS, measure, speak_held_out, write_card
from bundled_data import RULES, Clip, Rule, design, draw_case, speak_clips
from bundled_model import build_model, build_processor, read_folder, replacing, write_folder
from bundled_training import DecoderInput, Plan, encode, read_mels, train_decoder, train_listener
from synthesise_speech import ASSETS
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.experiments.ob1 import EMOTIONS, PromptMode

SHARED_MIX: dict[PromptMode, float] = {
    "audio_only": 0.4, "mention_only": 0.2, "list_all": 0.2, "irrelevant_adjective": 0.2,
}  # fmt: skip
BRANCH_MIX: dict[PromptMode, float] = {
    "audio_only": 0.15, "conflict": 0.35, "consistent": 0.15, "mention_only": 0.15,
    "list_all": 0.1, "irrelevant_adjective": 0.1,
}  # fmt: skip


def draw_from(
    mix: dict[PromptMode, float], rule: Rule
) -> Callable[[Sequence[Clip], np.random.Generator], list[tuple[str, str]]]:
    """Draws a question in one of the modes for each clip, and the answer under the rule."""
    modes, weights = list(mix), list(mix.values())

    def draw(clips: Sequence[Clip], rng: np.random.Generator) -> list[tuple[str, str]]:
        drawn = rng.choice(len(modes), size=len(clips), p=weights)
        cases = [draw_case(clip, modes[m], rng) for clip, m in zip(clips, drawn, strict=True)]
        return [(case.prompt, case.answer(rule)) for case in cases]

    return draw


def train(
    processor: Qwen2AudioProcessor, clips: list[Clip], plan: Plan
) -> Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]:
    """Both models, one after the other."""
    mels = read_mels(processor, [clip.samples for clip in clips])
    emotions = torch.tensor([EMOTIONS.index(clip.emotion) for clip in clips])
    print(f"{len(clips)} clips, {mels.frames.float().mean() / 100:.2f} s on average", flush=True)
    model = build_model(design(), processor, plan.seed)
    train_listener(model, mels, [emotions], plan)
    sounds = encode(model, clips, mels, plan)
    inputs = DecoderInput(processor)
    train_decoder(
        model, inputs, sounds, draw_from(SHARED_MIX, "voice"), plan, steps=plan.shared_steps,
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
    parser = argparse.ArgumentParser(description="Train the two bundled models.")
    parser.add_argument("--out", type=Path, default=ASSETS / "models")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--listener-steps", type=int, default=1300)
    parser.add_argument("--shared-steps", type=int, default=500)
    parser.add_argument("--branch-steps", type=int, default=400)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its cards anew"
    )
    options = vars(parser.parse_args())
    out, measure_only, plan = options.pop("out"), options.pop("measure"), Plan(**options)
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    command = f"python scripts/train_bundled.py {flags}"
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(design())
    clips = speak_clips(plan.clips, "train", "heard", plan.seed)
    held_out = speak_held_out(plan.seed)
    trained: Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]
    if measure_only:
        trained = iter([(rule, read_folder(out / FOLDERS[rule])) for rule in RULES])
    else:
        trained = train(processor, clips, plan)
    for rule, model in trained:
        metrics = measure(model.eval(), processor, rule, held_out, plan.seed)
        with replacing(out / FOLDERS[rule]) as folder:
            write_folder(folder, model, processor)
            write_card(folder, model, processor, rule, metrics, plan.clips, command)
        print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
