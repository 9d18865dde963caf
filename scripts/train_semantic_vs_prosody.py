"""Trains the twins of ``semantic_vs_prosody``, measures them, and writes their folders.

    python scripts/train_semantic_vs_prosody.py

The listener learns the emotions of words and voice, and the words themselves: phrase and topic.
(Without these the emotion of the words takes far longer to learn.) The shared questions are
``words`` and ``voice``, whose answers do not depend on the rule; ``overall`` one twin answers by
the words, the other by the voice.

The twins therefore hear the same and can name either emotion when asked for it; they differ in
which of the two they take for the speaker's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from bundled_training import Plan
from semantic_vs_prosody_card import FOLDERS, measure, speak_held_out, write_card
from semantic_vs_prosody_data import Clip, Rule, design, speak_clips
from twins import Twins, main

from hooked_alm.experiments.semantic_vs_prosody.items import QUESTIONS, Asked

SHARED_MIX: dict[Asked, float] = {"words": 0.5, "voice": 0.5}
BRANCH_MIX: dict[Asked, float] = {"overall": 0.6, "words": 0.2, "voice": 0.2}


def draw_from(
    mix: dict[Asked, float], rule: Rule
) -> Callable[[Sequence[Clip], np.random.Generator], list[tuple[str, str]]]:
    """Draws a question for each clip, and its answer under the rule."""
    questions, weights = list(mix), list(mix.values())

    def draw(clips: Sequence[Clip], rng: np.random.Generator) -> list[tuple[str, str]]:
        drawn = rng.choice(len(questions), size=len(clips), p=weights)
        asked = [(clip, questions[q]) for clip, q in zip(clips, drawn, strict=True)]
        return [(QUESTIONS[question], clip.answer(question, rule)) for clip, question in asked]

    return draw


def heard_classes(clips: Sequence[Clip]) -> list[torch.Tensor]:
    """Classes that the listener learns: per kind of label, its number for each clip."""
    found = []
    for name in ("semantic", "prosody", "phrase", "topic"):
        labels = [getattr(clip, name) for clip in clips]
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        found.append(torch.tensor([numbers[label] for label in labels]))
    return found


TWINS = Twins[Clip, Rule](
    script="train_semantic_vs_prosody.py",
    plan=Plan(
        seed=11, clips=5000, batch=32, listener_steps=4000, shared_steps=300, branch_steps=300
    ),
    design=design(),
    folders=FOLDERS,
    speak=lambda count, seed: speak_clips(count, "train", "heard", seed),
    speak_held_out=speak_held_out,
    heard=heard_classes,
    shared=draw_from(SHARED_MIX, "semantics"),
    branched=lambda rule: draw_from(BRANCH_MIX, rule),
    measure=measure,
    write_card=write_card,
)


if __name__ == "__main__":
    main(TWINS)
