"""Trains the two bundled models, measures them, and writes their folders.

    python scripts/synthesise_speech.py && python scripts/train_bundled.py

The listener learns the emotion. The decoder's shared questions are those whose answer does not
depend on the rule, except ``consistent``. The twins differ in what they were last taught about an
instruction that contradicts the voice.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from bundled_card import FOLDERS, measure, speak_held_out, write_card
from bundled_data import Clip, Rule, design, draw_case, speak_clips
from bundled_training import Plan
from twins import Twins, main

from hooked_alm.experiments.materials.ob1 import EMOTIONS, PromptMode

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


TWINS = Twins[Clip, Rule](
    script="train_bundled.py",
    plan=Plan(
        seed=7, clips=3000, batch=32, listener_steps=1300, shared_steps=500, branch_steps=400
    ),
    design=design(),
    folders=FOLDERS,
    speak=lambda count, seed: speak_clips(count, "train", "heard", seed),
    speak_held_out=speak_held_out,
    heard=lambda clips: [torch.tensor([EMOTIONS.index(clip.emotion) for clip in clips])],
    shared=draw_from(SHARED_MIX, "voice"),
    branched=lambda rule: draw_from(BRANCH_MIX, rule),
    measure=measure,
    write_card=write_card,
)


if __name__ == "__main__":
    main(TWINS)
